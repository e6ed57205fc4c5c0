"""Files over HTTP: kept whole or not at all, and never where a client's name would put them."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from sqlalchemy import update

from comps.finetuning.store.blobs import Blobs
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import FileRow, JobRow
from comps.finetuning.sweep import remove_expired

RECORDS = b'{"instruction": "Say hello", "output": "Hello"}\n' * 3


def upload(http: httpx.Client, name: str = "a", content: bytes = RECORDS, **fields: str) -> httpx.Response:
    return http.post("/v1/files", files={"file": (name, content)}, data={"purpose": "fine-tune", **fields})


def stored(service) -> set[str]:
    """The names of everything in the service's directory of files."""
    return {path.name for path in (service.data_dir / "files").iterdir()}


def database_of(service) -> Database:
    return Database(f"sqlite:///{service.data_dir}/finetuning.db")


def test_the_official_client_uploads_lists_reads_and_deletes(client: openai.OpenAI) -> None:
    file = client.files.create(file=("train.jsonl", RECORDS), purpose="fine-tune")
    assert (file.object, file.filename, file.bytes, file.status) == ("file", "train.jsonl", 144, "processed")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == RECORDS
    assert file.id in [each.id for each in client.files.list()]
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (file.id, True, "file")
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_documents_curl_line_works(server, tmp_path: Path) -> None:
    (tmp_path / "alpaca_data.json").write_bytes(RECORDS)
    command = ["curl", "-s", f"{server.url}/v1/files", "-X", "POST"]
    command += ["-H", "Content-Type: multipart/form-data"]
    command += ["-F", f"file=@{tmp_path}/alpaca_data.json", "-F", "purpose=fine-tune"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert answer.startswith('{"id":"file-')
    assert '"filename":"alpaca_data.json"' in answer


def test_pages_go_on_after_the_last_id_in_either_order(client: openai.OpenAI) -> None:
    made = [client.files.create(file=("p", b"x"), purpose="evals").id for _ in range(5)]
    assert [file.id for file in client.files.list(purpose="evals", limit=2, order="asc")] == made
    assert [file.id for file in client.files.list(purpose="evals", limit=2)] == made[::-1]
    page = client.files.list(purpose="evals", limit=2, after=made[3])
    assert [file.id for file in page.data] == [made[2], made[1]]
    assert page.has_more
    with pytest.raises(openai.UnprocessableEntityError, match="after: there is no file"):
        client.files.list(after="file-nothing")


def test_a_file_lives_as_long_as_it_was_asked_to(server, client: openai.OpenAI) -> None:
    expiry = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=("a", b"x"), purpose="user_data", expires_after=expiry)
    assert file.expires_at == file.created_at + 3600
    database = database_of(server)
    with database.session() as session:
        session.execute(update(FileRow).where(FileRow.id == file.id).values(expires_at=time.time() - 1))
    database.dispose()
    assert server.http.get(f"/v1/files/{file.id}").status_code == 404
    assert file.id not in [each.id for each in client.files.list()]


def test_an_expired_file_goes_at_the_next_start_unless_a_job_still_reads_it(make_server) -> None:
    service = make_server()
    read, gone = (upload(service.http).json()["id"] for _ in range(2))
    database = database_of(service)
    with database.session() as session:
        session.execute(update(FileRow).values(expires_at=time.time() - 1))
        session.add(JobRow(id="ft-job-x", kind="fine_tuning", status="paused", model="m", training_file=read))
    database.dispose()
    assert stored(service) == {read, gone}
    service.restart()
    assert stored(service) == {read}


def test_an_expired_file_goes_while_the_service_runs(tmp_path: Path) -> None:
    database, blobs = Database(f"sqlite:///{tmp_path}/x.db"), Blobs(tmp_path)
    database.migrate()
    with database.session() as session:
        for file_id, expires in (("file-1", time.time() - 1), ("file-2", time.time() + 60), ("file-3", None)):
            blobs.path(file_id).write_bytes(b"x")
            row = {"filename": "a", "purpose": "evals", "bytes": 1, "sha256": ""}
            session.add(FileRow(id=file_id, expires_at=expires, **row))
    (tmp_path / ".incoming-file-4").write_bytes(b"x")  # an upload under way
    remove_expired(database, blobs)
    database.dispose()
    assert {path.name for path in tmp_path.glob("*file*")} == {"file-2", "file-3", ".incoming-file-4"}


def test_another_database_costs_no_upload(make_server, tmp_path: Path) -> None:
    service = make_server()
    kept = upload(service.http).json()["id"]
    deleted = service.data_dir / "jobs" / ".deleted-1"
    (deleted / "output").mkdir(parents=True)
    service.environment["FINETUNING_DATABASE_URL"] = f"sqlite:///{tmp_path}/other.db"
    service.restart()
    assert stored(service) == {"orphaned"}
    assert (service.data_dir / "files" / "orphaned" / kept).read_bytes() == RECORDS
    assert "is FINETUNING_DATABASE_URL right?" in service.log
    assert not deleted.exists()


@pytest.mark.parametrize("seconds", ["3599", "2592001", "soon", "-1", "1e4", ""])
def test_a_wrong_life_span_is_refused(server, seconds: str) -> None:
    fields = {"expires_after[anchor]": "created_at", "expires_after[seconds]": seconds}
    answer = upload(server.http, **fields)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "expires_after.seconds"


def test_an_empty_file_is_refused(server) -> None:
    answer = upload(server.http, content=b"")
    assert answer.status_code == 422
    assert answer.json()["detail"] == "The file 'a' is empty."


@pytest.mark.parametrize("purpose", ["fine_tune", "", "fine-tune-results", "x" * 4000])
def test_an_unknown_purpose_is_refused_with_the_known_ones(server, purpose: str) -> None:
    answer = upload(server.http, purpose=purpose)
    assert answer.status_code == 422
    assert "fine-tune, assistants, batch" in answer.json()["detail"]


HOSTILE = [
    "../../../etc/passwd", "/etc/passwd", "..\\..\\evil.jsonl", "a\0b.jsonl", "%2e%2e%2fevil", "x" * 300,
    "..", ".", "/", "C:\\evil", "data-evil/../x", "Übung ✓.jsonl", "$(touch canary).jsonl", "a\r\nX-Evil: 1",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_client_s_file_name_never_becomes_a_path(server, name: str) -> None:
    before = stored(server)
    answer = upload(server.http, name=name)
    assert answer.status_code == 200, answer.text
    file = answer.json()
    assert stored(server) - before == {file["id"]}
    assert not {"/", "\\", "\0", "\n"} & set(file["filename"])
    assert 0 < len(file["filename"]) <= 255
    content = server.http.get(f"/v1/files/{file['id']}/content")
    assert content.content == RECORDS
    assert content.headers["content-disposition"].startswith("attachment")
    assert "x-evil" not in content.headers


@pytest.mark.parametrize("file_id", ["..%2f..%2flock", "%2e%2e", ".incoming-x", "file-1%00", "x" * 3000])
def test_a_hostile_id_finds_nothing(server, file_id: str) -> None:
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
        assert server.http.get(path).status_code in (404, 405)
    assert server.http.delete(f"/v1/files/{file_id}").status_code in (404, 405)


def part(name: str, content: bytes = b"x", filename: str | None = None) -> bytes:
    disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename else "")
    return f"--b\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"


MALFORMED = {
    "the file's part is missing": part("purpose", b"fine-tune") + b"--b--\r\n",
    "two files": part("file", filename="a") + part("file", filename="b") + b"--b--\r\n",
    "the file in another field": part("files", filename="a") + b"--b--\r\n",
    "the file as a plain field": part("file") + b"--b--\r\n",
    "no final boundary": part("file", filename="a") + part("purpose", b"fine-tune"),
    "no name": b"--b\r\n\r\nx\r\n--b--\r\n",
    "10,000 parts": part("x") * 10_000 + b"--b--\r\n",
    "a huge field": part("purpose", b"x" * 100_000) + b"--b--\r\n",
    "a huge header": b"--b\r\nX: " + b"x" * 1_000_000,
    "10,000 headers": b"--b\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    "no multipart at all": b"hello",
    "nothing": b"",
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_upload_is_422_and_leaves_nothing(server, body: bytes) -> None:
    before = stored(server)
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = server.http.post("/v1/files", content=body, headers=headers)
    assert answer.status_code == 422, answer.text
    assert answer.json()["detail"].endswith(".")
    assert stored(server) == before


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data", "multipart/mixed", ""])
def test_an_upload_that_is_not_multipart_is_422(server, content_type: str) -> None:
    answer = server.http.post("/v1/files", content=b"{}", headers={"content-type": content_type})
    assert answer.status_code == 422
    assert "multipart/form-data" in answer.json()["detail"]


def test_a_big_upload_streams_to_the_disk_and_not_into_memory(server) -> None:
    megabytes = 160
    process = psutil.Process(server.process.pid)
    upload(server.http)  # so that what any upload needs is loaded already
    before = process.memory_info().rss

    def body() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="big"\r\n\r\n'
        block = b"0123456789abcdef" * 2**16
        for _ in range(megabytes):
            yield block
            highest.append(process.memory_info().rss)
        yield b"\r\n" + part("purpose", b"fine-tune") + b"--b--\r\n"

    highest: list[int] = []
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = server.http.post("/v1/files", content=body(), headers=headers)
    assert answer.json()["bytes"] == megabytes * 2**20
    assert max(highest) - before < 24 * 2**20
    server.http.delete(f"/v1/files/{answer.json()['id']}")


def test_a_file_above_the_limit_is_413_and_leaves_nothing(make_server) -> None:
    service = make_server(FINETUNING_MAX_UPLOAD_BYTES="100000")
    assert upload(service.http, content=b"x" * 100_000).status_code == 200
    kept = stored(service)
    answer = upload(service.http, content=b"x" * 5_000_000)
    assert answer.status_code == 413
    assert "100000 bytes" in answer.json()["detail"]
    with pytest.raises(openai.APIStatusError, match="100000 bytes"):
        service.openai.files.create(file=("a", b"x" * 100_001), purpose="fine-tune")
    assert stored(service) == kept


def test_a_client_that_hangs_up_leaves_nothing(server) -> None:
    before, logged = stored(server), len(server.log)
    begin_upload(server).close()
    deadline = time.monotonic() + 5
    while stored(server) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert stored(server) == before
    assert server.http.get("/health").is_success
    assert "Traceback" not in server.log[logged:]


def begin_upload(service) -> socket.socket:
    """A connection in the midst of an upload, of which the first two megabytes are on the disk."""
    before = stored(service)
    host, port = service.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9000000\r\n"
    connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n")
    connection.sendall(part("file", b"x" * 2_500_000, "a"))
    deadline = time.monotonic() + 5
    while stored(service) == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return connection


def test_files_survive_kill_9_and_half_an_upload_does_not(make_server) -> None:
    service = make_server()
    kept = upload(service.http).json()
    with begin_upload(service):
        service.kill()
    assert len(stored(service)) == 2
    service.start()
    assert stored(service) == {kept["id"]}
    assert service.http.get(f"/v1/files/{kept['id']}").json() == kept


def test_a_file_that_an_unfinished_job_needs_cannot_be_deleted(server) -> None:
    file_id = upload(server.http).json()["id"]
    database = database_of(server)
    with database.session() as session:
        job_id = f"ft-job-{file_id}"
        session.add(JobRow(id=job_id, kind="fine_tuning", status="paused", model="m", training_file=file_id))
    answer = server.http.delete(f"/v1/files/{file_id}")
    assert answer.status_code == 409
    assert job_id in answer.json()["detail"]
    with database.session() as session:
        session.execute(update(JobRow).where(JobRow.training_file == file_id).values(status="cancelled"))
    database.dispose()
    assert server.http.delete(f"/v1/files/{file_id}").json()["deleted"]
    assert file_id not in stored(server)


def test_without_the_key_nothing_is_answered_but_health(make_server) -> None:
    service = make_server(FINETUNING_API_KEYS="the-key")
    file_id = upload(service.http).json()["id"]
    assert service.openai.files.retrieve(file_id).id == file_id
    for header in ("", "Bearer", "Bearer None", "Bearer the-kez", "Basic the-key", "the-key"):
        stranger = {"authorization": header}
        answer = service.http.get(f"/v1/files/{file_id}", headers=stranger)
        assert answer.status_code == 401, header
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert service.http.post("/v1/models", json={}, headers=stranger).status_code == 401
        assert service.http.get("/v1/health_check", headers=stranger).is_success
    assert "the-key" not in service.log


def test_a_second_service_on_the_same_data_is_refused(make_server) -> None:
    service = make_server()
    with pytest.raises(RuntimeError, match=r"exit code 2.*\n.*Another service uses the data directory"):
        make_server(FINETUNING_DATA_DIR=str(service.data_dir))


def test_sigterm_ends_the_service_cleanly(make_server) -> None:
    service = make_server()
    assert service.stop() == 0
    assert "Traceback" not in service.log
