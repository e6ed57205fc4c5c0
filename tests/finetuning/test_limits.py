"""Limits that the operator sets: each refusal says the limit and the setting, and the service goes on."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import openai
import psutil
import pytest
from fixtures_models import save_tiny_model
from fixtures_service import MODEL, RECORDS, create, events, job, upload
from fixtures_uploads import announce, send, stored, until
from service_process import ServiceProcess

from comps.finetuning.settings import variables

LIMITS = {
    "FINETUNING_MAX_UPLOAD_BYTES": "20000",
    "FINETUNING_MAX_BODY_BYTES": "5000",
    "FINETUNING_MAX_CONCURRENT_UPLOADS": "2",
    "FINETUNING_MAX_RECORD_BYTES": "1000",
    "FINETUNING_MAX_RECORDS": "50",
    "FINETUNING_MAX_QUEUED_JOBS": "2",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("limits")
    save_tiny_model(directory / "data" / "models" / MODEL)
    with closing(ServiceProcess(directory, **LIMITS)) as service:
        yield service


def said(error: Any, limit: str, code: str) -> None:
    """The refusal names the limit and the setting."""
    name = f"FINETUNING_MAX_{limit}"
    assert name in variables()
    assert error["code"] == code
    number = re.escape(f"{int(LIMITS[name]):,}").replace(",", ",?")
    assert re.search(rf"\b{number}\b.*\b{name}\b", error["message"]), error["message"]


def test_bytes_of_an_upload(service: ServiceProcess) -> None:
    before = stored(service)
    with pytest.raises(openai.APIStatusError) as raised:
        service.openai.files.create(file=("a", b"x" * 20_001), purpose="fine-tune")
    said(raised.value.body, "UPLOAD_BYTES", "too_large")
    with pytest.raises(openai.APIStatusError) as raised:
        announce(service, 20_001)
    said(raised.value.body, "UPLOAD_BYTES", "too_large")
    whole = announce(service, 20_000)
    with pytest.raises(openai.APIStatusError, match="larger than the 20000 bytes that were announced"):
        send(service, whole, b"x" * 20_001)
    assert stored(service) == before
    (part,) = send(service, whole, b"x" * 20_000)
    assert service.openai.uploads.complete(whole.id, part_ids=[part]).status == "completed"


def test_bytes_of_a_body(service: ServiceProcess) -> None:
    answer = service.http.post("/v1/fine_tuning/jobs", content=b'{"model": "%s"}' % (b"x" * 5000))
    assert answer.status_code == 413
    said(answer.json()["error"], "BODY_BYTES", "too_large")


def refused(service: ServiceProcess, name: str, content: bytes, **changes: Any) -> dict[str, Any]:
    """The error of a job whose data file is wrong."""
    file_id = service.openai.files.create(file=(name, content), purpose="fine-tune").id
    job_id = create(service, file_id, **changes)
    until(lambda: job(service, job_id)["status"] == "failed")
    error: dict[str, Any] = job(service, job_id)["error"]
    return error


def test_bytes_of_a_record(service: ServiceProcess) -> None:
    record = json.dumps(RECORDS[0]).encode()
    long = json.dumps({**RECORDS[0], "output": "x" * 1000}).encode()
    pages = b'instruction,output\nSay,no\nSay,"' + b"no\n" * 400 + b'"\n'
    files = {
        "a.jsonl": (record + b"\n" + long, "a.jsonl, line 2: "),
        "a.json": (b"[" + record + b", " + long + b"]", "a.json, record 2: "),
        "a.csv": (pages, "a.csv, line 3: "),
    }
    for name, (content, place) in files.items():
        error = refused(service, name, content)
        said(error, "RECORD_BYTES", "invalid_training_file")
        assert error["message"].startswith(place)


def test_number_of_records(service: ServiceProcess) -> None:
    too_many = b"".join(json.dumps(record).encode() + b"\n" for record in (RECORDS * 2)[:51])
    error = refused(service, "b.jsonl", too_many)
    said(error, "RECORDS", "invalid_training_file")
    assert error["message"].startswith("b.jsonl, line 51: the file has more than 50 records")


def test_a_validation_file_has_the_same_limits(service: ServiceProcess) -> None:
    many = b"".join(json.dumps(record).encode() + b"\n" for record in (RECORDS * 2)[:51])
    service.openai.files.create(file=("c.jsonl", many), purpose="fine-tune")
    good = json.dumps(RECORDS[:2]).encode()
    error = refused(service, "d.json", good, validation_file="c.jsonl")
    said(error, "RECORDS", "invalid_validation_file")
    assert error["param"] == "validation_file"


def test_jobs_that_have_not_ended(service: ServiceProcess) -> None:
    file_id = upload(service, RECORDS[:2])
    first, second = (create(service, file_id) for _ in range(2))
    # The client's own retries would only cost the user time.
    patient = service.openai.with_options(max_retries=5)
    began = time.monotonic()
    with pytest.raises(openai.RateLimitError) as raised:
        patient.fine_tuning.jobs.create(model=MODEL, training_file=file_id)
    assert time.monotonic() - began < 5
    said(raised.value.body, "QUEUED_JOBS", "queue_full")
    assert raised.value.response.headers["retry-after"] == "60"
    assert len(service.http.get("/v1/fine_tuning/jobs?limit=100").json()["data"]) >= 2
    service.openai.fine_tuning.jobs.cancel(first)
    third = create(service, file_id)
    for job_id in (second, third):
        service.openai.fine_tuning.jobs.cancel(job_id)
    assert "Created fine-tuning job" in events(service, third)[0]["message"]


def begin(service: ServiceProcess, path: str = "/v1/files") -> socket.socket:
    """A connection in the midst of an upload that holds its place."""
    before = stored(service)
    host, port = service.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9000\r\n"
    connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n")
    until(lambda: stored(service) != before)
    return connection


def test_uploads_at_a_time(service: ServiceProcess) -> None:
    waiting = announce(service, 10)
    process = psutil.Process(service.process.pid)
    form = {"file": ("a", b"x" * 15_000)}
    with ExitStack() as stack:
        stack.enter_context(begin(service))
        stack.enter_context(begin(service, f"/v1/uploads/{waiting.id}/parts"))
        before, memory, files = stored(service), process.memory_info().rss, process.num_fds()
        for _ in range(40):
            answer = service.http.post("/v1/files", files=form, data={"purpose": "evals"})
            assert answer.status_code == 503
            said(answer.json()["error"], "CONCURRENT_UPLOADS", "too_many_uploads")
            assert answer.headers["retry-after"] == "5"
        with pytest.raises(openai.InternalServerError, match="receiving 2 uploads"):
            send(service, waiting, b"0123456789")
        assert stored(service) == before
        assert process.num_fds() <= files
        assert process.memory_info().rss - memory < 8 * 2**20
        # What is no upload is answered as ever.
        assert service.http.get("/v1/files").is_success
        assert service.http.get("/health").is_success
    # Both clients hang up, and their places are free.
    until(lambda: service.http.post("/v1/files", files=form, data={"purpose": "evals"}).is_success)
    send(service, waiting, b"0123456789")


def test_an_upload_that_stalls_is_given_up_and_leaves_its_place(tmp_path_factory: Any) -> None:
    limits = {"FINETUNING_MAX_CONCURRENT_UPLOADS": "1", "FINETUNING_UPLOAD_IDLE_SECONDS": "0.5"}
    with closing(ServiceProcess(tmp_path_factory.mktemp("idle"), **limits)) as service:
        with begin(service) as connection:
            answer = b"".join(iter(lambda: connection.recv(4096), b""))  # to the end of the connection
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"upload_stalled"' in answer
        assert b"No byte of the upload came for 0.5 seconds; send it again." in answer
        assert stored(service) == set()
        assert upload(service)
