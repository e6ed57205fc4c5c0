"""Bytes that no row knows, rows without their bytes, and processes that should be gone."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from comps.finetuning.cluster.local_head import MARK as RAY_MARK
from tests.soak.record import Record
from tests.soak.world import MARK

ORPHANED = "orphaned"  # where the service keeps bytes whose row a crash has prevented
_TEMPORARY = re.compile(r"\.incoming-.*|\.deleted-.*|\..*\.(tmp|old)")
# In the directory of a job that has ended.
_HALF_WRITTEN = ("scratch", "ray_train")


def unknown_bytes(record: Record, orphans_allowed: int) -> list[str]:
    """What lies in the data directory and is nobody's; at most ``orphans_allowed`` files may be put aside."""
    files, jobs, adapters = (record.data_dir / name for name in ("files", "jobs", "adapters"))
    known = {row["id"] for row in (*record.files, *record.parts)} | {ORPHANED}
    found = [f"files/{name} belongs to no row" for name in _names(files) - known]
    if len(orphans := _names(files / ORPHANED)) > orphans_allowed:
        found.append(
            f"{len(orphans)} files were put aside as orphaned, {orphans_allowed} at most can have been"
        )
    found += [f"jobs/{name} belongs to no row" for name in _names(jobs) - {job["id"] for job in record.jobs}]
    for name in _names(adapters):
        owners = [row for row in record.models if Path(row["path"]).is_relative_to(adapters / name)]
        if not owners:
            found.append(f"adapters/{name} belongs to no row")
    for job in record.jobs:
        left = _names(record.job_directory(job["id"])) & {*_HALF_WRITTEN}
        found += [f"jobs/{job['id']}/{name} was left half-written" for name in left]
    return found + [f"{path} was left half-written" for path in _temporary(record.data_dir)]


def _temporary(data_dir: Path) -> Iterator[Path]:
    for root, directories, names in os.walk(data_dir):
        for name in (*directories, *names):
            if _TEMPORARY.fullmatch(name):
                yield (Path(root) / name).relative_to(data_dir)


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.is_dir() else set()


def missing_bytes(record: Record) -> list[str]:
    """Rows whose bytes are not there, or are others."""
    found = []
    for row in record.files:
        path = record.data_dir / "files" / row["id"]
        if not path.is_file():
            found.append(f"the file {row['id']} has no bytes")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != row["sha256"]:
            found.append(f"the file {row['id']} has other bytes than its row says")
    found += [
        f"the model {row['id']} has no directory" for row in record.models if not Path(row["path"]).is_dir()
    ]
    found += [
        f"the checkpoint {row['id']} of {row['job_id']} (step {row['step']}) has no directory"
        for row in record.checkpoints
        if not Path(row["path"]).is_dir()
    ]
    return found


def left_processes(data_dir: Path) -> list[str]:
    """Processes that carry the mark of this service's Ray or of this soak, and children of this process."""
    marks = {RAY_MARK: str((data_dir / "ray").resolve()), MARK: str(data_dir.resolve())}
    left = {each.pid: each for each in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # gone meanwhile, or another user's
            environment = process.environ()
            if any(environment.get(name) == value for name, value in marks.items()):
                left[process.pid] = process
    found = []
    for process in left.values():
        with suppress(psutil.NoSuchProcess):
            found.append(f"process {process.pid} is left: {' '.join(process.cmdline())[:200]}")
    return found
