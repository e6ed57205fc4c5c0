"""The tables. Times are Unix seconds in UTC; ids are ours and safe as file names."""

from __future__ import annotations

import time
import uuid
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, MetaData, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


def new_id(prefix: str) -> str:
    """A fresh id such as ``ft-job-<uuid4>``."""
    return f"{prefix}-{uuid.uuid4()}"


# Names for all constraints, so that a later migration can change one.
_NAMES = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=_NAMES)
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it as a plain class attribute
        dict[str, Any]: JSON,
        list[Any]: JSON,
        # File sizes and token counts pass 2**31; SQLite's only auto-incrementing type is INTEGER.
        int: BigInteger().with_variant(Integer, "sqlite"),
    }


class FileRow(Base):
    """An uploaded or produced file; its bytes are ``<data dir>/files/<id>``."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)
    filename: Mapped[str]  # the client's name, for display and for look-up by name; never a path
    purpose: Mapped[str]
    bytes: Mapped[int]
    sha256: Mapped[str]
    created_at: Mapped[float] = mapped_column(default=time.time)
    expires_at: Mapped[float | None]
    status: Mapped[str] = mapped_column(default="processed")
    owner: Mapped[str | None]

    __table_args__ = (Index("files_by_name", "filename", "created_at"),)


class JobRow(Base):
    """One run asked for over HTTP: ``kind`` is that of its spec, ``fine_tuning`` for a training.

    All kinds share the states, the queue, the directory layout and the reconciliation. ``spec`` is
    the run's spec as JSON (see ``comps.tuning.spec``), ``request`` what the client sent (without
    secrets).
    """

    __tablename__ = "jobs"

    # Queue order within a priority; also the order of listings.
    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str]
    status: Mapped[str]
    owner: Mapped[str | None]
    priority: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float] = mapped_column(default=time.time)
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]

    model: Mapped[str]  # the base model's name as the client wrote it
    training_file: Mapped[str | None]  # file id; of a pruning, its calibration file
    validation_file: Mapped[str | None]
    suffix: Mapped[str | None]
    seed: Mapped[int] = mapped_column(default=42)
    request: Mapped[dict[str, Any]] = mapped_column(default=dict)
    spec: Mapped[dict[str, Any]] = mapped_column(default=dict)
    hyperparameters: Mapped[dict[str, Any]] = mapped_column(default=dict)
    job_metadata: Mapped[dict[str, Any]] = mapped_column(default=dict)
    warnings: Mapped[list[Any]] = mapped_column(default=list)

    progress: Mapped[dict[str, Any]] = mapped_column(default=dict)
    estimated_finish: Mapped[float | None]
    trained_tokens: Mapped[int | None]
    fine_tuned_model: Mapped[str | None]
    error: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]  # the run's result.json, once it ended

    # For extract, merge and search: where the adapter comes from; the version's name.
    source: Mapped[str | None]  # a job id or a model id
    version: Mapped[str | None]

    # What the dispatcher knows of the run.
    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)  # attempts in a row that died without a new checkpoint
    losses: Mapped[int] = mapped_column(default=0, server_default="0")  # the same, that went with their Ray
    cpus: Mapped[int | None]  # cores that the running attempt holds in the cluster
    submission_id: Mapped[str | None]
    stopped: Mapped[bool] = mapped_column(default=False)  # an ended job's processes are known to be gone
    events_offset: Mapped[int] = mapped_column(default=0)  # bytes of events.jsonl already in the table
    run_seconds: Mapped[float] = mapped_column(default=0.0, server_default="0")  # of attempts that ended
    attempt_started_at: Mapped[float | None]  # of the attempt that runs now

    # What the request sets for this job, where it does not want the service's own rule.
    time_limit: Mapped[float | None]  # seconds of running, over all attempts
    retry_limit: Mapped[int | None]  # further attempts after deaths in a row without a new checkpoint
    secret: Mapped[str | None]  # the request's Hugging Face token, encrypted; gone when the job has ended

    __table_args__ = (Index("jobs_by_status", "status", "priority", "sequence"),)


class EventRow(Base):
    """One event of a job. ``source_offset`` is its byte offset in ``events.jsonl`` (absent for the
    service's own events), so that reading the file again adds nothing."""

    __tablename__ = "events"

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[float] = mapped_column(default=time.time)
    level: Mapped[str] = mapped_column(default="info")
    type: Mapped[str] = mapped_column(default="message")
    message: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)
    source_offset: Mapped[int | None]

    __table_args__ = (UniqueConstraint("job_id", "source_offset"),)


class CheckpointRow(Base):
    """A published checkpoint: ``<job directory>/output/checkpoint-<step>``."""

    __tablename__ = "checkpoints"

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    step: Mapped[int]
    created_at: Mapped[float] = mapped_column(default=time.time)
    path: Mapped[str]
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)

    __table_args__ = (UniqueConstraint("job_id", "step"),)


class ModelRow(Base):
    """A model that clients can name: ``kind`` is ``base``, ``super_adapter``, ``adapter``, ``merged``.

    Base models that merely lie under the models root need no row; they are found there.
    """

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    created_at: Mapped[float] = mapped_column(default=time.time)
    owner: Mapped[str | None]
    path: Mapped[str]
    base_model: Mapped[str | None]
    job_id: Mapped[str | None]
    details: Mapped[dict[str, Any]] = mapped_column(default=dict)


class UploadRow(Base):
    """A file that comes in parts; ``status`` is ``pending``, ``completed``, ``cancelled`` or ``expired``."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(primary_key=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int]  # as announced; the parts must add up to it
    mime_type: Mapped[str]
    status: Mapped[str] = mapped_column(default="pending")
    created_at: Mapped[float] = mapped_column(default=time.time)
    expires_at: Mapped[float]
    file_lifetime: Mapped[float | None]  # seconds that the file will be kept, if not for ever
    file_id: Mapped[str | None]  # the file that it became, or is about to become
    owner: Mapped[str | None]

    def status_at(self, now: float | None = None) -> str:
        """The status at a time (now), which is ``expired`` before anyone has written that down."""
        expired = self.status == "pending" and self.expires_at <= (time.time() if now is None else now)
        return "expired" if expired else self.status


class PartRow(Base):
    """One part of an upload that has not ended; its bytes are a blob of the part's id."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), index=True)
    bytes: Mapped[int]
    created_at: Mapped[float] = mapped_column(default=time.time)


class IdempotencyRow(Base):
    """A POST carried out under an ``Idempotency-Key``, written in the transaction of what it made."""

    __tablename__ = "idempotency_keys"

    owner: Mapped[str] = mapped_column(primary_key=True)  # empty when the service has no keys
    key: Mapped[str] = mapped_column(primary_key=True)
    request: Mapped[str]  # SHA-256 of method, path and body
    answer: Mapped[dict[str, Any]]
    created_at: Mapped[float] = mapped_column(default=time.time)
