"""From samples to numbers and bounds: how fast health was answered, how memory went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tests.soak.watch import Sample

# The cores are shared with the trainings, and one that waits for its turn answers late. So a single answer
# may be late, but not many.
HEALTH_P99 = 1.0  # seconds
HEALTH_MAX = 5.0
# Seconds of a life that don't count, or a third of it if it is short: the threads are started one by one,
# and SQLite fills a cache for each connection.
WARM_UP = 300.0
SHORTEST = 300.0  # seconds of a life without its warm-up, below which its memory says nothing
GROWTH = 16_000_000  # bytes, from the first quarter of a life to its last
FILES = 16  # open files, likewise


def health(seconds: Sequence[float]) -> tuple[dict[str, Any], list[str]]:
    """Numbers and violations."""
    if not seconds:
        return {"answers": 0}, ["health was never answered"]
    ordered = sorted(seconds)
    numbers = {
        "answers": len(ordered),
        "median": round(ordered[len(ordered) // 2], 4),
        "p99": round(ordered[int(0.99 * len(ordered))], 4),
        "max": round(ordered[-1], 4),
        "over a second": sum(each > 1 for each in ordered),
    }
    found = []
    if numbers["p99"] > HEALTH_P99:
        found.append(f"one in 100 answers to /health took {numbers['p99']} s; {HEALTH_P99} s is allowed")
    if numbers["max"] > HEALTH_MAX:
        found.append(f"an answer to /health took {numbers['max']} s; {HEALTH_MAX} s is allowed")
    return numbers, found


def memory(samples: Sequence[Sample]) -> tuple[list[dict[str, Any]], list[str]]:
    """For each life of the service, long enough to say something: medians of its first and last quarter."""
    lives, found = [], []
    for life in sorted({each.life for each in samples}):
        own = [each for each in samples if each.life == life]
        length = own[-1].seconds - own[0].seconds
        warm = own[0].seconds + min(WARM_UP, length / 3)
        rest = [each for each in own if each.seconds >= warm]
        numbers: dict[str, Any] = {"life": life, "seconds": round(length)}
        numbers["MB by minute"] = [round(each.rss / 1e6, 1) for each in own[::60]]
        quarter = len(rest) // 4
        if quarter:
            for name in ("rss", "files"):
                first, last = (
                    statistics.median(getattr(each, name) for each in part)
                    for part in (rest[:quarter], rest[-quarter:])
                )
                numbers |= {f"{name} first": first, f"{name} last": last, f"{name} growth": last - first}
        lives.append(numbers)
        if not quarter or rest[-1].seconds - rest[0].seconds < SHORTEST:
            continue
        if numbers["rss growth"] > GROWTH:
            found.append(f"life {life} of the service grew by {numbers['rss growth'] / 1e6:.1f} MB")
        if numbers["files growth"] > FILES:
            found.append(f"life {life} of the service has {numbers['files growth']:.0f} more files open")
    return lives, found
