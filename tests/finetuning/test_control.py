"""Pausing, resuming and cancelling in every state, and jobs that give the dispatcher trouble.

The service has no Ray here: what a run would leave behind, the tests write themselves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fixtures_models import save_tiny_model
from fixtures_service import MODEL, create, events, job, messages, upload, wait_until
from service_process import ServiceProcess
from sqlalchemy import select

from comps.finetuning.jobs.states import transition
from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import JobRow
from comps.tuning.rundir import RESULT, STOP

FAILED = {"outcome": "failed", "error": {"code": "server_error", "message": "it broke", "param": None}}


@pytest.fixture(scope="module", autouse=True)
def _model(server: ServiceProcess) -> None:
    save_tiny_model(server.models_dir / MODEL)


@pytest.fixture
def database(server: ServiceProcess) -> Iterator[Database]:
    database = Database(Settings(data_dir=server.data_dir).database_url)
    yield database
    database.dispose()


@pytest.fixture
def queued(server: ServiceProcess) -> Iterator[str]:
    job_id = create(server, upload(server))
    wait_until(server, job_id, lambda answer: answer["status"] == "queued")
    yield job_id
    ask(server, job_id, "cancel")


def ask(server: ServiceProcess, job_id: str, what: str) -> httpx.Response:
    return server.http.post(f"/v1/fine_tuning/jobs/{job_id}/{what}")


def begin(server: ServiceProcess, database: Database, job_id: str) -> Path:
    """As if Ray had taken the job. Returns its directory."""
    directory = server.data_dir / "jobs" / job_id
    directory.mkdir(parents=True, exist_ok=True)
    with database.session() as session:
        row = session.scalars(select(JobRow).filter_by(id=job_id)).one()
        transition(session, row, "running", "The job is starting", submission_id=job_id, attempt=1, cpus=1)
    return directory


def becomes(server: ServiceProcess, job_id: str, status: str) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while (answer := job(server, job_id))["status"] != status:
        assert time.monotonic() < deadline, answer
        time.sleep(0.05)
    return answer


def test_a_queued_job_waits_while_it_is_paused_and_asking_twice_changes_nothing(
    server: ServiceProcess, queued: str
) -> None:
    for _ in range(2):
        assert ask(server, queued, "pause").json()["status"] == "paused"
    time.sleep(1.2)  # rounds of the dispatcher
    assert job(server, queued)["status"] == "paused"
    client = server.openai.fine_tuning.jobs
    assert client.resume(queued).status == "validating_files"
    becomes(server, queued, "queued")
    assert client.resume(queued).status == "queued"
    told = [event["data"]["status"] for event in events(server, queued) if "status" in event["data"]]
    assert told == ["queued", "paused", "validating_files", "queued"]


def test_a_job_may_be_paused_before_its_files_are_checked_and_a_late_verdict_does_not_wake_it(
    server: ServiceProcess,
) -> None:
    job_id = create(server, upload(server))
    assert ask(server, job_id, "pause").json()["status"] == "paused"
    time.sleep(1.2)
    assert job(server, job_id)["status"] == "paused"
    assert ask(server, job_id, "cancel").json()["status"] == "cancelled"


def test_a_running_job_that_is_paused_is_asked_to_save_and_stop(
    server: ServiceProcess, database: Database, queued: str
) -> None:
    directory = begin(server, database, queued)
    paused = ask(server, queued, "pause").json()
    assert (paused["status"], paused["estimated_finish"]) == ("paused", None)
    deadline = time.monotonic() + 10
    while not (directory / STOP).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_that_ended_before_it_could_stop_has_ended(
    server: ServiceProcess, database: Database, queued: str
) -> None:
    directory = begin(server, database, queued)
    ask(server, queued, "pause")
    result = {"outcome": "succeeded", "path": str(directory / "output"), "trained_tokens": 7}
    (directory / RESULT).write_text(json.dumps(result))
    assert becomes(server, queued, "succeeded")["trained_tokens"] == 7


@pytest.mark.parametrize("what", ["pause", "resume", "cancel"])
def test_an_ended_job_stays_as_it_is(
    server: ServiceProcess, database: Database, queued: str, what: str
) -> None:
    (begin(server, database, queued) / RESULT).write_text(json.dumps(FAILED))
    becomes(server, queued, "failed")
    with pytest.raises(openai.ConflictError) as raised:
        getattr(server.openai.fine_tuning.jobs, what)(queued)
    assert raised.value.code == "job_has_ended"
    assert raised.value.response.headers["x-should-retry"] == "false"
    assert job(server, queued)["status"] == "failed"


def test_one_job_whose_result_cannot_be_read_does_not_keep_others_waiting(
    server: ServiceProcess, database: Database
) -> None:
    file_id = upload(server)
    first, second = (create(server, file_id) for _ in range(2))
    for job_id in (first, second):
        wait_until(server, job_id, lambda answer: answer["status"] == "queued")
    troubled, fine = (begin(server, database, job_id) for job_id in (first, second))
    (troubled / RESULT).mkdir()
    (fine / RESULT).write_text(json.dumps(FAILED))
    becomes(server, second, "failed")
    assert job(server, first)["status"] == "running"
    assert server.log.count(f"the running job {first} could not be handled") < 5, "with growing pauses"
    (troubled / RESULT).rmdir()
    (troubled / RESULT).write_text("{")
    assert "result.json" in becomes(server, first, "failed")["error"]["message"]


def test_limits_and_priority_are_answered_and_their_faults_named(server: ServiceProcess) -> None:
    file_id = upload(server)
    job_id = create(server, file_id, priority=-3, time_limit=3600, retry_limit=0)
    answer = job(server, job_id)
    assert [answer[name] for name in ("priority", "time_limit", "retry_limit")] == [-3, 3600, 0]
    assert "unknown" not in " ".join(messages(server, job_id))
    ask(server, job_id, "cancel")
    for name, value in (("priority", 101), ("time_limit", 0), ("retry_limit", -1), ("priority", "high")):
        body = {"model": MODEL, "training_file": file_id, name: value}
        response = server.http.post("/v1/fine_tuning/jobs", json=body)
        assert response.status_code == 422
        assert response.json()["error"]["param"] == name
