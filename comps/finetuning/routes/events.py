"""The events of a job: a page of them, or all of them as they come."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import select

from comps.cores.app import content
from comps.finetuning.dependencies import DatabaseDep, NewsDep, OwnerDep, ReaderDep
from comps.finetuning.jobs.find import find_run
from comps.finetuning.routes.event_stream import MEDIA_TYPE, is_asked_for, position, stream_events
from comps.finetuning.routes.jobs import JobPath
from comps.finetuning.routes.pages import After, Limit, newest_first
from comps.finetuning.schemas.events import EventList, JobEvent
from comps.finetuning.store.tables import EventRow

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["events"])

Stream = Annotated[
    bool | None, Query(description=f"Server-sent events; absent: if `Accept` names {MEDIA_TYPE}")
]
LastEventId = Annotated[
    str | None, Header(alias="Last-Event-ID", max_length=200, description="Where a stream goes on")
]


@router.get("/{fine_tuning_job_id}/events", response_model=EventList, responses=content(MEDIA_TYPE))
def list_events(
    fine_tuning_job_id: JobPath,
    request: Request,
    owner: OwnerDep,
    session: ReaderDep,
    database: DatabaseDep,
    news: NewsDep,
    after: After = None,
    limit: Limit = 20,
    stream: Stream = None,
    last_event_id: LastEventId = None,
) -> EventList | StreamingResponse:
    """What happened to a job, or to an extraction or a merge, newest first.

    As server-sent events: oldest first and all of them, as they come, until the job has ended; then
    `[DONE]`. `Last-Event-ID` (or `after`) names the event to go on after.
    """
    job = find_run(session, fine_tuning_job_id, owner)
    if stream if stream is not None else is_asked_for(request.headers.get("accept")):
        param = "Last-Event-ID" if last_event_id else "after"
        place = position(session, job.id, last_event_id or after, param)
        events = stream_events(database, news, job.id, place)
        headers = {
            "cache-control": "no-store",
            "x-accel-buffering": "no",
        }  # as they come, also through proxies
        return StreamingResponse(events, media_type=MEDIA_TYPE, headers=headers)
    query = select(EventRow).where(EventRow.job_id == job.id)
    rows, more = newest_first(session, EventRow, query, after, limit)
    return EventList(data=[JobEvent.of(row) for row in rows], has_more=more)
