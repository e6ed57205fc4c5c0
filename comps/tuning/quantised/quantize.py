"""Put the weights of a base model on integer grids.

Rounding goes file by file: no model is built, and the most that is in memory is one file of the base model
and one weight in float32. GPTQ needs the model once in float32, besides.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from comps.tuning import rundir
from comps.tuning.data.calibration import calibration_rows
from comps.tuning.export.base_files import find_base
from comps.tuning.models.load import load_base_model, load_tokenizer
from comps.tuning.quantised.gptq import Stopped, quantize_layers
from comps.tuning.quantised.grid import Grid, Steps
from comps.tuning.quantised.modules import Target, empty_model, grid_of, targets
from comps.tuning.quantised.openvino import require
from comps.tuning.quantised.write import openvino_facts, stored_tensors, write_model
from comps.tuning.sparse.layers import DecoderLayers
from comps.tuning.sparse.report import sparsity_of_directory
from comps.tuning.spec import ModelSpec, QuantizeSpec


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
    plan = targets(base, empty_model(source, base.directory), spec.grid)
    linears = [target for target in plan.values() if target.grid.bits == 4]
    events.write(
        f"Quantising {len(linears)} linear modules of {base.name} to {spec.grid.mode} in groups of "
        f"{spec.grid.group_size} by {spec.method}, embeddings {spec.grid.embeddings}"
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
