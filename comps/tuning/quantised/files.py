"""A model with integer weights on disk: safetensors, and a manifest beside them.

The files of the base model with, in place of each weight on a grid,

- ``<module>.qweight``: uint8; 4-bit integers two to a byte ``[out, in / 2]``, the even input in the low half,
  8-bit ones ``[out, in]``. Symmetric integers are stored with 8 (128) added, so that none is negative;
- ``<module>.scale``: float16 ``[out, groups]``;
- ``<module>.zero``: uint8 ``[out, groups]``, the integer that stands for 0.0; not on symmetric grids.

``config.json`` names the method in ``quantization_config``, so that a loader that does not know it says so
rather than taking the model for a damaged one. ``quantization.json`` lists the modules with their grids, and
how many of their integers stand for 0.0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from comps.tuning.errors import ModelError
from comps.tuning.export.base_files import BaseFiles
from comps.tuning.quantised.grid import Grid, Steps
from comps.tuning.sparse.report import INTEGER_GRID, QUANTISED

METHOD = INTEGER_GRID
MANIFEST = QUANTISED
QWEIGHT, SCALE, ZERO = "qweight", "scale", "zero"


def encode(module: str, steps: Steps, integers: Tensor) -> dict[str, Tensor]:
    """The tensors of one module, by name."""
    bits = steps.grid.bits
    stored = (integers - steps.grid.low).to(torch.uint8)
    if bits == 4:
        stored = stored[:, ::2] | (stored[:, 1::2] << 4)
    found = {f"{module}.{QWEIGHT}": stored.contiguous(), f"{module}.{SCALE}": steps.scale.half()}
    if steps.zero is not None:
        found[f"{module}.{ZERO}"] = steps.zero.to(torch.uint8)
    return found


def decode(grid: Grid, stored: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Steps, Tensor]:
    """The opposite of :func:`encode`: the steps, and the integers as int16 [out, in]."""
    if grid.bits == 4:
        stored = torch.stack([stored & 15, stored >> 4], -1).flatten(1)
    integers = stored.to(torch.int16) + grid.low
    return Steps(grid, scale.float(), None if zero is None else zero.float()), integers


def grid_facts(grid: Grid, transposed: bool) -> dict[str, Any]:
    """What the manifest says of a module's grid."""
    return {
        "bits": grid.bits, "symmetric": grid.symmetric, "group_size": grid.group_size,
        "transposed": transposed,
    }  # fmt: skip


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest. Raises :class:`ModelError` when it is damaged."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        for facts in manifest["modules"].values():
            _grid(facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"the quantised model in {directory.name} has a damaged {MANIFEST}") from error
    return dict(manifest)


def _grid(facts: Mapping[str, Any]) -> Grid:
    bits, symmetric, group = facts["bits"], facts["symmetric"], facts["group_size"]
    if bits not in (4, 8) or type(symmetric) is not bool or not (group is None or type(group) is int):
        raise ValueError("not a grid")
    return Grid(bits, symmetric, group)


class Reader:
    """Weights of a quantised model. ``modules`` are those on a grid, by their path in the checkpoint."""

    def __init__(self, base: BaseFiles) -> None:
        self._base = base
        self._facts: dict[str, dict[str, Any]] = read_manifest(base.directory)["modules"]
        self.modules = {module: _grid(facts) for module, facts in self._facts.items()}

    def transposed(self, module: str) -> bool:
        """Whether the module's weight is [in, out] in the model."""
        return bool(self._facts[module].get("transposed"))

    def read(self, module: str) -> tuple[Steps, Tensor]:
        """The steps and the integers [out, in] of one module. Raises :class:`ModelError`."""
        found: dict[str, Tensor | None] = {}
        for part in (QWEIGHT, SCALE, ZERO):
            name = f"{module}.{part}"
            if name not in self._base.shard_of:
                found[part] = None
                continue
            with self._open(self._base.shard_of[name]) as tensors:
                found[part] = tensors.get_tensor(name)
        stored, scale = found[QWEIGHT], found[SCALE]
        if stored is None or scale is None:
            raise ModelError(f"the base model {self._base.name} lacks a part of the weight of {module}")
        return decode(self.modules[module], stored, scale, found[ZERO])

    def tensors(self, shard: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one file as floating-point numbers, those on grids as float32, by the names and in
        the layouts that they had before they were quantised."""
        with self._open(shard) as stored:
            for name in stored.keys():  # noqa: SIM118
                module, _, part = name.rpartition(".")
                if module not in self.modules or part not in (QWEIGHT, SCALE, ZERO):
                    yield name, stored.get_tensor(name)
                elif part == QWEIGHT:
                    steps, integers = self.read(module)
                    weight = steps.values(integers)
                    yield f"{module}.weight", weight.T.contiguous() if self.transposed(module) else weight

    def _open(self, shard: str) -> Any:
        try:
            return safe_open(self._base.directory / shard, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{shard} of the base model {self._base.name} cannot be read: {error}"
            ) from error
