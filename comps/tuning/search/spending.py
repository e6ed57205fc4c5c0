"""How a search spends its evaluations: successive halving over growing slices of the items.

All choices of a batch are scored on the first quarter of the items; the better half goes on to half of them,
and the better half of those to all (Jamieson and Talwalkar 2016, with fronts of score and cost in place of a
single score). What a choice has seen is what it costs: a quarter of the items is a quarter of an evaluation.
A score on a part is made comparable by what the heuristic scores there and on all items, since choices find
the same items hard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from comps.tuning.search.ledger import Config, Ledger
from comps.tuning.search.problem import Algorithm, Choice, Measured, Problem, best

_FEWEST = 16  # items; of fewer, a quarter tells nothing
_IDLE = 50  # batches in a row without anything new, after which a search has nothing more to find


class Spending:
    """The evaluations of one search on the first ``items`` of a ledger.

    ``seen[choice]`` says on how many items a choice was scored for this search (the ledger may know more of
    it), ``order`` in which generation it was first asked for, ``spent`` what the algorithm's choices have
    cost, in evaluations on all items.
    """

    def __init__(
        self,
        problem: Problem,
        ledger: Ledger,
        items: int,
        sign: int,
        cost: Callable[[Config], float],
        *,
        halving: bool,
    ) -> None:
        self._problem, self._ledger, self._items = problem, ledger, items
        self._sign, self._cost = sign, cost
        quarter, half = math.ceil(items / 4), math.ceil(items / 2)
        self._rungs = (quarter, half, items) if halving and items >= _FEWEST else (items,)
        self.seen: dict[Choice, int] = {}
        self.order: dict[Choice, int] = {}
        self._counted = 0  # items that were counted as spent

    @property
    def spent(self) -> Fraction:
        return Fraction(self._counted, self._items)

    def free(self, choices: Sequence[Choice]) -> None:
        """Score choices on all items, and count nothing for it."""
        self._ledger.extend([self._problem.config(choice) for choice in choices], self._items)
        for choice in choices:
            self.seen[choice] = self._items
            self.order.setdefault(choice, 0)

    def score(self, choice: Choice, first: int = 0, last: int | None = None) -> float:
        """The mean over the items it has seen, or those from ``first`` up to ``last``: higher is better."""
        values = self._ledger.values[self._problem.config(choice)][first : last or self.seen[choice]]
        return self._sign * math.fsum(values) / len(values)

    def measured(self, choice: Choice) -> Measured:
        """As algorithms are told it."""
        seen, cost = self.seen[choice], self._cost(self._problem.config(choice))
        if seen >= self._items:
            return Measured(self.score(choice, 0, self._items), cost)
        heuristic = self._problem.named["heuristic"]
        easier = self.score(heuristic, 0, seen) - self.score(heuristic, 0, self._items)
        return Measured(self.score(choice) - easier, cost, whole=False)

    def explore(
        self, algorithm: Algorithm, num_evals: int, after_batch: Callable[[int], None] = lambda _: None
    ) -> None:
        """Let ``algorithm`` ask until ``num_evals`` are spent, or it has nothing more to ask.

        The named choices must have been scored before. ``after_batch(generation)`` may raise, to stop.
        """
        asking = algorithm(self._problem)
        asked = next(asking, [])
        generation = idle = 0
        while asked and idle < _IDLE:
            generation += 1
            before = self._counted
            count = self._affordable(asked, num_evals * self._items - before)
            if count:
                self._halve(asked[:count], generation)
            idle = 0 if self._counted > before else idle + 1
            after_batch(generation)
            if count < len(asked):
                return
            try:
                asked = asking.send([self.measured(choice) for choice in asked])
            except StopIteration:
                return

    def _halve(self, asked: Sequence[Choice], generation: int) -> None:
        left = list(dict.fromkeys(asked))
        for choice in left:
            self.order.setdefault(choice, generation)
        for number, last in enumerate(self._rungs):
            self._ledger.extend([self._problem.config(choice) for choice in left], last)
            for choice in left:
                seen = self.seen.get(choice, 0)
                self._counted += max(0, last - seen)
                self.seen[choice] = max(seen, last)
            if number + 1 < len(self._rungs):
                measured = [self.measured(choice) for choice in left]
                left = [left[place] for place in sorted(best(measured, math.ceil(len(left) / 2)))]

    def _affordable(self, asked: Sequence[Choice], left: int) -> int:
        """How many of ``asked`` can be halved for ``left`` items, whichever of them are better."""
        for count in range(len(asked), 0, -1):
            new = sum(self.seen.get(choice, 0) < self._items for choice in dict.fromkeys(asked[:count]))
            cost, before = 0, 0
            for last in self._rungs:
                cost += new * (last - before)
                new, before = math.ceil(new / 2), last
            if cost <= left:
                return count
        return 0
