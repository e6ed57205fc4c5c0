"""Read what a run has written: its events file into rows, and its result file for the end state."""

from __future__ import annotations

import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from comps.finetuning.store.tables import CheckpointRow, EventRow, JobRow
from comps.tuning import rundir

logger = logging.getLogger(__name__)

# At most this much of an events file becomes rows in one transaction (bytes).
CHUNK = 256 * 1024


def read_result(directory: Path) -> dict[str, Any] | None:
    """The run's result, or ``None`` while there is none. It is written whole or not at all."""
    path = directory / rundir.RESULT
    if not path.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:  # it was written whole, so it was damaged since
        return {"outcome": "failed", "error": {"code": "server_error", "message": f"{path.name}: {error}"}}
    return result


def follow(session: Session, job: JobRow, directory: Path) -> bool:
    """Turn the next whole lines of ``events.jsonl`` into rows and remember the offset, in one transaction,
    which the caller commits: so no line is read twice, and none left out. Returns whether there was any.
    """
    path = directory / rundir.EVENTS
    if not path.exists():
        return False
    with open(path, "rb") as stream:
        stream.seek(job.events_offset)
        chunk = stream.read(CHUNK)
        if b"\n" not in chunk and len(chunk) == CHUNK:  # one line longer than a chunk
            chunk += stream.readline()
        # The offset outlives a power cut; so must the lines before it, or others would take their place.
        os.fsync(stream.fileno())
    whole = chunk[: chunk.rfind(b"\n") + 1]
    offset = job.events_offset
    for line in whole.splitlines(keepends=True):
        _record(session, job, offset, line)
        offset += len(line)
    job.events_offset = offset
    return bool(whole)


def _record(session: Session, job: JobRow, offset: int, line: bytes) -> None:
    try:
        event = json.loads(line)
        message, data = str(event["message"]), dict(event.get("data") or {})
        level, kind = str(event.get("level", "info")), str(event.get("type", "message"))
        created_at = float(event["created_at"])
    except (ValueError, KeyError, TypeError):
        # A line torn by a crash. The run goes on; so do we, and the file still has it for people.
        if line.strip():
            logger.warning("job %s: unreadable event at byte %d", job.id, offset)
        return
    session.add(
        EventRow(
            id=f"ftevent-{uuid.uuid5(uuid.NAMESPACE_OID, f'{job.id}:{offset}')}",
            job_id=job.id, created_at=created_at, level=level, type=kind, message=message, data=data,
            source_offset=offset,
        )
    )  # fmt: skip
    if kind in ("metrics", "progress"):
        _progress(job, data, created_at)
    elif kind == "checkpoint":
        _checkpoint(session, job, data, created_at)


def _progress(job: JobRow, data: dict[str, Any], created_at: float) -> None:
    """``data`` has ``step``, ``total_steps`` and, once it is known, ``seconds_left`` (from the event on);
    ``saved`` says that a run that died now would go on from here."""
    job.progress = {**job.progress, **data}
    # What is left of a paused job's last lines tells nothing about when it will end.
    if (left := data.get("seconds_left")) is not None and job.status == "running":
        job.estimated_finish = created_at + float(left)
    if data.get("saved"):
        job.failures = 0  # as after a checkpoint
    if (tokens := data.get("trained_tokens")) is not None:
        job.trained_tokens = int(tokens)


def _checkpoint(session: Session, job: JobRow, data: dict[str, Any], created_at: float) -> None:
    step = int(data["step"])
    row = session.scalar(select(CheckpointRow).filter_by(job_id=job.id, step=step))
    if row is None:
        row = CheckpointRow(id=f"ftckpt-{uuid.uuid5(uuid.NAMESPACE_OID, f'{job.id}:{step}')}", job_id=job.id)
        session.add(row)
    # A run that was resumed writes a checkpoint of the same step again: the same one, as it was.
    row.step, row.path, row.metrics, row.created_at = step, str(data["path"]), data["metrics"], created_at
    session.execute(
        delete(CheckpointRow).where(
            CheckpointRow.job_id == job.id, CheckpointRow.step.in_(data.get("removed", []))
        )
    )
    job.failures = job.losses = 0  # the run moves: deaths before this one no longer count against it
