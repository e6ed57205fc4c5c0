"""Which job runs when, with what, and what becomes of one that cannot."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import closing

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
    succeeded,
    trainers,
    upload,
    wait,
)
from service_process import ServiceProcess

CANARY = "hf_canary_0123456789abcdef"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("queue")
    save_tiny_model(directory / "data" / "models" / MODEL)
    with closing(ServiceProcess(directory, ray=True, FINETUNING_MAX_ATTEMPTS="1")) as service:
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


def test_jobs_that_want_all_cores_run_one_after_the_other_and_the_token_stays_with_its_job(
    service: ServiceProcess,
) -> None:
    file_id = upload(service)
    all_cores = {"resources_per_worker": {"CPU": psutil.cpu_count()}, "max_train_steps": 10}
    first, second = (
        create(
            service,
            file_id,
            Training=all_cores,
            **({"General": {"config": {"token": CANARY}}} if token else {}),
        )
        for token in (True, False)
    )
    at_step(service, first, 1)
    assert job(service, second)["status"] == "queued"
    (worker,) = trainers(local_head(service), first)
    assert worker.environ()["HF_TOKEN"] == CANARY
    listing = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True)
    assert CANARY not in listing.stdout

    succeeded(service, second)
    ended = next(event for event in events(service, first) if event["data"].get("status") == "succeeded")
    began = next(event for event in events(service, second) if event["data"].get("status") == "running")
    assert began["created_at"] >= ended["created_at"]

    assert CANARY not in json.dumps([job(service, first), *events(service, first)])
    assert CANARY not in service.log
    private = local_head(service).directory, local_head(service).private_dir, service.data_dir
    found = subprocess.run(["grep", "-rla", CANARY, *private], capture_output=True, text=True)
    assert found.stdout == ""


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
    job_id = create(service, upload(service), General={"save_strategy": "no"}, Training={"epochs": 500})
    at_step(service, job_id, 1)
    (worker,) = trainers(local_head(service), job_id)
    worker.kill()
    failed = wait(service, job_id)
    assert failed["error"]["code"] == "server_error"
    assert failed["error"]["message"].startswith(
        "the run's processes ended (FAILED) without a result, 1 time(s) in a row without a new checkpoint"
    )
