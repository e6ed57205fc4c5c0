"""How sparse the models on disk are: counted once, beside the requests that ask for it.

To count the zeros of a model all of its weights are read, at a gigabyte a second or so: too long for a
request with a large model. So each count has a thread of its own, one at a time, for which a request waits
only briefly; what was counted is kept in memory as long as the files stay the same.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from comps.tuning.models.weights import WeightsError, weights_files
from comps.tuning.sparse.report import sparsity_of_directory

log = logging.getLogger(__name__)

_KEPT = 200  # models


class Count:
    """One model's count: until ``done`` is set it goes on; then there is a ``report``, or ``why_not``, in
    words."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.report: dict[str, Any] | None = None
        self.why_not = "The model's zeros are being counted; ask again in a while."


class SparsityReports:
    """``of`` may be called from any thread."""

    patience = 2.0  # seconds that a request waits

    def __init__(self) -> None:
        self._counts: OrderedDict[tuple[object, ...], Count] = OrderedDict()
        self._lock = threading.Lock()
        self._turn = threading.Lock()

    def of(self, directory: Path) -> Count:
        """The count of the model in ``directory``, begun now if it was not before."""
        try:
            stats = [(path.name, path.stat()) for path in weights_files(directory)]
        except (WeightsError, OSError) as error:
            return _failed(error)
        key = (directory, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
        with self._lock:
            count = self._counts.get(key)
            if count is None:
                count = self._counts[key] = Count()
                # A daemon, since a service that is told to stop has no use for the result.
                threading.Thread(target=self._work, args=(directory, count), daemon=True).start()
            self._counts.move_to_end(key)
            while len(self._counts) > _KEPT:
                self._counts.popitem(last=False)
        count.done.wait(self.patience)
        return count

    def _work(self, directory: Path, count: Count) -> None:
        with self._turn:
            try:
                report = sparsity_of_directory(directory)
                if report.weights:
                    count.report, count.why_not = report.facts(), ""
                else:
                    count.why_not = (
                        "The model has no linear weights in floating point whose zeros could be told."
                    )
            except (WeightsError, OSError) as error:
                count.why_not = _failed(error).why_not
            except Exception:
                log.exception("the zeros of %s could not be counted", directory)
                count.why_not = "The model's zeros could not be counted; the service's log says why."
            finally:
                count.done.set()


def _failed(error: Exception) -> Count:
    count = Count()
    reason = error if isinstance(error, WeightsError) else "cannot be read"
    count.why_not = f"The model's zeros cannot be counted: it {reason}."
    count.done.set()
    return count
