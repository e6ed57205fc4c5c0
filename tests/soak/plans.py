"""What is done, in which order: decided by the seed alone, so that a run can be repeated.

Step ``n`` of a thread depends on (seed, thread, n) and on nothing that happens. Where a step concerns one of
the things that are there, the plan holds a number from 0 to 1 in its place (see :func:`pick`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")
Parameters = dict[str, Any]

JOB_KINDS = {
    "nls": 6,
    "long": 2,  # some ten seconds of training, with checkpoints that are removed again
    "plain": 3,
    "two_workers": 2,
    "resumed": 2,  # from a checkpoint of another job
    "bad_data": 2,
    "too_big": 1,  # more cores than there are
}
BAD_DATA = ("broken", "not UTF-8", "wrong type", "empty output", "nested")
REFUSED_UPLOADS = ("empty", "no purpose", "unknown purpose", "not multipart", "two files")
REFUSED_JOBS = ("no file", "unknown file", "rank above r", "unknown module", "not JSON")
LOOKS = ("jobs", "files", "models", "job", "events", "checkpoints", "logs", "statistics", "metrics", "docs")
VERSIONS = ("heuristic", "minimal", "maximal", "one", "two")


@dataclass(frozen=True)
class Plan:
    """One step: what, with what, and how many seconds to wait before it."""

    action: str
    parameters: Parameters
    pause: float

    def __str__(self) -> str:
        values = " ".join(
            f"{name}={value:.3f}" if isinstance(value, float) else f"{name}={value}"
            for name, value in self.parameters.items()
        )
        return f"{self.action} {values}".strip()


def pick(things: Sequence[T], position: float) -> T | None:
    """The thing at ``position`` (0 to 1) of those that are there now; ``None`` when there are none."""
    return things[int(position * len(things))] if things else None


def _one_of(name: str, *values: str) -> Callable[[Random], Parameters]:
    return lambda random: {name: random.choice(values)}


def _something(name: str) -> Callable[[Random], Parameters]:
    return lambda random: {name: random.random()}


def _create(random: Random) -> Parameters:
    kind = random.choices([*JOB_KINDS], [*JOB_KINDS.values()])[0]
    return {"kind": kind, "file": random.random(), "steps": random.randint(4, 16), "job": random.random()}


def _version(random: Random) -> Parameters:
    return {"job": random.random(), "version": random.choice(VERSIONS), "wait": random.random() < 0.3}


def _follow(random: Random) -> Parameters:
    what = random.choice(("logs", "events"))
    return {"job": random.random(), "what": what, "seconds": random.uniform(0.2, 4)}


# action -> (weight, what decides its parameters)
CLIENT: dict[str, tuple[int, Callable[[Random], Parameters]]] = {
    "upload": (
        8,
        lambda random: {
            "form": random.choice(("json", "jsonl", "csv")),
            "records": random.randint(8, 48),
        },
    ),
    "upload_bad": (3, _one_of("fault", *BAD_DATA)),
    "upload_refused": (2, _one_of("fault", *REFUSED_UPLOADS)),
    "upload_huge": (2, lambda random: {"bytes": random.randint(4_000_000, 20_000_000)}),
    "upload_too_big": (1, lambda random: {}),
    "upload_cut": (2, lambda random: {"bytes": random.randint(1, 5_000_000)}),
    "download": (6, _something("file")),
    "create": (14, _create),
    "create_refused": (2, _one_of("fault", *REFUSED_JOBS)),
    "cancel": (2, _something("job")),
    "pause": (3, _something("job")),
    "resume": (6, _something("job")),
    "extract": (6, _version),
    "merge": (4, _version),
    "delete_file": (3, _something("file")),
    "delete_model": (2, _something("model")),
    "look": (16, lambda random: {"at": random.choice(LOOKS), "job": random.random()}),
    "follow": (3, _follow),
}

_KILLS: dict[str, tuple[int, Callable[[Random], Parameters]]] = {
    "kill_worker": (4, _something("process")),
    "kill_ray": (2, lambda random: {}),
}
_DOWN = lambda random: {"down": random.uniform(0, 3)}  # noqa: E731 - seconds without a service
TROUBLE = _KILLS | {
    "kill_service": (3, _DOWN),
    "stop_service": (2, _DOWN),
    "kill_service_and_ray": (1, _DOWN),
}
# For a time in which one service lives on, so that its memory can be looked at.
TROUBLE_BESIDE_THE_SERVICE = _KILLS


def plan(
    seed: int,
    thread: str,
    number: int,
    actions: dict[str, tuple[int, Callable[[Random], Parameters]]],
    mean_pause: float,
) -> Plan:
    """Step ``number`` of ``thread``; pauses are exponential with the given mean (seconds)."""
    random = Random(f"{seed}/{thread}/{number}")
    name = random.choices([*actions], [weight for weight, _ in actions.values()])[0]
    return Plan(name, actions[name][1](random), random.expovariate(1 / mean_pause))
