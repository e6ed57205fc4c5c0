"""What an evaluation has found so far, on disk as soon as it is known: a killed one goes on from there.

The file has one JSON array ``[key, value]`` in each line. A last line that a kill has torn is dropped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from comps.tuning import appended
from comps.tuning.failpoints import failpoint

FILE = "found.jsonl"
K = TypeVar("K")
V = TypeVar("V")


class Notes:
    """The notes in ``path``. ``found``: what was there at the start, by key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: dict[str, int] = {}
        self.found: dict[str, Any] = {}
        found, whole = appended.read(path)
        self.found.update(found)
        if path.exists():
            os.truncate(path, whole)

    def of(self, prefix: str) -> dict[str, Any]:
        """What was found, of the keys that begin with ``prefix``, without it."""
        return {
            key.removeprefix(prefix): value for key, value in self.found.items() if key.startswith(prefix)
        }

    def add(self, prefix: str, values: Mapping[K, V], note: Callable[[K, V], tuple[str, Any]]) -> None:
        """Write what is new in ``values``, a mapping that only grows and began with what :meth:`of` gave.
        ``note`` makes a key and something for JSON of a pair."""
        if prefix not in self._written:
            self._written[prefix] = len(self.of(prefix))
        before = self._written[prefix]
        new = [note(*pair) for pair in islice(values.items(), before, None)]
        appended.append(self._path, [(prefix + key, value) for key, value in new])
        self._written[prefix] = before + len(new)
        failpoint("evaluation-noted")
