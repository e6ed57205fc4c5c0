"""Processes that die at exactly the worst moments: each moment is a fail point, each death a real SIGKILL.

One job dies at one point after the other, and is the job that it was in the end.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from fixtures_models import save_tiny_model
from fixtures_service import (
    ENDED,
    MODEL,
    create,
    directory_of,
    job,
    kill_all,
    local_head,
    messages,
    succeeded,
    upload,
)
from fixtures_training import Run, assert_same_weights, run
from service_process import ServiceProcess

from comps.finetuning.jobs.states import MOVES
from comps.tuning.failpoints import VARIABLE
from comps.tuning.spec import TrainSpec

# In the order in which a job comes by.
SERVICE_POINTS = (
    "verdict-reached",
    "transition-made",
    "transition-flushed",
    "transition-written",
    "change-committed",
    "spec-written",
    "submitted",
)
RUN_POINTS = ("checkpoint-written", "manifest-written", "checkpoint-published", "result-unwritten")


class Failpoints:
    """The directory in which fail points are armed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    def arm(self, *names: str, action: str = "kill") -> None:
        for name in names:
            (self.directory / name).write_text(action)

    @property
    def armed(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()}


pytestmark = [pytest.mark.trust, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def failpoints(tmp_path_factory: pytest.TempPathFactory) -> Failpoints:
    return Failpoints(tmp_path_factory.mktemp("failpoints") / "armed")


@pytest.fixture(scope="module")
def service(failpoints: Failpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("service")
    save_tiny_model(directory / "data" / "models" / MODEL)
    environment = {VARIABLE: str(failpoints.directory)}
    with closing(ServiceProcess(directory, ray=True, **environment)) as service:
        yield service


def assert_legal(service: ServiceProcess, job_id: str) -> str:
    """The database is whole, and the job's states follow each other as they may. Returns the present one."""
    with closing(sqlite3.connect(service.data_dir / "finetuning.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (status,) = database.execute("SELECT status FROM jobs WHERE id = ?", (job_id,)).fetchone()
        rows = database.execute("SELECT data FROM events WHERE job_id = ? ORDER BY sequence", (job_id,))
        told = [data["status"] for (text,) in rows if "status" in (data := json.loads(text))]
    path = ["validating_files", *told]
    assert all(later in MOVES[earlier] for earlier, later in pairwise(path)), path
    assert path[-1] == status, "the row and the events say the same"
    return str(status)


def end_of(service: ServiceProcess, job_id: str) -> None:
    """Start the service again as often as it dies, until the job has ended."""
    deadline = time.monotonic() + 240
    while assert_legal(service, job_id) not in ENDED:
        assert time.monotonic() < deadline, job(service, job_id)
        if service.process.poll() is not None:
            start_again(service)
        time.sleep(0.1)
    if service.process.poll() is not None:
        service.start()


def create_somehow(service: ServiceProcess, file_id: str, key: str) -> str:
    """Create a job on a service that may die before it answers, as a client with a key can."""
    while True:
        try:
            return create(service, file_id, headers={"Idempotency-Key": key}, Training={"max_train_steps": 5})
        except httpx.TransportError:
            start_again(service)


def start_again(service: ServiceProcess) -> None:
    service.process.wait()
    with suppress(RuntimeError):  # it died again while it started
        service.start()


def test_a_service_that_dies_at_every_moment_of_a_jobs_life_loses_nothing(
    service: ServiceProcess, failpoints: Failpoints
) -> None:
    file_id = upload(service)
    for names in (SERVICE_POINTS[:4], SERVICE_POINTS[4:]):
        failpoints.arm(*names)
        job_id = create_somehow(service, file_id, names[0])
        end_of(service, job_id)
        assert failpoints.armed == set()
        succeeded(service, job_id)
        assert messages(service, job_id).count("The job has successfully completed") == 1


def test_a_run_that_dies_around_its_checkpoints_and_its_end_is_the_run_that_was(
    service: ServiceProcess, failpoints: Failpoints, tmp_path: Path
) -> None:
    failpoints.arm(*RUN_POINTS)
    training = {"max_train_steps": 20, "batch_size": 8}
    general = {"save_steps": 5, "lora_config": {"lora_dropout": 0.1}}
    job_id = create(service, upload(service), General=general, Training=training, retry_limit=10)
    succeeded(service, job_id)
    assert failpoints.armed == set()
    assert messages(service, job_id).count("Attempt 5 is starting") == 1
    directory = directory_of(service, job_id)
    spec = json.loads((directory / "spec.json").read_text())
    undisturbed = run(TrainSpec.model_validate(spec | {"directory": tmp_path}))
    assert_same_weights(Run(directory), undisturbed)
    assert not [path for path in directory.rglob("*") if path.name.endswith((".tmp", ".old"))]


@pytest.mark.parametrize("service_too", [False, True], ids=["Ray", "Ray and the service"])
def test_a_job_outlives_the_loss_of_ray_in_each_of_its_phases(
    service: ServiceProcess, failpoints: Failpoints, service_too: bool
) -> None:
    """None of these losses is a death of the job's own, so it may have no retry at all."""
    points = ("run-begun", "checkpoint-written", "result-unwritten")
    failpoints.arm(*points, action="hold")
    job_id = create(service, upload(service), Training={"max_train_steps": 4}, retry_limit=0)
    for point in points:
        lose_ray_at(service, failpoints, point, service_too)
    succeeded(service, job_id)
    assert assert_legal(service, job_id) == "succeeded"

    failpoints.arm("directory-filled", action="hold")
    body = {"fine_tuning_job_id": job_id, "adapter_version": "minimal", "wait": False}
    route = "/v1/finetune/extract_adapter"
    assert service.http.post(route, json=body).status_code == 200
    lose_ray_at(service, failpoints, "directory-filled", service_too)
    extracted = service.http.post(route, json=body | {"wait": True}, timeout=120).json()
    assert any(Path(extracted["path"]).glob("*.safetensors"))


def lose_ray_at(service: ServiceProcess, failpoints: Failpoints, point: str, service_too: bool) -> None:
    """Kill Ray with all its processes, and perhaps the service, while a run stands still at ``point``."""
    deadline = time.monotonic() + 120
    while point in failpoints.armed:
        assert time.monotonic() < deadline, point
        time.sleep(0.05)
    if service_too:
        service.kill()
    kill_all(local_head(service))
    if service_too:
        service.start()


def test_a_merge_that_dies_half_way_is_done_again(service: ServiceProcess, failpoints: Failpoints) -> None:
    job_id = create(service, upload(service), Training={"max_train_steps": 2})
    succeeded(service, job_id)
    for route in ("extract_adapter", "merge_adapter"):
        failpoints.arm("directory-filled")
        answer = service.http.post(
            f"/v1/finetune/{route}", json={"fine_tuning_job_id": job_id, "adapter_version": "minimal"}
        )
        assert answer.status_code == 200, answer.text
        assert failpoints.armed == set()
        made = Path(answer.json()["path"])
        assert any(made.glob("*.safetensors"))
        assert not [path for path in made.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ("spec-unwritten", "the service's disk is full; free some space and create the job again"),
        ("checkpoint-written", "the disk is full"),
    ],
)
def test_a_full_disk_fails_the_job_that_needs_it_and_no_other(
    service: ServiceProcess, failpoints: Failpoints, point: str, reason: str
) -> None:
    file_id = upload(service)
    failpoints.arm(point, action="full")
    job_id, other = (create(service, file_id, Training={"max_train_steps": 4}) for _ in range(2))
    succeeded(service, other)
    error = job(service, job_id)["error"]
    assert (error["code"], error["message"]) == ("insufficient_resources", reason)
