"""What tests ask of a running service: small jobs, the wait for their end, what they left behind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from service_process import ServiceProcess

from comps.finetuning.cluster.local_head import LocalHead

MODEL = "tiny/llama"
RECORDS = [
    {"instruction": "Say the number.", "input": str(number), "output": f"number {number}"}
    for number in range(48)
]
# One thread: on a busy machine several wait for each other most of the time.
NLS_JOB: dict[str, Any] = {
    "model": MODEL,
    "General": {
        "lora_config": {
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0,
            "neural_lora_search": True,
            "target_module_groups": [["q_proj", "k_proj", "v_proj"], ["up_proj"], ["down_proj"]],
            "search_space": ["8,6,4", "8,4", [8, 4, 2]],
        }
    },
    "Dataset": {"validation_split_percentage": 10},
    "Training": {
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "resources_per_worker": {"CPU": 1},
    },
}
ENDED = ("succeeded", "failed", "cancelled")


def with_changes(body: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``body`` with ``changes``, block by block: ``{"Training": {"epochs": 3}}`` changes one field."""
    merged = {**body, **changes}
    for name, block in changes.items():
        if isinstance(block, dict) and isinstance(body.get(name), dict):
            merged[name] = with_changes(body[name], block)
    return merged


def upload(
    service: ServiceProcess, records: list[dict[str, Any]] = RECORDS, name: str = "numbers.json"
) -> str:
    """Upload records; returns the file's id."""
    content = json.dumps(records).encode()
    return service.openai.files.create(file=(name, content), purpose="fine-tune").id


def create(
    service: ServiceProcess, file_id: str, headers: dict[str, str] | None = None, **changes: Any
) -> str:
    """Create :data:`NLS_JOB` with changes; returns its id."""
    body = with_changes(NLS_JOB, {**changes, "training_file": file_id})
    response = service.http.post("/v1/fine_tuning/jobs", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def job(service: ServiceProcess, job_id: str) -> dict[str, Any]:
    answer: dict[str, Any] = service.http.get(f"/v1/fine_tuning/jobs/{job_id}").json()
    return answer


def wait_until(
    service: ServiceProcess, job_id: str, reached: Callable[[dict[str, Any]], bool], timeout: float = 180
) -> dict[str, Any]:
    """The job as soon as it has ``reached`` something. Fails when it ends or takes too long before."""
    deadline = time.monotonic() + timeout
    while not reached(answer := job(service, job_id)):
        if time.monotonic() > deadline or answer["status"] in ENDED:
            logs = service.http.get(f"/v1/fine_tuning/jobs/{job_id}/logs").text
            raise AssertionError(f"{job_id} is {answer['status']}: {answer['error']}\n{logs[-5000:]}")
        time.sleep(0.1)
    return answer


def wait(service: ServiceProcess, job_id: str, timeout: float = 180) -> dict[str, Any]:
    """The job once it has ended."""
    return wait_until(service, job_id, lambda answer: answer["status"] in ENDED, timeout)


def succeeded(service: ServiceProcess, job_id: str, timeout: float = 180) -> dict[str, Any]:
    """The job once it has succeeded."""
    return wait_until(service, job_id, lambda answer: answer["status"] == "succeeded", timeout)


def at_step(service: ServiceProcess, job_id: str, step: int) -> None:
    """Wait until the job has trained ``step`` steps."""
    wait_until(service, job_id, lambda answer: answer["progress"].get("step", 0) >= step)


def events(service: ServiceProcess, job_id: str) -> list[dict[str, Any]]:
    """All events of a job, oldest first."""
    found: list[dict[str, Any]] = []
    more, query = True, "limit=100"
    while more:
        page = service.http.get(f"/v1/fine_tuning/jobs/{job_id}/events?{query}").json()
        found += page["data"]
        more, query = page["has_more"], f"limit=100&after={found[-1]['id']}"
    return found[::-1]


def messages(service: ServiceProcess, job_id: str) -> list[str]:
    return [event["message"] for event in events(service, job_id)]


def directory_of(service: ServiceProcess, job_id: str) -> Path:
    return service.data_dir / "jobs" / job_id


def output_of(service: ServiceProcess, job_id: str) -> Path:
    return directory_of(service, job_id) / "output"


def local_head(service: ServiceProcess) -> LocalHead:
    return LocalHead(service.data_dir / "ray")


def trainers(head: LocalHead, job_id: str) -> list[psutil.Process]:
    """The processes that train a job with one worker (one, or none)."""
    found = []
    for process in head.processes():
        with suppress(psutil.Error):  # gone meanwhile
            command = process.cmdline()
            if "comps.tuning" in command and job_id in command[-1]:
                found.append(process)
    return found


def kill_all(head: LocalHead) -> None:
    """``kill -9`` of a Ray head with all its processes."""
    for process in head.processes():
        with suppress(psutil.NoSuchProcess):
            process.kill()


def processes_end(service: ServiceProcess, job_id: str, timeout: float = 15) -> None:
    """Wait until a job's training process, if it is still there, is gone."""
    _, left = psutil.wait_procs(trainers(local_head(service), job_id), timeout)
    assert not left
