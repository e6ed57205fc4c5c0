"""Writing a quantised model: the base model's files again, file by file, with integers for some weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from comps.tuning import rundir
from comps.tuning.errors import ModelError
from comps.tuning.export.base_files import CONFIG, GENERATION_CONFIG, INDEX, BaseFiles
from comps.tuning.export.files import TOKENIZER, copy_files
from comps.tuning.quantised.files import MANIFEST, METHOD, encode, grid_facts
from comps.tuning.quantised.grid import Steps
from comps.tuning.quantised.modules import Target
from comps.tuning.quantised.openvino import write_openvino
from comps.tuning.spec import GridSpec, ModelSpec

# From the checkpoint's name of a weight and the weight [out, in] to its steps and its integers.
Choose = Callable[[str, Target, Tensor], tuple[Steps, Tensor]]


def openvino_facts(directory: Path, final: Path) -> dict[str, Any]:
    """Write the quantised model in ``directory``, to be called ``final``, as an OpenVINO model; what there is
    to say of it: ``{"path", "bytes"}``."""
    xml = write_openvino(directory)
    return {
        "path": str(final / xml.relative_to(directory)),
        "bytes": xml.with_suffix(".bin").stat().st_size,
    }


def write_model(
    directory: Path,
    base: BaseFiles,
    model: ModelSpec,
    grid: GridSpec,
    plan: Mapping[str, Target],
    choose: Choose,
    tensors_of: Callable[[str], Iterable[tuple[str, Tensor]]],
) -> dict[str, Any]:
    """Write the quantised model into ``directory``; returns the facts ``{"mode", "group_size",
    "modules", "bytes", "sparsity": {"before", "after", "layers"}}``.

    ``tensors_of`` gives the tensors of one of the base model's files, ``plan`` says which of them go on which
    grid, ``choose`` puts them there.
    """
    modules: dict[str, dict[str, Any]] = {}
    shard_of: dict[str, str] = {}
    weights = 0
    for shard in base.shards:
        tensors: dict[str, Tensor] = {}
        for name, tensor in tensors_of(shard):
            weights += tensor.numel()
            if (target := plan.get(name)) is None:
                tensors[name] = tensor
                continue
            weight = (tensor.T if target.transposed else tensor).float()
            if not weight.isfinite().all():
                raise ModelError(f"the base model {base.name} has weights that are not finite, in {name}")
            steps, integers = choose(name, target, weight)
            module = name.removesuffix(".weight")
            tensors |= encode(module, steps, integers)
            modules[module] = grid_facts(target.grid, target.transposed) | {
                "weights": weight.numel(),
                "zeros_before": weight.numel() - int(torch.count_nonzero(weight)),
                "zeros": steps.zeros(integers),
            }
        save_file(tensors, directory / shard, metadata={"format": "pt"})
        shard_of |= dict.fromkeys(tensors, shard)
    if missing := plan.keys() - {f"{module}.weight" for module in modules}:
        raise ModelError(f"the base model {base.name} lacks the tensor {min(missing)!r}")
    _write_rest(directory, base, model, grid, modules, shard_of)
    return {
        "mode": grid.mode,
        "group_size": grid.group_size,
        "modules": len(modules),
        "bytes": {
            "before": _bytes(base.directory, base.shards),
            "after": _bytes(directory, base.shards),
            "bf16": 2 * weights,
        },
        "sparsity": sparsity(modules),
    }


def stored_tensors(base: BaseFiles) -> Callable[[str], Iterator[tuple[str, Tensor]]]:
    """The tensors of the files of a base model that is not quantised."""

    def tensors(shard: str) -> Iterator[tuple[str, Tensor]]:
        try:
            with safe_open(base.directory / shard, framework="pt") as source:
                for name in source.keys():  # noqa: SIM118
                    yield name, source.get_tensor(name)
        except (SafetensorError, FileNotFoundError) as error:
            raise ModelError(f"{shard} of the base model {base.name} cannot be read: {error}") from error

    return tensors


def sparsity(modules: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """``{"before", "after", "layers": {module: {"before", "after"}}}``: of the weights of 4 bits, which
    fraction was 0 and which fraction is."""
    counted = {name: facts for name, facts in modules.items() if facts["bits"] == 4}

    def of(found: Collection[dict[str, Any]]) -> dict[str, float]:
        total = sum(facts["weights"] for facts in found)
        before, after = (sum(facts[key] for facts in found) / total for key in ("zeros_before", "zeros"))
        return {"before": before, "after": after}

    return (
        of(counted.values())
        | {"counted": "weights of 4 bits"}
        | {"layers": {name: of([facts]) for name, facts in counted.items()}}
    )


def _write_rest(
    directory: Path,
    base: BaseFiles,
    model: ModelSpec,
    grid: GridSpec,
    modules: dict[str, dict[str, Any]],
    shard_of: dict[str, str],
) -> None:
    # A quantised base model keeps its embeddings as they are, whatever is asked for.
    bytes_too = any(facts["bits"] == 8 for facts in modules.values())
    about = {"quant_method": METHOD} | grid.model_dump() | {"embeddings": "int8" if bytes_too else "as_is"}
    rundir.write_json(directory / CONFIG, base.config | {"quantization_config": about})
    rundir.write_json(directory / MANIFEST, about | {"base_model": model.name, "modules": modules})
    if base.index is not None:
        rundir.write_json(directory / INDEX, {"metadata": {}, "weight_map": shard_of})
    copy_files(base.directory, directory, [GENERATION_CONFIG, *TOKENIZER])
    if model.trust_remote_code:
        for path in base.directory.glob("*.py"):
            shutil.copyfile(path, directory / path.name)


def _bytes(directory: Path, shards: list[str]) -> int:
    return sum((directory / shard).stat().st_size for shard in shards)
