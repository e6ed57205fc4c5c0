"""Which job runs when, with what, and what becomes of one that cannot."""

from __future__ import annotations

import json
import sqlite3
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
from fixtures_models import save_tiny_model
from fixtures_service import (
    MODEL,
    at_step,
    create,
    directory_of,
    events,
    job,
    local_head,
    messages,
    processes_end,
    succeeded,
    trainers,
    upload,
    wait,
)
from service_process import ServiceProcess

from comps.tuning import sealed

CANARY = "hf_canary_0123456789abcdef"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("queue")
    save_tiny_model(directory / "data" / "models" / MODEL)
    with closing(ServiceProcess(directory, ray=True)) as service:
        yield service


def test_a_job_that_asks_for_more_cores_than_there_are_fails_with_a_sentence(
    service: ServiceProcess,
) -> None:
    job_id = create(service, upload(service), Training={"resources_per_worker": {"CPU": 4096}})
    failed = wait(service, job_id)
    assert failed["status"] == "failed"
    assert failed["error"]["code"] == "insufficient_resources"
    cores = psutil.cpu_count()
    assert failed["error"]["message"] == (
        "the job asks for 1 worker(s) with 4096 core(s) each, "
        f"but the cluster has 1 node(s) with {cores} core(s)"
    )


def moment(service: ServiceProcess, job_id: str, status: str) -> float:
    """When the job came into ``status``."""
    return next(
        event["created_at"] for event in events(service, job_id) if event["data"].get("status") == status
    )


def test_jobs_that_want_all_cores_run_one_after_the_other_by_priority(service: ServiceProcess) -> None:
    file_id = upload(service)
    all_cores = {"resources_per_worker": {"CPU": psutil.cpu_count()}, "max_train_steps": 10}
    first, last, second = (
        create(service, file_id, Training=all_cores, priority=priority) for priority in (0, 0, 5)
    )
    at_step(service, first, 1)
    assert [job(service, each)["status"] for each in (second, last)] == ["queued", "queued"]
    assert job(service, second)["priority"] == 5
    succeeded(service, last)
    assert moment(service, second, "running") >= moment(service, first, "succeeded")
    assert moment(service, last, "running") >= moment(service, second, "succeeded")


def everything_seen(stop: threading.Event, seen: set[str]) -> None:
    """Gather the command lines of all processes, again and again, as anyone on the machine could."""
    while not stop.is_set():
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                seen.add(" ".join(process.cmdline()))


def test_a_token_reaches_its_job_and_nobody_else(service: ServiceProcess) -> None:
    stop, command_lines = threading.Event(), set[str]()
    watcher = threading.Thread(target=everything_seen, args=(stop, command_lines))
    watcher.start()
    body = {"Training": {"max_train_steps": 200}, "General": {"config": {"token": CANARY}}}
    job_id = create(service, upload(service), **body)
    at_step(service, job_id, 1)
    stop.set()
    watcher.join()
    assert any(job_id in each for each in command_lines), "the watcher has seen the run begin"
    assert not any(CANARY in each for each in command_lines)
    for process in local_head(service).processes():
        with suppress(psutil.Error):
            assert CANARY not in process.environ().values()
    (worker,) = trainers(local_head(service), job_id)
    sealed_token, key = worker.environ()[sealed.SEALED], Path(worker.environ()[sealed.KEY_FILE])
    assert sealed.unseal(sealed_token, key) == CANARY
    assert stat.S_IMODE(key.stat().st_mode) == 0o600

    service.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
    assert CANARY not in json.dumps([job(service, job_id), *events(service, job_id)])
    assert CANARY not in service.log
    private = local_head(service).directory, local_head(service).private_dir, service.data_dir
    found = subprocess.run(["grep", "-rla", CANARY, *private], capture_output=True, text=True)
    assert found.stdout == ""
    with closing(sqlite3.connect(service.data_dir / "finetuning.db")) as database:
        assert database.execute("SELECT secret FROM jobs WHERE id = ?", (job_id,)).fetchone() == (None,)


def test_a_job_that_runs_for_too_long_fails_and_its_processes_end(service: ServiceProcess) -> None:
    job_id = create(service, upload(service), Training={"epochs": 500}, time_limit=0.5)
    failed = wait(service, job_id)
    assert failed["error"]["code"] == "time_limit_exceeded"
    assert "longer than its time_limit of 0.5 seconds" in failed["error"]["message"]
    processes_end(service, job_id)


@pytest.mark.trust
@pytest.mark.skipif((psutil.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_a_job_of_two_workers_that_is_cancelled_leaves_no_process(service: ServiceProcess) -> None:
    def workers() -> list[psutil.Process]:
        processes = local_head(service).processes()
        return [each for each in processes if each.is_running() and "RayTrainWorker" in each.name()]

    job_id = create(service, upload(service), Training={"epochs": 500, "num_training_workers": 2})
    at_step(service, job_id, 1)
    found = workers()
    assert len(found) == 2
    service.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
    _, left = psutil.wait_procs(found, 20)
    assert not left
    processes_end(service, job_id)
    assert job(service, job_id)["status"] == "cancelled"
    succeeded(service, create(service, upload(service), Training={"max_train_steps": 2}))


def test_a_data_set_that_is_damaged_fails_its_job_with_a_sentence(service: ServiceProcess) -> None:
    content = b'[{"instruction": "a", "output": "b"}, {"instruction": 3}]'
    file_id = service.openai.files.create(file=("damaged.json", content), purpose="fine-tune").id
    failed = wait(service, create(service, file_id))
    assert failed["status"] == "failed"
    assert failed["error"]["code"] == "invalid_training_file"
    assert "damaged.json" in failed["error"]["message"]


def test_an_error_of_the_run_itself_fails_the_job_at_once(service: ServiceProcess) -> None:
    job_id = create(service, upload(service), General={"report_to": "mlflow"})
    failed = wait(service, job_id)
    assert failed["error"] == {
        "code": "tuning_error",
        "message": "General.report_to is mlflow, but mlflow is not installed where the job runs",
        "param": "General.report_to",
    }
    assert "Attempt 2 is starting" not in messages(service, job_id)
    assert "mlflow is not installed" in (directory_of(service, job_id) / "log.txt").read_text()


def test_a_run_that_dies_too_often_fails_the_job_with_a_sentence(service: ServiceProcess) -> None:
    general = {"save_strategy": "no"}
    job_id = create(service, upload(service), General=general, Training={"epochs": 500}, retry_limit=0)
    at_step(service, job_id, 1)
    (worker,) = trainers(local_head(service), job_id)
    worker.kill()
    failed = wait(service, job_id)
    assert failed["error"]["code"] == "server_error"
    assert failed["error"]["message"].startswith(
        "the run's processes ended (FAILED) without a result, 1 time(s) in a row without a new checkpoint"
    )
