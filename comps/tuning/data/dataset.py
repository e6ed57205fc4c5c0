"""Data sets of token rows, made from the files a spec names."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from comps.tuning.data.masking import IGNORED
from comps.tuning.data.records import Skipped, iter_checked
from comps.tuning.data.tokenise import Row, instruction_rows, text_rows
from comps.tuning.errors import DataError
from comps.tuning.spec import DataSpec

# With fewer rows than this, a split would take rows away that training needs more.
SMALLEST_SPLIT = 20


class TokenRows(Dataset[dict[str, list[int]]]):
    """Rows of different lengths: ``rows[i]`` is ``{"input_ids": [...], "labels": [...]}``.

    All ids lie in one array of 32-bit integers and all masks in one of bytes, five bytes a token.
    ``lengths`` are the numbers of tokens, in order.
    """

    def __init__(self, ids: np.ndarray, learnt: np.ndarray, spans: np.ndarray) -> None:
        self._ids, self._learnt, self._spans = ids, learnt, spans  # spans: [rows, 2], start and end

    @classmethod
    def collect(cls, rows: Iterable[Row]) -> TokenRows:
        ids, learnt, ends = array("i"), bytearray(), [0]
        for row in rows:
            ids.extend(row.ids)
            learnt.extend(row.learnt)
            ends.append(len(ids))
        spans = np.array([ends[:-1], ends[1:]], dtype=np.int64).T
        return cls(np.array(ids, dtype=np.int32), np.frombuffer(bytes(learnt), dtype=np.bool_), spans)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        start, end = self._spans[index]
        ids, learnt = self._ids[start:end], self._learnt[start:end]
        return {"input_ids": ids.tolist(), "labels": np.where(learnt, ids, IGNORED).tolist()}

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> list[int]:
        lengths: list[int] = (self._spans[:, 1] - self._spans[:, 0]).tolist()
        return lengths

    def common_beginning(self, looked_at: int = 1000) -> int:
        """How many tokens all rows begin with alike, as far as ``looked_at`` of them tell."""
        common = min(self.lengths)  # at most, so that every row has them
        first, *others = self._spans[:: len(self) // looked_at + 1, 0]
        for start in others:
            differs = self._ids[start : start + common] != self._ids[first : first + common]
            common = int(differs.argmax()) if differs.any() else common
        return common

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenRows:
        """The rows at ``indices``, in that order, without copying their tokens."""
        return TokenRows(self._ids, self._learnt, self._spans[np.asarray(indices, dtype=np.int64)])


@dataclass(frozen=True)
class FileReport:
    """What became of one file. ``truncated`` rows were cut, ``dropped`` ones had nothing left to learn."""

    name: str
    skipped: Skipped
    truncated: int = 0
    dropped: int = 0

    def warnings(self, spec: DataSpec) -> list[str]:
        """Sentences for the job's events; none when every record was used whole."""
        limits = f"max_length={spec.max_length} or max_source_length={spec.max_source_length}"
        counted = [
            (self.truncated, f"longer than {limits} and cut"),
            (self.dropped, f"left out, because {limits} left no token of the response to learn"),
        ]
        lines = [f"{self.name}: {_counted(count)} {what}" for count, what in counted if count]
        return [*self.skipped.warnings(), *lines]


def _counted(count: int) -> str:
    return "1 record was" if count == 1 else f"{count} records were"


@dataclass(frozen=True)
class DataReport:
    """Counts of one :class:`TokenisedData`: rows and tokens, and warnings in words."""

    train_rows: int
    train_tokens: int
    validation_rows: int = 0
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TokenisedData:
    """The rows to train on and, if there are any, to validate on."""

    train: TokenRows
    validation: TokenRows | None
    report: DataReport


def build_datasets(spec: DataSpec, task: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> TokenisedData:
    """Read, check and tokenise the files of ``spec`` for ``task``.

    Without a validation file, ``validation_split_percentage`` of the rows (at least one) are drawn from
    the training file with ``seed``, unless it has fewer than 20 rows. ``max_train_samples`` and
    ``max_eval_samples`` keep the first rows. The same arguments give the same rows on every worker.
    Raises :class:`DataError` and :class:`ModelError`.
    """
    splits = spec.validation_file is None and spec.validation_split_percentage > 0
    first = None if splits else spec.max_train_samples
    train, report = _read(spec.train_file, spec.train_name, spec, task, tokenizer, first)
    warnings = report.warnings(spec)
    validation: TokenRows | None = None
    if spec.validation_file is not None:
        validation, report = _read(
            spec.validation_file, spec.validation_name, spec, task, tokenizer, spec.max_eval_samples
        )
        warnings += report.warnings(spec)
    elif splits and len(train) >= SMALLEST_SPLIT:
        count = max(1, round(len(train) * spec.validation_split_percentage / 100))
        order = np.random.default_rng(seed % 2**63).permutation(len(train))
        validation = train.select(np.sort(order[:count])[: spec.max_eval_samples])
        train = train.select(np.sort(order[count:]))
    if splits:
        train = train.select(range(len(train))[: spec.max_train_samples])
    validation_rows = 0 if validation is None else len(validation)
    totals = DataReport(len(train), sum(train.lengths), validation_rows, warnings)
    return TokenisedData(train, validation, totals)


def _read(
    path: Path,
    name: str,
    spec: DataSpec,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    first: int | None,
) -> tuple[TokenRows, FileReport]:
    """The usable rows of one file, at most the ``first`` of them."""
    name = name or path.name
    skipped = Skipped()
    records = iter_checked(
        path, name, task, skipped=skipped, limit=spec.max_record_bytes, max_records=spec.max_records
    )
    make_rows = text_rows if task == "pretraining" else instruction_rows
    counts = {"truncated": 0, "dropped": 0}

    def usable() -> Iterator[Row]:
        kept = 0
        for row in make_rows(records, tokenizer, spec):
            counts["truncated" if row.usable else "dropped"] += row.truncated or not row.usable
            if row.usable:
                yield row
                kept += 1
                if kept == first:
                    return

    rows = TokenRows.collect(usable())
    report = FileReport(name, skipped, **counts)
    if not len(rows):
        reason = report.warnings(spec)
        raise DataError(reason[0] if reason else f"{name}: holds no usable record")
    return rows, report
