"""The one loop that moves jobs: validate, begin, attend, end.

It keeps no knowledge of its own: each round reads the unfinished jobs from the database and compares
them with the evidence (result file, Ray). So a service that starts anew needs no special recovery;
its first round is the reconciliation. Order within a round: what ended is finished before what waits
is started, so that its cores are free.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from comps.finetuning.cluster import Cluster, ClusterUnavailable
from comps.finetuning.jobs import room
from comps.finetuning.jobs.finish import SERVER_ERROR, fail
from comps.finetuning.jobs.runs import Runs
from comps.finetuning.jobs.secrets import Secrets
from comps.finetuning.jobs.states import ACTIVE, TERMINAL, add_event, transition
from comps.finetuning.jobs.validate import Verdict, validate
from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import JobRow
from comps.tuning.failpoints import failpoint
from comps.tuning.spec import ResourcesSpec

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Dispatcher:
    """``start()`` and ``stop()`` from the application's lifespan; ``wake()`` after a new or changed row."""

    interval = 0.5  # seconds between rounds when nobody wakes the loop
    small_at_once = 2  # extractions and merges, which take memory but ask for no cores
    validations_at_once = 2
    longest_pause = 60.0  # seconds between two tries to handle a job that gives trouble

    def __init__(self, database: Database, settings: Settings, cluster: Cluster, secrets: Secrets) -> None:
        self._database, self._cluster, self._secrets = database, cluster, secrets
        self._runs = Runs(database, settings, cluster, secrets)
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._validations: dict[str, asyncio.Task[None]] = {}
        self._validating = asyncio.Semaphore(self.validations_at_once)
        self._too_big: set[str] = set()
        self._troubled: dict[str, tuple[float, float]] = {}  # job -> (when to try again, the pause before)

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="dispatcher")

    async def stop(self) -> None:
        """Stop moving jobs. What runs in a Ray of others runs on and is taken up by the next start; what
        runs in our own, which ends with us, saves a checkpoint and is queued."""
        tasks = [task for task in (self._task, *self._validations.values()) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._cluster.local:
            jobs = await asyncio.to_thread(self._unfinished)
            await self._runs.stop([job for job in jobs if _has_run(job)])

    def wake(self) -> None:
        """Have the next round begin now. For callers in the event loop's thread or any other."""
        if self._task:
            self._task.get_loop().call_soon_threadsafe(self._wake.set)

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._round()
            except ClusterUnavailable as error:
                logger.warning("waiting for Ray: %s", error)
            except Exception:
                # The loop must outlive whatever keeps it from reading the jobs at all; the log has the
                # traceback, and the next round tries again.
                logger.exception("a dispatcher round failed")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self.interval)

    async def _round(self) -> None:
        jobs = await asyncio.to_thread(self._unfinished)
        for job in jobs:
            if job.status == "validating_files" and job.id not in self._validations:
                self._validations[job.id] = asyncio.create_task(self._validate(job))
            elif _has_run(job):
                if await self._alone(job, self._runs.attend):
                    self.wake()
            elif job.status in TERMINAL:
                await self._alone(job, self._runs.end)
        if self._cluster.ready and any(job.status == "queued" for job in jobs):
            await self._begin_waiting(await asyncio.to_thread(self._unfinished))

    async def _alone(self, job: JobRow, work: Callable[[JobRow], Awaitable[T]]) -> T | None:
        """Do ``work`` on one job so that its trouble (a full disk, a directory that cannot be read, a bug)
        is its own: others go on, and it is tried again after a pause that doubles."""
        until, pause = self._troubled.get(job.id, (0.0, self.interval))
        if time.monotonic() < until:
            return None
        try:
            done = await work(job)
        except ClusterUnavailable:
            raise
        except Exception:
            pause = min(2 * pause, self.longest_pause)
            self._troubled[job.id] = (time.monotonic() + pause, pause)
            logger.exception("the %s job %s could not be handled; again in %g s", job.status, job.id, pause)
            return None
        self._troubled.pop(job.id, None)
        return done

    def _unfinished(self) -> list[JobRow]:
        """Active jobs, and ended ones whose processes may still be there; in queue order."""
        with self._database.reading() as session:
            ended = JobRow.status.in_(TERMINAL) & JobRow.submission_id.is_not(None) & ~JobRow.stopped
            query = select(JobRow).where(JobRow.status.in_(ACTIVE) | ended)
            return list(session.scalars(query.order_by(JobRow.priority.desc(), JobRow.sequence)))

    def _awaits_verdict(self, job: JobRow) -> bool:
        with self._database.reading() as session:
            status = session.scalar(select(JobRow.status).where(JobRow.id == job.id))
        return status == "validating_files"

    async def _validate(self, job: JobRow) -> None:
        try:
            async with self._validating:
                if not await asyncio.to_thread(self._awaits_verdict, job):
                    return  # it was cancelled, paused or deleted while it waited
                verdict = await asyncio.to_thread(_verdict, job, self._secrets)
            failpoint("verdict-reached")

            def change(session: Session, row: JobRow) -> None:
                for warning in verdict.warnings:
                    add_event(session, row, warning, level="warn")
                if verdict.error:
                    fail(session, row, *verdict.error)
                else:
                    transition(session, row, "queued", "Files validated, the job is queued")

            await self._runs.change(job, change)
            self.wake()
        except Exception:
            logger.exception("the verdict on %s was not written; its files are checked again", job.id)
            await asyncio.sleep(self._runs.ask_interval)
        finally:
            self._validations.pop(job.id, None)

    async def _begin_waiting(self, jobs: list[JobRow]) -> None:
        """Begin queued jobs in order while there is room. One that has to wait for cores holds back those
        behind it (first in, first out); the small kinds wait for each other only."""
        nodes = room.nodes(self._cluster.nodes())
        held = {job.id: room.held_by(job) for job in jobs if _holds_cores(job)}
        small = sum(job.status == "running" and not _asks_for_cores(job) for job in jobs)
        waits = False
        for job in jobs:
            if not _asks_for_cores(job):
                if job.status == "queued" and small < self.small_at_once:
                    small += 1
                    await self._alone(job, partial(self._runs.begin, wanted=None))
            elif job.status == "validating_files":
                waits = True
            elif job.status == "queued" and not waits:
                wanted = room.demand(ResourcesSpec.model_validate(job.spec["resources"]), nodes)
                if reason := room.impossible(wanted, nodes):
                    await self._refuse(job, reason)
                elif room.fits(wanted, nodes, (held[other] for other in held if other != job.id)):
                    held[job.id] = wanted
                    await self._alone(job, partial(self._runs.begin, wanted=wanted))
                else:
                    waits = True

    async def _refuse(self, job: JobRow, reason: str) -> None:
        """Fail a job that asks for more than there is; where nodes may yet come, let it wait with a
        warning, and let others pass."""
        if self._cluster.local:
            code, param = "insufficient_resources", "resources_per_worker"
            if job.kind == "fine_tuning":
                param = f"Training.{param}"
            await self._runs.change(job, partial(fail, message=reason, code=code, param=param))
        elif job.id not in self._too_big:
            self._too_big.add(job.id)
            warning = f"The job waits for the cluster to grow: {reason}"
            await self._runs.change(job, lambda s, row: add_event(s, row, warning, level="warn"))


def _has_run(job: JobRow) -> bool:
    """Whether there is a run to be followed: of a running job, or of a paused one that has not left yet."""
    return job.status == "running" or (
        job.status == "paused" and job.submission_id is not None and not job.stopped
    )


def _asks_for_cores(job: JobRow) -> bool:
    """Whether a job needs cores of its own, as all do but extractions and merges."""
    return "resources" in job.spec


def _holds_cores(job: JobRow) -> bool:
    """Whether such a job's processes are there, as far as is known: it runs, or was paused, paused and queued
    again, or cancelled, and has not left yet."""
    return job.cpus is not None and not job.stopped


def _verdict(job: JobRow, secrets: Secrets) -> Verdict:
    """:func:`validate`, whatever happens: a job must not wait for ever, nor others behind it."""
    try:
        return validate(job, secrets)
    except Exception as error:
        logger.exception("the validation of %s failed unexpectedly", job.id)
        return Verdict((f"The files could not be checked: {error}", SERVER_ERROR, "training_file"))
