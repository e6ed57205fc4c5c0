"""Receives a multipart upload as it arrives: one file straight into its destination, and short fields.

Starlette's own form parser would put the file into the system's temporary directory first, which
costs a second copy and, where that directory is memory, the file's size in RAM; and it would read
the whole body before a route could refuse it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import ClassVar, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from comps.cores.errors import InvalidRequest, ServiceError

MAX_PARTS = 16
MAX_FIELD_BYTES = 4096
_SLOWEST = 8192  # bytes a second, after the first ``idle_seconds``
_BLOCK = 2**20  # bytes gathered before a write on a thread


class UploadStalled(ServiceError):
    """The client, or the network between, has stopped sending."""

    status, type, code = 408, "invalid_request_error", "upload_stalled"
    # Whoever is still there may begin again, on another connection: the rest of this one is not read.
    headers: ClassVar[Mapping[str, str]] = {"connection": "close"}


class Destination(Protocol):
    """Where the bytes of the file go; what ``write`` raises ends the upload."""

    def write(self, data: bytes) -> None: ...


class Upload:
    """The parts of one multipart body, fed by :func:`receive_upload`.

    ``filename``: what the client called the file, or ``None`` when none came. ``fields``: the others.
    """

    def __init__(self, file_field: str) -> None:
        self.file_field = file_field
        self.filename: str | None = None
        self.fields: dict[str, str] = {}
        self.pending = bytearray()
        self.ended = False
        self._parts = 0
        self._header, self._value = b"", b""
        self._disposition = b""
        self._field: str | None = None  # None while inside the file
        self._text = bytearray()

    def parser(self, boundary: bytes) -> MultipartParser:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def _part_begin(self) -> None:
        self._disposition = b""
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InvalidRequest(f"The upload has more than {MAX_PARTS} parts.")

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if b"filename" not in options:
            self._field, self._text = name, bytearray()
            return
        if name != self.file_field:
            message = f"The upload's file must be in the field '{self.file_field}', not {name[:80]!r}."
            raise InvalidRequest(message, param=self.file_field)
        if self.filename is not None:
            raise InvalidRequest("The upload has more than one file.", param=self.file_field)
        self._field = None
        self.filename = options[b"filename"].decode("utf-8", "replace")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self.pending += memoryview(data)[start:end]
            return
        self._text += memoryview(data)[start:end]
        if len(self._text) > MAX_FIELD_BYTES:
            raise InvalidRequest(f"The field {self._field[:80]!r} is longer than {MAX_FIELD_BYTES} bytes.")

    def _part_end(self) -> None:
        if self._field is not None:
            self.fields[self._field] = self._text.decode("utf-8", "replace")

    def _end(self) -> None:
        self.ended = True


async def receive_upload(
    request: Request, file_field: str, destination: Destination, idle_seconds: float
) -> Upload:
    """Stream the request's body; the bytes of the part ``file_field`` go to ``destination``.

    Raises :class:`InvalidRequest` for anything but one whole multipart body with at most one file,
    :class:`UploadStalled` when no byte came for ``idle_seconds`` or they come too slowly, and lets the
    destination's errors through. Memory stays near one megabyte at any size.
    """
    content_type, options = parse_options_header(request.headers.get("content-type"))
    if content_type != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidRequest("An upload must be multipart/form-data with a boundary.")
    upload = Upload(file_field)

    async def flush() -> None:
        await run_in_threadpool(destination.write, bytes(upload.pending))
        upload.pending.clear()

    try:
        parser = upload.parser(options[b"boundary"])
        async for chunk in _chunks(request, idle_seconds):
            parser.write(chunk)
            if len(upload.pending) >= _BLOCK:
                await flush()
    except FormParserError as error:
        raise InvalidRequest(f"The upload is not well-formed multipart data: {error}.") from error
    if not upload.ended:
        raise InvalidRequest("The upload ended before its final boundary.")
    await flush()
    return upload


async def _chunks(request: Request, idle_seconds: float) -> AsyncIterator[bytes]:
    stream = request.stream()
    began, received = time.monotonic(), 0
    while True:
        try:
            async with asyncio.timeout(idle_seconds):
                chunk = await anext(stream, None)
        except TimeoutError as error:
            message = f"No byte of the upload came for {idle_seconds:g} seconds; send it again."
            raise UploadStalled(message) from error
        if chunk is None:
            return
        received += len(chunk)
        # Or a few clients that send a byte now and then would hold all places for uploads.
        if time.monotonic() - began > idle_seconds + received / _SLOWEST:
            raise UploadStalled(f"The upload comes at less than {_SLOWEST} bytes a second; send it again.")
        yield chunk
