"""How cores are shared out, and when a job has to wait."""

from __future__ import annotations

import pytest

from comps.finetuning.jobs.room import Demand, Node, demand, fits, impossible
from comps.tuning.spec import ResourcesSpec


@pytest.mark.parametrize(
    ("workers", "cores", "expected"),
    [
        (1, [2], 2),
        (2, [2], 1),
        (4, [2], 1),
        (1, [8, 4], 8),
        (2, [8, 4], 4),
        (2, [16, 4], 8),
        (4, [3, 3, 3], 1),
        (3, [8, 8], 4),
    ],
)
def test_workers_share_the_cores_alike_when_none_are_asked_for(
    workers: int, cores: list[int], expected: int
) -> None:
    nodes = [Node(each) for each in cores]
    wanted = demand(ResourcesSpec(num_workers=workers), nodes)
    assert wanted == Demand(workers, expected)
    assert (impossible(wanted, nodes) is None) == (workers <= sum(cores))


def test_free_cores_on_two_nodes_do_not_make_room_for_one_worker() -> None:
    nodes = [Node(4), Node(4)]
    held = [Demand(1, 3), Demand(1, 3)]
    assert not fits(Demand(1, 2), nodes, held)
    assert fits(Demand(2, 1), nodes, held)
    assert not fits(Demand(3, 1), nodes, held)


def test_an_impossible_demand_is_told_in_a_sentence() -> None:
    assert impossible(Demand(1, 4), [Node(2), Node(2)]) == (
        "the job asks for 1 worker(s) with 4 core(s) each, but the cluster has 2 node(s) with 2 core(s)"
    )
    assert impossible(Demand(1, 1, gpus=1), [Node(2)]) is not None
