"""The one loop that moves jobs: validate, submit, follow, finish, resume, stop.

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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from comps.finetuning.cluster import Cluster, ClusterUnavailable
from comps.finetuning.jobs import room
from comps.finetuning.jobs.finish import fail, finish
from comps.finetuning.jobs.follow import follow, read_result, run_directory
from comps.finetuning.jobs.secrets import Secrets
from comps.finetuning.jobs.states import ACTIVE, IllegalMove, add_event, transition
from comps.finetuning.jobs.validate import validate
from comps.finetuning.schemas.integrations import tracking_environment
from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import JobRow
from comps.tuning import rundir
from comps.tuning.spec import ResourcesSpec

logger = logging.getLogger(__name__)


class Dispatcher:
    """``start()`` and ``stop()`` from the application's lifespan; ``wake()`` after a new or changed row."""

    interval = 0.5  # seconds between rounds when nobody wakes the loop
    ray_interval = 3.0  # seconds between two questions to Ray about one job

    def __init__(self, database: Database, settings: Settings, cluster: Cluster, secrets: Secrets) -> None:
        self._database, self._settings, self._cluster, self._secrets = database, settings, cluster, secrets
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._validations: dict[str, asyncio.Task[None]] = {}
        self._asked_ray: dict[str, float] = {}

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="dispatcher")

    async def stop(self) -> None:
        """Stop moving jobs. What runs in Ray runs on; the next start takes it up again."""
        tasks = [task for task in (self._task, *self._validations.values()) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

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
                # The loop must outlive a full disk or a bug in one job's handling; nothing was
                # committed, the log has the traceback, and the next round tries again.
                logger.exception("a dispatcher round failed")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self.interval)

    async def _round(self) -> None:
        jobs = await asyncio.to_thread(self._unfinished)
        for job in jobs:
            if job.status == "validating_files" and job.id not in self._validations:
                self._validations[job.id] = asyncio.create_task(self._validate(job))
        for job in jobs:
            if job.status == "running":
                await self._attend(job)
            elif job.status in ("cancelled", "failed"):
                await self._end_processes(job)
        if self._cluster.ready:
            await self._submit_waiting()

    def _unfinished(self) -> list[JobRow]:
        """Active jobs, and ended ones whose processes may still be there; in queue order."""
        with self._database.reading() as session:
            stopping = JobRow.status.in_(["cancelled", "failed"]) & JobRow.submission_id.is_not(None)
            query = select(JobRow).where(JobRow.status.in_(ACTIVE) | (stopping & ~JobRow.stopped))
            return list(session.scalars(query.order_by(JobRow.priority.desc(), JobRow.sequence)))

    async def _change(self, job_id: str, change: Callable[[Session, JobRow], Any]) -> Any:
        """Run ``change(session, row)`` in one transaction on a thread. A client may have moved the job
        meanwhile (cancelled it): then the row stays as the client left it."""

        def work() -> Any:
            with self._database.session() as session:
                row = session.scalars(select(JobRow).filter_by(id=job_id).with_for_update()).one()
                return change(session, row)

        try:
            return await asyncio.to_thread(work)
        except IllegalMove as move:
            logger.info("%s", move)
            return None

    # -- validating ---------------------------------------------------------------------------------

    async def _validate(self, job: JobRow) -> None:
        try:
            token = self._secrets.token(job.id)
            verdict = await asyncio.to_thread(validate, job, token)

            def change(session: Session, row: JobRow) -> None:
                for warning in verdict.warnings:
                    add_event(session, row, warning, level="warn")
                if verdict.error:
                    fail(session, row, *verdict.error)
                else:
                    transition(session, row, "queued", "Files validated, the job is queued")

            await self._change(job.id, change)
            self.wake()
        except Exception:
            logger.exception("validation of %s failed unexpectedly and is tried again", job.id)
            await asyncio.sleep(self.ray_interval)
        finally:
            self._validations.pop(job.id, None)

    # -- submitting ---------------------------------------------------------------------------------

    async def _submit_waiting(self) -> None:
        """Submit queued jobs in order while there is room. A training job that has no room holds back
        those behind it (first in, first out); the small kinds need no cores and never wait."""
        jobs = await asyncio.to_thread(self._unfinished)
        queued = [job for job in jobs if job.status == "queued"]
        if not queued:
            return
        nodes = await self._cluster.cores()
        held = sum(job.cpus or 0 for job in jobs if job.status == "running")
        blocked = False
        for job in queued:
            if job.kind != "fine_tuning":
                await self._submit(job, None)
            elif not blocked:
                wanted = room.demand(ResourcesSpec.model_validate(job.spec["resources"]), nodes)
                if reason := room.impossible(wanted, nodes):
                    code, param = "insufficient_resources", "Training.resources_per_worker"
                    await self._change(job.id, partial(fail, message=reason, code=code, param=param))
                elif room.fits(wanted, nodes, held):
                    held += wanted.total
                    await self._submit(job, wanted)
                else:
                    blocked = True

    async def _submit(self, job: JobRow, wanted: room.Demand | None) -> None:
        """Row first, then the act: when the service dies between them, the next start finds a running
        job that Ray does not know, and submits it again."""
        attempt = job.attempt + 1
        submission = job.id if attempt == 1 else f"{job.id}-attempt-{attempt}"
        directory = run_directory(self._settings.data_dir, job.id)

        message = "The job is starting" if attempt == 1 else f"Attempt {attempt} is starting"
        cpus = wanted.total if wanted else None

        def change(session: Session, row: JobRow) -> bool:
            transition(
                session, row, "running", message,
                attempt=attempt, submission_id=submission, stopped=False, cpus=cpus,
            )  # fmt: skip
            return True

        if not await self._change(job.id, change):
            return
        spec = dict(job.spec)
        if wanted:
            spec["resources"] = {**spec["resources"], "cpus": wanted.cores}
        path = await asyncio.to_thread(self._write_spec, directory, spec)
        token = self._secrets.token(job.id)
        env = tracking_environment(job.request.get("integrations"))
        if token:
            env["HF_TOKEN"] = token
        if self._settings.hf_hub_offline:
            env["HF_HUB_OFFLINE"] = "1"
        await self._cluster.submit(submission, path, env, job.id)
        self._asked_ray[job.id] = time.monotonic()

    @staticmethod
    def _write_spec(directory: Path, spec: dict[str, Any]) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        rundir.write_json(directory / rundir.SPEC, spec)
        return directory / rundir.SPEC

    # -- running, ended -----------------------------------------------------------------------------

    async def _attend(self, job: JobRow) -> None:
        """Follow a running job's events; finish it when its result is there; resume it when it died."""
        directory = run_directory(self._settings.data_dir, job.id)
        # In this order: a result that is there now was written after all of the run's events.
        result = await asyncio.to_thread(read_result, directory)
        while await asyncio.to_thread(self._follow, job.id, directory):
            pass
        if result is not None:
            await self._change(job.id, lambda session, row: finish(session, row, result))
            self._secrets.forget(job.id)
            self.wake()  # its cores are free
            return
        now = time.monotonic()
        if not self._cluster.ready or now - self._asked_ray.get(job.id, 0) < self.ray_interval:
            return
        self._asked_ray[job.id] = now
        status = await self._cluster.job_status(job.submission_id or job.id)
        if status in ("PENDING", "RUNNING") or await asyncio.to_thread(read_result, directory) is not None:
            return
        await self._change(job.id, lambda session, row: self._died(session, row, status))
        self.wake()

    def _follow(self, job_id: str, directory: Path) -> bool:
        """One chunk of events into rows, without a write transaction when there is nothing new."""
        path = directory / rundir.EVENTS
        with self._database.reading() as session:
            row = session.scalars(select(JobRow).filter_by(id=job_id)).one()
            if not path.exists() or path.stat().st_size <= row.events_offset:
                return False
        with self._database.session() as session:
            row = session.scalars(select(JobRow).filter_by(id=job_id).with_for_update()).one()
            return follow(session, row, directory)

    def _died(self, session: Session, job: JobRow, status: str | None) -> None:
        """The run is gone and left no result: back to the queue, or failed after too many attempts."""
        job.failures += 1
        what = "Ray no longer knows the run" if status is None else f"the run's processes ended ({status})"
        if job.failures >= self._settings.max_attempts:
            fail(
                session, job,
                f"{what} without a result, {job.failures} times in a row without a new checkpoint; "
                f"see GET /v1/fine_tuning/jobs/{job.id}/logs",
            )  # fmt: skip
            return
        transition(session, job, "queued", f"{what} without a result; it is started again", cpus=None)
        add_event(session, job, "Training resumes from the newest good checkpoint", level="warn")

    async def _end_processes(self, job: JobRow) -> None:
        """Stop the processes of a job that ended by a decision, and note when they are gone."""
        if job.stopped or not job.submission_id or not self._cluster.ready:
            return
        status = await self._cluster.job_status(job.submission_id)
        if status in ("PENDING", "RUNNING"):
            await self._cluster.stop_job(job.submission_id)
            return

        def change(session: Session, row: JobRow) -> None:
            row.stopped = True

        await self._change(job.id, change)
        self._secrets.forget(job.id)
