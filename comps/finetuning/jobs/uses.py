"""Who still needs an adapter, a model or a checkpoint: asked before it is deleted."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, SQLColumnExpression, or_, select
from sqlalchemy.orm import Session

from comps.cores.errors import Conflict
from comps.finetuning.jobs.states import ACTIVE
from comps.finetuning.owner import Owner
from comps.finetuning.store.tables import JobRow, ModelRow

# Where a run's spec says what directories it reads.
_INPUTS: tuple[Any, ...] = (("base_model", "path"), "adapter", "super_adapter", "resume_from")


def is_in(path: SQLColumnExpression[str], directory: str) -> ColumnElement[bool]:
    """The condition that a path is a directory, or leads into it."""
    return or_(path == directory, path.startswith(f"{directory}/", autoescape=True))


def check_not_read(session: Session, thing: str, directory: str, owner: Owner, param: str) -> None:
    """Raises :class:`Conflict` when a job that has not ended reads something in ``directory``. ``thing`` is
    how the message calls what was to be deleted."""
    reads = or_(*(is_in(JobRow.spec[name].as_string(), directory) for name in _INPUTS))
    job = session.scalar(select(JobRow).where(reads, JobRow.status.in_(ACTIVE)).limit(1))
    if job is not None:
        raise Conflict(f"{thing} is used by {shown(job, owner)}, which has not ended.", param=param)


def check_not_a_base(
    session: Session, thing: str, models: Collection[str], directory: str | None, owner: Owner, param: str
) -> None:
    """Raises :class:`Conflict` when an adapter would lose its base model.

    ``models`` are the ids that go: adapters that were registered (and what was made of these) know their
    base model by its id. ``directory`` is what goes with them, if anything: adapters that were trained
    here know their base model by its directory.
    """
    known = ModelRow.job_id.is_(None) & ModelRow.base_model.in_(models)
    if directory is not None:
        trained = select(JobRow.id).where(is_in(JobRow.spec["base_model", "path"].as_string(), directory))
        known |= ModelRow.job_id.in_(trained.where(JobRow.kind == "fine_tuning"))
    other = session.scalar(select(ModelRow).where(known, ModelRow.id.not_in(models)).limit(1))
    if other is not None:
        raise Conflict(
            f"{thing} is the base model of {shown(other, owner)}: delete that model first.", param=param
        )


def shown(row: JobRow | ModelRow, owner: Owner) -> str:
    """How a message calls a job or a model: by its id, unless it is not the caller's to know."""
    if isinstance(row, ModelRow):
        return f"the model {row.id!r}" if owner.sees(row.owner) else "a model of another API key"
    return f"the job {row.id}" if owner.sees(row.owner) else "a job of another API key"
