"""Jobs outlive what runs them: the service, Ray, a worker. Each kill is real, and so is Ray.

The tests share one service and one data directory, which makes each start also a start after the others.
"""

from __future__ import annotations

import json
import sqlite3
import time
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
    kill_all,
    local_head,
    messages,
    succeeded,
    trainers,
    upload,
)
from fixtures_training import Run, assert_same_weights, run
from service_process import ServiceProcess

from comps.tuning.spec import TrainSpec

# Some seconds of training, a checkpoint every 20 steps; with dropout, so that random states matter.
STEPS = 200
TRAINING = {"max_train_steps": STEPS, "batch_size": 8, "logging_steps": 5}
GENERAL = {"save_steps": 20, "lora_config": {"lora_dropout": 0.1}}


pytestmark = [pytest.mark.trust, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("survival")
    save_tiny_model(directory / "data" / "models" / MODEL)
    with closing(ServiceProcess(directory, ray=True)) as service:
        yield service


@pytest.fixture(scope="module")
def undisturbed(service: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same training, in this process from its beginning to its end."""
    job_id = create(service, upload(service), General=GENERAL, Training=TRAINING)
    service.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    with closing(sqlite3.connect(service.data_dir / "finetuning.db")) as database:
        (spec,) = database.execute("SELECT spec FROM jobs WHERE id = ?", (job_id,)).fetchone()
    directory = tmp_path_factory.mktemp("undisturbed")
    return run(TrainSpec.model_validate(json.loads(spec) | {"directory": directory}))


@pytest.fixture
def running(service: ServiceProcess) -> str:
    """A job in the middle of its training, with a checkpoint behind it."""
    job_id = create(service, upload(service), General=GENERAL, Training=TRAINING)
    at_step(service, job_id, 25)
    return job_id


def assert_every_line_is_one_event(service: ServiceProcess, job_id: str) -> None:
    """The run's own events are in the table once each, in order."""
    lines = (directory_of(service, job_id) / "events.jsonl").read_text().splitlines()
    with closing(sqlite3.connect(service.data_dir / "finetuning.db")) as database:
        rows = database.execute(
            "SELECT message FROM events WHERE job_id = ? AND source_offset IS NOT NULL ORDER BY sequence",
            (job_id,),
        )
        assert [row[0] for row in rows] == [json.loads(line)["message"] for line in lines]


def resumed_steps(service: ServiceProcess, job_id: str) -> list[tuple[int, int]]:
    """For each resume: the step of the checkpoint, and the first step logged after it."""
    found = []
    checkpoint: int | None = None
    for event in events(service, job_id):
        if event["message"].startswith("Resuming from checkpoint-"):
            checkpoint = int(event["message"].rpartition("-")[2])
        elif checkpoint is not None and event["type"] == "metrics" and "train_loss" in event["data"]:
            found.append((checkpoint, event["data"]["step"]))
            checkpoint = None
    return found


def assert_resumed_exactly(service: ServiceProcess, job_id: str, undisturbed: Run) -> None:
    """It went on from a checkpoint, never behind it, and ended with the very same weights."""
    ((checkpoint, first),) = resumed_steps(service, job_id)
    assert checkpoint >= 20
    assert checkpoint < first <= checkpoint + 5
    assert_every_line_is_one_event(service, job_id)
    assert_same_weights(Run(directory_of(service, job_id)), undisturbed)


def test_a_killed_service_finds_its_jobs_and_its_ray_again(service: ServiceProcess, running: str) -> None:
    address = local_head(service).find()
    service.kill()
    assert local_head(service).alive()
    service.start()
    assert job(service, running)["status"] == "running"
    succeeded(service, running)
    assert local_head(service).find() == address
    assert "Attempt 2 is starting" not in messages(service, running)
    assert_every_line_is_one_event(service, running)


def test_a_service_killed_at_any_moment_of_a_jobs_beginning_brings_it_to_its_end(
    service: ServiceProcess,
) -> None:
    file_id = upload(service)
    jobs = []
    for seconds in (0, 0.1, 0.4):
        jobs.append(create(service, file_id, Training={"max_train_steps": 5}))
        time.sleep(seconds)
        service.kill()
        service.start()
    for job_id in jobs:
        succeeded(service, job_id)
        assert_every_line_is_one_event(service, job_id)


def test_a_killed_worker_costs_the_steps_since_the_checkpoint(
    service: ServiceProcess, running: str, undisturbed: Run
) -> None:
    (worker,) = trainers(local_head(service), running)
    worker.kill()
    succeeded(service, running)
    assert any("processes ended (FAILED) without a result" in text for text in messages(service, running))
    assert_resumed_exactly(service, running, undisturbed)


def test_a_killed_service_and_a_killed_ray_cost_the_steps_since_the_checkpoint(
    service: ServiceProcess, running: str, undisturbed: Run
) -> None:
    service.kill()
    kill_all(local_head(service))
    service.start()
    assert job(service, running)["status"] == "running"
    succeeded(service, running)
    assert any("Ray no longer knows the run" in text for text in messages(service, running))
    assert_resumed_exactly(service, running, undisturbed)


def test_a_killed_ray_is_replaced_while_the_service_runs(service: ServiceProcess) -> None:
    head = local_head(service)
    address = head.find()
    job_id = create(service, upload(service), Training={"max_train_steps": 5})
    kill_all(head)
    succeeded(service, job_id)
    assert head.find() not in (None, address)


def test_a_ray_that_has_lost_its_node_and_lives_on_is_replaced(service: ServiceProcess) -> None:
    """Without its agent Ray ends the node, in good order, so that nothing ends the head."""
    head = local_head(service)
    address = head.find()
    job_id = create(service, upload(service), Training={"max_train_steps": 5})
    (agent,) = (process for process in head.processes() if process.name().startswith("ray::DashboardAg"))
    agent.kill()
    succeeded(service, job_id)
    assert head.find() not in (None, address)


def test_a_stopped_service_saves_its_jobs_and_leaves_no_process(
    service: ServiceProcess, running: str, undisturbed: Run
) -> None:
    began = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - began < 40
    assert local_head(service).processes() == []
    stopped = json.loads((directory_of(service, running) / "events.jsonl").read_text().splitlines()[-1])
    assert stopped["message"].startswith("Stopped on request after step")
    service.start()
    succeeded(service, running)
    ((checkpoint, _),) = resumed_steps(service, running)
    assert stopped["message"].endswith(f" {checkpoint}"), "it goes on with the very next step"
    assert_resumed_exactly(service, running, undisturbed)


def test_a_paused_job_leaves_its_cores_to_others_and_goes_on_to_the_same_weights(
    service: ServiceProcess, running: str, undisturbed: Run
) -> None:
    paused = service.http.post(f"/v1/fine_tuning/jobs/{running}/pause").json()
    assert (paused["status"], paused["estimated_finish"]) == ("paused", None)
    all_cores = {"max_train_steps": 5, "resources_per_worker": {"CPU": psutil.cpu_count()}}
    other = create(service, upload(service), Training=all_cores)
    succeeded(service, other)
    assert trainers(local_head(service), running) == []
    left = next(text for text in messages(service, running) if text.startswith("The run has left its cores"))
    service.restart()
    assert job(service, running)["status"] == "paused", "also after a restart"
    again = service.openai.fine_tuning.jobs.pause(running)
    assert again.status == "paused"
    assert service.openai.fine_tuning.jobs.resume(running).status == "queued"
    succeeded(service, running)
    ((checkpoint, _),) = resumed_steps(service, running)
    assert left.endswith(f" {checkpoint}")
    assert_resumed_exactly(service, running, undisturbed)


def test_one_of_two_workers_is_killed_and_the_weights_are_those_of_an_undisturbed_run(
    service: ServiceProcess,
) -> None:
    training = TRAINING | {"batch_size": 4, "num_training_workers": 2, "max_train_steps": 60}
    calm, disturbed = (create(service, upload(service), General=GENERAL, Training=training) for _ in range(2))
    at_step(service, disturbed, 25)
    workers = [each for each in local_head(service).processes() if "RayTrainWorker" in each.name()]
    assert len(workers) == 2
    workers[1].kill()
    succeeded(service, disturbed)
    ((checkpoint, first),) = resumed_steps(service, disturbed)
    assert checkpoint >= 20
    assert checkpoint < first <= checkpoint + 5
    # The order in which two workers' gradients are added up is not fixed.
    runs = [Run(directory_of(service, job_id)) for job_id in (disturbed, calm)]
    assert_same_weights(*runs, tolerance=1e-5)


def test_a_job_may_start_from_the_checkpoint_of_another(service: ServiceProcess) -> None:
    file_id = upload(service)
    first = create(service, file_id, Training={"max_train_steps": 4})
    succeeded(service, first)
    checkpoints = service.http.post("/v1/finetune/list_checkpoints", json={"fine_tuning_job_id": first})
    newest = checkpoints.json()[-1]["fine_tuned_model_checkpoint"]
    second = create(
        service, file_id, General={"resume_from_checkpoint": newest}, Training={"max_train_steps": 6}
    )
    succeeded(service, second)
    assert any(text.startswith("Starting from checkpoint-4") for text in messages(service, second))
    steps = [event["data"]["step"] for event in events(service, second) if event["type"] == "metrics"]
    assert min(steps) == 5
    assert max(steps) == 6
