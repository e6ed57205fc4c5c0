"""The order in which rows are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

# Rows are sorted by length within a window of this many batches: wide enough to leave little padding,
# narrow enough that large data sets meet in new combinations every epoch.
WINDOW = 50


class LengthGroupedSampler(Sampler[int]):
    """Yields row indices so that each run of ``global_batch_size`` of them has similar lengths.

    ``global_batch_size`` is rows per optimizer step: workers x rows per worker x accumulation. The
    order depends on ``seed`` and the epoch alone, and consecutive indices make up a global batch, so one
    worker and N workers that share it out see the same global batches. Batches come in random order; a
    last, smaller batch holds rows drawn at random. With ``group_by_length`` false the rows are merely
    shuffled; with ``shuffle`` false they keep the file's order.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        global_batch_size: int,
        seed: int,
        shuffle: bool = True,
        group_by_length: bool = True,
    ) -> None:
        self._lengths = np.asarray(lengths)
        self._batch, self._seed = global_batch_size, seed
        self._shuffle, self._group = shuffle, group_by_length
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows())

    def rows(self, epoch: int | None = None) -> list[int]:
        """All indices as they come in ``epoch``, or in the one that was set."""
        rows = len(self._lengths)
        if not self._shuffle:
            return list(range(rows))
        epoch = self._epoch if epoch is None else epoch
        generator = np.random.default_rng([self._seed % 2**63, epoch])
        order = generator.permutation(rows)
        if self._group:
            whole = rows - rows % self._batch
            window = WINDOW * self._batch
            for start in range(0, whole, window):
                part = order[start : min(start + window, whole)]
                part[:] = part[np.argsort(self._lengths[part], kind="stable")]
            batches = order[:whole].reshape(-1, self._batch)
            order = np.concatenate([generator.permutation(batches).ravel(), order[whole:]])
        found: list[int] = order.tolist()
        return found
