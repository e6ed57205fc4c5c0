"""The checkpoint object of a fine-tuning job."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from comps.finetuning.store.tables import CheckpointRow


class CheckpointMetrics(BaseModel):
    """Losses are means per token of the loss; more values may come with them."""

    model_config = ConfigDict(extra="allow")

    step: int
    train_loss: float | None = None
    valid_loss: float | None = None


class JobCheckpoint(BaseModel):
    """``fine_tuned_model_checkpoint`` is the checkpoint's directory on the server; it is what
    ``General.resume_from_checkpoint`` takes."""

    id: str
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    step_number: int

    @classmethod
    def of(cls, row: CheckpointRow) -> JobCheckpoint:
        metrics: dict[str, Any] = row.metrics | {"step": row.step}
        return cls(
            id=row.id,
            created_at=int(row.created_at),
            fine_tuned_model_checkpoint=row.path,
            fine_tuning_job_id=row.job_id,
            metrics=CheckpointMetrics.model_validate(metrics),
            step_number=row.step,
        )


class CheckpointList(BaseModel):
    """One page of checkpoints, newest first."""

    object: Literal["list"] = "list"
    data: list[JobCheckpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool
