"""What was scored, item by item, on disk as soon as it is known: the memory of a search that may be killed.

``evaluations.jsonl`` begins with ``{"key": ...}``, a hash of base model, adapter, items and metric; each
further line is one batch,
``{"first": 0, "last": 38, "configs": [[16, ...], ...], "values": [[1.0, ...], ...]}``: a value for
each item from ``first`` up to ``last`` and each configuration. Items are always scored in order, so what is
known of a configuration are the values of the first so many. A search that is started again asks for the same
things and finds them here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from comps.tuning import appended, rundir
from comps.tuning.failpoints import failpoint

FILE = "evaluations.jsonl"

Config = tuple[int, ...]
# (configurations, first item, the one after the last) -> a value for each item, for each configuration.
Score = Callable[[Sequence[Config], int, int], list[list[float]]]


class Ledger:
    """``values[config]`` are those known; ``seconds`` and ``scored`` what was spent on new ones, and on how
    many items (one of two configurations counts twice); ``found`` how many batches were there already.

    ``known`` are files of other ledgers, which are read where their key is the same.
    """

    def __init__(self, path: Path, key: str, score: Score, known: Iterable[Path] = ()) -> None:
        self.values: dict[Config, list[float]] = {}
        self.seconds, self.scored = 0.0, 0
        self._path, self._score = path, score
        head = {"key": key}
        for other in known:
            for batch in _batches(other, head)[0]:
                self._take(batch)
        batches, whole = _batches(path, head)
        self.found = len(batches)
        for batch in batches:
            self._take(batch)
        if whole:
            os.truncate(path, whole)  # a line that was torn by a kill
        else:
            rundir.write_file(path, f"{json.dumps(head)}\n".encode())

    def extend(self, configs: Sequence[Config], last: int) -> None:
        """Have the values of ``configs`` up to item ``last`` known."""
        missing: dict[int, list[Config]] = {}
        for config in dict.fromkeys(configs):
            if (known := len(self.values.get(config, ()))) < last:
                missing.setdefault(known, []).append(config)
        batches = []
        for first, group in missing.items():
            began = time.monotonic()
            values = self._score(group, first, last)
            self.seconds += time.monotonic() - began
            self.scored += len(group) * (last - first)
            batches.append({"first": first, "last": last, "configs": group, "values": values})
        for batch in batches:
            self._take(batch)
        if batches:
            self._append(batches)

    def _append(self, batches: list[dict[str, Any]]) -> None:
        failpoint("evaluations-unwritten")
        appended.append(self._path, batches)
        failpoint("evaluations-written")

    def _take(self, batch: dict[str, Any]) -> None:
        for config, values in zip(batch["configs"], batch["values"], strict=True):
            known = self.values.setdefault(tuple(config), [])
            if len(known) >= batch["first"]:
                known[batch["first"] :] = values if len(known) <= batch["last"] else known[batch["first"] :]


def _batches(path: Path, head: dict[str, str]) -> tuple[list[dict[str, Any]], int]:
    """The whole batches of a file that begins with ``head``, and the bytes up to their end."""
    lines, end = appended.read(path)
    return (lines[1:], end) if lines[:1] == [head] else ([], 0)
