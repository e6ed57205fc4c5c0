"""What runs leave that were ended in the midst of writing, and that no later run of theirs will replace.

A run removes its own when it fails, and what an earlier attempt left when it is started again; one that was
cancelled, or killed too often, does neither.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import or_, select

from comps.finetuning.jobs.states import TERMINAL
from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import JobRow
from comps.tuning import rundir

# Within a job's directory, or within that of a registered super-adapter's versions.
_PATTERNS = (rundir.SCRATCH, "ray_train", *(
    f"{where}.*.{ending}" for where in ("", "*/", "output/*/") for ending in ("tmp", "old")
))  # fmt: skip


def remove_half_written(database: Database, settings: Settings) -> None:
    """Remove half-written files and directories of jobs that have ended and whose processes are gone.

    May run at any time: a run that might write there is in the database before it begins.
    """
    for area in (settings.jobs_dir, settings.data_dir / "adapters"):
        for directory in _entries(area):
            left = [path for pattern in _PATTERNS for path in directory.glob(pattern)]
            if left and _is_idle(database, directory.name):
                for path in left:
                    _remove(path)


def _entries(area: Path) -> Iterator[Path]:
    if area.is_dir():
        yield from (path for path in area.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_idle(database: Database, name: str) -> bool:
    """Whether no run is, or will be, at work in the directory of this job or (with @ for /) model."""
    ids = (name, name.replace("@", "/"))
    gone = JobRow.status.in_(TERMINAL) & or_(JobRow.stopped, JobRow.submission_id.is_(None))
    query = select(JobRow.id).where(or_(JobRow.id.in_(ids), JobRow.source.in_(ids)), ~gone)
    with database.reading() as session:
        return session.scalar(query.limit(1)) is None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)  # it may have been in a directory that is gone now
