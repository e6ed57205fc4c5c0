"""A full disk: what cannot be written is answered with 507 or fails with a typed error; the service lives."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fixtures_models import save_tiny_model
from fixtures_service import MODEL, NLS_JOB, create, job, messages, succeeded, upload, wait
from service_process import ServiceProcess
from small_disk import SmallDisk, small_disk

MEGABYTE = 1_000_000


pytestmark = [pytest.mark.trust, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base models, on a disk with room."""
    directory = tmp_path_factory.mktemp("models")
    save_tiny_model(directory / MODEL)
    return directory


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "data") as disk:
        yield disk


@pytest.fixture
def make_service(disk: SmallDisk, models: Path, tmp_path: Path) -> Iterator[Callable[..., ServiceProcess]]:
    """Starts a service whose data directory is the small disk."""
    services: list[ServiceProcess] = []

    def make(*, ray: bool = False) -> ServiceProcess:
        service = ServiceProcess(tmp_path, ray=ray, prefix=disk.prefix, FINETUNING_MODELS_DIR=str(models))
        services.append(service)
        return service

    yield make
    for service in services:
        service.close()


def send(service: ServiceProcess, size: int) -> httpx.Response:
    files = {"file": ("a.json", b"x" * size)}
    return service.http.post("/v1/files", files=files, data={"purpose": "fine-tune"})


def lists(service: ServiceProcess) -> list[Any]:
    """What there is, for a look before and after."""
    return [service.http.get(path).json() for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/models")]


def assert_disk_full(answer: httpx.Response) -> None:
    assert answer.status_code == 507, answer.text
    assert answer.json()["error"]["code"] == "insufficient_storage"
    assert "disk is full" in answer.json()["detail"]
    assert answer.headers["x-should-retry"] == "false"


def test_an_upload_beyond_the_disk_is_507_and_leaves_nothing(
    make_service: Callable[..., ServiceProcess], disk: SmallDisk
) -> None:
    service = make_service()
    kept = send(service, MEGABYTE).json()
    before = disk.free
    for _ in range(2):
        assert_disk_full(send(service, 9 * MEGABYTE))
        assert [path.name for path in (disk.path / "files").iterdir()] == [kept["id"]]
        assert disk.free == before
        assert service.http.get("/health").is_success
    assert send(service, 1000).status_code == 200


def test_on_a_full_disk_changes_are_507_and_change_nothing_until_there_is_room(
    make_service: Callable[..., ServiceProcess], disk: SmallDisk
) -> None:
    service = make_service()
    file_id = upload(service)
    queued = create(service, file_id)
    while job(service, queued)["status"] != "queued":
        time.sleep(0.05)
    before = lists(service)
    disk.fill()
    changes = [
        ("POST", "/v1/fine_tuning/jobs", NLS_JOB | {"training_file": file_id}),
        ("POST", f"/v1/fine_tuning/jobs/{queued}/cancel", None),
        ("POST", "/v1/models", {"id": "another/name", "path": MODEL}),
    ]
    for method, path, body in changes * 3:
        assert_disk_full(service.http.request(method, path, json=body))
    assert_disk_full(send(service, 1000))
    assert service.http.get("/health").is_success
    assert lists(service) == before
    assert service.http.get(f"/v1/files/{file_id}/content").is_success
    assert len(list((disk.path / "files").iterdir())) == 1
    # SQLite would follow the disk's path, a link, to the same place on this process's own disk.
    check = f"import sqlite3; print(*sqlite3.connect({str(service.data_dir / 'finetuning.db')!r})"
    check += ".execute('PRAGMA integrity_check').fetchone())"
    checked = subprocess.run([*disk.prefix, sys.executable, "-c", check], capture_output=True, text=True)
    assert checked.stdout == "ok\n", checked

    disk.clear()
    for method, path, body in changes:
        answer = service.http.request(method, path, json=body)
        assert answer.status_code == 200, answer.text
    assert send(service, 1000).status_code == 200
    assert job(service, queued)["status"] == "cancelled"
    assert "unexpected error" not in service.log


def test_a_service_that_was_killed_starts_on_a_full_disk_with_all_that_it_knew(
    make_service: Callable[..., ServiceProcess], disk: SmallDisk
) -> None:
    service = make_service()
    create(service, upload(service))
    while lists(service)[1]["data"][0]["status"] != "queued":
        time.sleep(0.05)
    before = lists(service)
    service.kill()
    disk.fill()
    service.start()
    assert lists(service) == before
    assert_disk_full(send(service, 1000))


def test_a_service_that_cannot_open_its_database_on_a_full_disk_says_so(
    make_service: Callable[..., ServiceProcess], disk: SmallDisk
) -> None:
    service = make_service()
    service.stop()
    disk.fill()
    with pytest.raises(RuntimeError, match=r"exit code 2\)(?s:.*)its disk is full\.$"):
        service.start()
    disk.clear()
    service.start()


def test_jobs_that_meet_a_full_disk_fail_with_a_typed_error_while_others_go_on(
    make_service: Callable[..., ServiceProcess], disk: SmallDisk, tmp_path: Path
) -> None:
    service = make_service(ray=True)
    # They are queued until Ray answers: time to give two of them disks of their own that are too small.
    file_id = upload(service)
    no_room, little_room, enough = (
        create(service, file_id, General={"save_steps": 1}, Training={"max_train_steps": steps, "epochs": 20})
        for steps in (60, 60, 2)
    )
    for job_id, options in ((no_room, "size=4k,nr_inodes=1"), (little_room, "size=600k")):
        directory = tmp_path / "data" / "jobs" / job_id
        subprocess.run([*disk.prefix, "mkdir", directory], check=True)
        disk.mount(directory, options)
        assert job(service, job_id)["status"] in ("validating_files", "queued")

    succeeded(service, enough)
    for job_id in (no_room, little_room):
        failed = wait(service, job_id)
        assert failed["status"] == "failed"
        assert failed["error"]["code"] == "insufficient_resources", failed["error"]
        assert "disk is full" in failed["error"]["message"]
    assert "Attempt 2 is starting" not in messages(service, little_room)

    # The whole disk, while a job is on its way to Ray.
    waiting = create(service, file_id, Training={"max_train_steps": 2})
    disk.fill()
    for _ in range(20):
        assert service.http.get("/health").is_success
        assert service.http.get(f"/v1/fine_tuning/jobs/{waiting}").is_success
        time.sleep(0.1)
    disk.clear()
    ended = wait(service, waiting)
    if ended["status"] == "failed":
        assert ended["error"]["code"] == "insufficient_resources"
        succeeded(service, create(service, file_id, Training={"max_train_steps": 2}))
