"""The algorithms on objectives whose optimum is known, and what a front is."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from pymoo.core.population import Population
from pymoo.core.problem import Problem as PymooProblem

from comps.tuning.elastic.space import ElasticGroup, SearchSpace
from comps.tuning.errors import AdapterError
from comps.tuning.search.additive import fit
from comps.tuning.search.algorithms import algorithm
from comps.tuning.search.nsga2 import AnotherRank
from comps.tuning.search.problem import Choice, Measured, Problem, best, dominates, front

Measure = Callable[[Choice], Measured]
ALL = ("nsga2", "hill_climbing", "random", "learned")


def space_of(groups: int) -> SearchSpace:
    return SearchSpace(
        tuple(
            ElasticGroup((f"model.layers.{layer}.q_proj",), (16, 12, 8), 0, 10 + layer)
            for layer in range(groups)
        )
    )


def objective(space: SearchSpace, seed: int = 5) -> Measure:
    """Any of a group's ranks may be its best; the score is the sum of what each is worth."""
    worth = np.random.default_rng(seed).normal(0, 1, (len(space), 3))

    def measure(choice: Choice) -> Measured:
        score = float(worth[np.arange(len(space)), list(choice)].sum())
        config = [group.ranks[index] for group, index in zip(space.groups, choice, strict=True)]
        return Measured(score, float(space.parameters(config)))

    return measure


def problem_of(space: SearchSpace, measure: Measure, seed: int = 0) -> Problem:
    """As :class:`Problem`, with a model of 400 steps of a training in which the objective was the loss."""
    choices = np.random.default_rng(1).integers(0, 3, (400, len(space)))
    noise = np.random.default_rng(2).normal(0, 1, 400)
    losses = np.array([-measure(tuple(choice)).score for choice in choices.tolist()]) + noise
    model = fit(space, choices, losses, np.full(400, 100))
    return Problem(space, population=20, seed=seed, model=model)


def run(name: str, problem: Problem, measure: Measure, budget: int) -> dict[Choice, Measured]:
    found: dict[Choice, Measured] = {}
    asking = algorithm(name)(problem)
    batch = next(asking)
    while len(found) < budget:
        assert 0 < len(batch) <= problem.population
        found |= {choice: measure(choice) for choice in batch}
        try:
            batch = asking.send([found[choice] for choice in batch])
        except StopIteration:
            break
    return found


def brute_force(problem: Problem, measure: Measure) -> set[Choice]:
    everything = list(itertools.product(*map(range, problem.sizes)))
    return {everything[place] for place in front([measure(choice) for choice in everything])}


def test_nsga2_finds_the_front_that_brute_force_finds() -> None:
    space = space_of(6)
    measure = objective(space)
    problem = problem_of(space, measure)
    truth = brute_force(problem, measure)
    assert len(truth) >= 8
    found = run("nsga2", problem, measure, budget=400)
    choices = list(found)
    assert {choices[place] for place in front(list(found.values()))} == truth
    assert len(found) < 3**6


def test_mutation_really_mutates() -> None:
    """With pymoo's own defaults it is one child in two hundred."""
    for ranks, groups in itertools.product((2, 3, 5, 9), (6, 30, 96)):
        most = np.full(groups, ranks - 1)
        most[0] = 0  # a group without a choice
        space = PymooProblem(n_var=groups, n_obj=2, xl=np.zeros(groups), xu=most, vtype=int)
        parents = np.random.default_rng(0).integers(0, most + 1, (500, groups))
        children = AnotherRank()(
            space, Population.new("X", parents.copy()), random_state=np.random.default_rng(1)
        ).get("X")
        changed = (children != parents).sum(1)
        assert 0.8 < changed.mean() < 1.2
        assert (changed > 0).mean() > 0.55
        assert set(np.unique(children)) == set(range(ranks))


@pytest.mark.parametrize(("name", "share"), [("nsga2", 0.6), ("hill_climbing", 0.6), ("learned", 0.9)])
def test_an_algorithm_goes_far_above_chance_in_a_space_too_large_to_try(name: str, share: float) -> None:
    space = space_of(30)
    measure = objective(space)
    problem = problem_of(space, measure)
    chance = run("random", problem, measure, budget=400)
    found = run(name, problem, measure, budget=400)
    top = sum(max(measure(tuple(i if g == group else 1 for g in range(30))).score for i in range(3))
              - measure((1,) * 30).score for group in range(30)) + measure((1,) * 30).score  # fmt: skip
    scores = [max(each.score for each in of.values()) for of in (chance, found)]
    assert scores[0] < scores[1] <= top + 1e-9
    assert scores[1] > share * top


@pytest.mark.parametrize("name", ALL)
def test_the_seed_and_the_scores_decide_what_is_asked(name: str) -> None:
    space = space_of(12)
    measure = objective(space)
    runs = [list(run(name, problem_of(space, measure, seed), measure, 120)) for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert len(set(runs[0])) == len(runs[0])


@pytest.mark.parametrize("name", ALL)
def test_a_small_space_is_searched_to_its_end(name: str) -> None:
    space = space_of(2)
    measure = objective(space)
    found = run(name, problem_of(space, measure), measure, budget=1000)
    assert len(found) == 9 or name == "learned"  # which asks for nothing that no effects speak for


def test_learned_covers_the_range_of_costs() -> None:
    space = space_of(12)
    measure = objective(space)
    found = run("learned", problem_of(space, measure), measure, budget=20)
    costs = [each.cost for each in found.values()]
    assert min(costs) == space.parameters(space.minimal)
    assert len(set(costs)) > 8


def test_learned_without_statistics_is_one_sentence() -> None:
    with pytest.raises(AdapterError, match="nothing was learned"):
        next(algorithm("learned")(Problem(space_of(2), 10, 0)))


def test_a_front_has_what_nothing_dominates() -> None:
    generator = np.random.default_rng(0)
    points = [Measured(*map(float, pair)) for pair in generator.integers(0, 12, (60, 2))]
    found = front(points)
    for place, point in enumerate(points):
        beaten = any(dominates(other, point) for other in points)
        same = any(point == points[other] for other in found)
        assert same != beaten, place
    assert [points[place].score for place in found] == sorted({points[p].score for p in found}, reverse=True)
    chosen = best(points, 20)
    assert chosen[: len(found)] == found
    assert len(set(chosen)) == 20
