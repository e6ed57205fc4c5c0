"""Turn the evidence of a run's end into the job's end state and the models it gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from comps.finetuning.jobs.states import add_event, transition
from comps.finetuning.store.tables import JobRow, ModelRow
from comps.tuning.sparse.report import filled_zeros

SERVER_ERROR = "server_error"


def finish(session: Session, job: JobRow, result: dict[str, Any]) -> None:
    """Apply a ``result.json`` (see ``comps.tuning.outcome``) to a running job."""
    if result["outcome"] == "failed":
        fail(session, job, **result["error"])
    else:
        _FINISH[job.kind](session, job, result)


def fail(
    session: Session, job: JobRow, message: str, code: str = SERVER_ERROR, param: str | None = None
) -> None:
    """End a job as failed with an error a person can act on."""
    error = {"code": code, "message": message, "param": param}
    transition(session, job, "failed", f"The job failed: {message}", error=error, cpus=None)


def model_name(job: JobRow) -> str:
    """``ft:<base model>:<suffix>:<job id>``, the shape that OpenAI's clients know."""
    return ":".join(["ft", job.model, job.suffix or "", job.id])


def _finish_training(session: Session, job: JobRow, result: dict[str, Any]) -> None:
    name = model_name(job)
    elastic = bool(job.spec["lora"]["groups"])
    sparse = bool(job.spec["lora"].get("sparse"))  # older rows don't say
    session.merge(
        ModelRow(
            id=name, kind="super_adapter" if elastic else "adapter", owner=job.owner, path=result["path"],
            base_model=job.model, job_id=job.id, details={"sparse_adapter": True} if sparse else {},
        )
    )  # fmt: skip
    transition(
        session, job, "succeeded", "The job has successfully completed",
        fine_tuned_model=name, trained_tokens=result["trained_tokens"], result=result, cpus=None,
    )  # fmt: skip


def _finish_adapter(session: Session, job: JobRow, result: dict[str, Any]) -> None:
    """A sub-adapter or a merged model is named after its source: ``<source model>[:<version>][:merged]``."""
    trained = session.scalar(select(JobRow).where(JobRow.id == job.source))
    parts = [(trained and trained.fine_tuned_model) or str(job.source)]
    if job.version:
        parts.append(job.version)
    if job.kind == "merge":
        parts.append("merged")
    name = ":".join(parts)
    details = {key: value for key, value in result.items() if key not in ("outcome", "path")}
    for warning in filled_zeros(result) if job.kind == "merge" else []:
        job.warnings = [*job.warnings, warning]
        add_event(session, job, warning, level="warn")
    session.merge(
        ModelRow(
            id=name, kind="merged" if job.kind == "merge" else "adapter", owner=job.owner,
            path=result["path"], base_model=job.model, job_id=trained.id if trained else None,
            details=details,
        )
    )  # fmt: skip
    transition(
        session, job, "succeeded", f"Written as {name}", fine_tuned_model=name, result=result, cpus=None
    )


def _finish_search(session: Session, job: JobRow, result: dict[str, Any]) -> None:
    """Nothing is made of it yet: extraction takes ``best`` and ``pareto-<k>`` from the result."""
    message = "The search has succeeded: its best sub-adapter is the adapter_version 'best'"
    transition(session, job, "succeeded", message, result=result, cpus=None)


def _finish_base(session: Session, job: JobRow, result: dict[str, Any]) -> None:
    """A new base model, under the name that its request has chosen or was given."""
    name = job.spec["name"]
    details = {
        key: value for key, value in result.items() if key not in ("outcome", "path", "name", "base_model")
    }
    session.merge(
        ModelRow(
            id=name, kind="base", owner=job.owner, path=result["path"], base_model=job.model, job_id=job.id,
            details=details,
        )
    )  # fmt: skip
    transition(
        session, job, "succeeded", f"Written as {name}", fine_tuned_model=name, result=result, cpus=None
    )


def _finish_evaluation(session: Session, job: JobRow, result: dict[str, Any]) -> None:
    """Nothing is made of it; the run's own last event has said what was found."""
    transition(session, job, "succeeded", "The evaluation has succeeded", result=result, cpus=None)


# What success means for each kind of job.
_FINISH: dict[str, Callable[[Session, JobRow, dict[str, Any]], None]] = {
    "fine_tuning": _finish_training,
    "extract": _finish_adapter,
    "merge": _finish_adapter,
    "search": _finish_search,
    "prune": _finish_base,
    "quantize": _finish_base,
    "evaluate": _finish_evaluation,
}
