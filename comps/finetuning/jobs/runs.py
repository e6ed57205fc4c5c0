"""The attempts of jobs in Ray: begun, followed, ended, and put back into the queue when they died.

Nothing is remembered here that would be missed after a crash: a row says what should be, the run's
directory what has been, Ray what is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from comps.cores.errors import InsufficientStorage
from comps.finetuning.catalog import hub_cache
from comps.finetuning.cluster import Cluster, ClusterUnavailable
from comps.finetuning.jobs.finish import fail, finish
from comps.finetuning.jobs.follow import follow, read_result
from comps.finetuning.jobs.result_files import write_step_metrics
from comps.finetuning.jobs.room import Demand
from comps.finetuning.jobs.secrets import Secrets
from comps.finetuning.jobs.states import add_event, transition
from comps.finetuning.schemas.integrations import tracking_environment
from comps.finetuning.settings import Settings
from comps.finetuning.store.blobs import Blobs
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import CheckpointRow, JobRow
from comps.tuning import rundir
from comps.tuning.failpoints import failpoint

logger = logging.getLogger(__name__)

_ALIVE = ("PENDING", "RUNNING")
_RESUMED = {
    "fine_tuning": " from its newest good checkpoint",
    "search": " after its last batch",
    "evaluate": " after its last batch",
}
_MORE_LOSSES = 2  # than deaths, before a job fails


class Runs:
    """All methods take a row as it was read a moment ago, and change it in a transaction of their own."""

    ask_interval = 3.0  # seconds between two questions to Ray about one job
    longest_pause = 60.0  # seconds between two tries to submit a job that Ray does not take
    tidy_up = 30.0  # seconds that a finished run's processes have to end by themselves

    def __init__(self, database: Database, settings: Settings, cluster: Cluster, secrets: Secrets) -> None:
        self._database, self._settings, self._cluster, self._secrets = database, settings, cluster, secrets
        self._blobs = Blobs(settings.files_dir)
        self._asked: dict[str, float] = {}
        self._pauses: dict[str, tuple[float, float]] = {}  # job -> (end of the pause, its length)

    async def change(self, job: JobRow, change: Callable[[Session, JobRow], Any]) -> bool:
        """Run ``change(session, row)`` in one transaction on a thread, if the job is still in the state that
        ``job`` was read in. Returns false when a client has moved it meanwhile (paused, cancelled, deleted):
        then it stays as the client left it, and the next round sees that."""

        def work() -> bool:
            with self._database.session() as session:
                row = session.scalar(select(JobRow).filter_by(id=job.id).with_for_update())
                if row is None or row.status != job.status:
                    return False
                change(session, row)
            failpoint("change-committed")
            return True

        return await asyncio.to_thread(work)

    # -- begin ----------------------------------------------------------------------------------------

    async def begin(self, job: JobRow, wanted: Demand | None) -> None:
        """Submit the next attempt of a queued job.

        Row first, then the act: when the service dies between them, the next start finds a running job
        that Ray does not know. Raises :class:`ClusterUnavailable`; the job is queued then.
        """
        until, pause = self._pauses.get(job.id, (0.0, 1.0))
        if time.monotonic() < until:
            return
        # An earlier attempt may live: it was paused and is saving, or its end was not seen, or a submission
        # got through after all.
        if job.submission_id and (status := await self._cluster.job_status(job.submission_id)) in _ALIVE:
            if status == "PENDING":  # it has not begun, so there is nothing to save
                await self._cluster.stop_job(job.submission_id)
            else:
                await asyncio.to_thread(self._ask_to_stop, job)
            return
        try:
            path = await asyncio.to_thread(self._write_spec, job, wanted)
        except OSError as error:
            if not rundir.disk_is_full(error):
                raise
            reason = "the service's disk is full; free some space and create the job again"
            await self.change(job, partial(fail, message=reason, code="insufficient_resources"))
            return
        failpoint("spec-written")
        attempt = job.attempt + 1
        submission = job.id if attempt == 1 else f"{job.id}-attempt-{attempt}"
        message = "The job is starting" if attempt == 1 else f"Attempt {attempt} is starting"
        changes = {"attempt": attempt, "submission_id": submission, "stopped": False}
        changes["cpus"] = wanted.workers * wanted.cores if wanted else None
        if not await self.change(job, lambda s, row: transition(s, row, "running", message, **changes)):
            if not job.attempt:  # nothing was ever run there, and the job may be deleted by now
                await asyncio.to_thread(shutil.rmtree, path.parent, ignore_errors=True)
            return
        job.status = "running"
        # A single worker trains in the run's first process, several get one each from Ray Train.
        single = wanted if wanted and wanted.workers == 1 else Demand(0, 0)
        env = self.environment(job)
        try:
            await self._cluster.submit(submission, path, env, job.id, cores=single.cores, gpus=single.gpus)
        except ClusterUnavailable as error:
            reason = f"Ray did not take the job, it is tried again: {error}"
            await self.change(job, lambda session, row: _queue_again(session, row, reason))
            self._pauses[job.id] = (time.monotonic() + pause, min(2 * pause, self.longest_pause))
            raise
        failpoint("submitted")
        self._pauses.pop(job.id, None)
        self._asked[job.id] = time.monotonic()

    def _write_spec(self, job: JobRow, wanted: Demand | None) -> Path:
        directory = self._directory(job)
        failpoint("spec-unwritten")
        directory.mkdir(parents=True, exist_ok=True)
        for left in (rundir.STOP, rundir.SUSPECT):
            (directory / left).unlink(missing_ok=True)
        spec = dict(job.spec)
        if wanted:
            spec["resources"] = {**spec["resources"], "cpus": wanted.cores}
        rundir.write_json(directory / rundir.SPEC, spec)
        return directory / rundir.SPEC

    def environment(self, job: JobRow) -> dict[str, str]:
        """The variables of a job's run, of which no other job knows."""
        env = tracking_environment(job.request.get("integrations"))
        env |= self._secrets.environment(job)
        if cache := hub_cache(self._settings, job.owner):
            env["HF_HUB_CACHE"] = str(cache)
        if self._settings.hf_hub_offline:
            env["HF_HUB_OFFLINE"] = "1"
        return env

    def _directory(self, job: JobRow) -> Path:
        return self._settings.jobs_dir / job.id

    # -- attend ---------------------------------------------------------------------------------------

    async def attend(self, job: JobRow) -> bool:
        """Follow a running job's events; finish it when its result is there; queue it when it died.

        The same for a job that was paused while it ran: its run is asked to save and leave, and may yet
        finish instead. Returns whether it has left its cores.
        """
        pausing = job.status == "paused"
        if pausing:
            await asyncio.to_thread(self._ask_to_stop, job)
        result = await self._catch_up(job)
        gone, status = False, None
        now = time.monotonic()
        if result is None and self._cluster.ready and now - self._asked.get(job.id, 0) >= self.ask_interval:
            self._asked[job.id] = now
            status = await self._cluster.job_status(job.submission_id or job.id)
            if status not in _ALIVE:
                result = await self._catch_up(job)  # all that it has written before its end is there now
                gone = result is None
        if result is not None:
            await self._finish(job, result)
        elif pausing and status == "PENDING":  # it has not begun, so there is nothing to save
            await self._cluster.stop_job(job.submission_id or job.id)
        elif gone and pausing:
            await self.change(job, _has_left)
        elif gone:
            await self.change(job, lambda session, row: self._died(session, row, status))
        elif status and not pausing and (waits := self._waits(status)) != (job.attempt_started_at is None):
            await self.change(job, _has_to_wait if waits else _has_begun)
        elif not pausing and job.time_limit is not None and _has_run(job) > job.time_limit:
            await self.change(job, _out_of_time)
        return gone or result is not None

    def _waits(self, status: str) -> bool:
        """Whether a run is still to begin for want of room, which others can take only of a Ray of others."""
        return status == "PENDING" and not self._cluster.local

    def _ask_to_stop(self, job: JobRow) -> None:
        (self._directory(job) / rundir.STOP).touch()

    async def _catch_up(self, job: JobRow) -> dict[str, Any] | None:
        """Turn the events written so far into rows. Returns the run's result if there is one; it is
        written after all events, so all of them have been read then."""
        directory = self._directory(job)
        result = await asyncio.to_thread(read_result, directory)
        while await asyncio.to_thread(self._follow, job.id, directory):
            pass
        return result

    def _follow(self, job_id: str, directory: Path) -> bool:
        """One chunk of events into rows, without a write transaction when there is nothing new."""
        path = directory / rundir.EVENTS
        with self._database.reading() as session:
            offset = session.scalars(select(JobRow.events_offset).filter_by(id=job_id)).one()
        if not path.exists() or path.stat().st_size <= offset:
            return False
        with self._database.session() as session:
            row = session.scalars(select(JobRow).filter_by(id=job_id).with_for_update()).one()
            return follow(session, row, directory)

    async def _finish(self, job: JobRow, result: dict[str, Any]) -> None:
        file = None
        if job.kind == "fine_tuning" and result["outcome"] == "succeeded":
            try:
                file = await asyncio.to_thread(write_step_metrics, self._database, self._blobs, job)
            except (
                InsufficientStorage
            ) as error:  # the adapter is there, so the job has succeeded all the same
                logger.warning("the metrics of %s could not be written: %s", job.id, error)

        def change(session: Session, row: JobRow) -> None:
            if file is not None:
                session.merge(file)
            finish(session, row, {**result, "result_files": [file.id]} if file else result)

        await self.change(job, change)

    def _died(self, session: Session, job: JobRow, status: str | None) -> None:
        """The run is gone and left no result: back to the queue, or failed after too many attempts.

        A run that went with its Ray, or that a killed service never submitted, seldom has itself to blame:
        such losses are counted apart, and more of them are allowed.
        """
        if status == "NO ROOM":
            _queue_again(session, job, "Ray had no room for the run; it is submitted again")
            return
        allowed = self._settings.max_attempts if job.retry_limit is None else 1 + job.retry_limit
        if status is None:
            job.losses += 1
            what, count, allowed = "Ray no longer knows the run", job.losses, allowed + _MORE_LOSSES
        else:
            job.failures += 1
            what, count = f"the run's processes ended ({status})", job.failures
        if count >= allowed:
            fail(
                session, job,
                f"{what} without a result, {count} time(s) in a row without a new checkpoint"
                f"{self._suspected(job)}; see GET /v1/fine_tuning/jobs/{job.id}/logs",
            )  # fmt: skip
            return
        message = f"{what[0].upper()}{what[1:]} without a result; it is started again"
        message += _RESUMED.get(job.kind, "")
        _queue_again(session, job, message)

    def _suspected(self, job: JobRow) -> str:
        try:
            return f" (its first error was {(self._directory(job) / rundir.SUSPECT).read_text()!r})"
        except FileNotFoundError:
            return ""

    # -- end ------------------------------------------------------------------------------------------

    async def end(self, job: JobRow) -> None:
        """End what is left of an ended job's processes, and note when they are gone."""
        if not self._cluster.ready or job.submission_id is None:
            return
        if await self._lives(job):
            just_ended = time.time() - (job.finished_at or 0) < self.tidy_up
            if not (job.status == "succeeded" and just_ended):
                await self._cluster.stop_job(job.submission_id)
            return

        await self._catch_up(job)  # its last checkpoint, and those that this replaced

        def change(session: Session, row: JobRow) -> None:
            row.stopped = True

        await self.change(job, change)
        self._asked.pop(job.id, None)

    async def stop(self, jobs: list[JobRow]) -> None:
        """Have running jobs save and leave, since their Ray is about to be stopped, and queue them (paused
        ones stay paused).

        Those that end now are finished; those that have not begun to train, or take too long, lose what
        came after their newest checkpoint.
        """
        for job in jobs:
            try:
                await asyncio.to_thread(self._ask_to_stop, job)
            except OSError as error:  # a full disk; the others are still asked
                logger.warning("the job %s cannot be asked to save: %s", job.id, error)
        training = [job for job in jobs if "step" in job.progress]
        with contextlib.suppress(ClusterUnavailable, TimeoutError):
            async with asyncio.timeout(self._settings.stop_seconds):
                while training:
                    training = [job for job in training if await self._lives(job)]
                    await asyncio.sleep(0.2)
        message = "The service stops; the job goes on at its next start"
        for job in jobs:
            try:
                if (result := await self._catch_up(job)) is not None:
                    await self._finish(job, result)
                elif job.status == "running":
                    await self.change(job, lambda session, row: _queue_again(session, row, message))
            except Exception:
                # The others are still to be put back; the next start finds this one as it is.
                logger.exception("the job %s could not be put back into the queue", job.id)

    async def _lives(self, job: JobRow) -> bool:
        """Whether Ray has processes of the job's newest attempt."""
        status = await self._cluster.job_status(job.submission_id) if job.submission_id else None
        return status in _ALIVE


def _queue_again(session: Session, job: JobRow, message: str) -> None:
    transition(session, job, "queued", message, cpus=None)


def _has_to_wait(session: Session, job: JobRow) -> None:
    job.attempt_started_at = None  # no running time
    add_event(session, job, "The run waits in Ray until there is room for it")


def _has_begun(session: Session, job: JobRow) -> None:
    job.attempt_started_at = time.time()
    add_event(session, job, "Ray has begun the run")


def _has_left(session: Session, job: JobRow) -> None:
    """A paused job's run is gone."""
    job.stopped, job.cpus = True, None
    newest = _newest_checkpoint(session, job)
    saved = f"it goes on after step {newest}" if newest else "it begins anew, since it had not trained yet"
    add_event(session, job, f"The run has left its cores; when it is resumed, {saved}")


def _newest_checkpoint(session: Session, job: JobRow) -> int | None:
    return session.scalar(select(func.max(CheckpointRow.step)).filter_by(job_id=job.id))


def _has_run(job: JobRow) -> float:
    """Seconds that a job has run, over all attempts."""
    return job.run_seconds + (time.time() - job.attempt_started_at if job.attempt_started_at else 0)


def _out_of_time(session: Session, job: JobRow) -> None:
    newest = _newest_checkpoint(session, job)
    then = f"its checkpoint of step {newest} can be trained on" if newest else "it has no checkpoint"
    message = f"it has run for longer than its time_limit of {job.time_limit:g} seconds; {then}"
    fail(session, job, message, code="time_limit_exceeded", param="time_limit")
