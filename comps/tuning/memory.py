"""How much memory there is for a run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

# Control groups, version 2 and 1: directory, files, and what of memory.stat is cache.
_GROUPS_AT = Path("/sys/fs/cgroup")
_GROUPS = (
    ("", "memory.max", "memory.current", ("active_file", "inactive_file")),
    (
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
)


def available_memory() -> int:
    """Bytes that this process could still take: of the machine, and of its control group if that is limited.
    Cached pages of files count as free: they go when memory is asked for."""
    found: list[int] = [psutil.virtual_memory().available]
    for directory, limit, used, cached in _GROUPS:
        group = _GROUPS_AT / directory
        with suppress(OSError, ValueError, KeyError):  # no limit, or another version of control groups
            facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            files = sum(int(facts[name]) for name in cached)
            taken = int((group / used).read_text()) - files
            found.append(int((group / limit).read_text()) - taken)
    return max(0, min(found))
