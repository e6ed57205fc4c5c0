"""An upload in parts outlives ``kill -9`` of the service: it goes on, or what is left of it is removed."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest
from fixtures_uploads import Json, announce, content, expire, send, state, stored, until
from service_process import ROOT, ServiceProcess

PART = b"0123456789abcdef" * 2**19  # 8 MiB


pytestmark = pytest.mark.trust


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with closing(ServiceProcess(tmp_path_factory.mktemp("killed"))) as service:
        yield service


def test_a_process_killed_at_any_moment_leaves_all_or_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.finetuning.kill_uploads", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def half_a_part(service: ServiceProcess, path: str) -> socket.socket:
    """A connection in the midst of a part, of which the first two megabytes are on the disk."""
    before = stored(service)
    host, port = service.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9000000\r\n"
    head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    head += '--b\r\nContent-Disposition: form-data; name="data"; filename="a"\r\n\r\n'
    connection.sendall(head.encode() + PART[:2_500_000])
    until(lambda: stored(service) != before)
    return connection


def test_the_parts_that_were_answered_are_there_after_a_kill_in_the_midst_of_the_next(
    service: ServiceProcess,
) -> None:
    upload = announce(service, 3 * len(PART))
    parts = send(service, upload, PART, PART)
    before: Json = state(service, upload)
    with half_a_part(service, f"/v1/uploads/{upload.id}/parts"):
        service.kill()
    assert any(name.startswith(".incoming-part-") for name in stored(service))
    service.start()
    assert stored(service) == set(parts)
    assert state(service, upload) == before
    parts += send(service, upload, PART)
    done = service.openai.uploads.complete(upload.id, part_ids=parts)
    assert content(service, done) == PART * 3
    assert done.file is not None
    service.openai.files.delete(done.file.id)


@pytest.mark.parametrize("moment", [".incoming-file-", "file-"])
def test_a_completion_that_was_killed_is_as_if_it_had_not_begun_or_done(
    service: ServiceProcess, moment: str
) -> None:
    upload = announce(service, 4 * len(PART))
    parts = send(service, upload, *[PART] * 4)

    def complete() -> None:
        with suppress(httpx.TransportError):
            service.http.post(f"/v1/uploads/{upload.id}/complete", json={"part_ids": parts})

    thread = threading.Thread(target=complete)
    thread.start()
    until(lambda: any(name.startswith(moment) for name in stored(service)), pause=0)
    service.kill()
    thread.join()
    service.start()
    found = state(service, upload)
    if found["status"] == "pending":
        assert [part["id"] for part in found["parts"]] == parts
        assert stored(service) == set(parts)
    else:
        assert (found["status"], found["parts"]) == ("completed", [])
        assert stored(service) == {found["file"]["id"]}
    done = service.openai.uploads.complete(upload.id, part_ids=parts)
    assert content(service, done) == PART * 4
    assert done.file is not None
    assert stored(service) == {done.file.id}
    service.openai.files.delete(done.file.id)


def test_what_has_expired_goes_at_the_next_start_and_so_do_parts_without_an_upload(
    service: ServiceProcess,
) -> None:
    upload = announce(service, 1)
    (part,) = send(service, upload, b"x")
    (service.data_dir / "files" / "part-of-nothing").write_bytes(b"x")
    service.restart()
    assert stored(service) == {part}
    expire(service, upload.id)
    service.restart()
    assert stored(service) == set()
    assert state(service, upload)["status"] == "expired"
    assert "orphaned" not in service.log
