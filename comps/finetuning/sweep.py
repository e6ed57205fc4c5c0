"""Frees the disk of what nobody can name any more: expired files, and what a crash left half-done."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from comps.cores.errors import ServiceError
from comps.finetuning.jobs.find import needs_file
from comps.finetuning.jobs.half_written import remove_half_written
from comps.finetuning.settings import Settings
from comps.finetuning.store.blobs import Blobs
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import FileRow, JobRow

log = logging.getLogger(__name__)

DELETED = ".deleted-"  # directories of deleted models, among those of jobs and of adapters
_INTERVAL_SECONDS = 3600


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


def tidy(settings: Settings, database: Database, blobs: Blobs) -> None:
    """Finish what the last service began. Only for the start, before any request."""
    remove_expired(database, blobs)
    with database.reading() as session:
        known = set(session.scalars(select(FileRow.id)))
    if orphans := blobs.tidy(known):
        log.warning(
            "the database knows nothing of %d files (is FINETUNING_DATABASE_URL right?); they are now in %s",
            len(orphans),
            blobs.orphaned,
        )
    for area in ("jobs", "adapters"):
        for directory in (settings.data_dir / area).glob(f"{DELETED}*"):
            shutil.rmtree(directory)


async def sweep_hourly(settings: Settings, database: Database, blobs: Blobs) -> None:
    """Remove what has expired and what was left half-written, now and every hour until cancelled."""
    while True:
        try:
            await asyncio.to_thread(remove_expired, database, blobs)
            await asyncio.to_thread(remove_half_written, database, settings)
        except (ServiceError, SQLAlchemyError, OSError) as error:
            log.warning("the disk could not be swept, and will be again in an hour: %s", error)
        await asyncio.sleep(_INTERVAL_SECONDS)
