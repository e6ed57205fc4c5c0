"""Bytes of files on disk: ``<data dir>/files/<file id>``, whole or not at all.

A blob is written under a temporary name, flushed and renamed; then its row is committed. Deleting
goes the other way: the row first, then the bytes. So a crash leaves at worst bytes without a row,
which :meth:`Blobs.tidy` puts aside at the next start. Parts of uploads are blobs like files.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from comps.cores.errors import InsufficientStorage, TooLarge
from comps.tuning.rundir import disk_is_full, fsync_path

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_TEMPORARY = ".incoming-"
PART = "part"  # what the ids of parts begin with


@contextmanager
def full_disk_is_507() -> Iterator[None]:
    """Turn the operating system's word for a full disk into :class:`InsufficientStorage`."""
    try:
        yield
    except OSError as error:
        if disk_is_full(error):
            raise InsufficientStorage("The service's disk is full; nothing was stored.") from error
        raise


class BlobWriter:
    """Receives one blob. ``size`` bytes with digest ``sha256`` so far."""

    def __init__(self, path: Path, limit: int, excess: TooLarge) -> None:
        self.path = path
        self._limit, self._excess = limit, excess
        self._temporary = path.with_name(f"{_TEMPORARY}{path.name}")
        self._digest = hashlib.sha256()
        self.size = 0
        with full_disk_is_507():
            self._stream = open(self._temporary, "xb", buffering=0)  # noqa: SIM115

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        """Append. Raises the given :class:`TooLarge`, or :class:`InsufficientStorage`."""
        self.size += len(data)
        if self.size > self._limit:
            raise self._excess
        with full_disk_is_507():
            rest = memoryview(data)
            while rest:  # an unbuffered write may take only a part
                rest = rest[self._stream.write(rest) :]
        self._digest.update(data)

    def publish(self) -> None:
        """Flush to the disk and give the blob its name."""
        with full_disk_is_507():
            os.fsync(self._stream.fileno())
            self._stream.close()
            os.replace(self._temporary, self.path)
            fsync_path(self.path.parent)

    def discard(self) -> None:
        """Drop what was not published. Does nothing after :meth:`publish`."""
        self._stream.close()
        self._temporary.unlink(missing_ok=True)


class Blobs:
    """All blobs under one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, file_id: str) -> Path:
        """Where the bytes of ``file_id`` are. Only ids of our own form name a path."""
        if not _ID.fullmatch(file_id):
            raise ValueError(f"{file_id!r} is not a file id")
        return self.directory / file_id

    def writer(self, file_id: str, limit: int, excess: TooLarge) -> BlobWriter:
        """Begin a blob of at most ``limit`` bytes (``excess`` is raised above); end with ``discard()``."""
        return BlobWriter(self.path(file_id), limit, excess)

    @contextmanager
    def published(self, writer: BlobWriter) -> Iterator[None]:
        """Publish, then run the block, which commits the row; if it fails, the bytes go again."""
        try:
            writer.publish()
            yield
        except BaseException:
            writer.path.unlink(missing_ok=True)
            raise

    def delete(self, file_id: str) -> None:
        """Remove the bytes; to be called after the row's removal was committed."""
        self.path(file_id).unlink(missing_ok=True)

    @property
    def orphaned(self) -> Path:
        """Where bytes without a row go. They are kept: it may be the database that is the wrong one."""
        return self.directory / "orphaned"

    def tidy(self, known: Collection[str], unfinished: Collection[str] = ()) -> list[str]:
        """Remove half-written blobs, parts that no row knows and the blobs ``unfinished``, which are made
        of parts that are still there. Put aside what else no row knows; returns the ids of that.

        For the start, before any upload.
        """
        orphans = []
        for entry in list(self.directory.iterdir()):
            if entry.name in known or entry == self.orphaned:
                continue
            if entry.name.startswith((_TEMPORARY, f"{PART}-")) or entry.name in unfinished:
                entry.unlink()
            else:
                self.orphaned.mkdir(mode=0o700, exist_ok=True)
                entry.rename(self.orphaned / entry.name)
                orphans.append(entry.name)
        return orphans
