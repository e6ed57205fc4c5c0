"""Ray as the service uses it: closed to others, on loopback, its own head or one that is named."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fixtures_models import save_tiny_model
from fixtures_service import (
    MODEL,
    at_step,
    create,
    directory_of,
    job,
    messages,
    succeeded,
    trainers,
    upload,
    wait_until,
)
from fixtures_training import Run, run
from service_process import ROOT, ServiceProcess

from comps.finetuning.cluster import ClusterUnavailable
from comps.finetuning.cluster.client import JobsClient
from comps.finetuning.cluster.local_head import LocalHead
from comps.tuning.spec import TrainSpec


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHead]:
    """A Ray head that belongs to no service."""
    head = LocalHead(tmp_path_factory.mktemp("head") / "ray")
    with pytest.MonkeyPatch.context() as environment:
        # What an operator's cluster has: the code, and a Python with its libraries.
        environment.setenv("PYTHONPATH", str(ROOT))
        environment.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        head.start()
    yield head
    head.stop()


def dashboard(head: LocalHead) -> str:
    address = head.find()
    assert address is not None
    return address


@pytest.fixture(scope="module")
def service(head: LocalHead, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service that has joined ``head``."""
    directory = tmp_path_factory.mktemp("joined")
    save_tiny_model(directory / "data" / "models" / MODEL)
    cluster = {"RAY_ADDRESS": dashboard(head), "RAY_AUTH_TOKEN_PATH": str(head.token_path)}
    with closing(ServiceProcess(directory, ray=True, **cluster)) as service:
        wait_for_ray(service)
        yield service


def wait_for_ray(service: ServiceProcess, timeout: float = 60) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    while (ray := service.http.get("/v1/health_check").json()["Ray"])["state"] != "ready":
        assert time.monotonic() < deadline, ray
        time.sleep(0.2)
    return dict(ray)


class Listeners:
    """Collects the addresses that the processes of ``head`` listen on, until the end of the block."""

    def __init__(self, head: LocalHead) -> None:
        self._head, self._done = head, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.seen: dict[tuple[str, int], str] = {}

    def __enter__(self) -> Listeners:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            for process in self._head.processes():
                with suppress(psutil.Error):
                    for connection in process.net_connections():
                        if connection.status == psutil.CONN_LISTEN:
                            self.seen[connection.laddr] = " ".join(process.cmdline())[:200]

    @property
    def open_to_others(self) -> dict[tuple[str, int], str]:
        loopback = ("127.", "::1", "::ffff:127.")
        return {address: who for address, who in self.seen.items() if not address[0].startswith(loopback)}


def test_two_workers_train_as_one_with_twice_the_batch_and_listen_on_loopback_only(
    head: LocalHead, service: ServiceProcess, tmp_path: Path
) -> None:
    training = {"batch_size": 2, "num_training_workers": 2, "logging_steps": 1, "max_train_steps": 12}
    with Listeners(head) as listeners:
        job_id = create(service, upload(service), Training=training)
        succeeded(service, job_id)
    assert len(listeners.seen) > 8
    assert any("RayTrainWorker" in who for who in listeners.seen.values())
    assert listeners.open_to_others == {}

    directory = directory_of(service, job_id)
    spec = json.loads((directory / "spec.json").read_text()) | {"directory": tmp_path}
    spec["resources"] |= {"num_workers": 1}
    spec["training"] |= {"batch_size": 4}
    single, pair = run(TrainSpec.model_validate(spec)), Run(directory)
    assert pair.messages[0].startswith("Training with 2 worker(s), 1 thread(s) each")
    assert pair.losses == pytest.approx(single.losses, rel=1e-4)
    assert [loss for _, loss in pair.series("valid_loss")] == pytest.approx(
        [loss for _, loss in single.series("valid_loss")], rel=1e-4
    )


def test_ray_refuses_requests_without_the_token(head: LocalHead, service: ServiceProcess) -> None:
    address = dashboard(head)
    job: dict[str, Any] = {"entrypoint": "true", "submission_id": "stranger"}
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert httpx.post(f"{address}/api/jobs/", json=job, headers=headers).status_code in (401, 403)
        assert httpx.get(f"{address}/api/jobs/", headers=headers).status_code in (401, 403)
    ours = {"Authorization": f"Bearer {head.token}"}
    known = httpx.get(f"{address}/api/jobs/", headers=ours).json()
    assert "stranger" not in [each["submission_id"] for each in known]
    assert stat.S_IMODE(head.token_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(head.private_dir.stat().st_mode) == 0o700


def test_a_service_that_joined_a_cluster_leaves_it_and_its_jobs_alone(
    head: LocalHead, service: ServiceProcess
) -> None:
    job_id = create(service, upload(service), Training={"max_train_steps": 200})
    at_step(service, job_id, 5)
    before = dashboard(head)
    gcs = next(part for part in head.processes()[0].cmdline() if part.startswith("--port="))
    service.stop()
    assert dashboard(head) == before
    assert trainers(head, job_id)
    # The other way to name it: the address that Ray's own processes use.
    service.environment["RAY_ADDRESS"] = f"127.0.0.1:{gcs.removeprefix('--port=')}"
    service.start()
    ray = wait_for_ray(service)
    assert ray["address"] == before
    assert not ray["local"]
    succeeded(service, job_id)
    assert "Attempt 2 is starting" not in messages(service, job_id)


def test_a_job_too_big_for_a_cluster_of_others_waits_and_lets_others_pass(
    head: LocalHead, service: ServiceProcess
) -> None:
    file_id = upload(service)
    big = create(service, file_id, Training={"num_training_workers": 4096})
    with Listeners(head) as listeners:
        succeeded(service, create(service, file_id, Training={"max_train_steps": 2}))
    assert listeners.open_to_others == {}
    waiting = [text for text in messages(service, big) if "waits for the cluster to grow" in text]
    assert len(waiting) == 1
    assert "4096 worker(s)" in waiting[0]
    assert service.openai.fine_tuning.jobs.cancel(big).status == "cancelled"


@pytest.mark.trust
def test_a_run_waits_while_others_have_the_cores_of_their_cluster(
    head: LocalHead, service: ServiceProcess
) -> None:
    def ask(method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {head.token}"}
        return httpx.request(
            method, f"{dashboard(head)}/api/jobs/{path}", json=body, headers=headers, timeout=30
        )

    other = {"entrypoint": "sleep 300", "submission_id": "other", "entrypoint_num_cpus": psutil.cpu_count()}
    ask("POST", "", other).raise_for_status()
    deadline = time.monotonic() + 60
    while ask("GET", "other").json()["status"] != "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    job_id = create(service, upload(service), Training={"max_train_steps": 2}, time_limit=60)
    wait_until(service, job_id, lambda _: any("waits in Ray" in text for text in messages(service, job_id)))
    time.sleep(65)
    assert job(service, job_id)["status"] == "running"
    ask("POST", "other/stop", {}).raise_for_status()
    succeeded(service, job_id)
    assert "Attempt 2 is starting" not in messages(service, job_id)
    assert "Ray has begun the run" in messages(service, job_id)


@pytest.mark.trust
def test_what_ray_gives_up_for_want_of_room_has_not_failed(tmp_path: Path) -> None:
    head = LocalHead(tmp_path / "ray")

    async def given_up(cores: int) -> str | None:
        client = JobsClient(dashboard(head), head.token)
        async with asyncio.timeout(200):
            while not await answers(client):
                await asyncio.sleep(0.5)
            await client.submit("other", "sleep 300", {}, "other", cores, 0)
            while await client.status("other") != "RUNNING":
                await asyncio.sleep(0.5)
            await client.submit("ours", "true", {}, "ours", cores, 0)
            while (status := await client.status("ours")) == "PENDING":
                await asyncio.sleep(0.5)
        await client.close()
        return status

    async def answers(client: JobsClient) -> bool:
        with suppress(ClusterUnavailable):
            return bool(await client.nodes())
        return False

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_JOB_START_TIMEOUT_SECONDS", "20")  # Ray's own are fifteen minutes
        head.start()
    try:
        assert asyncio.run(given_up(psutil.cpu_count() or 1)) == "NO ROOM"
    finally:
        head.stop()


def test_the_operators_secrets_are_not_in_the_environment_of_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "FINETUNING_API_KEYS",
        "FINETUNING_DATABASE_URL",
        "OPEA_API_KEYS",
        "HF_TOKEN",
        "RAY_ADDRESS",
    ):
        monkeypatch.setenv(name, "secret")
    head = LocalHead(tmp_path / "ray")
    head.start()
    try:
        assert "secret" not in head.processes()[0].environ().values()
    finally:
        head.stop()
    assert head.processes() == []
    assert head.find() is None


def test_a_record_of_a_head_whose_process_id_is_another_ones_now_is_not_believed(tmp_path: Path) -> None:
    head = LocalHead(tmp_path / "ray")
    record = {"pid": os.getpid(), "dashboard": "http://127.0.0.1:1"}
    (head.directory / "head.json").write_text(json.dumps(record))
    assert not head.alive()
    head.stop()  # and this process lives on
    assert head.find() is None
