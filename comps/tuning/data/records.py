"""Read and validate files of training records. Needs no torch, so the service can use it too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comps.tuning.data.formats import MAX_RECORD_BYTES, Format, detect_format, read_records, unit
from comps.tuning.data.shapes import Shape, check_record, expect_shape
from comps.tuning.errors import DataError, TooManyRecords

__all__ = ["Checked", "Skipped", "Summary", "iter_checked", "iter_records", "validate_file"]


@dataclass(frozen=True)
class Summary:
    """What a valid file holds. ``records`` counts the usable ones; ``warnings`` are sentences."""

    records: int
    shape: Shape
    format: Format
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """A usable record and its place in words (``"train.json, record 3"``), for later messages."""

    record: dict[str, Any]
    shape: Shape
    where: str


@dataclass
class Skipped:
    """The records of one file that were left out because a field of theirs is empty.

    Large public data sets have a few such records, and they are no reason to refuse the others. When
    more than one in a hundred is empty, something is wrong with the file.
    """

    count: int = 0
    empty_field: str = ""  # of the first one
    places: list[str] = field(default_factory=list)  # of the first few

    def add(self, where: str, field: str) -> None:
        self.count += 1
        self.empty_field = self.empty_field or field
        if len(self.places) < 5:
            self.places.append(where)

    def check(self, usable: int) -> None:
        """Raise :class:`DataError` when the records left out are too many beside ``usable`` good ones."""
        if self.count * 100 > self.count + usable:
            others = f", as are {self.count - 1} more records" if self.count > 1 else ""
            raise DataError(f"{self.places[0]}: {self.empty_field!r} is empty{others}")

    def warnings(self) -> tuple[str, ...]:
        if not self.count:
            return ()
        places = "; ".join(self.places) + ("; ..." if self.count > len(self.places) else "")
        records = "1 record was" if self.count == 1 else f"{self.count} records were"
        return (f"{records} left out because {self.empty_field!r} is empty: {places}",)


def iter_records(
    path: Path, name: str = "", *, limit: int = MAX_RECORD_BYTES
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Stream ``(number, record)`` from a JSON array, JSON Lines, CSV or Parquet file.

    ``name`` is the client's name of the file, used in messages and, where the content leaves it open,
    to tell the format. Numbers start at 1: lines for JSON Lines and CSV, records otherwise. ``limit``
    is the largest record in bytes. Raises :class:`DataError`.
    """
    name = name or path.name
    return read_records(path, name, detect_format(path, name), limit)


def iter_checked(
    path: Path,
    name: str,
    task: str,
    *,
    skipped: Skipped | None = None,
    limit: int = MAX_RECORD_BYTES,
    max_records: int | None = None,
) -> Iterator[Checked]:
    """Stream the usable records of a file, each checked against the shape of the first one.

    ``task`` is ``instruction_tuning``, ``pretraining`` or ``calibration``, which takes the records of both.
    Records with an empty field go to ``skipped``.
    Raises :class:`DataError` for the first fault (a record above ``limit`` bytes or one more than
    ``max_records`` are faults, too), and at the end of the file when no record was usable or too many
    were empty (see :class:`Skipped`; empty plain texts are between paragraphs, and fine).
    """
    name = name or path.name
    format = detect_format(path, name)
    counts = unit(format)
    skipped = skipped if skipped is not None else Skipped()
    shape: Shape | None = None
    usable = 0
    for count, (number, record) in enumerate(read_records(path, name, format, limit), start=1):
        where = f"{name}, {counts} {number}"
        if max_records is not None and count > max_records:
            raise TooManyRecords(f"{where}: the file has more than {max_records:,} records")
        shape = shape or expect_shape(record, task, where)
        empty = check_record(record, shape, where)
        if empty is None:
            usable += 1
            yield Checked(record, shape, where)
        elif shape != "text":
            skipped.add(where, empty)
    skipped.check(usable)
    if not usable:
        raise DataError(f"{name}: holds no usable record")


def validate_file(
    path: Path, name: str, task: str, *, limit: int = MAX_RECORD_BYTES, max_records: int | None = None
) -> Summary:
    """Read the whole file once, in bounded memory. Raises :class:`DataError` for the first fault."""
    skipped = Skipped()
    records = 0
    found = iter_checked(path, name, task, skipped=skipped, limit=limit, max_records=max_records)
    for checked in found:  # noqa: B007
        records += 1
    return Summary(records, checked.shape, detect_format(path, name or path.name), skipped.warnings())
