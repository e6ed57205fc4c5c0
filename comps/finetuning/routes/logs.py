"""The log of a job's run: all of it, its end, or as it grows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, BinaryIO

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from comps.cores.app import content
from comps.finetuning.dependencies import DatabaseDep, NewsDep, OwnerDep, SettingsDep
from comps.finetuning.jobs.find import find_run
from comps.finetuning.jobs.news import News
from comps.finetuning.jobs.states import TERMINAL
from comps.finetuning.owner import Owner
from comps.finetuning.routes.jobs import JobPath
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import JobRow
from comps.tuning.rundir import LOG

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["logs"])

_CHUNK = 64 * 1024
_POLL_SECONDS = 0.3


def tail_offset(path: Path, lines: int) -> int:
    """The byte at which the last ``lines`` lines of a file begin. Reads no more than these."""
    with open(path, "rb") as stream:
        position = end = stream.seek(0, 2)
        if lines == 0:
            return end
        found = 0
        while position > 0:
            start = max(0, position - _CHUNK)
            stream.seek(start)
            block = stream.read(position - start)
            for index in range(len(block) - 1, -1, -1):
                # The newline that ends the last line begins nothing.
                if block[index] == 0x0A and start + index + 1 < end:
                    found += 1
                    if found == lines:
                        return start + index + 1
            position = start
    return 0


@router.get("/{fine_tuning_job_id}/logs", response_class=StreamingResponse, responses=content("text/plain"))
async def job_logs(
    fine_tuning_job_id: JobPath,
    owner: OwnerDep,
    settings: SettingsDep,
    database: DatabaseDep,
    news: NewsDep,
    tail: Annotated[int | None, Query(ge=0, le=1_000_000, description="Only the last lines")] = None,
    follow: Annotated[bool, Query(description="Go on until the job has ended, or the service stops")] = False,
) -> StreamingResponse:
    """Standard output and error of a run, also of an extraction or a merge. Empty before it starts."""
    job_id = await run_in_threadpool(_known_id, database, fine_tuning_job_id, owner)
    path = settings.jobs_dir / job_id / LOG
    offset = await run_in_threadpool(tail_offset, path, tail) if tail is not None and path.exists() else 0
    text = _read(path, offset, database, news, job_id if follow else None)
    return StreamingResponse(text, media_type="text/plain; charset=utf-8")


def _known_id(database: Database, job_id: str, owner: Owner) -> str:
    with database.reading() as session:
        return find_run(session, job_id, owner).id


def _ended(database: Database, job_id: str) -> bool:
    with database.reading() as session:
        return session.scalar(select(JobRow.status).where(JobRow.id == job_id)) in (*TERMINAL, None)


async def _read(
    path: Path, offset: int, database: Database, news: News, followed: str | None
) -> AsyncIterator[bytes]:
    """The file from ``offset`` to its present end, or to the end of the job ``followed``."""
    stream: BinaryIO | None = None
    try:
        while True:
            # Asked before reading: what was written before the end is then read for sure.
            ended = followed is None or news.closed or await run_in_threadpool(_ended, database, followed)
            if stream is None and path.exists():
                stream = await run_in_threadpool(open, path, "rb")
                stream.seek(offset)
            while stream and (chunk := await run_in_threadpool(stream.read, _CHUNK)):
                yield chunk
            if ended:
                return
            await asyncio.sleep(_POLL_SECONDS)
    finally:
        if stream:
            stream.close()
