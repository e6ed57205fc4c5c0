"""The directory of one run: names of its files, and the writes that others may rely on.

::

    <directory>/
      spec.json       what is asked (AnySpec), written by the service before the start
      events.jsonl    one JSON object a line, appended by rank 0 and followed by the service
      log.txt         standard output and error of the run
      result.json     the end state, written last (atomically): its presence is the evidence
      suspect.txt     the first error of an attempt of several workers that died
      stop            written by the service: save a checkpoint after this step and end without a result
      output/         what users get: the adapter, checkpoint-<step>/, <version>/, merged models
      reports/        what TensorBoard and other trackers write
      scratch/        anything half-written; may be deleted at any time when no run is active
      .lock           held by the attempt that runs

Needs no torch: the service reads these files too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comps.tuning.failpoints import failpoint

SPEC = "spec.json"
EVENTS = "events.jsonl"
LOG = "log.txt"
RESULT = "result.json"
SUSPECT = "suspect.txt"
STOP = "stop"
OUTPUT = "output"
REPORTS = "reports"
SCRATCH = "scratch"
LOCK = ".lock"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
CHECKPOINT_PREFIX = "checkpoint-"


def disk_is_full(error: OSError) -> bool:
    """Whether ``error`` is the operating system's word for a full disk, or a spent quota."""
    return error.errno in DISK_FULL


def fsync_path(path: Path) -> None:
    """Flush one file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that readers see the old file or the whole new one, also after a power cut."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False).encode())


def write_file(path: Path, content: bytes) -> None:
    """As :func:`write_json`, for any content."""
    _write(path, content, os.replace, 0o666)


def create_file(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Create a file whole, or leave the one that is there already: of several writers the first wins."""
    with contextlib.suppress(FileExistsError):
        _write(path, content, os.link, mode)


def _write(path: Path, content: bytes, put: Callable[[Path, Path], object], mode: int) -> None:
    # The workers of a run may write the same file at once, each under a name of its own.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with open(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(descriptor)
        put(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)  # on a full disk, half of it must not stay


def publish_directory(temporary: Path, final: Path) -> None:
    """Flush a finished directory and rename it into place. ``final`` is replaced when it exists."""
    # Weights come out of safetensors readable by their owner alone, whatever the umask says.
    mode = temporary.stat().st_mode & 0o666
    for root, _, files in os.walk(temporary):
        for name in files:
            (Path(root) / name).chmod(mode)
            fsync_path(Path(root) / name)
        fsync_path(Path(root))
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        # A directory cannot be renamed over a non-empty one; move the old one out of the way first.
        old = _old(final)
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
        os.replace(temporary, final)
        shutil.rmtree(old)
    else:
        os.replace(temporary, final)
    fsync_path(final.parent)


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """A directory to fill; it appears under its final name whole, or not at all.

    One process at a time. What one that was killed left behind is removed by the next.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.tmp")
    if _old(final).exists() and not final.exists():
        os.replace(_old(final), final)  # killed between the two renames: the old one is the good one
    for left in (temporary, _old(final)):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        failpoint("directory-filled")
        publish_directory(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


class EventWriter:
    """Appends events to ``events.jsonl``.

    A line: ``{"created_at": unix seconds, "level": "info|warn|error", "type": "message|metrics|
    checkpoint|progress", "message": str, "data": {...}}``. Each line is flushed, so a follower sees
    it at once; a torn last line (after a crash) is closed before the next one is written.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = directory / EVENTS
        self._clock = clock
        torn = False
        if self._path.exists() and self._path.stat().st_size:
            with open(self._path, "rb") as stream:
                stream.seek(-1, os.SEEK_END)
                torn = stream.read(1) != b"\n"
        self._stream = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        if torn:
            self._stream.write("\n")

    def write(self, message: str, *, level: str = "info", type: str = "message", **data: Any) -> None:
        line = {"created_at": self._clock(), "level": level, "type": type, "message": message, "data": data}
        self._stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()
