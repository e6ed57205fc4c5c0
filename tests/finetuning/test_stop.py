"""Requests under way when the service is told to stop are answered, and say what becomes of their work."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from fixtures_elastic import lora, super_adapter
from fixtures_jobs import succeeded_job
from fixtures_models import save_tiny_model, tiny_model
from fixtures_uploads import database_of, stored, until
from service_process import ServiceProcess

BASE = "org/stop"


def source(service: ServiceProcess, directory: Path) -> str:
    """A job that has succeeded; returns its id."""
    save_tiny_model(service.models_dir / BASE)
    super_adapter(tiny_model(), lora(), directory)
    database = database_of(service)
    job_id = succeeded_job(database, service.data_dir / "jobs", service.models_dir / BASE, directory)
    database.dispose()
    return job_id


@contextmanager
def sigterm(service: ServiceProcess) -> Iterator[None]:
    """The service is told to stop, and has stopped when this block ends."""
    stopping = threading.Thread(target=service.stop)
    stopping.start()
    yield
    stopping.join()
    assert service.process.returncode == 0
    assert "Traceback" not in service.log


def test_who_waits_for_an_extraction_hears_that_it_goes_on_later(make_server, tmp_path: Path) -> None:
    service: ServiceProcess = make_server()
    body = {"fine_tuning_job_id": source(service, tmp_path / "adapter"), "adapter_version": "minimal"}
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(service.http.post("/v1/finetune/extract_adapter", json=body))

    def runs() -> list[dict[str, Any]]:
        listed = service.http.post("/v1/finetune/extract_adapter", json=body | {"wait": False})
        return [listed.json()]

    asking = threading.Thread(target=ask)
    asking.start()
    (run,) = runs()  # the same one, since it is asked for twice
    until(lambda: service.log.count("extract_adapter 200") == 1)
    with sigterm(service):
        asking.join(timeout=4)  # well before the grace of those who do not listen
        assert not asking.is_alive()
    (answer,) = answers
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "stopping"
    assert f"The service is stopping; the extract {run['id']} goes on" in answer.json()["detail"]
    assert answer.json()["fine_tuning_job_id"] == body["fine_tuning_job_id"]
    assert answer.headers["retry-after"]
    service.start()
    assert runs()[0]["id"] == run["id"]


def test_an_upload_that_does_not_end_in_time_is_refused_and_leaves_nothing(make_server) -> None:
    service: ServiceProcess = make_server()
    host, port = service.url.removeprefix("http://").split(":")
    head = f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9000000\r\n"
    head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    head += '--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"x" * 2_500_000)
        until(lambda: stored(service))
        with sigterm(service):
            said = b""
            while chunk := connection.recv(65536):
                said += chunk
    status, _, rest = said.partition(b"\r\n")
    assert status.startswith(b"HTTP/1.1 503 ")
    assert json.loads(rest.partition(b"\r\n\r\n")[2])["error"]["code"] == "cut_off"
    assert stored(service) == set()


def test_an_extraction_can_be_cancelled_and_asked_for_again(make_server, tmp_path: Path) -> None:
    service: ServiceProcess = make_server()
    body = {"fine_tuning_job_id": source(service, tmp_path / "adapter"), "adapter_version": "minimal"}
    route = "/v1/finetune/extract_adapter"
    run = service.http.post(route, json=body | {"wait": False}).json()["id"]
    cancelled = service.http.post(f"/v1/fine_tuning/jobs/{run}/cancel")
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert service.http.post(route, json=body | {"wait": False}).json()["id"] != run


def test_a_log_that_is_followed_ends_with_the_service(make_server, tmp_path: Path) -> None:
    service: ServiceProcess = make_server()
    body = {"fine_tuning_job_id": source(service, tmp_path / "adapter"), "adapter_version": "minimal"}
    run = service.http.post("/v1/finetune/extract_adapter", json=body | {"wait": False}).json()["id"]
    path = f"/v1/fine_tuning/jobs/{run}/logs?follow=true"
    with service.http.stream("GET", path) as stream, sigterm(service):
        assert stream.read() == b""
