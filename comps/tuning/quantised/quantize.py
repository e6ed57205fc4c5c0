"""Put the weights of a base model on integer grids, file by file: no model is built, and the most that is in
memory is one file of the base model and one weight in float32."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from comps.tuning import rundir
from comps.tuning.errors import ModelError
from comps.tuning.export.base_files import CONFIG, GENERATION_CONFIG, INDEX, BaseFiles, find_base
from comps.tuning.export.files import TOKENIZER, copy_files
from comps.tuning.quantised.files import MANIFEST, METHOD, encode, grid_facts
from comps.tuning.quantised.grid import Steps
from comps.tuning.quantised.modules import Target, empty_model, grid_of, targets
from comps.tuning.spec import GridSpec, ModelSpec, QuantizeSpec

# From the checkpoint's name of a weight and the weight [out, in] to its steps and its integers.
Choose = Callable[[str, Target, Tensor], tuple[Steps, Tensor]]


def quantize(spec: QuantizeSpec) -> dict[str, Any]:
    """Quantise ``spec.base_model`` to ``spec.output``: each value to the nearest of its grid.

    The output is a base model like any other to this library (:mod:`comps.tuning.quantised.files` says how it
    is kept); it appears whole or not at all. What is exactly zero stays so.

    Returns ``{"path", "mode", "group_size", "modules", "bytes": {"before", "after", "bf16"}, "sparsity":
    {"before", "after"}}``: sizes of the weights' files, and of all weights in 16 bits; the fractions of exact
    zeros among the quantised weights of the decoder layers. With ``spec.openvino`` also ``"openvino"``.

    Raises:
        ModelError: the base model cannot be read, or not be cut into these groups.
    """
    base = find_base(spec.base_model)
    empty = empty_model(spec.base_model, base.directory)
    plan = targets(base, empty, grid_of(spec.grid), spec.embeddings == "int8")
    with rundir.new_directory(spec.output) as directory:
        facts = write_model(directory, base, spec.base_model, spec.grid, plan, nearest)
    return {"path": str(spec.output)} | facts


def nearest(name: str, target: Target, weight: Tensor) -> tuple[Steps, Tensor]:
    """The grid from the least to the largest value of each group, and each value's nearest on it."""
    steps = target.grid.fit(weight)
    return steps, steps.integers(weight)


def write_model(
    directory: Path, base: BaseFiles, model: ModelSpec, grid: GridSpec, plan: dict[str, Target], choose: Choose
) -> dict[str, Any]:
    """Write the quantised model into ``directory``; returns the facts of :func:`quantize` without the path."""
    modules: dict[str, dict[str, Any]] = {}
    shard_of: dict[str, str] = {}
    weights = 0
    for shard in base.shards:
        tensors: dict[str, Tensor] = {}
        try:
            with safe_open(base.directory / shard, framework="pt") as source:
                for name in source.keys():  # noqa: SIM118
                    tensor = source.get_tensor(name)
                    weights += tensor.numel()
                    if (target := plan.get(name)) is None:
                        tensors[name] = tensor
                        continue
                    weight = (tensor.T if target.transposed else tensor).float()
                    steps, integers = choose(name, target, weight)
                    module = name.removesuffix(".weight")
                    tensors |= encode(module, steps, integers)
                    modules[module] = grid_facts(target.grid, target.transposed) | {
                        "weights": weight.numel(),
                        "zeros_before": weight.numel() - int(torch.count_nonzero(weight)),
                        "zeros": steps.zeros(integers),
                    }
        except (SafetensorError, FileNotFoundError) as error:
            raise ModelError(f"{shard} of the base model {base.name} cannot be read: {error}") from error
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


def sparsity(modules: dict[str, dict[str, Any]]) -> dict[str, float]:
    """``{"before", "after"}``: of the weights of 4 bits, which fraction was 0 and which fraction is."""
    counted = [facts for facts in modules.values() if facts["bits"] == 4]
    total = sum(facts["weights"] for facts in counted)
    before, after = (sum(facts[key] for facts in counted) / total for key in ("zeros_before", "zeros"))
    return {"before": before, "after": after}


def _write_rest(
    directory: Path,
    base: BaseFiles,
    model: ModelSpec,
    grid: GridSpec,
    modules: dict[str, dict[str, Any]],
    shard_of: dict[str, str],
) -> None:
    about = {"quant_method": METHOD} | grid.model_dump()
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
