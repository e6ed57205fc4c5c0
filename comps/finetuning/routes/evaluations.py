"""Evaluations: begin, list, look at, the record of each question, cancel, delete."""

from __future__ import annotations

from typing import Annotated

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
from comps.finetuning.jobs.evaluations import create_evaluation, find_evaluation, visible_evaluations
from comps.finetuning.jobs.repeats import once
from comps.finetuning.routes.pages import After, Limit, newest_first
from comps.finetuning.schemas.evaluations import (
    Evaluation,
    EvaluationDeleted,
    EvaluationList,
    EvaluationRequest,
)
from comps.finetuning.store.tables import JobRow
from comps.tuning.rundir import OUTPUT

router = APIRouter(prefix="/v1/evaluations", tags=["evaluations"])

EvaluationPath = Annotated[str, Path(max_length=200)]
_ITEMS = "items.jsonl"  # comps.tuning.evaluation.run.ITEMS, whose module needs torch
_JSON_LINES = "application/jsonl"


@router.post("")
def begin_evaluation(
    body: EvaluationRequest,
    request: Request,
    owner: OwnerDep,
    settings: SettingsDep,
    database: DatabaseDep,
    repeat: RepeatDep,
) -> Evaluation:
    """Evaluate a model. The answer comes at once; the evaluation's status tells the rest. Its events and its
    log are at `/v1/fine_tuning/jobs/{evaluation_id}/events` and `/logs`."""

    def make() -> Evaluation:
        job = create_evaluation(database, settings, body, owner, repeat)
        request.app.state.dispatcher.wake()
        return Evaluation.of(job)

    return once(database, repeat, make, Evaluation.model_validate)


@router.get("")
def list_evaluations(
    owner: OwnerDep, session: ReaderDep, after: After = None, limit: Limit = 20
) -> EvaluationList:
    """Evaluations, newest first."""
    rows, more = newest_first(session, JobRow, visible_evaluations(owner), after, limit)
    return EvaluationList(data=[Evaluation.of(row) for row in rows], has_more=more)


@router.get("/{evaluation_id}")
def retrieve_evaluation(evaluation_id: EvaluationPath, owner: OwnerDep, session: ReaderDep) -> Evaluation:
    """One evaluation, with what it has found."""
    return Evaluation.of(find_evaluation(session, evaluation_id, owner))


@router.get("/{evaluation_id}/items", response_class=FileResponse, responses=content(_JSON_LINES))
def evaluation_items(
    evaluation_id: EvaluationPath, owner: OwnerDep, settings: SettingsDep, session: ReaderDep
) -> FileResponse:
    """What became of each question, as JSON Lines: answers, log-likelihoods, and what each metric says."""
    job = find_evaluation(session, evaluation_id, owner)
    path = settings.jobs_dir / job.id / OUTPUT / _ITEMS
    if job.status != "succeeded" or not path.is_file():
        raise NotFound(f"The evaluation {job.id} is {job.status} and has no items.", param="evaluation_id")
    return FileResponse(path, media_type=_JSON_LINES, filename=f"{job.id}.jsonl")


@router.post("/{evaluation_id}/cancel")
def cancel_evaluation(
    evaluation_id: EvaluationPath, request: Request, owner: OwnerDep, session: SessionDep
) -> Evaluation:
    """Stop one evaluation. Cancelling it again changes nothing; one that has ended stays as it is."""
    job = control.cancel(session, find_evaluation(session, evaluation_id, owner))
    session.commit()
    request.app.state.dispatcher.wake()
    return Evaluation.of(job)


@router.delete("/{evaluation_id}")
def remove_evaluation(
    evaluation_id: EvaluationPath, owner: OwnerDep, settings: SettingsDep, database: DatabaseDep
) -> EvaluationDeleted:
    """Remove an evaluation that has ended, with its items, events and log."""
    with database.reading() as session:
        find_evaluation(session, evaluation_id, owner)
    delete_job(database, settings, evaluation_id, owner)
    return EvaluationDeleted(id=evaluation_id)
