"""Which weights of a linear module go: those of the lowest score among the ones they are compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scores(weight: Tensor, norms: Tensor | None) -> Tensor:
    """``|W_ij| * ||X_j||_2`` (Wanda, Sun et al. 2023, equation 1), or ``|W_ij|`` without ``norms``.

    ``weight`` is [out, in] in float32, ``norms`` [in].
    """
    magnitude = weight.abs()
    return magnitude if norms is None else magnitude * norms.to(magnitude.dtype)


def kept_by_ratio(score: Tensor, sparsity: float) -> Tensor:
    """Which weights stay when in each row the ``sparsity`` part of the lowest goes; boolean [out, in].

    ``floor(sparsity * in)`` weights of a row go, so at least one stays. Of equal scores the first goes first.
    """
    # The product of two floats may fall short of the whole number it stands for: 0.29 * 100 = 28.999...
    count = math.floor(sparsity * score.shape[1] + 1e-6)
    return ~_lowest(score, min(count, score.shape[1] - 1))


def kept_by_pattern(score: Tensor, pattern: str) -> Tensor:
    """Which weights stay under N:M, as ``"2:4"``: of each M consecutive inputs the N of the highest score.

    ``in`` must be a multiple of M. Of equal scores the first goes first.
    """
    n, m = parse_pattern(pattern)
    groups = score.reshape(-1, m)
    return ~_lowest(groups, m - n).reshape(score.shape)


def parse_pattern(pattern: str) -> tuple[int, int]:
    """N and M of ``"N:M"``."""
    n, _, m = pattern.partition(":")
    return int(n), int(m)


def _lowest(score: Tensor, count: int) -> Tensor:
    """The ``count`` lowest of each row; of equal ones those that come first."""
    if not count:
        return torch.zeros_like(score, dtype=torch.bool)
    last = score.kthvalue(count, dim=1, keepdim=True).values  # a third of the time of a stable sort
    lowest, ties = score < last, score == last
    missing = count - lowest.sum(1, keepdim=True)
    return lowest | (ties & (ties.cumsum(1) <= missing))
