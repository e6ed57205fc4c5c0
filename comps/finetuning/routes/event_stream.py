"""The events of a job as server-sent events: what there is, then what comes, until the job has ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from comps.cores.errors import InvalidRequest
from comps.finetuning.jobs.news import News
from comps.finetuning.jobs.states import TERMINAL
from comps.finetuning.schemas.events import JobEvent
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import EventRow, JobRow

MEDIA_TYPE = "text/event-stream"

_AT_ONCE = 200  # events read in one go
_KEEP_ALIVE_SECONDS = 15.0  # proxies close what is silent for a minute, some for half of one


def is_asked_for(accept: str | None) -> bool:
    """Whether an ``Accept`` header names the media type of server-sent events."""
    types = (part.partition(";")[0].strip().lower() for part in (accept or "").split(","))
    return MEDIA_TYPE in types


def position(session: Session, job_id: str, last_event_id: str | None, param: str) -> int:
    """The place in the order of events to go on after: that of ``last_event_id``, or the beginning.

    Raises :class:`InvalidRequest` when the job has no event with this id.
    """
    if not last_event_id:
        return 0
    here = select(EventRow.sequence).where(EventRow.job_id == job_id, EventRow.id == last_event_id)
    found = session.scalar(here)
    if found is None:
        raise InvalidRequest(
            f"{param}: the job {job_id} has no event {last_event_id[:80]!r}; leave it out to begin with the "
            "first one.",
            param=param,
        )
    return found


async def stream_events(
    database: Database, news: News, job_id: str, after: int, keep_alive: float = _KEEP_ALIVE_SECONDS
) -> AsyncIterator[str]:
    """The events after the place ``after``, oldest first, then ``[DONE]`` when the job has ended.

    A stream of a service that stops, or of a connection that breaks, ends without ``[DONE]``: to be taken up
    again with the last id. After ``keep_alive`` seconds without an event comes a comment.
    """
    with news.bell(job_id) as bell:
        while not news.closed:
            bell.clear()
            rows, ended = await run_in_threadpool(_read, database, job_id, after)
            for row in rows:
                yield _event(row)
                after = row.sequence
            if len(rows) == _AT_ONCE:
                continue
            if ended:
                yield "data: [DONE]\n\n"
                return
            try:
                await asyncio.wait_for(bell.wait(), keep_alive)
            except TimeoutError:
                yield ": keep-alive\n\n"


def _read(database: Database, job_id: str, after: int) -> tuple[Sequence[EventRow], bool]:
    """The next events, and whether the job has ended (or was deleted), so that there are no more to come."""
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.sequence > after)
    with database.reading() as session:
        # Asked before reading: what was written before the end is then read for sure.
        status = session.scalar(select(JobRow.status).where(JobRow.id == job_id))
        rows = session.scalars(query.order_by(EventRow.sequence).limit(_AT_ONCE)).all()
    return rows, status is None or status in TERMINAL


def _event(row: EventRow) -> str:
    event = JobEvent.of(row)
    # Plain ASCII, since some readers take other characters than line feeds for the ends of lines.
    data = json.dumps(event.model_dump(mode="json"), separators=(",", ":"))
    return f"id: {event.id}\nevent: {event.type}\ndata: {data}\n\n"
