"""Searches for the sub-adapter worth deploying: begin, list, look at, cancel, delete."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request
from fastapi.responses import FileResponse

from comps.cores.app import content
from comps.cores.errors import NotFound
from comps.finetuning.dependencies import (
    DatabaseDep,
    OwnerDep,
    ReaderDep,
    RepeatDep,
    SessionDep,
    SettingsDep,
)
from comps.finetuning.jobs import control
from comps.finetuning.jobs.delete import delete_job
from comps.finetuning.jobs.repeats import once
from comps.finetuning.jobs.searches import create_search, find_search, visible_searches
from comps.finetuning.routes.pages import After, Limit, newest_first
from comps.finetuning.schemas.searches import SearchDeleted, SearchJob, SearchList, SearchRequest
from comps.finetuning.store.tables import JobRow
from comps.tuning.rundir import OUTPUT

router = APIRouter(prefix="/v1/finetune/search", tags=["searches"])

SearchPath = Annotated[str, Path(max_length=200)]
_FILE = content("text/csv")
_FILE[200]["content"] |= content("image/png")[200]["content"] | content("application/json")[200]["content"]
ReportFile = Literal[
    "search_progression.csv", "search_progression.png", "pareto_front.json", "search_result.json"
]


@router.post("")
def begin_search(
    body: SearchRequest,
    request: Request,
    owner: OwnerDep,
    settings: SettingsDep,
    database: DatabaseDep,
    repeat: RepeatDep,
) -> SearchJob:
    """Search a super-adapter's ranks. The answer comes at once; the search's status tells the rest. Its
    events and its log are at `/v1/fine_tuning/jobs/{search_id}/events` and `/logs`."""

    def make() -> SearchJob:
        job = create_search(database, settings, body, owner, repeat)
        request.app.state.dispatcher.wake()
        return SearchJob.of(job, settings)

    return once(database, repeat, make, SearchJob.model_validate)


@router.get("")
def list_searches(
    owner: OwnerDep, settings: SettingsDep, session: ReaderDep, after: After = None, limit: Limit = 20
) -> SearchList:
    """Searches, newest first."""
    rows, more = newest_first(session, JobRow, visible_searches(owner), after, limit)
    return SearchList(data=[SearchJob.of(row, settings) for row in rows], has_more=more)


@router.get("/{search_id}")
def retrieve_search(
    search_id: SearchPath, owner: OwnerDep, settings: SettingsDep, session: ReaderDep
) -> SearchJob:
    """One search, with what it has found."""
    return SearchJob.of(find_search(session, search_id, owner), settings)


@router.get("/{search_id}/files/{name}", response_class=FileResponse, responses=_FILE)
def search_file(
    search_id: SearchPath, name: ReportFile, owner: OwnerDep, settings: SettingsDep, session: ReaderDep
) -> FileResponse:
    """One of the files of a finished search's report."""
    search = find_search(session, search_id, owner)
    path = settings.jobs_dir / search.id / OUTPUT / name
    if search.status != "succeeded" or not path.is_file():
        raise NotFound(f"The search {search.id} is {search.status} and has no {name}.", param="name")
    return FileResponse(path)


@router.post("/{search_id}/cancel")
def cancel_search(
    search_id: SearchPath, request: Request, owner: OwnerDep, settings: SettingsDep, session: SessionDep
) -> SearchJob:
    """Stop one search. Cancelling it again changes nothing; one that has ended otherwise stays as it is."""
    job = control.cancel(session, find_search(session, search_id, owner))
    session.commit()
    request.app.state.dispatcher.wake()
    return SearchJob.of(job, settings)


@router.delete("/{search_id}")
def remove_search(
    search_id: SearchPath, owner: OwnerDep, settings: SettingsDep, database: DatabaseDep
) -> SearchDeleted:
    """Remove a search that has ended; what was extracted by it stays."""
    with database.reading() as session:
        find_search(session, search_id, owner)
    delete_job(database, settings, search_id, owner)
    return SearchDeleted(id=search_id)
