"""A finished training's ``step_metrics.csv``: its losses as a file, where OpenAI's clients look for them."""

from __future__ import annotations

import csv
import io
import time
import uuid
from typing import Any

from sqlalchemy import select

from comps.cores.errors import TooLarge
from comps.finetuning.store.blobs import Blobs
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import EventRow, FileRow, JobRow

PURPOSE = "fine-tune-results"
_COLUMNS = ("step", "train_loss", "valid_loss", "learning_rate", "trained_tokens")


def write_step_metrics(database: Database, blobs: Blobs, job: JobRow) -> FileRow | None:
    """Write the metrics that the job's events tell; returns the row to add, or ``None`` when there are none.

    A line for each step that told something, the last told value where a resumed run told it again. Raises
    :class:`InsufficientStorage` on a full disk.
    """
    with database.reading() as session:
        told = select(EventRow.data).where(EventRow.job_id == job.id, EventRow.type == "metrics")
        lines = _by_step(list(session.scalars(told.order_by(EventRow.sequence))))
    if not lines:
        return None
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    content = text.getvalue().encode()
    # Of the job's own id, so that whoever finishes a job again after a crash writes the same file again.
    file_id = f"file-{uuid.uuid5(uuid.NAMESPACE_OID, f'{job.id}:{PURPOSE}')}"
    blob = blobs.writer(file_id, len(content), TooLarge("the metrics do not fit into themselves"))
    try:
        blob.write(content)
        blob.publish()
    finally:
        blob.discard()
    return FileRow(
        id=file_id, filename="step_metrics.csv", purpose=PURPOSE, bytes=blob.size, sha256=blob.sha256,
        created_at=time.time(), owner=job.owner,
    )  # fmt: skip


def _by_step(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    steps: dict[int, dict[str, Any]] = {}
    for data in told:
        steps.setdefault(int(data["step"]), {}).update(data)
    return [steps[step] for step in sorted(steps)]
