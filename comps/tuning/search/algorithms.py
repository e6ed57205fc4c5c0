"""The ways to search. Each is a generator that asks for choices and is sent their scores."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from itertools import islice

import numpy as np

from comps.tuning.errors import AdapterError
from comps.tuning.search.additive import cheapest
from comps.tuning.search.problem import Algorithm, Choice, Measured, Problem

Asking = Generator[list[Choice], list[Measured], None]

# Draws in a row that give nothing new, after which a space is taken to be exhausted.
_PATIENCE = 2000
_MOVES = 1 / 8  # of the groups, in a step of hill climbing


def random_search(problem: Problem) -> Asking:
    """Each group drawn uniformly, no choice twice."""
    generator = random.Random(f"random/{problem.seed}")
    fresh = _fresh(lambda: tuple(int(generator.random() * size) for size in problem.sizes))
    while batch := list(islice(fresh, problem.population)):
        yield batch


def hill_climbing(problem: Problem) -> Asking:
    """From the heuristic: neighbours, in which some groups are one index up or down, and on to the best of
    them when it is better (or as good and costs less). Neighbours that were looked at are not again."""
    generator = random.Random(f"hill_climbing/{problem.seed}")
    here = problem.named["heuristic"]
    known = (yield [here])[0]

    def neighbour() -> Choice:
        groups = range(len(here))
        moved = [group for group in groups if generator.random() < _MOVES]
        steps = {
            group: 1 if generator.random() < 0.5 else -1 for group in moved or [generator.choice(groups)]
        }
        pairs = zip(here, problem.sizes, strict=True)
        return tuple(min(size - 1, max(0, i + steps.get(g, 0))) for g, (i, size) in enumerate(pairs))

    fresh = _fresh(neighbour, here)
    while batch := list(islice(fresh, problem.population)):
        measured = yield batch
        for choice, found in zip(batch, measured, strict=True):
            if found.whole and (found.score, -found.cost) > (known.score, -known.cost):
                here, known = choice, found


def learned(problem: Problem) -> Asking:
    """What the training speaks for, at every price of a parameter: by the effects as they are, and then by
    others that would explain the training as well (Thompson 1933)."""
    if problem.model is None:
        raise AdapterError("nothing was learned of this super-adapter's ranks", param="algorithm")
    generator = np.random.default_rng(problem.seed)
    groups = problem.space.groups
    costs = [np.array(group.ranks, dtype=float) * max(1, group.parameters_per_rank) for group in groups]
    effects = problem.model.effects
    prices = _prices(effects, costs)
    asked = list(dict.fromkeys(cheapest(effects, costs, price) for price in prices))
    for start in range(0, len(asked), problem.population):
        yield asked[start : start + problem.population]

    def drawn() -> Choice:
        assert problem.model is not None
        return cheapest(problem.model.draw(generator), costs, float(generator.choice(prices)))

    fresh = _fresh(drawn, *asked)
    while batch := list(islice(fresh, problem.population)):
        yield batch


def _prices(effects: list[np.ndarray], costs: list[np.ndarray], count: int = 16) -> list[float]:
    """Prices from none to one at which every group takes its smallest rank, each as far along as the last."""
    turns = []
    for of_group, cost in zip(effects, costs, strict=True):
        gains, savings = of_group[-1] - of_group[:-1], cost[:-1] - cost[-1]
        turns += [gain / saving for gain, saving in zip(gains, savings, strict=True) if gain > 0]
    if not turns:
        return [0.0]
    return [0.0, *(float(price) for price in np.quantile(turns, np.linspace(0, 1, count - 1)) * (1 + 1e-9))]


def _fresh(draw: object, *seen: Choice) -> Iterator[Choice]:
    """Draws that were not drawn before, until there seem to be no more."""
    assert callable(draw)
    known = set(seen)
    failures = 0
    while failures < _PATIENCE:
        choice = draw()
        if choice in known:
            failures += 1
            continue
        failures = 0
        known.add(choice)
        yield choice


def algorithm(name: str) -> Algorithm:
    """By the name that requests give it."""
    if name == "nsga2":
        from comps.tuning.search.nsga2 import nsga2

        return nsga2
    return {"random": random_search, "hill_climbing": hill_climbing, "learned": learned}[name]
