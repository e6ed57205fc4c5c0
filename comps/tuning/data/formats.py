"""Readers of data files: JSON array, JSON Lines, CSV, Parquet, one record at a time.

Memory stays within a few times the largest record allowed, whatever the file's size. The format is
told from the content first and the client's file name second, since stored files carry no suffix.
Every fault is a :class:`DataError` naming the file and the record or line. Needs no torch.
"""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

from comps.tuning.data.shapes import FIELDS
from comps.tuning.errors import DataError, RecordTooLarge

Format = Literal["json", "jsonl", "csv", "parquet"]
Numbered = Iterator[tuple[int, dict[str, Any]]]

MAX_RECORD_BYTES = 10_000_000

_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]+")
_FOREIGN = {
    b"\x1f\x8b": "is compressed with gzip; send the file itself",
    b"PK\x03\x04": "is a ZIP archive; send the file in it itself",
    b"\xff\xfe": "is UTF-16, not UTF-8",
    b"\xfe\xff": "is UTF-16, not UTF-8",
}


def detect_format(path: Path, name: str) -> Format:
    """Tell the format of ``path``. Raises :class:`DataError` for an empty, foreign or unreadable file."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(4096)
            while head and not head.removeprefix(codecs.BOM_UTF8).strip():
                head = stream.read(4096)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error
    if not head:
        raise DataError(f"{name}: is empty")
    for magic, sentence in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{name}: {sentence}")
    if head.startswith(b"PAR1"):
        return "parquet"
    first = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first == b"[":
        return "json"
    if first == b"{":
        return "jsonl"
    if Path(name).suffix.lower() in (".csv", ".tsv") or _delimiter(head):
        return "csv"
    raise DataError(f"{name}: is neither a JSON array nor JSON Lines, CSV or Parquet")


def unit(format: Format) -> str:
    """What the numbers of a format's records count: lines of the file, or records."""
    return "line" if format in ("jsonl", "csv") else "record"


def read_records(path: Path, name: str, format: Format, limit: int = MAX_RECORD_BYTES) -> Numbered:
    """Yield ``(number, record)``; numbers start at 1 and are lines for JSON Lines and CSV."""
    try:
        yield from _READERS[format](path, name, limit)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


class _Unacceptable(ValueError):
    """A value that JSON's grammar, or Python's reading of it, lets through and training must not see."""


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Unacceptable(f"the number {text[:40]} is too large")
    return value


def _constant(text: str) -> NoReturn:
    raise _Unacceptable(f"{text} is not JSON")


def _integer(text: str) -> int:
    if len(text) > 400:  # more digits than the largest float; Python refuses from 4300 on
        raise _Unacceptable(f"the number {text[:20]}... is too large")
    return int(text)


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_constant, parse_int=_integer)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: is not a JSON object")
    return value


def _too_large(where: str, limit: int) -> RecordTooLarge:
    return RecordTooLarge(f"{where}: is larger than {limit:,} bytes")


def _exceeds(text: str, start: int, end: int, limit: int) -> bool:
    """Whether ``text[start:end]`` has more than ``limit`` bytes; it is encoded only if that is open."""
    length = end - start
    return length > limit or (4 * length > limit and len(text[start:end].encode()) > limit)


def _lines(stream: BinaryIO, name: str, limit: int) -> Iterator[tuple[int, str]]:
    """Lines with their line ends, decoded strictly; a byte order mark at the start is dropped."""
    number = 0
    while line := stream.readline(limit + 1):
        number += 1
        where = f"{name}, line {number}"
        if len(line) > limit:
            raise _too_large(where, limit)
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: byte {error.start + 1} is not UTF-8") from error


def _read_jsonl(path: Path, name: str, limit: int) -> Numbered:
    with open(path, "rb") as stream:
        for number, line in _lines(stream, name, limit):
            text = line.strip()
            if not text:
                continue
            where = f"{name}, line {number}"
            try:
                value = _DECODER.decode(text)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: is not valid JSON: {error.msg}, column {error.colno}") from error
            except _Unacceptable as error:
                raise DataError(f"{where}: {error}") from error
            except RecursionError as error:
                raise DataError(f"{where}: is nested too deeply") from error
            yield number, _object(value, where)


class _Text:
    """A window on a UTF-8 file: ``text[position:]`` is read and not yet consumed."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name = stream, name
        self._pending, self._decoded = b"", 0  # bytes read but not decoded; bytes decoded so far
        self.text, self.position, self.line, self.finished = "", 0, 1, False

    def more(self, size: int) -> None:
        """Drop what is consumed and read up to ``size`` further bytes."""
        self.line += self.text.count("\n", 0, self.position)
        chunk = self._stream.read(size)
        self.finished = not chunk
        data = self._pending + chunk
        try:
            text, used = codecs.utf_8_decode(data, "strict", self.finished)
        except UnicodeDecodeError as error:
            place = self._decoded + error.start + 1
            raise DataError(f"{self._name}: byte {place} of the file is not UTF-8") from error
        if not self._decoded:
            text = text.removeprefix("\ufeff")
        self._pending, self._decoded = data[used:], self._decoded + used
        self.text, self.position = self.text[self.position :] + text, 0

    def peek(self) -> str:
        """The next character that is not whitespace, not consumed; empty at the end of the file."""
        while True:
            if blank := _SPACE.match(self.text, self.position):
                self.position = blank.end()
            if self.position < len(self.text) or self.finished:
                return self.text[self.position : self.position + 1]
            self.more(_CHUNK)

    def line_at(self, position: int) -> int:
        return self.line + self.text.count("\n", 0, position)


def _read_json(path: Path, name: str, limit: int) -> Numbered:
    with open(path, "rb") as stream:
        window = _Text(stream, name)
        window.peek()
        window.position += 1  # the bracket that made this file a JSON array
        if window.peek() == "]":
            window.position += 1
        else:
            number, separator = 0, ","
            while separator == ",":
                number += 1
                yield number, _object(_value(window, name, number, limit), f"{name}, record {number}")
                separator = window.peek()
                window.position += 1
            if separator != "]":
                line = window.line_at(window.position)
                found = f"{separator!r} follows" if separator else "the file ends"
                raise DataError(f"{name}, line {line}: {found} after record {number}, not ',' or ']'")
        if window.peek():
            raise DataError(f"{name}, line {window.line_at(window.position)}: text follows the JSON array")


def _value(window: _Text, name: str, number: int, limit: int) -> Any:
    """Decode the next value, reading on until it is whole. Doubling keeps the work linear."""
    where = f"{name}, record {number}"
    window.peek()
    while True:
        available = len(window.text) - window.position
        try:
            value, end = _DECODER.raw_decode(window.text, window.position)
        except _Unacceptable as error:
            raise DataError(f"{where}: {error}") from error
        except json.JSONDecodeError as error:
            # A value that the window cuts off looks like a wrong one until the rest is there.
            if available > limit:
                raise _too_large(where, limit) from error
            if not window.finished:
                window.more(max(_CHUNK, available))
                continue
            line = window.line_at(error.pos)
            raise DataError(f"{where}: is not valid JSON: {error.msg}, line {line}") from error
        except RecursionError as error:
            raise DataError(f"{where}: is nested too deeply") from error
        if _exceeds(window.text, window.position, end, limit):
            raise _too_large(where, limit)
        window.position = end
        return value


def _delimiter(head: bytes) -> str | None:
    """The delimiter under which the first line holds a field we know, if there is one."""
    header = head.splitlines()[0].decode("utf-8-sig", "replace")
    for delimiter in ",;\t":
        names = next(csv.reader([header], delimiter=delimiter), [])
        if any(name.strip() in FIELDS for name in names):
            return delimiter
    return None


def _read_csv(path: Path, name: str, limit: int) -> Numbered:
    # The limit is the process's own and only ever raised; the default of 128 KiB is less than a record.
    csv.field_size_limit(max(csv.field_size_limit(), limit))
    with open(path, "rb") as stream:
        head = stream.readline(min(limit, _CHUNK))
        stream.seek(0)
        delimiter = _delimiter(head) or ","
        size, line = 0, 1  # bytes of the present record, and its first line

        def lines() -> Iterator[str]:
            nonlocal size
            for _, text in _lines(stream, name, limit):
                size += len(text.encode())
                if size > limit:  # quoted fields may hold any number of lines
                    raise _too_large(f"{name}, line {line}", limit)
                yield text

        reader = csv.reader(lines(), delimiter=delimiter, strict=True)
        fields: list[str] | None = None
        try:
            for row in reader:
                size = 0
                if fields is None:
                    fields = [field.strip() for field in row]
                elif row:
                    if len(row) != len(fields):
                        message = f"has {len(row)} values for {len(fields)} columns"
                        raise DataError(f"{name}, line {line}: {message}")
                    yield line, dict(zip(fields, row, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{name}, line {line}: is not valid CSV: {error}") from error


def _read_parquet(path: Path, name: str, limit: int) -> Numbered:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path, buffer_size=_CHUNK) as file:
            # Without a column we know, the first record tells people what the file holds instead.
            columns = [column for column in file.schema_arrow.names if column in FIELDS] or None
            # A large value that all records share is in the file once, but in each record of a batch.
            for batch in file.iter_batches(batch_size=16, columns=columns):
                for row in range(batch.num_rows):
                    number += 1
                    record = batch.slice(row, 1)
                    if record.nbytes > limit:
                        raise _too_large(f"{name}, record {number}", limit)
                    yield number, record.to_pylist()[0]
    except MemoryError as error:
        sentence = f"{name}, record {number + 1}: takes more memory to unpack than a record may"
        raise DataError(sentence) from error
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        # It may quote bytes of the file.
        reason = "".join(c if c.isprintable() else "?" for c in str(error).partition("\n")[0]).rstrip(".")
        raise DataError(f"{name}: is not a readable Parquet file after record {number}: {reason}") from error


_READERS = {"json": _read_json, "jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet}
