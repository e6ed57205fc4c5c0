"""Frees the disk of what nobody can use any more: expired files and uploads, what a crash left half-done."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from sqlalchemy import delete, select
from sqlalchemy.exc import SQLAlchemyError

from comps.cores.errors import ServiceError
from comps.finetuning.jobs.find import needs_file
from comps.finetuning.jobs.half_written import remove_half_written
from comps.finetuning.jobs.repeats import forget_old
from comps.finetuning.settings import Settings
from comps.finetuning.store.blobs import Blobs
from comps.finetuning.store.database import Database
from comps.finetuning.store.removal import settle
from comps.finetuning.store.tables import FileRow, JobRow, ModelRow, PartRow, UploadRow
from comps.finetuning.uploads import forget_parts

log = logging.getLogger(__name__)

_INTERVAL_SECONDS = 3600
# So long after its last hour one can still ask what became of an upload.
_UPLOADS_KEPT_SECONDS = 24 * 3600


def remove_expired(database: Database, blobs: Blobs) -> None:
    """Remove expired files that no unfinished job reads."""
    needed = select(JobRow.id).where(needs_file(FileRow.id)).exists()
    with database.session() as session:
        expired = session.scalars(select(FileRow).where(FileRow.expires_at <= time.time(), ~needed)).all()
        for row in expired:
            session.delete(row)
    for row in expired:
        blobs.delete(row.id)
    if expired:
        log.info("removed %d expired files", len(expired))


def remove_expired_uploads(database: Database, blobs: Blobs) -> None:
    """End the uploads whose hour is over, remove their parts, and forget those that ended long ago."""
    now = time.time()
    old = UploadRow.expires_at <= now - _UPLOADS_KEPT_SECONDS
    with database.session() as session:
        pending = select(UploadRow).where(UploadRow.status == "pending", UploadRow.expires_at <= now)
        expired = list(session.scalars(pending.with_for_update()))
        parts = []
        for upload in expired:
            upload.status = "expired"
            parts += forget_parts(session, upload)
        session.flush()
        session.execute(delete(UploadRow).where(old))
    for part_id in parts:
        blobs.delete(part_id)
    if expired:
        log.info("removed the %d parts of %d expired uploads", len(parts), len(expired))


def tidy(settings: Settings, database: Database, blobs: Blobs) -> None:
    """Finish what the last service began. Only for the start, before any request."""
    with database.reading() as session:
        begun = select(UploadRow.file_id).where(UploadRow.status != "completed")
        unfinished = {file_id for file_id in session.scalars(begun) if file_id}
    remove_expired(database, blobs)
    remove_expired_uploads(database, blobs)
    forget_old(database)
    with database.reading() as session:
        known = {*session.scalars(select(FileRow.id)), *session.scalars(select(PartRow.id))}
    if orphans := blobs.tidy(known, unfinished):
        log.warning(
            "the database knows nothing of %d files (is FINETUNING_DATABASE_URL right?); they are now in %s",
            len(orphans),
            blobs.orphaned,
        )

    def is_named(directory: Path) -> bool:
        """Whether a row still names this directory of a job or a model."""
        job = select(JobRow.id).where(JobRow.id == directory.name)
        model = select(ModelRow.id).where(ModelRow.path == str(directory))
        with database.reading() as session:
            return bool(session.scalar(job if directory.parent == settings.jobs_dir else model))

    for area in (settings.jobs_dir, settings.data_dir / "adapters"):
        settle(area, is_named)


async def sweep_hourly(settings: Settings, database: Database, blobs: Blobs) -> None:
    """Remove what has expired, is too old or was left half-written, now and every hour until cancelled."""
    while True:
        try:
            await asyncio.to_thread(remove_expired, database, blobs)
            await asyncio.to_thread(forget_old, database)
            await asyncio.to_thread(remove_expired_uploads, database, blobs)
            await asyncio.to_thread(remove_half_written, database, settings)
        except (ServiceError, SQLAlchemyError, OSError) as error:
            log.warning("the disk could not be swept, and will be again in an hour: %s", error)
        await asyncio.sleep(_INTERVAL_SECONDS)
