"""Start or join Ray, and speak about jobs with whichever Ray there is now.

``status()["state"]``: ``starting`` (not answering yet), ``ready``, ``unreachable`` (answered before,
or never did within the start time-out; the message says more).
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comps.finetuning.cluster.errors import ClusterUnavailable, NodesLost
from comps.finetuning.cluster.local_head import LocalHead
from comps.finetuning.cluster.named import dashboard_address, operator_token
from comps.finetuning.settings import Settings

if TYPE_CHECKING:
    from comps.finetuning.cluster.client import JobsClient, RayStatus

logger = logging.getLogger(__name__)

# The directory that holds the packages comps and patches, for workers on this machine.
SOURCE_ROOT = Path(__file__).resolve().parents[3]


class Cluster:
    """The one Ray cluster of a service. All methods may be called while it still starts."""

    start_timeout = 120.0
    watch_interval = 2.0
    longest_pause = 30.0  # between two starts of a local head that does not come up

    def __init__(self, settings: Settings) -> None:
        self._head = None if settings.ray_address else LocalHead(settings.ray_dir)
        self._named = settings.ray_address
        self._client: JobsClient | None = None
        self._nodes: list[dict[str, float]] = []
        self._state, self._message = "starting", "Ray is starting"
        self._since = time.monotonic()  # of the present state
        self._starts = 0  # of a local head, since one was ready
        self._launching = asyncio.Lock()  # held while a local head is started or ended
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to start or join; returns at once. Progress is in :meth:`status`."""
        self._watcher = asyncio.create_task(self._watch(), name="cluster-watch")

    async def stop(self) -> None:
        """Let go of the cluster, and end the local head if there is one."""
        if self._watcher:
            async with self._launching:  # or the head would come up when nobody watches any more
                self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._disconnect()
        if self._head:
            await asyncio.to_thread(self._head.stop)

    def status(self) -> dict[str, Any]:
        """``state``, ``message``, ``address`` and ``local``, for the health and statistics routes."""
        address = self._client.address if self._client else self._named
        return {"state": self._state, "message": self._message, "address": address, "local": self.local}

    @property
    def ready(self) -> bool:
        return self._state == "ready"

    @property
    def local(self) -> bool:
        """Whether Ray is a head of our own, which ends with the service."""
        return self._head is not None

    # -- what is asked about jobs ---------------------------------------------------------------------

    async def submit(
        self,
        submission_id: str,
        spec: Path,
        env: dict[str, str],
        job_id: str,
        *,
        cores: int = 0,
        gpus: float = 0,
    ) -> None:
        """Run ``python -m comps.tuning SPEC`` as a Ray job. ``env`` is that job's own environment; ``cores``
        and ``gpus`` are what its first process takes, beside those that it starts itself.

        Raises :class:`ClusterUnavailable` when Ray cannot be asked or refuses.
        """
        interpreter = sys.executable if self._head else "python"
        # Ray runs the entry point with a shell: quote every part, and replace the shell by it.
        entrypoint = "exec " + shlex.join([interpreter, "-m", "comps.tuning", "--ray", str(spec)])
        if self._head:
            paths = [str(SOURCE_ROOT), os.environ.get("PYTHONPATH")]
            env = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **env}
        await self._connected().submit(submission_id, entrypoint, env, job_id, cores, gpus)

    async def job_status(self, submission_id: str) -> RayStatus | None:
        """Ray's word on a submission, ``None`` when it does not know it."""
        return await self._connected().status(submission_id)

    async def stop_job(self, submission_id: str) -> None:
        await self._connected().stop(submission_id)

    def nodes(self) -> list[dict[str, float]]:
        """The resources of each living node, as of the last look a moment ago."""
        self._connected()
        return self._nodes

    def _connected(self) -> JobsClient:
        if self._client is None or not self.ready:
            raise ClusterUnavailable(self._message)
        return self._client

    # -- starting and watching ------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Keep a connection: start or join at first, notice losses, replace a local head that died."""
        while True:
            try:
                client = await self._connect()
                self._nodes = await client.nodes()
                self._starts = 0
                self._report("ready", "Ray answers")
            except (ClusterUnavailable, OSError) as error:
                await self._not_ready(error)
            except Exception:
                # Without this loop no job would ever start; the log has the traceback, and it goes on.
                logger.exception("a look at Ray failed")
            quick = self._head and not self.ready  # our own head is about to answer
            await asyncio.sleep(0.25 if quick else self.watch_interval)

    async def _connect(self) -> JobsClient:
        """The present connection, or a new one, for which a local head is found or started."""
        if self._client and (self._head is None or self._head.alive()):
            return self._client
        await self._disconnect()
        if self._head:
            address, token = await self._own_head(self._head), self._head.token
        else:
            address, token = await dashboard_address(self._named), operator_token()
        # On a thread, so that the service answers meanwhile: see the module.
        module = await asyncio.to_thread(importlib.import_module, "comps.finetuning.cluster.client")
        client: JobsClient = module.JobsClient(address, token)
        self._client = client
        return client

    async def _own_head(self, head: LocalHead) -> str:
        """The address of the head that runs already, or of a new one."""
        async with self._launching:
            if address := head.find():
                logger.info("the local Ray head at %s is taken up again", address)
                return address
        if self._starts:
            logger.warning("the local Ray head has ended while it started; see %s", head.log)
            await asyncio.sleep(min(self.longest_pause, 2**self._starts))
        elif self.ready:
            logger.warning("the local Ray head is gone; a new one is started")
        self._starts += 1
        self._report("starting", "Ray is starting")
        async with self._launching:
            return await asyncio.to_thread(head.start)

    async def _not_ready(self, reason: Exception) -> None:
        late = time.monotonic() - self._since > self.start_timeout
        self._report("starting" if self._state == "starting" and not late else "unreachable", str(reason))
        if self._head and (isinstance(reason, NodesLost) or (late and self._starts)):
            # A head whose node has ended does not get another, and a new one that never answers is of no
            # use. (One that has answered is left alone otherwise: it may be slow only because a training has
            # all the cores.)
            async with self._launching:
                await asyncio.to_thread(self._head.stop)
        if late and self._head is None:
            await self._disconnect()  # the cluster may come back elsewhere

    async def _disconnect(self) -> None:
        if self._client:
            await self._client.close()
            self._client = None

    def _report(self, state: str, message: str) -> None:
        if state != self._state:
            logger.log(logging.WARNING if state == "unreachable" else logging.INFO, "Ray: %s", message)
            self._since = time.monotonic()
        self._state, self._message = state, message
