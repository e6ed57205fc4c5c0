"""NSGA-II (Deb, Pratap, Agarwal and Meyarivan 2002) with pymoo: score and cost at once."""

from __future__ import annotations

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem as PymooProblem
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.operators.sampling.rnd import IntegerRandomSampling

from comps.tuning.search.algorithms import Asking
from comps.tuning.search.problem import Problem

# Most polynomial steps are rounded back to where they began: of three ranks, at the usual eta of 20, all but
# one in two hundred. At 2 a third of them stay, so that three tries for each child change one group of it.
_ETA, _TRIES = 2.0, 3


def mutation(groups: int) -> Mutation:
    """Polynomial mutation that really changes about one group of each child. (pymoo from 0.6 has to be told
    both: ``prob`` is that of a child being mutated at all, ``prob_var`` that of each of its groups.)"""
    return PM(prob=1.0, prob_var=min(0.9, _TRIES / groups), eta=_ETA, repair=RoundingRepair())


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
        mutation=mutation(len(last)),
        eliminate_duplicates=True,
    )
    search.setup(space, termination=NoTermination(), seed=problem.seed, verbose=False)
    while (asked := search.ask()) is not None and len(asked):
        measured = yield [tuple(int(index) for index in choice) for choice in asked.get("X")]
        asked.set("F", np.array([[-each.score, each.cost] for each in measured]))
        search.tell(infills=asked)
