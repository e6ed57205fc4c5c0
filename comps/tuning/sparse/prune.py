"""Pruning a base model: the weights of its decoder layers' linear modules that matter least become zero.

``wanda`` (Sun et al. 2023, arXiv:2306.11695) scores a weight by ``|W_ij| * ||X_j||_2``, its size times the
norm of what it is multiplied with on calibration rows, and compares it with those of the same output row.
Layers go in order: the rows enter a layer as the layers before it, already pruned, hand them on; the inputs
of all linear modules of a layer are taken before any of them is pruned. ``magnitude`` is the same with
``|W_ij|`` alone, and needs no data. Embeddings, norms, biases and the output head stay as they are.

In memory are the model once, in the type that it is stored in (its embeddings in float32 with wanda), one of
its layers in float32, and the rows' hidden states at one layer.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from comps.tuning import rundir
from comps.tuning.data.calibration import CalibrationRows, calibration_rows
from comps.tuning.errors import ModelError
from comps.tuning.export.base_files import find_base
from comps.tuning.models.load import load_base_model, load_tokenizer
from comps.tuning.sparse.layers import DecoderLayers, Linear, in_float32, input_norms
from comps.tuning.sparse.report import sparsity_of_directory
from comps.tuning.sparse.scores import kept_by_pattern, kept_by_ratio, parse_pattern, scores
from comps.tuning.sparse.zeroed_copy import ZeroedCopy
from comps.tuning.spec import PruneSpec
from comps.tuning.training import facts

MANIFEST = "sparsity.json"


class _Stopped(Exception):
    """The run was asked to stop."""


def prune(spec: PruneSpec) -> dict[str, Any] | None:
    """Write the pruned model to ``spec.output``, whole or not at all: the base model's own files, byte for
    byte, but for the weights that became zero, and :data:`MANIFEST`.

    Returns what the manifest says, with ``path``; None when the run was asked to stop, which it heeds between
    layers. A run that is begun again begins anew.

    Raises:
        ModelError: the base model cannot be read, is quantised, or is not of a kind that can be pruned.
        DataError: the calibration data cannot be used.
    """
    with closing(rundir.EventWriter(spec.directory)) as events:
        try:
            return _prune(spec, events)
        except _Stopped:
            events.write("Stopped on request; the run will begin anew")
            return None


@torch.no_grad()
def _prune(spec: PruneSpec, events: rundir.EventWriter) -> dict[str, Any]:
    began = time.monotonic()
    if spec.resources.cpus:
        torch.set_num_threads(spec.resources.cpus)
    base = find_base(spec.base_model)
    # The very files that are copied, also where the base model is one of the hub's.
    source = spec.base_model.model_copy(update={"path": str(base.directory), "local": True})
    with rundir.new_directory(spec.output) as directory:
        copy = ZeroedCopy(base, directory)
        model = load_base_model(source, dtype=copy.dtype(), device=spec.resources.device)
        layers = DecoderLayers(model, base.name)
        if spec.pattern:
            _check_pattern(layers, spec.pattern)
        rows = None
        if spec.method == "wanda" and spec.calibration:
            longest = getattr(model.config, "max_position_embeddings", None)
            rows = calibration_rows(spec.calibration, load_tokenizer(source), longest)
            for warning in rows.warnings:
                events.write(warning, level="warn")
        _say_what(spec, layers, rows, events)
        copy.copy(code=spec.base_model.trust_remote_code)
        _prune_layers(spec, layers, rows, copy, events)
        report = sparsity_of_directory(directory)
        manifest: dict[str, Any] = {
            "name": spec.name,
            "base_model": base.name,
            "method": spec.method,
            "target": spec.pattern or spec.sparsity,
            "calibration": _calibration_facts(spec, rows),
            "sparsity": report.facts(),
            "seconds": round(time.monotonic() - began, 3),
            "versions": facts.versions(),
        }
        rundir.write_json(directory / MANIFEST, manifest)
    events.write(f"{report.total:.1%} of the weights are zero", seconds=manifest["seconds"])
    return {"path": str(spec.output), **manifest}


def _prune_layers(
    spec: PruneSpec,
    layers: DecoderLayers,
    rows: CalibrationRows | None,
    copy: ZeroedCopy,
    events: rundir.EventWriter,
) -> None:
    hidden = layers.begin(rows.rows) if rows else []
    began = time.monotonic()
    for index in range(len(layers)):
        if (spec.directory / rundir.STOP).exists():
            raise _Stopped
        linears = layers.linears(index)
        norms: dict[str, Tensor] = {}
        with in_float32(layers.layers[index]):
            if rows:
                with input_norms(linears, norms):
                    for states in hidden:
                        layers.run(index, states)
            for name, linear in linears.items():
                _prune_linear(spec, name, linear, norms.get(name), copy)
            if rows and index + 1 < len(layers):
                for place, states in enumerate(hidden):
                    hidden[place] = layers.run(index, states)
        layers.forget(index)
        done = index + 1
        left = (time.monotonic() - began) / done * (len(layers) - done)
        events.write(
            f"Pruned layer {done} of {len(layers)}",
            type="progress", step=done, total_steps=len(layers), seconds_left=round(left, 1),
        )  # fmt: skip


def _prune_linear(spec: PruneSpec, name: str, linear: Linear, norms: Tensor | None, copy: ZeroedCopy) -> None:
    weight = linear.weight.data
    if spec.method == "wanda" and (norms is None or not norms.isfinite().all()):
        what = "is never used" if norms is None else "gets inputs that are not finite"
        raise ModelError(f"on the calibration data, {name} of the base model {what}; it cannot be pruned")
    rows = weight.T if isinstance(linear, Conv1D) else weight  # [out, in]
    score = scores(rows, norms)
    if spec.pattern:
        keep = kept_by_pattern(score, spec.pattern)
    else:
        assert spec.sparsity is not None
        keep = kept_by_ratio(score, spec.sparsity)
    copy.zero(name, weight, keep.T if isinstance(linear, Conv1D) else keep)
    rows.masked_fill_(~keep, 0)  # what the next layer is fed with


def _check_pattern(layers: DecoderLayers, pattern: str) -> None:
    _, group = parse_pattern(pattern)
    for index in range(len(layers)):
        for name, linear in layers.linears(index).items():
            inputs = linear.weight.shape[0 if isinstance(linear, Conv1D) else 1]
            if inputs % group:
                raise ModelError(
                    f"the pattern {pattern} does not fit the base model: {name} has {inputs} inputs, "
                    f"which is no multiple of {group}",
                    param="pattern",
                )


def _say_what(
    spec: PruneSpec, layers: DecoderLayers, rows: CalibrationRows | None, events: rundir.EventWriter
) -> None:
    target = f"to {spec.pattern}" if spec.pattern else f"to a sparsity of {spec.sparsity:g}"
    on = f" on {len(rows.rows)} rows ({rows.tokens} tokens)" if rows else ""
    machine = facts.machine()
    events.write(
        f"Pruning {len(layers)} layers of {spec.base_model.name} {target} by {spec.method}{on} with "
        f"{machine['threads']} thread(s)",
        machine=machine, versions=facts.versions(),
    )  # fmt: skip


def _calibration_facts(spec: PruneSpec, rows: CalibrationRows | None) -> dict[str, Any] | None:
    if rows is None or spec.calibration is None:
        return None
    asked = spec.calibration
    return {
        "file": asked.name or Path(asked.file).name,
        "samples": len(rows.rows),
        "tokens": rows.tokens,
        "max_length": asked.max_length,
        "seed": asked.seed,
    }
