"""Fine-tuning jobs: create, list, retrieve, cancel, pause, resume, delete."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from sqlalchemy import ColumnElement, String, cast
from sqlalchemy.orm import Session

from comps.cores.errors import InvalidRequest
from comps.finetuning.dependencies import (
    DatabaseDep,
    OwnerDep,
    ReaderDep,
    RepeatDep,
    SettingsDep,
)
from comps.finetuning.jobs import control
from comps.finetuning.jobs.create import create_fine_tuning_job
from comps.finetuning.jobs.delete import delete_job
from comps.finetuning.jobs.find import find_job, find_run, visible_jobs
from comps.finetuning.jobs.repeats import claim, keep, once
from comps.finetuning.owner import Owner
from comps.finetuning.routes.pages import After, Limit, newest_first
from comps.finetuning.schemas.job_object import FineTuningJob, JobDeleted, JobList
from comps.finetuning.schemas.jobs import MAX_METADATA, JobId, JobRequest
from comps.finetuning.schemas.tolerant import request_warnings
from comps.finetuning.store.tables import JobRow

router = APIRouter(prefix="/v1", tags=["jobs"])

JobPath = Annotated[str, Path(max_length=200)]


@router.post("/fine_tuning/jobs")
@router.post("/sqft/jobs")
def create_job(
    body: JobRequest,
    request: Request,
    owner: OwnerDep,
    settings: SettingsDep,
    database: DatabaseDep,
    repeat: RepeatDep,
) -> FineTuningJob:
    """Ask for an adapter to be trained. The answer comes at once; the job's status tells the rest."""

    def make() -> FineTuningJob:
        job = create_fine_tuning_job(database, settings, request.app.state.secrets, body, owner, repeat)
        request.app.state.dispatcher.wake()
        return FineTuningJob.of(job, settings)

    return once(database, repeat, make, FineTuningJob.model_validate)


@router.get("/fine_tuning/jobs")
def list_jobs(
    request: Request,
    owner: OwnerDep,
    settings: SettingsDep,
    session: ReaderDep,
    after: After = None,
    limit: Limit = 20,
) -> JobList:
    """Jobs, newest first. ``metadata[key]=value`` keeps those with it, ``metadata=null`` those without."""
    filters = [_metadata(name, value) for name, value in request.query_params.multi_items()]
    conditions = [each for each in filters if each is not None]
    if len(conditions) > MAX_METADATA:  # a database does not take any number of conditions
        message = f"metadata is asked for {len(conditions)} times; {MAX_METADATA} are allowed."
        raise InvalidRequest(message, param="metadata")
    query = visible_jobs(owner).where(*conditions)
    rows, more = newest_first(session, JobRow, query, after, limit)
    return JobList(data=[FineTuningJob.of(row, settings) for row in rows], has_more=more)


def _metadata(name: str, value: str) -> ColumnElement[bool] | None:
    if name == "metadata" and value == "null":
        return cast(JobRow.job_metadata, String) == "{}"
    if not name.startswith("metadata["):
        return None
    key = name.removeprefix("metadata[").removesuffix("]")
    # A quote or a backslash would end the key within the database's path to it.
    if not name.endswith("]") or not key or len(key) > 64 or '"' in key or "\\" in key:
        raise InvalidRequest(f"{name[:80]!r} is not metadata[key] with a usable key.", param="metadata")
    has_value: ColumnElement[bool] = JobRow.job_metadata[key].as_string() == value
    return has_value


@router.post("/fine_tuning/jobs/retrieve")
def retrieve_job_by_body(
    body: JobId, owner: OwnerDep, settings: SettingsDep, session: ReaderDep
) -> FineTuningJob:
    """One job, as OPEA asks for it."""
    job = find_run(session, body.fine_tuning_job_id, owner)
    return FineTuningJob.of(job, settings, tuple(request_warnings(body)))


class Act:
    """What all routes that move a job have in common."""

    def __init__(
        self,
        request: Request,
        owner: OwnerDep,
        settings: SettingsDep,
        database: DatabaseDep,
        repeat: RepeatDep,
    ) -> None:
        self.request, self.owner, self.settings = request, owner, settings
        self.database, self.repeat = database, repeat

    def __call__(
        self,
        find: Callable[[Session, str, Owner], JobRow],
        job_id: str,
        move: Callable[[Session, JobRow], JobRow],
        warnings: tuple[str, ...] = (),
    ) -> FineTuningJob:
        """Find the job and move it, and have the dispatcher look at it."""

        def make() -> FineTuningJob:
            with self.database.session() as session:
                claim(session, self.repeat)
                job = move(session, find(session, job_id, self.owner))
                answer = FineTuningJob.of(job, self.settings, warnings)
                keep(session, self.repeat, answer)
            self.request.app.state.dispatcher.wake()
            return answer

        return once(self.database, self.repeat, make, FineTuningJob.model_validate)


ActDep = Annotated[Act, Depends()]


@router.post("/fine_tuning/jobs/cancel")
def cancel_job_by_body(body: JobId, act: ActDep) -> FineTuningJob:
    """Stop one job, as OPEA asks for it."""
    return act(find_run, body.fine_tuning_job_id, control.cancel, tuple(request_warnings(body)))


@router.get("/fine_tuning/jobs/{fine_tuning_job_id}")
def retrieve_job(
    fine_tuning_job_id: JobPath, owner: OwnerDep, settings: SettingsDep, session: ReaderDep
) -> FineTuningJob:
    """One job, of any kind."""
    return FineTuningJob.of(find_run(session, fine_tuning_job_id, owner), settings)


@router.delete("/fine_tuning/jobs/{fine_tuning_job_id}")
def remove_job(
    fine_tuning_job_id: JobPath, owner: OwnerDep, settings: SettingsDep, database: DatabaseDep
) -> JobDeleted:
    """Remove a job that has ended with all that came of it: its adapter, checkpoints, events and log, its
    sub-adapters and merged models. Refused while something else needs a part of it."""
    delete_job(database, settings, fine_tuning_job_id, owner)
    return JobDeleted(id=fine_tuning_job_id)


@router.post("/fine_tuning/jobs/{fine_tuning_job_id}/cancel")
def cancel_job(fine_tuning_job_id: JobPath, act: ActDep) -> FineTuningJob:
    """Stop one job, of any kind. Cancelling it again changes nothing; a job that has ended
    otherwise stays as it is."""
    return act(find_run, fine_tuning_job_id, control.cancel)


@router.post("/fine_tuning/jobs/{fine_tuning_job_id}/pause")
def pause_job(fine_tuning_job_id: JobPath, act: ActDep) -> FineTuningJob:
    """Have a job wait. A run saves a checkpoint after its present step and leaves its cores."""
    return act(find_job, fine_tuning_job_id, control.pause)


@router.post("/fine_tuning/jobs/{fine_tuning_job_id}/resume")
def resume_job(fine_tuning_job_id: JobPath, act: ActDep) -> FineTuningJob:
    """Have a paused job go on from its newest checkpoint, when its turn comes."""
    return act(find_job, fine_tuning_job_id, control.resume)
