"""Evaluations: what is asked for, and the object that tells how it stands."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from comps.finetuning.schemas.adapters import Version
from comps.finetuning.schemas.tolerant import Count, Integer, Tolerant
from comps.finetuning.schemas.training import Seed, WorkerResources
from comps.finetuning.store.tables import JobRow
from comps.tuning.spec import MetricName

_FILE = "An uploaded file of questions: its id, or its name (the newest of it)"


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class EvaluationRequest(Tolerant):
    """Which model, on which questions, by which metrics.

    ``model`` is only looked at without a ``fine_tuning_job_id``, since a job object, passed on as it is, has
    its base model there.
    """

    model: str | None = Field(
        None, max_length=1000, description="A base model, an adapter or a merged one, by its id"
    )
    fine_tuning_job_id: str | None = Field(None, max_length=200)
    adapter_version: Version | None = Field(
        None,
        description="Of a super-adapter: `heuristic`, `minimal`, `maximal`, `learned`, what a search has "
        "found, or one that was extracted",
    )
    sub_adapter_version: Version | None = Field(None, description="Another name of `adapter_version`")
    # Without fail_fast a long list of nonsense is a hundred thousand errors.
    custom_config: Annotated[list[Integer], Field(max_length=100_000, fail_fast=True)] | None = Field(
        None, description="Ranks to evaluate a super-adapter at: index = group * layers + layer"
    )
    search_id: str | None = Field(
        None, max_length=200, description="The search that found `best` or `pareto-<k>`; absent: the newest"
    )
    file: str | None = Field(None, min_length=1, max_length=1024, description=_FILE)
    task: str | None = Field(None, min_length=1, max_length=100, description="A built-in task")
    metrics: (
        Annotated[list[MetricName], BeforeValidator(_as_list), Field(min_length=1, max_length=8)] | None
    ) = Field(None, description="Absent: those that suit the questions")
    metric: MetricName | None = Field(None, description="The same for a single one")
    choices: Literal["labels", "texts"] = Field(
        "labels", description="What LLM-Adapters' questions are answered with: `answer2`, or its text"
    )
    limit: Count | None = Field(None, description="Draw so many questions")
    seed: Seed = Field(42, description="Decides which questions `limit` draws")
    max_length: Annotated[Integer, Field(ge=2, le=1_000_000)] = Field(
        2048, description="Tokens of a row, for loss, perplexity and token_accuracy"
    )
    max_new_tokens: Annotated[Integer, Field(ge=1, le=100_000)] = Field(
        256, description="Of a generated answer"
    )
    batch_size: Annotated[Integer, Field(ge=1, le=4096)] = Field(
        16, description="Answers generated at a time"
    )
    resources_per_worker: WorkerResources = WorkerResources()
    priority: int = Field(0, ge=-100, le=100, description="Jobs of higher priority begin first")

    @model_validator(mode="after")
    def _no_contradiction(self) -> EvaluationRequest:
        if self.metrics and self.metric and self.metrics != [self.metric]:
            raise ValueError("metric and metrics differ; give one of them")
        if self.metrics and len(set(self.metrics)) < len(self.metrics):
            raise ValueError("metrics names one twice")
        return self


class MetricValue(BaseModel):
    """``stderr`` is null for a single question."""

    value: float
    stderr: float | None


class Evaluation(BaseModel):
    """One evaluation. ``config`` are the ranks at which a super-adapter is evaluated; ``metrics`` and
    ``items`` (how many questions) are there once it has succeeded."""

    id: str
    object: Literal["evaluation"] = "evaluation"
    created_at: int
    finished_at: int | None
    status: str
    model: str
    fine_tuning_job_id: str | None
    adapter_version: str | None
    config: list[int] | None
    file: str | None
    task: str | None
    seed: int
    metrics: dict[str, MetricValue] | None
    items: int | None
    result: dict[str, Any] | None
    progress: dict[str, Any]
    estimated_finish: int | None
    error: dict[str, Any] | None
    warnings: list[str]

    @classmethod
    def of(cls, job: JobRow) -> Evaluation:
        result = job.result or {}
        return cls(
            id=job.id,
            created_at=int(job.created_at),
            finished_at=int(job.finished_at) if job.finished_at else None,
            status=job.status,
            model=job.request.get("model") or job.model,
            fine_tuning_job_id=job.request.get("fine_tuning_job_id"),
            adapter_version=job.version,
            config=job.spec["config"],
            file=job.training_file,
            task=job.spec["task"],
            seed=job.seed,
            metrics=result.get("metrics"),
            items=result.get("items"),
            result={key: value for key, value in result.items() if key != "outcome"} or None,
            progress=job.progress,
            estimated_finish=int(job.estimated_finish) if job.estimated_finish else None,
            error=job.error,
            warnings=job.warnings,
        )


class EvaluationList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Evaluation]
    has_more: bool


class EvaluationDeleted(BaseModel):
    id: str
    object: Literal["evaluation"] = "evaluation"
    deleted: bool = True
