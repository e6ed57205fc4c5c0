"""Put the weights of a base model on integer grids, file by file: no model is built, and the most that is in
memory is one file of the base model and one weight in float32."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from comps.tuning import rundir
from comps.tuning.data.calibration import calibration_rows
from comps.tuning.errors import ModelError
from comps.tuning.export.base_files import CONFIG, GENERATION_CONFIG, INDEX, BaseFiles, find_base
from comps.tuning.export.files import TOKENIZER, copy_files
from comps.tuning.models.load import load_base_model, load_tokenizer
from comps.tuning.quantised.files import MANIFEST, METHOD, encode, grid_facts
from comps.tuning.quantised.gptq import Stopped, quantize_layers
from comps.tuning.quantised.grid import Grid, Steps
from comps.tuning.quantised.modules import Target, empty_model, grid_of, targets
from comps.tuning.quantised.openvino import require, write_openvino
from comps.tuning.sparse.layers import DecoderLayers
from comps.tuning.sparse.report import sparsity_of_directory
from comps.tuning.spec import GridSpec, ModelSpec, QuantizeSpec

# From the checkpoint's name of a weight and the weight [out, in] to its steps and its integers.
Choose = Callable[[str, Target, Tensor], tuple[Steps, Tensor]]


def quantize(spec: QuantizeSpec) -> dict[str, Any] | None:
    """Quantise ``spec.base_model`` to ``spec.output``.

    The output is a base model like any other to this library (:mod:`comps.tuning.quantised.files` says how it
    is kept); it appears whole or not at all. What is exactly zero stays so.

    Returns ``{"path", "name", "base_model", "method", "seconds", "mode", "group_size", "modules", "bytes":
    {"before", "after", "bf16"}, "sparsity", "sparsity_before"}``: sizes of the weights' files, and of all
    weights in 16 bits; the report of the integers that stand for 0 (:mod:`comps.tuning.sparse.report`), and
    the fraction of those weights that was 0 before. With ``spec.openvino`` also ``"openvino"``: ``{"path",
    "bytes"}``. None when the run was asked to stop, which GPTQ heeds between layers; one that is begun again
    begins anew.

    Raises:
        ModelError: the base model cannot be read, or not be cut into these groups.
        DataError: the calibration data cannot be used.
        TuningError: an OpenVINO model is asked for, and the package is not installed.
    """
    if spec.openvino:
        require()
    with closing(rundir.EventWriter(spec.directory)) as events:
        try:
            return _quantize(spec, events)
        except Stopped:
            events.write("Stopped on request; the run will begin anew")
            return None


def _quantize(spec: QuantizeSpec, events: rundir.EventWriter) -> dict[str, Any]:
    began = time.monotonic()
    if spec.resources.cpus:
        torch.set_num_threads(spec.resources.cpus)
    base = find_base(spec.base_model)
    # The very files that are copied, also where the base model is one of the hub's.
    source = spec.base_model.model_copy(update={"path": str(base.directory), "local": True})
    plan = targets(base, empty_model(source, base.directory), grid_of(spec.grid), spec.embeddings == "int8")
    linears = [target for target in plan.values() if target.grid.bits == 4]
    events.write(
        f"Quantising {len(linears)} linear modules of {base.name} to {spec.grid.mode} in groups of "
        f"{spec.grid.group_size} by {spec.method}, embeddings {spec.embeddings}"
    )
    given: dict[str, tuple[Steps, Tensor]] = {}
    if spec.method == "gptq":
        given = _gptq(spec, source, grid_of(spec.grid), events)

    def choose(name: str, target: Target, weight: Tensor) -> tuple[Steps, Tensor]:
        return given.get(target.module) or nearest(target, weight)

    with rundir.new_directory(spec.output) as directory:
        facts = write_model(directory, base, source, spec.grid, plan, choose, stored_tensors(base))
        if spec.openvino:
            facts["openvino"] = openvino_facts(directory, spec.output)
    report = sparsity_of_directory(spec.output)
    facts |= {
        "method": spec.method,
        "sparsity_before": facts["sparsity"]["before"],
        "sparsity": report.facts(),
        "seconds": round(time.monotonic() - began, 3),
    }
    size, half = facts["bytes"]["after"], facts["bytes"]["bf16"]
    events.write(
        f"Written in {facts['seconds']} s: {size / 1e6:.1f} MB, {size / half:.2f} of 16 bits a weight; "
        f"{report.total:.1%} of the integers stand for 0"
    )
    return {"path": str(spec.output), "name": spec.name, "base_model": base.name} | facts


def _gptq(
    spec: QuantizeSpec, source: ModelSpec, grid: Grid, events: rundir.EventWriter
) -> dict[str, tuple[Steps, Tensor]]:
    assert spec.calibration is not None
    model = load_base_model(source)
    longest = getattr(model.config, "max_position_embeddings", None)
    rows = calibration_rows(spec.calibration, load_tokenizer(source), longest)
    for warning in rows.warnings:
        events.write(warning, level="warn")
    layers = DecoderLayers(model, spec.base_model.name)
    return quantize_layers(layers, rows, grid, events, spec.directory / rundir.STOP)


def nearest(target: Target, weight: Tensor) -> tuple[Steps, Tensor]:
    """The grid from the least to the largest value of each group, and each value's nearest on it."""
    steps = target.grid.fit(weight)
    return steps, steps.integers(weight)


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
    """Write the quantised model into ``directory``; returns the facts of :func:`quantize` without the path.

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
