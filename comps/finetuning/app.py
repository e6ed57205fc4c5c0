"""The fine-tuning service as an application: what it is made of, and the order it starts and stops in."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

import comps
from comps.cores.app import create_component
from comps.cores.errors import StartupError
from comps.cores.middleware import ANY_ADDRESS
from comps.cores.slots import UploadSlots
from comps.finetuning.cluster import Cluster
from comps.finetuning.dependencies import get_owner
from comps.finetuning.jobs.dispatcher import Dispatcher
from comps.finetuning.jobs.news import News
from comps.finetuning.jobs.secrets import Secrets
from comps.finetuning.metrics import StoreMetrics
from comps.finetuning.routes import (
    adapters,
    checkpoints,
    evaluations,
    events,
    files,
    jobs,
    logs,
    models,
    searches,
    sqft,
    uploads,
)
from comps.finetuning.settings import Settings, is_loopback
from comps.finetuning.sparsity import SparsityReports
from comps.finetuning.store.blobs import Blobs
from comps.finetuning.store.database import Database
from comps.finetuning.sweep import sweep_hourly, tidy

NAME = "opea_service@finetuning"
TITLE = "Fine-tuning service"
DESCRIPTION = "Fine-tunes language models: LoRA with elastic ranks (NLS), sub-adapters, merged models."

ROUTERS = tuple(
    part.router
    for part in (
        files,
        uploads,
        jobs,
        events,
        checkpoints,
        logs,
        adapters,
        searches,
        evaluations,
        sqft,
        models,
    )
)
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@contextmanager
def only_service(data_dir: Path) -> Iterator[None]:
    """Hold the data directory's lock. Raises :class:`StartupError` when another service has it.

    The operating system drops the lock with the process, however that ends.
    """
    descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StartupError(f"Another service uses the data directory {data_dir}.") from error
        yield
    finally:
        os.close(descriptor)


def make_directories(settings: Settings) -> None:
    """Raises :class:`StartupError` when a directory cannot be made or written to."""
    private = (settings.data_dir, settings.files_dir, settings.jobs_dir, settings.ray_dir)
    try:
        for directory in (*private, settings.models_dir):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"The directory {error.filename} cannot be made: {error.strerror}.") from error
    for directory in private:
        if not os.access(directory, os.W_OK | os.X_OK):
            raise StartupError(f"The directory {directory} is not writable.")


def create_app(settings: Settings) -> FastAPI:
    """The application. Nothing is opened or started before its lifespan begins."""
    database = Database(settings.database_url)
    blobs = Blobs(settings.files_dir)
    news = News(database)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        make_directories(settings)
        with only_service(settings.data_dir):
            await asyncio.to_thread(database.migrate)
            await asyncio.to_thread(tidy, settings, database, blobs)
            secrets = Secrets(settings.data_dir / "secrets.key", settings.hf_token)
            cluster = Cluster(settings)
            dispatcher = Dispatcher(database, settings, cluster, secrets)
            app.state.secrets, app.state.cluster, app.state.dispatcher = secrets, cluster, dispatcher
            await cluster.start()
            await dispatcher.start()
            await news.start()
            sweeping = asyncio.create_task(sweep_hourly(settings, database, blobs))
            try:
                yield
            finally:
                sweeping.cancel()
                await news.stop()
                try:
                    await dispatcher.stop()
                finally:
                    await cluster.stop()
                    database.dispose()

    def health() -> dict[str, Any]:
        status = app.state.cluster.status()
        if (
            settings.api_keys or settings.operator_keys
        ):  # strangers see this; addresses and paths are not theirs
            status = {name: status[name] for name in ("state", "local")}
        return {"Ray": status}

    app = create_component(
        name=NAME,
        title=TITLE,
        description=DESCRIPTION,
        version=comps.__version__,
        lifespan=lifespan,
        health=health,
        max_body_bytes=settings.max_body_bytes,
        max_body_setting="FINETUNING_MAX_BODY_BYTES",
        body_seconds=settings.body_seconds,
        admit=lambda request: get_owner(request, settings),
        uploads=("/v1/files", "/v1/uploads/{upload_id}/parts"),
        hosts=answered_hosts(settings),
        hosts_setting="FINETUNING_ALLOWED_HOSTS",
        origins=settings.allowed_hosts,
    )
    app.state.settings, app.state.database, app.state.blobs = settings, database, blobs
    app.state.news = news
    app.state.sparsity = SparsityReports()
    limit = settings.max_concurrent_uploads
    app.state.upload_slots = UploadSlots(limit, "FINETUNING_MAX_CONCURRENT_UPLOADS")
    app.state.completing = asyncio.Lock()
    app.state.statistics.registry.register(StoreMetrics(database))
    for router in ROUTERS:
        app.include_router(router)
    return app


def answered_hosts(settings: Settings) -> tuple[str, ...]:
    """The host names this service answers to; empty for any.

    A service on loopback is only ever asked by a loopback name, unless a page rebinds its own name to it. One
    that listens wider without keys is asked by addresses, and by the names that the operator knows of. Where
    there are keys, a page has none.
    """
    names = (*_LOOPBACK_NAMES, settings.host, *settings.allowed_hosts)
    if is_loopback(settings.host):
        return names
    if not settings.api_keys and not settings.operator_keys:
        return (*names, ANY_ADDRESS)
    return names if settings.allowed_hosts else ()
