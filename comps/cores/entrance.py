"""What is asked of a request before its body is read: a key, a body as it is, and some speed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from starlette.requests import Request
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from comps.cores.errors import ServiceError, SlowRequest, UnsupportedEncoding, error_response

_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")


class Entrance:
    """Refuses requests whose body is not worth reading.

    ``admit`` raises for a stranger, who could otherwise have the service hold any number of bodies. A body
    that is compressed gets 415. One that has not arrived after ``patience`` seconds gets 408, except at the
    paths in ``uploads`` (see :class:`comps.cores.middleware.JsonBodies`), whose routes see to it themselves.
    """

    def __init__(
        self, app: ASGIApp, admit: Callable[[Request], object], patience: float, uploads: Collection[str]
    ) -> None:
        self.app = app
        self.admit = admit
        self.patience = patience
        self.uploads = [compile_path(path)[0] for path in uploads]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _WITHOUT_BODY:
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        try:
            self.admit(request)
            encoding = request.headers.get("content-encoding", "identity").strip().lower()
            if encoding not in ("identity", ""):
                raise UnsupportedEncoding(
                    f"The request body is encoded as {encoding[:40]!r}; send it as it is."
                )
        except ServiceError as error:
            await error_response(error)(scope, receive, send)
            return
        if not any(path.fullmatch(scope["path"]) for path in self.uploads):
            receive = self._in_time(receive)
        await self.app(scope, receive, send)

    def _in_time(self, receive: Receive) -> Receive:
        """``receive`` with a deadline for the end of the body; what comes after is awaited without one."""
        deadline: float | None = asyncio.get_running_loop().time() + self.patience

        async def receive_in_time() -> Message:
            nonlocal deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                sentence = f"The request body did not arrive within {self.patience:g} seconds."
                raise SlowRequest(sentence) from None
            if not message.get("more_body", False):
                deadline = None
            return message

        return receive_in_time
