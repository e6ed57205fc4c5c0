"""The events of a job."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import select

from comps.finetuning.dependencies import OwnerDep, ReaderDep
from comps.finetuning.jobs.find import find_run
from comps.finetuning.routes.jobs import JobPath
from comps.finetuning.routes.pages import After, Limit, newest_first
from comps.finetuning.schemas.events import EventList, JobEvent
from comps.finetuning.store.tables import EventRow

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["events"])


@router.get("/{fine_tuning_job_id}/events")
def list_events(
    fine_tuning_job_id: JobPath,
    owner: OwnerDep,
    session: ReaderDep,
    after: After = None,
    limit: Limit = 20,
) -> EventList:
    """What happened to a job, or to an extraction or a merge, newest first."""
    job = find_run(session, fine_tuning_job_id, owner)
    query = select(EventRow).where(EventRow.job_id == job.id)
    rows, more = newest_first(session, EventRow, query, after, limit)
    return EventList(data=[JobEvent.of(row) for row in rows], has_more=more)
