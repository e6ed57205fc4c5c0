"""Frees the disk of what nobody can name any more: expired files, and what a crash left half-done."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from comps.cores.errors import ServiceError
from comps.finetuning.jobs.find import needs_file
from comps.finetuning.jobs.repeats import forget_old
from comps.finetuning.settings import Settings
from comps.finetuning.store.blobs import Blobs
from comps.finetuning.store.database import Database
from comps.finetuning.store.removal import settle
from comps.finetuning.store.tables import FileRow, JobRow, ModelRow

log = logging.getLogger(__name__)

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
    forget_old(database)
    with database.reading() as session:
        known = set(session.scalars(select(FileRow.id)))
    if orphans := blobs.tidy(known):
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


async def sweep_hourly(database: Database, blobs: Blobs) -> None:
    """Remove expired files, and forget old idempotency keys, every hour until cancelled."""
    while True:
        await asyncio.sleep(_INTERVAL_SECONDS)
        try:
            await asyncio.to_thread(remove_expired, database, blobs)
            await asyncio.to_thread(forget_old, database)
        except (ServiceError, SQLAlchemyError, OSError) as error:
            log.warning("what has expired could not be removed, and will be tried again: %s", error)
