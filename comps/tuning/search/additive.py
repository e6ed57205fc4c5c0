"""What each rank of each group does to the loss, from the steps of a training: an additive model.

``loss_t = trend(t) + sum over groups g of beta[g, rank of g in step t] + noise``, fitted by ridge regression
(Hoerl and Kennard 1970) whose strength maximises the evidence (MacKay 1992). A step's noise, the rows that
happen to be in it, is far larger than what one group does, so groups learn from each other: beside an effect
of its own each has part in a slope that all groups share, and in one that the groups of its kind share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from comps.tuning.elastic.space import SearchSpace

_KNOTS = 12  # of the trend, at most
_STEPS_A_KNOT = 30
_RIDGES = np.logspace(-3, 7, 61)


@dataclass(frozen=True)
class AdditiveModel:
    """``effects[g][k]``: how the ``k``-th rank of group ``g`` moves the loss. Lower is better.

    ``coefficients`` ``[features]`` and ``spread`` ``[features, features]`` are mean and square root of the
    covariance of what the effects are made of by ``features``, an array ``[features, ranks]`` for each group.
    ``steps`` is how many it was fitted on, ``explained`` the share of the losses' variance around the trend.
    """

    features: tuple[np.ndarray, ...]
    coefficients: np.ndarray
    spread: np.ndarray
    steps: int
    explained: float

    @property
    def effects(self) -> list[np.ndarray]:
        return [self.coefficients @ of_group for of_group in self.features]

    def draw(self, generator: np.random.Generator) -> list[np.ndarray]:
        """Effects that the training would also be explained by: a draw from their distribution."""
        noise = generator.standard_normal(len(self.coefficients))
        drawn = self.coefficients + self.spread @ noise
        return [drawn @ of_group for of_group in self.features]


def predict(effects: Sequence[np.ndarray], choice: Sequence[int]) -> float:
    """The loss of a choice (an index into each group's ranks), but for what all choices have in common."""
    return float(sum(of_group[index] for of_group, index in zip(effects, choice, strict=True)))


def cheapest(
    effects: Sequence[np.ndarray], costs: Sequence[np.ndarray], price: float = 0.0
) -> tuple[int, ...]:
    """The choice of least loss + ``price`` x cost; of equal ones the one of the higher ranks."""
    pairs = zip(effects, costs, strict=True)
    return tuple(int(np.argmin(of_group + price * cost)) for of_group, cost in pairs)


def fit(
    space: SearchSpace,
    choices: np.ndarray,
    losses: np.ndarray,
    labels: np.ndarray,
) -> AdditiveModel:
    """``choices`` ``[steps, groups]`` are indices into the ranks, ``losses`` and ``labels`` ``[steps]`` the
    mean loss of each step and the number of tokens it is a mean of."""
    features = _features(space)
    rows = sum(of_group[:, choices[:, g]] for g, of_group in enumerate(features)).T  # type: ignore[union-attr]
    trend, _ = np.linalg.qr(_trend(len(losses), labels))
    rest = losses - trend @ (trend.T @ losses)
    rows = rows - trend @ (trend.T @ rows)
    left, sizes, right = np.linalg.svd(rows, full_matrices=False)
    along = left.T @ rest
    beside = max(float(rest @ rest - along @ along), 0.0)
    freedom = max(len(losses) - trend.shape[1], 1)
    evidence = [_evidence(ridge, sizes, along, beside, freedom) for ridge in _RIDGES]
    ridge = _RIDGES[int(np.argmax(evidence))]
    noise = (float(np.sum(along**2 / (1 + sizes**2 / ridge))) + beside) / freedom
    coefficients = right.T @ (sizes / (sizes**2 + ridge) * along)
    # The prior's spread along all directions, narrowed along those that the steps tell about.
    narrowed = np.sqrt(noise / (sizes**2 + ridge)) - np.sqrt(noise / ridge)
    spread = np.sqrt(noise / ridge) * np.eye(rows.shape[1]) + right.T @ (narrowed[:, None] * right)
    total = float(rest @ rest)
    left_over = rest - rows @ coefficients
    explained = 1 - float(left_over @ left_over) / total if total > 0 else 0.0
    return AdditiveModel(features, coefficients, spread, len(losses), explained)


def _evidence(ridge: float, sizes: np.ndarray, along: np.ndarray, beside: float, freedom: int) -> float:
    """The logarithm of the losses' probability, but for a constant, at the likeliest noise."""
    widths = 1 + sizes**2 / ridge
    noise = (float(np.sum(along**2 / widths)) + beside) / freedom
    return -0.5 * (freedom * float(np.log(max(noise, 1e-300))) + float(np.sum(np.log(widths))))


def _features(space: SearchSpace) -> tuple[np.ndarray, ...]:
    """For each group ``[features, ranks]``: one of its own for each rank, the shared slope, its kind's."""
    kinds = {kind: i for i, kind in enumerate(dict.fromkeys(group.group for group in space.groups))}
    own = sum(len(group.ranks) for group in space.groups)
    found, first = [], 0
    for group in space.groups:
        count = len(group.ranks)
        of_group = np.zeros((own + 1 + len(kinds), count))
        of_group[first : first + count] = np.eye(count) - 1 / count
        ranks = np.array(group.ranks, dtype=float)
        slope = (ranks - ranks.mean()) / ranks.max()
        of_group[own] = slope
        of_group[own + 1 + kinds[group.group]] = slope
        found.append(of_group)
        first += count
    return tuple(found)


def _trend(steps: int, labels: np.ndarray) -> np.ndarray:
    """A broken line through the steps, and what the number of labels explains: ``[steps, columns]``."""
    places = np.linspace(0, 1, steps)
    knots = np.linspace(0, 1, int(np.clip(steps // _STEPS_A_KNOT, 2, _KNOTS)))
    width = knots[1] - knots[0]
    line: np.ndarray = np.maximum(0, 1 - np.abs(places[:, None] - knots) / width)
    known = np.log(np.maximum(labels, 1)).astype(float)
    if np.ptp(known) == 0:
        return line
    return np.column_stack([line, known - known.mean()])
