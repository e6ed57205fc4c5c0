"""The answer of requests whose work is a job behind them: when it has ended, or at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from comps.cores.errors import NotFound, ServiceError, Stopping
from comps.finetuning.jobs.news import News
from comps.finetuning.jobs.repeats import Repeat, keep, once
from comps.finetuning.jobs.states import TERMINAL
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import JobRow

_LOOK_SECONDS = 1.0  # between two looks whether the client still waits


class RunFailed(ServiceError):
    """The work was begun and did not succeed; the message and the code are those of its run."""

    status, type, code = 422, "invalid_request_error", "run_failed"


class RunBroke(ServiceError):
    """As above, through no fault of the request."""


Answer = TypeVar("Answer", bound=BaseModel)


async def answer_when_done(
    request: Request,
    database: Database,
    news: News,
    repeat: Repeat | None,
    make: Callable[[], JobRow | Answer],
    kind: type[Answer],
    of: Callable[[JobRow], Answer],
    *,
    wait: bool,
) -> Answer:
    """Have ``make`` write the job's row, or find that of a repeated request; answer with ``of`` the row, a
    model of ``kind``, when the job has ended (or at once, without ``wait``).

    Raises :class:`RunFailed` or :class:`RunBroke` when it did not succeed, :class:`Stopping` when the service
    ends before it, and what ``make`` raises. The work goes on when the client hangs up.
    """

    def begin() -> JobRow | Answer:
        return once(database, repeat, make, lambda kept: _made_before(database, kept, kind))

    job = await run_in_threadpool(begin)
    if not isinstance(job, JobRow):
        return job
    request.app.state.dispatcher.wake()
    if wait:
        job = await _ended(request, database, news, job)
    if job.status in ("failed", "cancelled"):
        error = job.error or {"message": f"The {job.kind} {job.id} was {job.status}.", "code": "cancelled"}
        broke = RunBroke if error["code"] == "server_error" else RunFailed
        raise broke(error["message"], code=error["code"], param=error.get("param"))
    answer = of(job)
    if repeat and job.status == "succeeded":
        await run_in_threadpool(_keep_result, database, repeat, answer)
    return answer


async def _ended(request: Request, database: Database, news: News, job: JobRow) -> JobRow:
    """The job once it has ended, or its client has hung up."""
    with news.bell(job.id) as bell:
        while job.status not in TERMINAL and not await request.is_disconnected():
            if news.closed:
                sentence = f"The service is stopping; the {job.kind} {job.id} goes on when it has started."
                raise Stopping(f"{sentence} Send the request again to wait for it.")
            with suppress(TimeoutError):
                await asyncio.wait_for(bell.wait(), _LOOK_SECONDS)
            bell.clear()
            job = await run_in_threadpool(_again, database, job)
    return job


def _made_before(database: Database, kept: dict[str, Any], kind: type[Answer]) -> JobRow | Answer | None:
    """The run that a repeated request has made, unless that has failed; if it was deleted, its answer."""
    with database.reading() as session:
        job = session.scalar(select(JobRow).where(JobRow.id == kept["id"]))
    if job is None:
        return kind.model_validate(kept)
    return None if job.status in ("failed", "cancelled") else job


def _keep_result(database: Database, repeat: Repeat, answer: BaseModel) -> None:
    """What was kept at first says that the run is queued."""
    with database.session() as session:
        keep(session, repeat, answer)


def _again(database: Database, job: JobRow) -> JobRow:
    with database.reading() as session:
        now = session.scalar(select(JobRow).where(JobRow.id == job.id))
    if now is None:  # it ended, and its source was deleted with all that came of it
        raise NotFound(f"The {job.kind} {job.id} was deleted.", code="job_deleted")
    return now
