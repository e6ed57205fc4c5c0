"""Connections on which nothing comes, or half a request: they are closed in time, and lock nobody out."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
from service_process import ServiceProcess

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
SECONDS = 2.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One that waits two seconds for a head, and may open 256 files."""
    directory: Path = tmp_path_factory.mktemp("connections")
    few = ("prlimit", "--nofile=256:256")
    with closing(ServiceProcess(directory, prefix=few, FINETUNING_HEAD_SECONDS=str(SECONDS))) as service:
        yield service


def connect(service: ServiceProcess) -> socket.socket:
    host, _, port = service.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def seconds_until_closed(line: socket.socket) -> float:
    began = time.monotonic()
    try:
        while line.recv(10_000):
            pass
    except ConnectionError:
        pass
    return time.monotonic() - began


def drip(line: socket.socket, data: bytes) -> None:
    """Send ``data`` ten times a second. Raises :class:`ConnectionError` once the other side has closed."""
    for _ in range(int(10 * (SECONDS + 5))):
        line.sendall(data)
        time.sleep(0.1)


@pytest.mark.parametrize(
    "sent",
    [b"", HEAD, HEAD + b"X-Half: ", HEAD + b"\r\n" + HEAD],
    ids=["nothing", "half a head", "half a header", "a request and half of the next"],
)
def test_a_connection_without_a_whole_head_is_closed_in_time(service: ServiceProcess, sent: bytes) -> None:
    with connect(service) as line:
        line.sendall(sent)
        assert SECONDS - 1 < seconds_until_closed(line) < SECONDS + 3


def test_a_head_that_drips_is_no_reason_to_wait_longer(service: ServiceProcess) -> None:
    with connect(service) as line:
        began = time.monotonic()
        line.sendall(HEAD)
        with pytest.raises(ConnectionError):
            drip(line, b"X: y\r\n")
        assert time.monotonic() - began < SECONDS + 3


def test_a_body_that_is_answered_before_it_came_is_not_waited_for(service: ServiceProcess) -> None:
    with connect(service) as line:
        line.sendall(b"POST /nothing HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 1000000\r\n\r\n")
        assert line.recv(20).startswith(b"HTTP/1.1 400")
        with pytest.raises(ConnectionError):
            drip(line, b"x")


def test_more_silent_connections_than_there_are_files_lock_nobody_out(service: ServiceProcess) -> None:
    before = len(service.log)
    with ExitStack() as lines:
        for number in range(600):
            line = lines.enter_context(connect(service))
            line.sendall(HEAD if number % 2 else b"")
            if number % 100 == 99:
                assert httpx.get(f"{service.url}/health", timeout=5).is_success
    assert "out of system resource" not in service.log
    assert len(service.log) - before < 10_000


def test_requests_that_are_under_way_are_not_closed_for_newer_ones(service: ServiceProcess) -> None:
    """A body that is still to come is no idle connection, however many come after it."""
    with ExitStack() as lines:
        busy = lines.enter_context(connect(service))
        busy.sendall(b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n")
        for _ in range(300):
            lines.enter_context(connect(service))
        time.sleep(SECONDS + 0.5)
        busy.sendall(b"{}")
        assert busy.recv(20).startswith(b"HTTP/1.1 422")
