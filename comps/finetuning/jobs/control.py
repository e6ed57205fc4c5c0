"""What a client may do to a job that is there: cancel it, pause it, have it go on.

Each says what should be, in the job's row; the dispatcher sees to the processes. Asking again for what is
already so changes nothing.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from comps.cores.errors import Conflict
from comps.finetuning.jobs.states import TERMINAL, IllegalMove, transition
from comps.finetuning.store.tables import JobRow


def cancel(session: Session, job: JobRow) -> JobRow:
    """Raises :class:`Conflict` when the job has ended otherwise."""
    if job.status != "cancelled":
        try:
            transition(session, job, "cancelled", "The job was cancelled")
        except IllegalMove as move:
            raise _conflict(job, "cancelled") from move
    return job


def pause(session: Session, job: JobRow) -> JobRow:
    """Have a job wait until it is resumed. Its run, if there is one, saves a checkpoint after the present
    step and leaves its cores; if that was the last step, it finishes instead.

    Raises :class:`Conflict` when the job has ended.
    """
    if job.status != "paused":
        try:
            transition(session, job, "paused", "The job was paused")
        except IllegalMove as move:
            raise _conflict(job, "paused") from move
    return job


def resume(session: Session, job: JobRow) -> JobRow:
    """Put a paused job back in the queue, at its old place; it goes on from its newest checkpoint.

    A job that was never paused, or was resumed before, stays as it is. Raises :class:`Conflict` when the job
    has ended.
    """
    if job.status in TERMINAL:
        raise _conflict(job, "resumed")
    if job.status == "paused":
        # Its files may not have been checked before it was paused.
        transition(session, job, "queued" if job.attempt else "validating_files", "The job was resumed")
    return job


def _conflict(job: JobRow, what: str) -> Conflict:
    return Conflict(
        f"The job {job.id} has {_ENDED.get(job.status, job.status)} and cannot be {what}.",
        param="fine_tuning_job_id",
        code="job_has_ended",
    )


_ENDED = {"cancelled": "been cancelled"}
