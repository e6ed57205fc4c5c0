"""The application that every OPEA component is, before it has routes of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from comps.cores.docs_page import DOCS_POLICY, docs_page
from comps.cores.entrance import Entrance
from comps.cores.errors import ErrorBody, add_error_handlers
from comps.cores.middleware import Guard, HeadAsGet, JsonBodies, RequestLog
from comps.cores.statistics import RequestStatistics

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def content(media_type: str) -> dict[int | str, dict[str, Any]]:
    """For the schema: what a route answers that answers no JSON."""
    return {200: {"content": {media_type: {"schema": {"type": "string"}}}}}


def create_component(
    *,
    name: str,
    title: str,
    description: str,
    version: str,
    lifespan: Lifespan,
    health: Callable[[], dict[str, Any]],
    max_body_bytes: int,
    max_body_setting: str,
    body_seconds: float = 60,
    admit: Callable[[Request], object] = lambda _: None,
    uploads: Collection[str] = (),
    hosts: Collection[str] = (),
    hosts_setting: str = "",
    origins: Collection[str] = (),
) -> FastAPI:
    """An application with OPEA's common routes, error envelope, request log, metrics and guards.

    ``name`` is the key in ``/v1/statistics`` (OPEA writes ``opea_service@finetuning``), ``health``
    gives what ``/v1/health_check`` says besides title, version and description. ``max_body_bytes``, its
    setting and ``uploads`` are explained in :class:`comps.cores.middleware.JsonBodies`, ``hosts``,
    its setting and ``origins`` in :class:`comps.cores.middleware.Guard`, ``body_seconds`` and ``admit`` in
    :class:`comps.cores.entrance.Entrance`.
    """
    # A path with a slash too many is answered with a sentence, not with a redirect that has no body.
    # FastAPI's own pages load their scripts from elsewhere.
    app = FastAPI(
        title=title, description=description, version=version, lifespan=lifespan, redirect_slashes=False,
        docs_url=None, redoc_url=None,
        responses={"default": {"model": ErrorBody, "description": "A refusal, or a failure"}},
    )  # fmt: skip
    statistics = RequestStatistics(name)
    app.state.statistics = statistics
    add_error_handlers(app)
    # The last added is the outermost.
    app.add_middleware(JsonBodies, limit=max_body_bytes, setting=max_body_setting, uploads=uploads)
    app.add_middleware(Entrance, admit=admit, patience=body_seconds, uploads=uploads)
    app.add_middleware(Guard, hosts=hosts, origins=origins, setting=hosts_setting)
    app.add_middleware(RequestLog, statistics=statistics)
    app.add_middleware(HeadAsGet)

    @app.get("/v1/health_check", tags=["service"])
    @app.get("/health", tags=["service"])
    def health_check() -> dict[str, Any]:
        """Whether the service answers, and what it says of its parts."""
        about = {"Service Title": title, "Version": version, "Service Description": description}
        return about | health()

    @app.get("/v1/statistics", tags=["service"])
    def request_statistics() -> dict[str, dict[str, float | None]]:
        """Latencies of requests in seconds, as OPEA components report them."""
        return statistics.as_opea()

    @app.get("/metrics", tags=["service"], response_class=Response, responses=content("text/plain"))
    def metrics() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(statistics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    def root() -> RedirectResponse:
        """For people who open the address in a browser."""
        return RedirectResponse("/docs")

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        """The routes and what they take, for people."""
        return HTMLResponse(docs_page(app.openapi()), headers={"content-security-policy": DOCS_POLICY})

    return app
