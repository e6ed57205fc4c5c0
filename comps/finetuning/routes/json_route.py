"""Routes whose JSON bodies are read with care.

Before FastAPI validates a body it must be an object of plain JSON: no ``NaN``, no numbers of thousands of
digits, no nesting without end, no text that is not Unicode. One fault is forgiven, since published
examples have it: a comma after the last element of a list or an object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message

from comps.cores.errors import InvalidRequest

# A string (also an unfinished one), or a comma with nothing after it.
_TRAILING_COMMA = re.compile(rb'("(?:[^"\\]|\\.)*+"?)|,(?=\s*+[}\]])', re.DOTALL)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def clean_json(body: bytes) -> bytes:
    """``body``, with trailing commas taken out. Raises :class:`InvalidRequest` when it is not an object."""
    try:
        value = _load(body)
    except json.JSONDecodeError as error:
        body = _TRAILING_COMMA.sub(lambda match: match[1] or b"", body)
        try:
            value = _load(body)
        except ValueError:
            raise InvalidRequest(
                f"The request body is not valid JSON: {error}.", code="invalid_json"
            ) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("The request body is not UTF-8 text.", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest(f"The request body cannot be read: {what}.", code="invalid_json") from error
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_json")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        message = "The request body has half of a surrogate pair in it, which is not Unicode text."
        raise InvalidRequest(message, code="invalid_json") from error
    return body


def _load(body: bytes) -> Any:
    return json.loads(body, parse_constant=_no_constant)


class JsonRoute(APIRoute):
    """To be given to a router as its ``route_class``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def handle(request: Request) -> Response:
            body = await request.body()
            if body:
                body = request.state.body = clean_json(body)

            given = False

            async def replay() -> Message:
                nonlocal given
                if given:
                    return await request.receive()  # a client that hangs up
                given = True
                return {"type": "http.request", "body": body, "more_body": False}

            # Whatever content type the client named, this is JSON.
            kept = [item for item in request.scope["headers"] if item[0] != b"content-type"]
            scope = {**request.scope, "headers": [*kept, (b"content-type", b"application/json")]}
            return await handler(Request(scope, replay))

        return handle
