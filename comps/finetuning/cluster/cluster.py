"""Start or join Ray, and speak about jobs with whichever Ray there is now.

``status()["state"]``: ``starting`` (not answering yet), ``ready``, ``unreachable`` (answered before,
or never did within the start time-out; the message says more).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comps.finetuning.cluster.errors import ClusterUnavailable
from comps.finetuning.cluster.local_head import LocalHead
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

    def __init__(self, settings: Settings) -> None:
        self._local = None if settings.ray_address else LocalHead(settings.data_dir / "ray")
        self._named = settings.ray_address
        self._client: JobsClient | None = None
        self._ready = asyncio.Event()
        self._state, self._message = "starting", "Ray is starting"
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to start or join; returns at once. Progress is in :meth:`status`."""
        self._watcher = asyncio.create_task(self._watch(), name="cluster-watch")

    async def stop(self) -> None:
        """Let go of the cluster, and end the local head if there is one."""
        if self._watcher:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        if self._client:
            await self._client.close()
        if self._local:
            await asyncio.to_thread(self._local.stop)

    def status(self) -> dict[str, Any]:
        """``state``, ``message``, ``address`` and ``local``, for the health and statistics routes."""
        address = self._client.address if self._client else self._named
        return {
            "state": self._state,
            "message": self._message,
            "address": address,
            "local": self._local is not None,
        }

    @property
    def ready(self) -> bool:
        return self._ready.is_set()

    # -- what the dispatcher asks -------------------------------------------------------------------

    async def submit(self, submission_id: str, spec: Path, env: dict[str, str], job_id: str) -> None:
        """Run ``python -m comps.tuning SPEC`` as a Ray job. ``env`` is that job's own environment.

        Raises :class:`ClusterUnavailable` when Ray cannot be asked or refuses.
        """
        interpreter = sys.executable if self._local else "python"
        # Ray runs the entry point with a shell: quote every part, and replace the shell by it.
        entrypoint = "exec " + shlex.join([interpreter, "-m", "comps.tuning", "--ray", str(spec)])
        if self._local:
            env = {"PYTHONPATH": str(SOURCE_ROOT), **env}
        await self._connected().submit(submission_id, entrypoint, env, job_id)

    async def job_status(self, submission_id: str) -> RayStatus | None:
        """Ray's word on a submission, ``None`` when it does not know it."""
        return await self._connected().status(submission_id)

    async def stop_job(self, submission_id: str) -> None:
        await self._connected().stop(submission_id)

    async def cores(self) -> list[int]:
        """The cores of each living node, largest first."""
        nodes = await self._connected().nodes()
        return sorted((int(node.get("CPU", 0)) for node in nodes), reverse=True)

    def _connected(self) -> JobsClient:
        if self._client is None or not self._ready.is_set():
            raise ClusterUnavailable(self._message)
        return self._client

    # -- starting and watching ------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Keep a connection: start or join at first, notice losses, restart a local head that died."""
        waiting_since = time.monotonic()
        while True:
            try:
                if self._client is None or (self._local and not self._local.alive()):
                    if self._ready.is_set():
                        logger.warning("the local Ray head is gone; a new one is started")
                        waiting_since = time.monotonic()
                    self._ready.clear()
                    await self._connect()
                assert self._client is not None
                await self._client.nodes()
                if not self._ready.is_set():
                    logger.info("Ray is ready at %s", self._client.address)
                self._state, self._message = "ready", "Ray answers"
                self._ready.set()
            except (ClusterUnavailable, OSError) as error:
                waited = time.monotonic() - waiting_since
                starting = self._state == "starting" and waited < self.start_timeout
                if self._ready.is_set():
                    logger.warning("%s", error)
                self._ready.clear()
                self._state = "starting" if starting else "unreachable"
                self._message = str(error)
                if self._local and waited > self.start_timeout:
                    # A head that runs but never answers is of no use: begin again.
                    await asyncio.to_thread(self._local.stop)
                    waiting_since = time.monotonic()
            await asyncio.sleep(self.watch_interval if self._ready.is_set() else 0.25)

    async def _connect(self) -> None:
        if self._client:
            await self._client.close()
            self._client = None
        if self._local:
            address = await asyncio.to_thread(lambda: self._local.find() or self._local.start())  # type: ignore[union-attr]
            token: str | None = self._local.token
        else:
            assert self._named is not None
            address = await _dashboard_address(self._named)
            token = _operator_token()
        # On a thread, so that the service answers meanwhile: see the module.
        client = await asyncio.to_thread(importlib.import_module, "comps.finetuning.cluster.client")
        self._client = client.JobsClient(address, token)


def _operator_token() -> str | None:
    """The token of a named cluster, from where Ray itself looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return path.read_text().strip() if path.is_file() else None


async def _dashboard_address(named: str) -> str:
    """The dashboard of the cluster that ``RAY_ADDRESS`` names: itself when it is an ``http`` address;
    otherwise Ray is asked in a process of its own (``auto``, ``ray://host:10001``, ``host:6379``)."""
    if named.startswith(("http://", "https://")):
        return named
    script = (
        "import json,sys,ray; c=ray.init(sys.argv[1],log_to_driver=False); print(json.dumps(c.dashboard_url))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, named,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, errors = await process.communicate()
    last = output.decode().strip().rpartition("\n")[2]
    url = json.loads(last) if process.returncode == 0 and last else None
    if not url:
        reason = errors.decode(errors="replace").strip().rpartition("\n")[2]
        raise ClusterUnavailable(f"there is no Ray cluster with a dashboard at RAY_ADDRESS={named}: {reason}")
    return f"http://{url}"
