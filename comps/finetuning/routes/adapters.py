"""Extraction and merge, under all the paths that documents give them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from comps.cores.errors import NotFound, ServiceError, Stopping
from comps.finetuning.dependencies import DatabaseDep, NewsDep, OwnerDep, RepeatDep, SettingsDep
from comps.finetuning.jobs.adapters import create_extract, create_merge
from comps.finetuning.jobs.news import News
from comps.finetuning.jobs.repeats import Repeat, keep, once
from comps.finetuning.jobs.states import TERMINAL
from comps.finetuning.schemas.adapters import AdapterAnswer, AdapterRequest, ExtractRequest, MergeRequest
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import JobRow

router = APIRouter(prefix="/v1", tags=["adapters"])

_LOOK_SECONDS = 1.0  # between two looks whether the client still waits


class RunFailed(ServiceError):
    """The work was begun and did not succeed; the message and the code are those of its run."""

    status, type, code = 422, "invalid_request_error", "run_failed"


class RunBroke(ServiceError):
    """As above, through no fault of the request."""


@router.post("/finetune/extract_adapter")
@router.post("/finetune/extract_sub_adapter")
@router.post("/sqft/extract_sub_adapter")
async def extract_adapter(
    body: ExtractRequest,
    request: Request,
    owner: OwnerDep,
    settings: SettingsDep,
    database: DatabaseDep,
    news: NewsDep,
    repeat: RepeatDep,
) -> AdapterAnswer:
    """Cut a sub-adapter out of a super-adapter. The answer comes when it is written."""
    make = partial(create_extract, database, settings, body, owner, repeat)
    return await _answer(request, database, news, body, repeat, make)


@router.post("/finetune/merge_adapter")
@router.post("/ffinetune/merge_adapter")
@router.post("/sqft/merge_adapter")
async def merge_adapter(
    body: MergeRequest,
    request: Request,
    owner: OwnerDep,
    settings: SettingsDep,
    database: DatabaseDep,
    news: NewsDep,
    repeat: RepeatDep,
) -> AdapterAnswer:
    """Merge an adapter into its base model. The answer comes when the model is written."""
    make = partial(create_merge, database, settings, body, owner, repeat)
    return await _answer(request, database, news, body, repeat, make)


async def _answer(
    request: Request,
    database: Database,
    news: News,
    body: AdapterRequest,
    repeat: Repeat | None,
    make: Callable[[], JobRow | AdapterAnswer],
) -> AdapterAnswer:
    def begin() -> JobRow | AdapterAnswer:
        return once(database, repeat, make, lambda answer: _made_before(database, answer))

    job = await run_in_threadpool(begin)
    if isinstance(job, AdapterAnswer):
        return job
    request.app.state.dispatcher.wake()
    if body.wait:
        # The work goes on when the client hangs up; the same request then finds it again.
        with news.bell(job.id) as bell:
            while job.status not in TERMINAL and not await request.is_disconnected():
                if news.closed:
                    sentence = (
                        f"The service is stopping; the {job.kind} {job.id} goes on when it has started."
                    )
                    raise Stopping(f"{sentence} Send the request again to wait for it.")
                with suppress(TimeoutError):
                    await asyncio.wait_for(bell.wait(), _LOOK_SECONDS)
                bell.clear()
                job = await run_in_threadpool(_again, database, job)
    if job.status in ("failed", "cancelled"):
        error = job.error or {"message": f"The {job.kind} {job.id} was {job.status}.", "code": "cancelled"}
        kind = RunBroke if error["code"] == "server_error" else RunFailed
        raise kind(error["message"], code=error["code"], param=error.get("param"))
    answer = AdapterAnswer.of(job, body)
    if repeat and job.status == "succeeded":
        await run_in_threadpool(_keep_result, database, repeat, answer)
    return answer


def _made_before(database: Database, answer: dict[str, Any]) -> JobRow | AdapterAnswer | None:
    """The run that a repeated request has made, unless that has failed; if it was deleted, its answer."""
    with database.reading() as session:
        job = session.scalar(select(JobRow).where(JobRow.id == answer["id"]))
    if job is None:
        return AdapterAnswer.model_validate(answer)
    return None if job.status in ("failed", "cancelled") else job


def _keep_result(database: Database, repeat: Repeat, answer: AdapterAnswer) -> None:
    """What was kept at first says that the run is queued."""
    with database.session() as session:
        keep(session, repeat, answer)


def _again(database: Database, job: JobRow) -> JobRow:
    with database.reading() as session:
        now = session.scalar(select(JobRow).where(JobRow.id == job.id))
    if now is None:  # it ended, and its source was deleted with all that came of it
        raise NotFound(f"The {job.kind} {job.id} was deleted.", code="job_deleted")
    return now
