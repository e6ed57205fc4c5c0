"""The body of a search for sub-adapters, and the object of one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from comps.finetuning.schemas.adapters import SourceRequest
from comps.finetuning.schemas.job_object import JobError, whole
from comps.finetuning.schemas.tolerant import Count
from comps.finetuning.schemas.training import Seed, WorkerResources
from comps.finetuning.settings import Settings
from comps.finetuning.store.tables import JobRow
from comps.tuning.rundir import OUTPUT
from comps.tuning.search.report import FILES

Algorithm = Literal["nsga2", "hill_climbing", "random", "learned"]


class SearchRequest(SourceRequest):
    """Search the ranks of a super-adapter, a finished job's or a registered one."""

    algorithm: Algorithm = "nsga2"
    num_evals: Annotated[Count, Field(le=100_000)] = Field(
        50, description="Evaluations of one sub-adapter on all items, which may be spent in parts"
    )
    population: Annotated[Count, Field(ge=4, le=1000)] = Field(
        20, description="Sub-adapters asked for at a time"
    )
    seed: Seed = 42
    validation_file: str | None = Field(
        None,
        max_length=1024,
        description="A file's id or name; absent: what the job has held out of its training data",
    )
    metric: Literal["acc", "acc_norm", "loss"] | None = Field(
        None, description="Absent: acc_norm where the records have choices, else loss"
    )
    cost: Literal["parameters", "macs"] = "parameters"
    items: Annotated[Count, Field(ge=8, le=100_000)] | None = Field(
        None, description="Items to search on; absent: two thirds of them, at most 300"
    )
    all_items: Annotated[Count, Field(ge=8, le=1_000_000)] | None = Field(
        None, description="Items to score the best on in the end; absent: four times as many, if there are"
    )
    finalists: Annotated[Count, Field(le=100)] = Field(
        5, description="Of the front, how many are scored on more items"
    )
    halving: bool = Field(True, description="False: score every sub-adapter on all items")
    choices: Literal["labels", "texts"] = Field(
        "labels", description="What LLM-Adapters' questions are answered with: `answer2`, or its text"
    )
    resources_per_worker: WorkerResources = WorkerResources()


class SearchJob(BaseModel):
    """A search in its present state, and what it has found once it has succeeded.

    ``best`` and the entries of ``front`` are versions that extraction takes by name. ``fine_tuning_job_id``
    is that of the job searched, so that a pipeline can pass this on to the extraction.
    """

    id: str
    object: Literal["fine_tuning.search"] = "fine_tuning.search"
    created_at: int
    started_at: int | None
    finished_at: int | None
    status: str
    error: JobError | None
    search_id: str
    fine_tuning_job_id: str | None
    model: str | None
    validation_file: str | None
    algorithm: Algorithm
    num_evals: int
    population: int
    seed: int
    metric: str | None
    cost: str
    progress: dict[str, Any]
    estimated_finish: int | None
    best: dict[str, Any] | None
    front: list[dict[str, Any]]
    references: dict[str, Any]
    finalists: list[dict[str, Any]]
    evaluations: dict[str, Any]
    report_files: list[str] = Field(description="At `/v1/finetune/search/{search_id}/files/{name}`")
    output_dir: str
    warnings: list[str]

    @classmethod
    def of(cls, row: JobRow, settings: Settings) -> SearchJob:
        """The object of a row."""
        spec, result = row.spec, row.result or {}
        from_job = (row.source or "").startswith("ft-job-")
        return cls(
            id=row.id,
            created_at=int(row.created_at),
            started_at=whole(row.started_at),
            finished_at=whole(row.finished_at),
            status=row.status,
            error=JobError.model_validate(row.error) if row.error else None,
            search_id=row.id,
            fine_tuning_job_id=row.source if from_job else None,
            model=None if from_job else row.source,
            validation_file=row.validation_file,
            **{name: spec[name] for name in ("algorithm", "num_evals", "population", "seed", "cost")},
            metric=result.get("metric", spec["metric"]),
            progress=row.progress,
            estimated_finish=whole(row.estimated_finish),
            best=result.get("best"),
            front=result.get("front", []),
            references=result.get("references", {}),
            finalists=result.get("finalists", []),
            evaluations=result.get("evaluations", {}),
            report_files=list(FILES) if row.status == "succeeded" else [],
            output_dir=str(settings.jobs_dir / row.id / OUTPUT),
            warnings=row.warnings,
        )


class SearchList(BaseModel):
    """One page of searches, newest first."""

    object: Literal["list"] = "list"
    data: list[SearchJob]
    has_more: bool


class SearchDeleted(BaseModel):
    id: str
    object: Literal["fine_tuning.search.deleted"] = "fine_tuning.search.deleted"
    deleted: bool = True
