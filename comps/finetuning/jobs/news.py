"""Tells those who follow jobs when there are new events: one question to the database for all of them.

Who waits for news holds neither a thread nor a connection, so there may be many.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import EventRow

log = logging.getLogger(__name__)


class News:
    """``start()`` and ``stop()`` from the application's lifespan; the rest in the event loop's thread."""

    interval = 0.3  # seconds between two looks, as long as anyone follows

    def __init__(self, database: Database) -> None:
        self.closed = False  # the service stops: followers end
        self._database = database
        self._bells: dict[str, set[asyncio.Event]] = {}
        self._followed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._watcher = asyncio.create_task(self._watch(), name="news")

    async def stop(self) -> None:
        self._close()
        self._loop = None
        if self._watcher:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)

    def close(self) -> None:
        """Have all followers end. May be called from anywhere, also from a signal handler."""
        if self._loop:
            self._loop.call_soon_threadsafe(self._close)

    @contextmanager
    def bell(self, job_id: str) -> Iterator[asyncio.Event]:
        """Set when the job may have new events, or followers shall end. To miss none, clear it, then read."""
        bell = asyncio.Event()
        self._bells.setdefault(job_id, set()).add(bell)
        self._followed.set()
        try:
            yield bell
        finally:
            self._bells[job_id].discard(bell)
            if not self._bells[job_id]:
                del self._bells[job_id]

    def _close(self) -> None:
        self.closed = True
        self._ring(self._bells)

    def _ring(self, jobs: Collection[str]) -> None:
        for job_id in jobs:
            for bell in self._bells.get(job_id, ()):
                bell.set()

    async def _watch(self) -> None:
        seen: int | None = None  # the newest event of the last look
        while True:
            if not self._bells:
                seen = None
                self._followed.clear()
                await self._followed.wait()
            try:
                newest, jobs = await asyncio.to_thread(self._look, seen)
                # After a while without a look nobody knows what was new; they look for themselves.
                self._ring(self._bells if seen is None else jobs)
                seen = newest
            except SQLAlchemyError as error:
                log.warning("new events could not be looked for, and will be again: %s", error)
            await asyncio.sleep(self.interval)

    def _look(self, seen: int | None) -> tuple[int, Collection[str]]:
        """The newest event there is, and the jobs with events after ``seen``."""
        with self._database.reading() as session:
            if seen is None:
                return session.scalar(select(func.max(EventRow.sequence))) or 0, ()
            query = select(EventRow.job_id, func.max(EventRow.sequence)).where(EventRow.sequence > seen)
            newest = dict(session.execute(query.group_by(EventRow.job_id)).tuples().all())
        return max(newest.values(), default=seen), newest
