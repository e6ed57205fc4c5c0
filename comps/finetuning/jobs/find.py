"""Finding rows for a caller, who sees their own: the one place that says who sees what.

Events, checkpoints and logs are found through their job.
"""

from __future__ import annotations

import time
from pathlib import Path

from sqlalchemy import ColumnElement, Select, SQLColumnExpression, or_, select, true
from sqlalchemy.orm import Session

from comps.cores.errors import InvalidRequest, NotFound
from comps.finetuning import catalog
from comps.finetuning.jobs.states import ACTIVE
from comps.finetuning.owner import Owner
from comps.finetuning.settings import Settings
from comps.finetuning.store.tables import CheckpointRow, FileRow, JobRow, ModelRow, UploadRow
from comps.tuning.spec import ModelSpec

DATA_PURPOSE = "fine-tune"
QUESTIONS_PURPOSES = (DATA_PURPOSE, "evals")

_SHOWN = 80


Owned = type[JobRow] | type[FileRow] | type[ModelRow] | type[UploadRow]


def visible(table: Owned, owner: Owner) -> ColumnElement[bool]:
    """The condition that ``owner`` may see a row: it is theirs, or nobody's, or they see everything."""
    if owner.sees_all:
        return true()
    return or_(table.owner == owner.id, table.owner.is_(None))


def visible_jobs(owner: Owner) -> Select[JobRow]:
    """The fine-tuning jobs of a caller."""
    return select(JobRow).where(JobRow.kind == "fine_tuning", visible(JobRow, owner))


def usable_files(owner: Owner) -> Select[FileRow]:
    """The files of a caller that have not expired."""
    not_expired = or_(FileRow.expires_at.is_(None), FileRow.expires_at > time.time())
    return select(FileRow).where(visible(FileRow, owner), not_expired)


def needs_file(file_id: str | SQLColumnExpression[str]) -> ColumnElement[bool]:
    """The condition that a job reads this file and has not ended."""
    return or_(JobRow.training_file == file_id, JobRow.validation_file == file_id) & JobRow.status.in_(ACTIVE)


# Kinds of jobs whose output is their own; extractions and merges write beside the adapter they are of.
WITH_OUTPUT = ("fine_tuning", "prune", "quantize", "evaluate", "search")


def find_job(session: Session, job_id: str, owner: Owner, param: str = "fine_tuning_job_id") -> JobRow:
    """A fine-tuning job. Raises :class:`NotFound`."""
    job = session.scalar(visible_jobs(owner).where(JobRow.id == job_id))
    if job is None:
        raise NotFound(f"There is no fine-tuning job {job_id[:_SHOWN]!r}.", param=param)
    return job


def find_run(session: Session, job_id: str, owner: Owner) -> JobRow:
    """A job of any kind: all have a state, events and logs. Raises :class:`NotFound`."""
    run = session.scalar(select(JobRow).where(JobRow.id == job_id, visible(JobRow, owner)))
    if run is None:
        raise NotFound(f"There is no job {job_id[:_SHOWN]!r}.", param="fine_tuning_job_id")
    return run


def find_file(session: Session, file_id: str, owner: Owner) -> FileRow:
    """A stored file by its id. Raises :class:`NotFound`."""
    row = session.scalar(usable_files(owner).where(FileRow.id == file_id))
    if row is None:
        raise NotFound(f"There is no file {file_id[:_SHOWN]!r}.", param="file_id")
    return row


def find_upload(session: Session, upload_id: str, owner: Owner) -> UploadRow:
    """An upload in parts, whatever became of it. Raises :class:`NotFound`."""
    row = session.scalar(select(UploadRow).where(UploadRow.id == upload_id, visible(UploadRow, owner)))
    if row is None:
        raise NotFound(f"There is no upload {upload_id[:_SHOWN]!r}.", param="upload_id")
    return row


def find_data_file(
    session: Session, name: str, owner: Owner, param: str, purposes: tuple[str, ...] = (DATA_PURPOSE,)
) -> FileRow:
    """A stored file by its id, or the newest by its name, that was uploaded for one of ``purposes``. By name
    the caller's own go before all that they see besides.

    Raises :class:`NotFound`, or :class:`InvalidRequest` for a file of another purpose.
    """
    own = FileRow.owner.is_not_distinct_from(owner.id)
    newest = FileRow.purpose.in_(purposes).desc(), own.desc(), FileRow.created_at.desc(), FileRow.id
    usable = usable_files(owner)
    row = session.scalar(usable.where(FileRow.id == name)) or session.scalar(
        usable.where(FileRow.filename == name).order_by(*newest).limit(1)
    )
    if row is not None and row.purpose not in purposes:
        raise InvalidRequest(
            f"{param}: the file {name[:_SHOWN]!r} was uploaded with the purpose {row.purpose!r}; "
            f"upload it with the purpose {DATA_PURPOSE!r} to use it as data.",
            param=param,
        )
    if row is None:
        raise NotFound(
            f"{param}: there is no stored file with the id or the name {name[:_SHOWN]!r}; "
            "upload it first with POST /v1/files.",
            param=param,
            code="file_not_found",
        )
    return row


def find_model(session: Session, model_id: str, owner: Owner, *kinds: str) -> ModelRow | None:
    """A model with a row (registered, or made by a job), of one of ``kinds`` or of any."""
    query = select(ModelRow).where(ModelRow.id == model_id, visible(ModelRow, owner))
    return session.scalar(query.where(ModelRow.kind.in_(kinds)) if kinds else query)


def find_base_model(session: Session, settings: Settings, name: str, owner: Owner) -> ModelSpec:
    """A registered base model or a merged one by its id, else what the catalogue knows by that name.

    Raises :class:`InvalidRequest` or :class:`NotFound`.
    """
    if not name:
        raise InvalidRequest("model is missing: name the base model.", param="model")
    if row := find_model(session, name, owner):
        if row.kind not in ("base", "merged"):
            raise InvalidRequest(
                f"model: {name[:_SHOWN]!r} is an adapter; merge it with POST /v1/finetune/merge_adapter, and "
                "name the merged model.",
                param="model",
            )
        own_code = catalog.runs_own_code(settings, Path(row.path))
        return ModelSpec(name=name, path=row.path, trust_remote_code=own_code)
    return catalog.resolve(settings, name, owner.id)


def find_checkpoint(session: Session, name: str, owner: Owner) -> tuple[CheckpointRow, JobRow]:
    """A checkpoint by its id or its ``fine_tuned_model_checkpoint``, and its job. Raises :class:`NotFound`.

    Only what is in the table is found, so a path never leads to another directory.
    """
    query = (
        select(CheckpointRow, JobRow)
        .join(JobRow, JobRow.id == CheckpointRow.job_id)
        .where(or_(CheckpointRow.id == name, CheckpointRow.path == name), visible(JobRow, owner))
    )
    found = session.execute(query).first()
    if found is None:
        raise NotFound(
            f"General.resume_from_checkpoint: there is no checkpoint {name[:_SHOWN]!r}; "
            "POST /v1/finetune/list_checkpoints lists those of a job.",
            param="General.resume_from_checkpoint",
            code="checkpoint_not_found",
        )
    return found[0], found[1]
