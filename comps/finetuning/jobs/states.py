"""The states of a job, the moves allowed between them, and the one function that makes a move.

::

    validating_files -> queued -> running -> succeeded | failed | cancelled
                          ^         |
                          +---------+  (a run that died goes back to the queue to be resumed)

Each of the first three may be paused. A paused job goes back to the queue (to its validation, if it never
ran); it ends by itself only when its run was so near its end that there was nothing left to pause.
"""

from __future__ import annotations

import time
from typing import Any, Literal, get_args

from sqlalchemy.orm import Session

from comps.finetuning.store.tables import EventRow, JobRow, new_id
from comps.tuning.failpoints import failpoint

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]

TERMINAL: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})
ACTIVE: frozenset[Status] = frozenset(get_args(Status)) - TERMINAL

MOVES: dict[Status, frozenset[Status]] = {
    "validating_files": frozenset({"queued", "paused", "failed", "cancelled"}),
    "queued": frozenset({"running", "paused", "failed", "cancelled"}),
    "running": frozenset({"queued", "paused", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"validating_files", "queued", "succeeded", "failed", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}


class IllegalMove(Exception):
    """A job cannot go from its state to the asked one (for example: cancelling a finished job)."""

    def __init__(self, job_id: str, current: str, wanted: str) -> None:
        super().__init__(job_id, current, wanted)
        self.job_id, self.current, self.wanted = job_id, current, wanted

    def __str__(self) -> str:
        return f"job {self.job_id} is {self.current} and cannot become {self.wanted}"


def add_event(
    session: Session, job: JobRow, message: str, *, level: str = "info", type: str = "message", **data: Any
) -> None:
    """Record an event of the service itself (the run's own come from its events file)."""
    session.add(
        EventRow(id=new_id("ftevent"), job_id=job.id, level=level, type=type, message=message, data=data)
    )


def transition(session: Session, job: JobRow, to: Status, message: str, **changes: Any) -> None:
    """Move ``job`` to ``to``, set the given columns and add the event, all in the session's transaction.

    The caller commits. The row's present state is read again under the write lock, so two callers
    cannot both move a job. Raises :class:`IllegalMove` when the table does not allow the move.
    """
    session.flush()
    session.refresh(job, with_for_update=True)
    current: Status = job.status  # type: ignore[assignment]
    if to not in MOVES[current]:
        raise IllegalMove(job.id, current, to)
    now = time.time()
    job.status = to
    job.estimated_finish = None
    if to == "running":
        job.started_at = job.started_at or now
        job.attempt_started_at = now
    elif job.attempt_started_at is not None:
        job.run_seconds += now - job.attempt_started_at
        job.attempt_started_at = None
    if to in TERMINAL:
        job.finished_at = now
        job.secret = None
    failpoint("transition-made")
    session.flush()
    failpoint("transition-flushed")
    for column, value in changes.items():
        if column not in JobRow.__mapper__.columns:
            raise AttributeError(f"jobs have no column {column!r}")
        setattr(job, column, value)
    level = "error" if to == "failed" else "info"
    add_event(session, job, message, level=level, status=to)
    session.flush()
    failpoint("transition-written")
