"""What every request passes before it reaches a route, from the outside in.

Plain ASGI, since Starlette's ``BaseHTTPMiddleware`` costs a task for each request and gets between a
route and a client that hangs up.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from comps.cores.errors import (
    BadHost,
    CutOff,
    Forbidden,
    ServiceError,
    TooLarge,
    error_response,
    request_ids,
)
from comps.cores.json_body import read_json
from comps.cores.logging import request_id
from comps.cores.statistics import RequestStatistics

log = logging.getLogger("comps.requests")

# Among the names that a server answers to: every IP address. No page can rebind one to another address.
ANY_ADDRESS = "any IP address"

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# What browsers are told about every answer; a page of ours says for itself what it may load.
_FOR_BROWSERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class RequestLog:
    """Gives each request an id, logs and counts it, and answers 500 for what nobody expected."""

    def __init__(self, app: ASGIApp, statistics: RequestStatistics) -> None:
        self.app = app
        self.statistics = statistics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        current = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        token = request_id.set(current)
        started = time.perf_counter()
        answered = False

        async def send_with_id(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                # Before the client can ask what the log or the metrics say of its request.
                self._record(scope, message["status"], time.perf_counter() - started)
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = current
                for name, value in _FOR_BROWSERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            if not answered:
                self._record(scope, 0, time.perf_counter() - started)  # and there is nobody left to answer
        except asyncio.CancelledError:
            if answered:
                raise
            # The server cancels what has not ended within its grace, and would itself answer 500.
            failure = CutOff(
                "The service stopped before it could tell what became of this request. See whether it was "
                "carried out before you send it again, or send it with an Idempotency-Key from the beginning."
            )
            await error_response(failure, request_ids(Request(scope)))(scope, receive, send_with_id)
        except Exception as error:
            log.error("unexpected error", exc_info=error)
            if answered:
                raise  # too late for an answer; the server closes the connection
            unexpected = ServiceError("The service failed on this request; its log says why.")
            await error_response(unexpected, request_ids(Request(scope)))(scope, receive, send_with_id)
        finally:
            request_id.reset(token)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        method, route = scope["method"], getattr(scope.get("route"), "path", "unknown")
        path = scope["path"][:500]
        fields = {"method": method, "path": path, "status": status, "seconds": round(seconds, 4)}
        log.info("%s %s %s", method, path, status or "disconnected", extra={"fields": fields})
        if status:
            self.statistics.record(method=method, route=route, status=status, seconds=seconds)


def is_address(host: str) -> bool:
    """Whether ``host`` (without brackets or a port) is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def host_name(authority: str) -> str:
    """The host of ``host:port``, lower-case, without brackets; empty for what is not one."""
    try:
        return urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return ""


class HeadAsGet:
    """Answers HEAD wherever there is GET, as HTTP asks; the server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send)


class Guard:
    """Refuses requests that a browser was tricked into.

    ``hosts``: the names this server answers to (:data:`ANY_ADDRESS` may be one); empty means any. A foreign
    ``Host`` (DNS rebinding) gets 400 and is told of ``setting``, which adds names. A request that changes
    something gets 403 when it comes from a page of another site, except for pages of the hosts named in
    ``origins``.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str], setting: str) -> None:
        self.app = app
        self.setting = setting
        self.addresses = ANY_ADDRESS in hosts
        self.hosts = frozenset(host.lower() for host in hosts)
        self.origins = frozenset(host.lower() for host in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope["method"], Headers(scope=scope))
            except ServiceError as error:
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, method: str, headers: Headers) -> None:
        host = headers.get("host", "")
        name = host_name(host)
        if self.hosts and name not in self.hosts and not (self.addresses and is_address(name)):
            raise BadHost(
                f"This service does not answer to the host name {host!r}; its operator can add the name to "
                f"{self.setting}."
            )
        origin = headers.get("origin")
        if origin is None or method in _SAFE_METHODS:
            return
        authority = origin.partition("://")[2]
        if authority != host and host_name(authority) not in self.origins:
            raise Forbidden(f"A page of {origin} may not send requests to this service.")


class JsonBodies:
    """Bounds every body but uploads, and refuses bad JSON before a route sees it.

    A body is JSON whatever its Content-Type says, if it has one at all (curl's ``-d`` calls everything a
    form). What was read stays in the request's state as ``json``, so that an error can repeat the ids it
    names. ``limit`` is in bytes, and ``setting`` is what changes it. Multipart bodies pass to the paths in
    ``uploads`` (written as routes are, ``/things/{id}/parts``), whose routes stream them.
    """

    def __init__(self, app: ASGIApp, limit: int, setting: str, uploads: Collection[str]) -> None:
        self.app = app
        self.limit, self.setting = limit, setting
        self.uploads = [compile_path(path)[0] for path in uploads]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _SAFE_METHODS:
            await self.app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        multipart = headers.get("content-type", "").lower().startswith("multipart/")
        if multipart and any(path.fullmatch(scope["path"]) for path in self.uploads):
            await self.app(scope, receive, send)
            return
        headers["content-type"] = "application/json"
        try:
            body = await self._read(scope, receive)
            if body:
                scope.setdefault("state", {})["json"], body = read_json(body)
        except ServiceError as error:
            await error_response(error)(scope, receive, send)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        body = bytearray()
        async for chunk in Request(scope, receive).stream():
            body += chunk
            if len(body) > self.limit:
                raise TooLarge(
                    f"The request body is larger than the limit of {self.limit} bytes ({self.setting})."
                )
        return bytes(body)
