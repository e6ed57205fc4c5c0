"""Two hundred jobs in the queue: nothing waits for them, nothing grows, and their order is kept."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from fixtures_models import save_tiny_model
from fixtures_service import MODEL, create, job, local_head, trainers, upload
from health_watch import HealthWatch
from service_process import ServiceProcess

from tests.soak import numbers

pytestmark = [pytest.mark.trust, pytest.mark.timeout(900)]

JOBS = 200
# Bytes, from the 50th job to the 200th: each job that waits takes some kilobytes while the queue is looked
# at, and as the database grows so do SQLite's caches, to 2 MB for each of up to eight idle connections.
GROWTH = 32_000_000


@pytest.fixture
def make_service(tmp_path: Path) -> Iterator[Callable[..., ServiceProcess]]:
    save_tiny_model(tmp_path / "data" / "models" / MODEL)
    services: list[ServiceProcess] = []

    def make(*, ray: bool) -> ServiceProcess:
        services.append(ServiceProcess(tmp_path, ray=ray))
        return services[-1]

    yield make
    for service in services:
        service.close()


def listed(service: ServiceProcess) -> list[dict[str, Any]]:
    """All jobs, oldest first, read page by page."""
    found: list[dict[str, Any]] = []
    more, query = True, "limit=70"
    while more:
        page = service.http.get(f"/v1/fine_tuning/jobs?{query}").json()
        found += page["data"]
        more, query = page["has_more"], f"limit=70&after={found[-1]['id']}"
    return found[::-1]


def queue(service: ServiceProcess) -> list[str]:
    """The ids of the queued jobs in the order in which they will begin."""
    with closing(sqlite3.connect(service.data_dir / "finetuning.db")) as database:
        query = "SELECT id FROM jobs WHERE status = 'queued' ORDER BY priority DESC, sequence"
        return [row[0] for row in database.execute(query)]


def memory(service: ServiceProcess) -> int:
    """Resident bytes of the service's own process."""
    return int(psutil.Process(service.process.pid).memory_info().rss)


def queue_jobs(service: ServiceProcess, made: list[str], **changes: Any) -> None:
    """Create jobs until there are :data:`JOBS`, and wait until their files have been checked."""
    file_id = upload(service)
    at_50 = 0
    while len(made) < JOBS:
        made.append(create(service, file_id, **changes))
        at_50 = at_50 or (memory(service) if len(made) == 50 else 0)
    deadline = time.monotonic() + 60
    while len(queue(service)) < JOBS - 1:
        assert time.monotonic() < deadline, f"{len(queue(service))} of {JOBS} jobs are queued"
        time.sleep(0.1)
    growth = memory(service) - at_50
    assert growth < GROWTH, f"{growth:,} bytes more since the 50th job"


def cancel_all(service: ServiceProcess, jobs: list[str]) -> None:
    for job_id in jobs:
        answer = service.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
        assert answer.json()["status"] == "cancelled", answer.text
    assert {each["status"] for each in listed(service)} == {"cancelled"}


def test_200_jobs_without_ray_are_queued_in_order_and_survive_kill_9(
    make_service: Callable[..., ServiceProcess],
) -> None:
    service = make_service(ray=False)
    made: list[str] = []
    with HealthWatch(service.url) as health:
        queue_jobs(service, made)
    assert not numbers.health(health.seconds)[1]
    assert [each["id"] for each in listed(service)] == queue(service) == made

    service.kill()
    service.start()
    with HealthWatch(service.url) as health:
        assert [each["id"] for each in listed(service)] == queue(service) == made
        assert {each["status"] for each in listed(service)} == {"queued"}
        cancel_all(service, made)
    assert not numbers.health(health.seconds)[1]
    assert queue(service) == []


def test_199_jobs_wait_behind_one_that_has_all_cores_and_then_begin_in_order(
    make_service: Callable[..., ServiceProcess],
) -> None:
    service = make_service(ray=True)
    file_id = upload(service)
    all_cores = {"resources_per_worker": {"CPU": psutil.cpu_count()}, "epochs": 1000}
    first = create(service, file_id, Training=all_cores)
    with HealthWatch(service.url) as health:
        made = [first]
        queue_jobs(service, made, Training=all_cores)
        deadline = time.monotonic() + 120
        while job(service, first)["status"] != "running":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert queue(service) == made[1:]
        # The first two go: their cores become those of the third, and of no other.
        for job_id in made[:2]:
            assert service.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").is_success
        while job(service, made[2])["status"] != "running":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert queue(service) == made[3:]
        cancel_all(service, made)
    assert not numbers.health(health.seconds)[1]
    while any(trainers(local_head(service), job_id) for job_id in made[:3]):
        assert time.monotonic() < deadline
        time.sleep(0.2)
