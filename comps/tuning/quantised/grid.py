"""Integer grids for weights: a scale for each group of inputs, and a zero that is exact.

A weight ``[out, in]`` is cut into groups of ``group_size`` consecutive inputs. Its values become integers
``q`` and, back, ``(q - z) * scale`` (asymmetric: q from 0 to 2^bits - 1, z is the group's zero point) or
``q * scale`` (symmetric: q from -2^(bits-1) to 2^(bits-1) - 1; the scale is negative where the largest
value of the group is positive, so that it is met exactly). Either way 0.0 is on the grid: what a sparse
model has pruned stays pruned. The formulas are those of NNCF's weight compression; the difference is
that a scale is rounded to float16, as it is stored, *before* the integers are found with it and not after,
and is at least :data:`_LEAST`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The least scale: below it float16 has fewer than five bits left.
_LEAST = 2.0**-20


@dataclass(frozen=True)
class Grid:
    """How weights are cut and counted. ``group_size`` ``None``: a row is one group."""

    bits: int = 4
    symmetric: bool = False
    group_size: int | None = 64

    @property
    def low(self) -> int:
        """The least integer."""
        return -(1 << self.bits - 1) if self.symmetric else 0

    @property
    def high(self) -> int:
        """The largest integer."""
        return self.low + (1 << self.bits) - 1

    def fits(self, inputs: int) -> bool:
        """Whether rows of so many inputs can be cut into groups."""
        return self.group_size is None or inputs % self.group_size == 0

    def grouped(self, weight: Tensor) -> Tensor:
        """``[out, in]`` as ``[out, groups, group size]``, without a copy."""
        return weight.view(len(weight), -1, self.group_size or weight.shape[1])

    def fit(self, weight: Tensor) -> Steps:
        """The steps for ``weight`` [out, in]: from the least to the largest value of each group, and 0."""
        groups = self.grouped(weight.detach().float())
        least, most = groups.amin(-1), groups.amax(-1)
        if self.symmetric:
            scale = torch.where(least.abs() >= most, least.abs(), -most) / -self.low
            return Steps(self, _stored(scale), None)
        least, most = least.clamp(max=0), most.clamp(min=0)
        scale = _stored((most - least) / self.high)
        return Steps(self, scale, (-least / scale).round_().clamp_(self.low, self.high))


@dataclass(frozen=True)
class Steps:
    """The grid of one weight: ``scale`` and ``zero`` [out, groups], float32; the scale's values are float16's
    and the zero's are whole. ``zero`` is ``None`` on symmetric grids."""

    grid: Grid
    scale: Tensor
    zero: Tensor | None

    def integers(self, weight: Tensor) -> Tensor:
        """The nearest integers for ``weight`` [out, in], as int16 of that shape."""
        found = self.grid.grouped(weight.detach().float()) / self.scale[..., None]
        if self.zero is not None:
            found += self.zero[..., None]
        return found.round_().clamp_(self.grid.low, self.grid.high).flatten(1).to(torch.int16)

    def values(self, integers: Tensor) -> Tensor:
        """What ``integers`` [out, in] stand for, as float32: exact, since a float16 has 11 bits."""
        found = self.grid.grouped(integers.float())
        if self.zero is not None:
            found = found - self.zero[..., None]
        # Adding zero turns -0.0, which a negative scale makes of 0, into 0.0.
        return (found * self.scale[..., None]).add_(0.0).flatten(1)

    def nearest(self, weight: Tensor) -> Tensor:
        """The nearest values on the grid: ``values(integers(weight))``."""
        return self.values(self.integers(weight))

    def zeros(self, integers: Tensor) -> int:
        """How many of ``integers`` [out, in] stand for 0.0."""
        groups = self.grid.grouped(integers)
        zero: Tensor | int = 0 if self.zero is None else self.zero[..., None].to(integers.dtype)
        return int((groups == zero).sum())


def _stored(scale: Tensor) -> Tensor:
    """As float16 holds it, away from 0 (a group of zeros has any scale)."""
    sign = torch.where(scale < 0, -1.0, 1.0)
    return (scale.abs().clamp(min=_LEAST) * sign).half().float()
