"""NSGA-II (Deb, Pratap, Agarwal and Meyarivan 2002) with pymoo: score and cost at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem as PymooProblem
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.operators.sampling.rnd import IntegerRandomSampling

from comps.tuning.search.algorithms import Asking
from comps.tuning.search.problem import Problem


class AnotherRank(Mutation):  # type: ignore[misc]  # pymoo is untyped
    """Each group of a child gets another of its ranks with a probability of one in as many as there are
    groups with a choice, so that one group changes on average. (Polynomial steps, as is usual, are mostly
    rounded back to where they began: of three ranks, at the usual eta of 20, all but one in two hundred.)"""

    def _do(self, problem: Any, X: Any, *_: Any, random_state: Any, **__: Any) -> Any:
        sizes = (problem.xu - problem.xl + 1).astype(int)
        chosen = random_state.random(X.shape) < 1 / max(1, (sizes > 1).sum())
        steps = 1 + (random_state.random(X.shape) * (sizes - 1)).astype(int)  # to any but itself
        return np.where(chosen & (sizes > 1), (X + steps) % sizes, X)


def nsga2(problem: Problem) -> Asking:
    """The first generation is random, but for the choices that have a name."""
    last = np.array(problem.sizes) - 1
    space = PymooProblem(n_var=len(last), n_obj=2, xl=np.zeros_like(last), xu=last, vtype=int)
    first = IntegerRandomSampling()(
        space, problem.population, random_state=np.random.default_rng(problem.seed)
    )
    drawn = first.get("X")
    named = np.array(list(dict.fromkeys(problem.named.values())))[: len(drawn)]
    drawn[: len(named)] = named
    search = NSGA2(
        pop_size=problem.population,
        sampling=drawn,
        crossover=SBX(prob=0.9, eta=10, repair=RoundingRepair()),
        mutation=AnotherRank(),
        eliminate_duplicates=True,
    )
    search.setup(space, termination=NoTermination(), seed=problem.seed, verbose=False)
    while (asked := search.ask()) is not None and len(asked):
        measured = yield [tuple(int(index) for index in choice) for choice in asked.get("X")]
        asked.set("F", np.array([[-each.score, each.cost] for each in measured]))
        search.tell(infills=asked)
