"""GPTQ with the mask kept: the weights that come later in a row make up for the rounding of those before.

Frantar et al. 2023 (arXiv:2210.17323): with ``H = 2 X^T X`` over calibration inputs and the upper Cholesky
factor U of its inverse, column j is rounded, and its error ``e = (w_j - q_j) / U_jj`` is taken from the
columns after it, ``W[:, j+1:] -= e U[j, j+1:]``. As published, that fills what was pruned; here a weight
that is 0 stays 0, and only the others move. A group's scale is fitted when its first column is reached, to
what its weights have become by then.

Layers go in order, as in pruning: each is fed by the already quantised ones before it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from comps.tuning import rundir
from comps.tuning.data.calibration import CalibrationRows
from comps.tuning.errors import ModelError
from comps.tuning.quantised.grid import Grid, Steps
from comps.tuning.sparse.layers import DecoderLayers, Linear, in_float32

_DAMPING = 0.01  # of the mean of H's diagonal, as published
_BLOCK = 128  # columns whose errors are gathered before the rest of the matrix is touched


class Stopped(Exception):
    """The run was asked to stop."""


@torch.no_grad()
def quantize_layers(
    layers: DecoderLayers, rows: CalibrationRows, grid: Grid, events: rundir.EventWriter, stop: Path
) -> dict[str, tuple[Steps, Tensor]]:
    """Steps and integers (int8) [out, in] of each linear module by its path; the model's weights become
    what they stand for.

    Raises :class:`ModelError` for a module that the calibration data never reach, and :class:`Stopped` when
    the file ``stop`` is there, which is looked for between layers.
    """
    found: dict[str, tuple[Steps, Tensor]] = {}
    hidden = layers.begin(rows.rows)
    began = time.monotonic()
    for index in range(len(layers)):
        if stop.exists():
            raise Stopped
        linears = layers.linears(index)
        grams: dict[str, Tensor] = {}
        with in_float32(layers.layers[index]), _input_grams(linears, grams):
            for states in hidden:
                layers.run(index, states)
        for name, linear in linears.items():
            gram = grams.get(name)
            if gram is None or not gram.isfinite().all():
                what = (
                    "is never used; use the method nearest"
                    if gram is None
                    else "gets inputs that are not finite"
                )
                raise ModelError(f"on the calibration data, {name} of the base model {what}")
            transposed = isinstance(linear, Conv1D)
            weight = linear.weight.data.T if transposed else linear.weight.data
            steps, integers = quantize_weight(weight.float(), gram, grid)
            found[name] = steps, integers.to(torch.int8)
            values = steps.values(integers)
            linear.weight.data = (values.T if transposed else values).contiguous()
        with in_float32(layers.layers[index]):
            for place, states in enumerate(hidden):
                hidden[place] = layers.run(index, states)
        layers.forget(index)
        done = index + 1
        left = (time.monotonic() - began) / done * (len(layers) - done)
        events.write(
            f"Quantised layer {done} of {len(layers)}",
            type="progress", step=done, total_steps=len(layers), seconds_left=round(left, 1),
        )  # fmt: skip
    return found


def quantize_weight(weight: Tensor, gram: Tensor, grid: Grid) -> tuple[Steps, Tensor]:
    """Steps and integers for ``weight`` [out, in] (float32, left as it is), whose inputs have the Gram matrix
    ``gram`` ``X^T X`` [in, in]."""
    weight, mask = weight.clone(), weight != 0
    factor = _inverse_factor(gram)
    inputs = weight.shape[1]
    size = grid.group_size or inputs
    integers = torch.empty_like(weight, dtype=torch.int16)
    scales, zeros = [], []
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        errors = torch.empty_like(weight[:, start:end])
        for column in range(start, end):
            if column % size == 0:
                group = Grid(grid.bits, grid.symmetric, None).fit(weight[:, column : column + size])
                scales.append(group.scale)
                zeros.append(group.zero)
            found = group.integers(weight[:, column : column + 1])
            error = (weight[:, column] - group.values(found)[:, 0]) / factor[column, column]
            integers[:, column] = found[:, 0]
            errors[:, column - start] = error
            weight[:, column + 1 : end].addr_(error, factor[column, column + 1 : end], alpha=-1)
            weight[:, column + 1 : end].mul_(mask[:, column + 1 : end])
        weight[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
        weight[:, end:].mul_(mask[:, end:])
    steps = Steps(grid, torch.cat(scales, 1), None if grid.symmetric else torch.cat(zeros, 1))  # type: ignore[arg-type]
    return steps, integers


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of ``(2 X^T X + damping)^-1``; inputs that are always 0 stand alone."""
    hessian = 2 * gram.double()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += _DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


@contextmanager
def _input_grams(linears: dict[str, Linear], grams: dict[str, Tensor]) -> Iterator[None]:
    """Sum up, while it is entered, ``X^T X`` [in, in] of what comes into each linear module."""

    def add(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        flat = args[0].reshape(-1, args[0].shape[-1])
        if name in grams:
            grams[name].addmm_(flat.T, flat)
        else:
            grams[name] = flat.T @ flat

    hooks = [module.register_forward_pre_hook(partial(add, name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
