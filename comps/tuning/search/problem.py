"""What a search chooses from, and what it is told of its choices. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from comps.tuning.elastic.space import SearchSpace

if TYPE_CHECKING:
    from comps.tuning.search.additive import AdditiveModel

# An index into each group's ranks, which are descending: 0 is the largest.
Choice = tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """A choice's ``score`` (higher is better) and ``cost`` (lower is better).

    ``whole``: the score is that of all items; otherwise it is reckoned from some of them.
    """

    score: float
    cost: float
    whole: bool = True


@dataclass(frozen=True)
class Problem:
    """The space, how many choices an algorithm asks for at a time, its seed, and what the training has taught
    (for ``learned`` alone)."""

    space: SearchSpace
    population: int
    seed: int
    model: AdditiveModel | None = None

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(group.ranks) for group in self.space.groups)

    @property
    def named(self) -> dict[str, Choice]:
        """The choices that are always evaluated."""
        space = self.space
        configs = {"heuristic": space.heuristic, "minimal": space.minimal, "maximal": space.maximal}
        return {name: self.choice(config) for name, config in configs.items()}

    def config(self, choice: Choice) -> tuple[int, ...]:
        """The ranks of a choice."""
        return tuple(group.ranks[index] for group, index in zip(self.space.groups, choice, strict=True))

    def choice(self, config: Sequence[int]) -> Choice:
        """The other way. Raises :class:`AdapterError` for ranks that are not in the space."""
        pairs = zip(self.space.groups, self.space.check(config), strict=True)
        return tuple(group.ranks.index(rank) for group, rank in pairs)


# An algorithm asks for choices, at most ``population`` of them, and is sent what was measured of each. It
# ends when it has nothing more to ask; the same measurements make it ask the same.
Algorithm = Callable[[Problem], Generator[list[Choice], list[Measured], None]]


def dominates(one: Measured, other: Measured) -> bool:
    """Whether ``one`` is better in score or cost, and in neither worse."""
    as_good = one.score >= other.score and one.cost <= other.cost
    return as_good and (one.score > other.score or one.cost < other.cost)


def front(measured: Sequence[Measured]) -> list[int]:
    """The places of those that none dominates, the best score first; of equal ones the first."""
    found: list[int] = []
    for place in sorted(range(len(measured)), key=lambda i: (-measured[i].score, measured[i].cost, i)):
        if not found or measured[place].cost < measured[found[-1]].cost:
            found.append(place)
    return found


def best(measured: Sequence[Measured], count: int) -> list[int]:
    """The places of ``count``: front after front, of the last one those of the best scores."""
    left, found = list(range(len(measured))), list[int]()
    while left and len(found) < count:
        of_front = [left[place] for place in front([measured[place] for place in left])]
        found += of_front[: count - len(found)]
        left = [place for place in left if place not in of_front]
    return found
