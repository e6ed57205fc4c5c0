"""What a component answers when it refuses or fails.

::

    ServiceError             one sentence for the person who sent the request
    +-- BadHost              400  the Host header names another server
    +-- InvalidRequest       422  a field has a wrong value; ``param`` names it
    +-- Unauthorized         401  no key, or a wrong one
    +-- Forbidden            403  known, but not allowed
    +-- NotFound             404
    +-- Conflict             409  the thing's state does not allow it; asking again will not help
    +-- SlowRequest          408  the body did not come
    +-- TooLarge             413
    +-- UnsupportedEncoding  415  the body is compressed
    +-- Unavailable          503  for now; asking again may help
    |   +-- Stopping         503  the service ends; the request may be sent again
    |   +-- CutOff           503  the service ends, and nobody knows what became of the request
    +-- InsufficientStorage  507  the disk is full

Each knows its ``status``, ``type`` and ``code``. A new one sets these three and needs nothing else.
The body is OpenAI's envelope plus ``detail`` for OPEA's clients: ``{"error": {"message", "type",
"param", "code"}, "detail": message}``, and the ids that the request named, so that a pipeline which
passes answers on without looking at their status still knows which job they are about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

IDS = ("fine_tuning_job_id", "id")
_LONGEST_ID = 1000  # characters; what is longer is no id, and is not repeated
_QUOTED_INPUT = 80
# Fields whose values are not repeated in messages.
_SECRET = re.compile(r"(^|_)(token|secret|password|api_?key)$", re.IGNORECASE)
# pydantic's words for these are about Python's types.
_OBJECT = ("model_type", "model_attributes_type", "dict_type")


class StartupError(Exception):
    """The service cannot start. One sentence for the operator; the command prints it and exits with 2."""


class ServiceError(Exception):
    """Base class. ``param`` is the dotted request field it is about, ``code`` a stable word for programs."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"
    headers: ClassVar[Mapping[str, str]] = {}

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code


class BadHost(ServiceError):
    status, type, code = 400, "invalid_request_error", "bad_host"


class InvalidRequest(ServiceError):
    status, type, code = 422, "invalid_request_error", "invalid_value"


class Unauthorized(ServiceError):
    status, type, code = 401, "authentication_error", "invalid_api_key"
    headers: ClassVar[Mapping[str, str]] = {"www-authenticate": "Bearer"}


class Forbidden(ServiceError):
    status, type, code = 403, "permission_error", "forbidden"


class NotFound(ServiceError):
    status, type, code = 404, "invalid_request_error", "not_found"


class Conflict(ServiceError):
    status, type, code = 409, "invalid_request_error", "conflict"
    # OpenAI's client repeats a 409 by itself unless told that it is final.
    headers: ClassVar[Mapping[str, str]] = {"x-should-retry": "false"}


class SlowRequest(ServiceError):
    status, type, code = 408, "invalid_request_error", "request_timeout"


class TooLarge(ServiceError):
    status, type, code = 413, "invalid_request_error", "too_large"


class UnsupportedEncoding(ServiceError):
    status, type, code = 415, "invalid_request_error", "unsupported_encoding"


class Unavailable(ServiceError):
    status, type, code = 503, "server_error", "unavailable"


class Stopping(Unavailable):
    code = "stopping"
    headers: ClassVar[Mapping[str, str]] = {"retry-after": "10"}


class CutOff(Unavailable):
    code = "cut_off"
    # OpenAI's client would send it again by itself.
    headers: ClassVar[Mapping[str, str]] = {"x-should-retry": "false"}


class InsufficientStorage(ServiceError):
    status, type, code = 507, "server_error", "insufficient_storage"
    # Nothing is freed within the client's few seconds of retries, and an upload is dear to repeat.
    headers: ClassVar[Mapping[str, str]] = {"x-should-retry": "false"}


class ErrorFacts(BaseModel):
    """OpenAI's part of an error's body."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error, for the schema; ``detail`` repeats the message for OPEA's clients."""

    error: ErrorFacts
    detail: str


def envelope(
    message: str, *, type: str, code: str, param: str | None = None, ids: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The body of every error."""
    error = {"message": message, "type": type, "param": param, "code": code}
    return {"error": error, "detail": message, **(ids or {})}


def error_response(error: ServiceError, ids: Mapping[str, str] | None = None) -> JSONResponse:
    """``error`` as a response; for middleware, which runs outside the exception handlers."""
    body = envelope(error.message, type=error.type, code=error.code, param=error.param, ids=ids)
    return JSONResponse(body, error.status, dict(error.headers))


def request_ids(request: Request) -> dict[str, str]:
    """The ids that a request names in its path or in its JSON body."""
    sent = getattr(request.state, "json", None)  # read by comps.cores.middleware.JsonBodies
    found = (sent if isinstance(sent, dict) else {}) | request.path_params
    return {
        key: value for key in IDS if isinstance(value := found.get(key), str) and len(value) <= _LONGEST_ID
    }


def describe_problem(problem: Mapping[str, Any]) -> tuple[str, str | None]:
    """One of pydantic's problems as a sentence, and the dotted field that it is about."""
    where, *path = problem["loc"] or ("request",)
    kind, reason = problem["type"], str(problem["msg"]).removeprefix("Value error, ")
    reason = "a JSON object was expected" if kind in _OBJECT else reason[:1].lower() + reason[1:]
    if path and path[-1] == "[key]":
        path, reason = path[:-2], f"a key of it is wrong: {reason}"
    field = ".".join(str(part) for part in path) or None
    place = f"{where}.{field}" if field and where != "body" else field or f"The request {where}"
    if kind == "missing":
        return (f"{place} is missing." if field else f"{place} is empty, JSON was expected."), field
    given = problem.get("input")
    shown = ""
    secret = any(_SECRET.search(str(part)) for part in path)
    if not secret and (given is None or isinstance(given, str | int | float)):
        text = json.dumps(given, ensure_ascii=False)
        shown = f" (got {text if len(text) <= _QUOTED_INPUT else text[:_QUOTED_INPUT] + '...'})"
    return f"{place}: {reason}{shown}.", field


def _on_service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return error_response(error, request_ids(request))


def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    message, param = describe_problem(problems[0])
    if len(problems) > 1:
        message += f" ({len(problems) - 1} more in this request.)"
    return error_response(InvalidRequest(message, param=param), request_ids(request))


def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        message = f"There is no route {where}."
    elif error.status_code == 405:
        message = f"{request.url.path} does not allow {request.method}."
    else:
        message = str(error.detail)
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    code = HTTPStatus(error.status_code).name.lower()
    body = envelope(message, type=kind, code=code, ids=request_ids(request))
    return JSONResponse(body, error.status_code, dict(error.headers or {}))


def add_error_handlers(app: FastAPI) -> None:
    """Make every expected error of ``app`` leave in the one envelope.

    What nobody expected is logged and answered by :class:`comps.cores.middleware.RequestLog`.
    """
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
