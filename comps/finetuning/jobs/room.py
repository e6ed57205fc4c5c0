"""What of the cluster a job gets, and whether there is room for it now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from comps.finetuning.store.tables import JobRow
from comps.tuning.spec import ResourcesSpec


@dataclass(frozen=True)
class Node:
    """A machine that can run workers."""

    cores: int
    gpus: float = 0

    def __str__(self) -> str:
        return f"{self.cores} core(s)" + (f" and {self.gpus:g} GPU(s)" if self.gpus else "")


@dataclass(frozen=True)
class Demand:
    """Cores and GPUs for each of ``workers`` training workers."""

    workers: int
    cores: int
    gpus: float = 0

    def __str__(self) -> str:
        return f"{self.workers} worker(s) with {Node(self.cores, self.gpus)} each"


def nodes(resources: Iterable[dict[str, float]]) -> list[Node]:
    """The nodes with cores to give, most cores first, from Ray's resources of all living nodes."""
    found = [Node(int(each.get("CPU", 0)), each.get("GPU", 0)) for each in resources]
    return sorted((node for node in found if node.cores), key=lambda node: node.cores, reverse=True)


def demand(resources: ResourcesSpec, nodes: list[Node]) -> Demand:
    """What each worker gets on ``nodes``.

    Without a number of cores in the request each gets as many as can be had for all of them alike: a
    whole node, or a share of one when there are more workers than nodes. So the same request runs on a
    laptop and on a cluster.
    """
    workers = resources.num_workers
    if resources.cpus is not None:
        return Demand(workers, resources.cpus, resources.gpus)
    shares = range(max((node.cores for node in nodes), default=1), 1, -1)
    enough = (cores for cores in shares if sum(node.cores // cores for node in nodes) >= workers)
    return Demand(workers, next(enough, 1), resources.gpus)


def impossible(wanted: Demand, nodes: list[Node]) -> str | None:
    """Why these nodes can never hold ``wanted``, in a sentence; ``None`` when they can."""
    if sum(_places(wanted, node) for node in nodes) >= wanted.workers:
        return None
    sizes = Counter(str(node) for node in nodes)
    there = ", ".join(f"{count} node(s) with {size}" for size, count in sizes.items())
    return f"the job asks for {wanted}, but the cluster has {there or 'no node with cores'}"


def _places(wanted: Demand, node: Node) -> int:
    """How many of the workers one node can hold."""
    by_cores = node.cores // wanted.cores
    return min(by_cores, int(node.gpus / wanted.gpus)) if wanted.gpus else by_cores


def fits(wanted: Demand, nodes: list[Node], held: Iterable[Demand]) -> bool:
    """Whether ``wanted`` fits beside what is ``held`` by the jobs that run now.

    Each worker lies on one node, so free cores or GPUs here and there don't add up. Which node Ray has given
    a worker is not asked: they are laid out anew, largest first, each on the node with the most free cores.
    """
    free = list(nodes)
    workers = [each for each in (*held, wanted) for _ in range(each.workers)]
    for worker in sorted(workers, key=lambda each: (each.gpus, each.cores), reverse=True):
        able = [i for i, node in enumerate(free) if node.cores >= worker.cores and node.gpus >= worker.gpus]
        if not able:
            return False
        index = max(able, key=lambda i: free[i].cores)
        node = free[index]
        free[index] = replace(node, cores=node.cores - worker.cores, gpus=node.gpus - worker.gpus)
    return True


def held_by(job: JobRow) -> Demand:
    """What a running training holds."""
    resources = ResourcesSpec.model_validate(job.spec["resources"])
    workers = resources.num_workers
    return Demand(workers, (job.cpus or 0) // workers, resources.gpus)
