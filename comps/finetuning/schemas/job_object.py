"""The fine-tuning job object: OpenAI's fields in their order, then ours."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from comps.finetuning.settings import Settings
from comps.finetuning.store.tables import JobRow
from comps.tuning.rundir import OUTPUT


def whole(seconds: float | None) -> int | None:
    """A time as OpenAI's clients expect it: whole Unix seconds."""
    return None if seconds is None else int(seconds)


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class FineTuningJob(BaseModel):
    """``id`` must stay the first field: old scripts look for ``{"id":"ft-job`` at the start of the body."""

    id: str
    created_at: int
    error: JobError | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: dict[str, Any]
    model: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    organization_id: str = ""
    result_files: list[str]
    seed: int
    status: str
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[dict[str, Any]]
    metadata: dict[str, str]
    method: dict[str, Any]

    # The same as id, so that a pipeline can pass a job on to what takes a fine_tuning_job_id.
    fine_tuning_job_id: str
    suffix: str | None
    started_at: int | None
    priority: int
    time_limit: float | None
    retry_limit: int | None
    output_dir: str
    progress: dict[str, Any]
    warnings: list[str]

    @classmethod
    def of(cls, row: JobRow, settings: Settings, warnings: tuple[str, ...] = ()) -> FineTuningJob:
        """The object of a row; ``warnings`` are added to those of the job."""
        return cls(
            id=row.id,
            created_at=int(row.created_at),
            error=JobError.model_validate(row.error) if row.error else None,
            fine_tuned_model=row.fine_tuned_model,
            finished_at=whole(row.finished_at),
            hyperparameters=row.hyperparameters,
            model=row.model,
            result_files=(row.result or {}).get("result_files", []),
            seed=row.seed,
            status=row.status,
            trained_tokens=row.trained_tokens,
            training_file=row.training_file or "",
            validation_file=row.validation_file,
            estimated_finish=whole(row.estimated_finish),
            integrations=row.request.get("integrations") or [],
            metadata=row.job_metadata,
            method={"type": "supervised", "supervised": {"hyperparameters": row.hyperparameters}},
            fine_tuning_job_id=row.id,
            suffix=row.suffix,
            started_at=whole(row.started_at),
            priority=row.priority,
            time_limit=row.time_limit,
            retry_limit=row.retry_limit,
            output_dir=str(settings.jobs_dir / row.id / OUTPUT),
            progress=row.progress,
            warnings=[*row.warnings, *warnings],
        )


class JobList(BaseModel):
    """One page of jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool


class JobDeleted(BaseModel):
    id: str
    object: Literal["fine_tuning.job.deleted"] = "fine_tuning.job.deleted"
    deleted: bool = True
