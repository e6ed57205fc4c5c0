"""How many cores a job gets, and whether the cluster has room for it now."""

from __future__ import annotations

from dataclasses import dataclass

from comps.tuning.spec import ResourcesSpec


@dataclass(frozen=True)
class Demand:
    """Cores for each of ``workers`` training workers."""

    workers: int
    cores: int

    @property
    def total(self) -> int:
        return self.workers * self.cores


def demand(resources: ResourcesSpec, nodes: list[int]) -> Demand:
    """The cores each worker gets on ``nodes`` (cores of each node, largest first).

    Without a number in the request a worker gets a whole node, or its even share of one when there
    are more workers than nodes, so that the same request runs on a laptop and on a cluster.
    """
    workers = resources.num_workers
    if resources.cpus is not None:
        return Demand(workers, resources.cpus)
    if workers <= len(nodes):
        return Demand(workers, max(1, nodes[workers - 1]))
    return Demand(workers, max(1, sum(nodes) // workers))


def impossible(wanted: Demand, nodes: list[int]) -> str | None:
    """Why the cluster can never hold this demand, in a sentence; ``None`` when it can."""
    places = sum(node // wanted.cores for node in nodes)
    if places >= wanted.workers:
        return None
    return (
        f"the job asks for {wanted.workers} worker(s) with {wanted.cores} core(s) each, "
        f"but the cluster's nodes have {nodes} cores"
    )


def fits(wanted: Demand, nodes: list[int], held: int) -> bool:
    """Whether ``wanted`` fits beside the ``held`` cores of the jobs that run now."""
    return held + wanted.total <= sum(nodes)
