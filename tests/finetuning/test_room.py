"""How cores are shared out, and when a job has to wait."""

from __future__ import annotations

import pytest

from comps.finetuning.jobs.room import Demand, Node, demand, fits, impossible, nodes
from comps.tuning.spec import ResourcesSpec


def test_nodes_without_cores_do_not_count() -> None:
    resources = [{"CPU": 8.0}, {"memory": 1e9}, {"CPU": 16.0, "GPU": 2.0}]
    assert nodes(resources) == [Node(16, 2), Node(8)]


def test_what_the_request_names_is_what_a_worker_gets() -> None:
    wanted = demand(ResourcesSpec(num_workers=2, cpus=3, gpus=0.5), [Node(16, 2)])
    assert wanted == Demand(2, 3, 0.5)


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


def test_free_gpus_on_two_nodes_do_not_make_room_for_one_worker() -> None:
    nodes = [Node(8, 2), Node(8, 2)]
    held = [Demand(1, 1, 1), Demand(1, 1, 1), Demand(1, 1, 1)]
    assert not fits(Demand(1, 1, 2), nodes, held)
    assert fits(Demand(1, 1, 1), nodes, held)


def test_free_cores_on_two_nodes_do_not_make_room_for_one_worker() -> None:
    nodes = [Node(4), Node(4)]
    held = [Demand(1, 3), Demand(1, 3)]
    assert not fits(Demand(1, 2), nodes, held)
    assert fits(Demand(2, 1), nodes, held)
    assert not fits(Demand(3, 1), nodes, held)


def test_a_job_waits_for_the_gpus_that_others_hold() -> None:
    assert fits(Demand(1, 1, 1), [Node(16, 2)], [Demand(1, 1, 1)])
    assert not fits(Demand(1, 1, 1), [Node(16, 2)], [Demand(2, 1, 1)])


@pytest.mark.parametrize(
    ("wanted", "possible"),
    [
        (Demand(1, 16), True),
        (Demand(1, 17), False),
        (Demand(4, 8), True),
        (Demand(5, 8), False),  # 40 cores of 32
        (Demand(3, 10), False),  # 30 cores of 32, but only one node has ten
        (Demand(4, 2, 0.5), True),
        (Demand(3, 2, 1), False),
    ],
)
def test_workers_must_fit_onto_nodes(wanted: Demand, possible: bool) -> None:
    assert (impossible(wanted, [Node(16, 2), Node(8), Node(8)]) is None) == possible


def test_an_impossible_demand_is_told_in_a_sentence() -> None:
    assert impossible(Demand(3, 2, 1), [Node(16, 2), Node(8), Node(8)]) == (
        "the job asks for 3 worker(s) with 2 core(s) and 1 GPU(s) each, but the cluster has "
        "1 node(s) with 16 core(s) and 2 GPU(s), 2 node(s) with 8 core(s)"
    )
    assert str(impossible(Demand(1, 1), [])).endswith("the cluster has no node with cores")
