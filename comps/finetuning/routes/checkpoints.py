"""The checkpoints of a job, for OpenAI's clients and for OPEA's."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import select

from comps.finetuning.dependencies import OwnerDep, ReaderDep
from comps.finetuning.jobs.find import find_job
from comps.finetuning.routes.jobs import JobPath
from comps.finetuning.routes.pages import After, Limit, newest_first
from comps.finetuning.schemas.checkpoints import CheckpointList, JobCheckpoint
from comps.finetuning.schemas.jobs import JobId
from comps.finetuning.store.tables import CheckpointRow

router = APIRouter(prefix="/v1", tags=["checkpoints"])


@router.get("/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints")
def list_checkpoints(
    fine_tuning_job_id: JobPath,
    owner: OwnerDep,
    session: ReaderDep,
    after: After = None,
    limit: Limit = 10,
) -> CheckpointList:
    """Checkpoints, newest first."""
    job = find_job(session, fine_tuning_job_id, owner)
    query = select(CheckpointRow).where(CheckpointRow.job_id == job.id)
    rows, more = newest_first(session, CheckpointRow, query, after, limit)
    data = [JobCheckpoint.of(row) for row in rows]
    return CheckpointList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=more,
    )


@router.post("/finetune/list_checkpoints")
def list_checkpoints_by_body(body: JobId, owner: OwnerDep, session: ReaderDep) -> list[JobCheckpoint]:
    """All checkpoints as a bare array, newest last: what OPEA's clients read."""
    job = find_job(session, body.fine_tuning_job_id, owner)
    query = select(CheckpointRow).where(CheckpointRow.job_id == job.id).order_by(CheckpointRow.step)
    return [JobCheckpoint.of(row) for row in session.scalars(query)]
