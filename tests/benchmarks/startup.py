"""From the command to a healthy service, and from an accepted job to its first training step.

``python -m tests.benchmarks.startup --model DIR --data FILE``: a real service with its own Ray, and NLS
jobs of three steps one after another. The phases come from the job's events.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.machine import Load, describe
from tests.service_process import ServiceProcess

JOB = {
    "General": {
        "lora_config": {
            "r": 16, "lora_alpha": 32, "lora_dropout": 0, "neural_lora_search": True,
            "target_module_groups": [["q_proj", "k_proj", "v_proj"], ["up_proj"], ["down_proj"]],
            "search_space": ["16,12,8", "16,12,8", "16,12,8"],
        },
        "save_strategy": "no",
    },
    "Dataset": {"max_length": 256, "validation_split_percentage": 0},
    "Training": {"batch_size": 16, "max_train_steps": 3},
}  # fmt: skip
# Words of an event of the run, and what has been reached with it.
PHASES = {
    "Training with": "libraries imported",
    " training rows": "tokenised",
    "Loaded ": "model loaded, adapter set up",
    "Set-up took": "faster ways to compute compared with the model's own",
    "The whole run": "cost told",
    "First step done": "first step done",
}


@contextmanager
def serving(model: Path, data: Path) -> Iterator[tuple[ServiceProcess, dict[str, Any]]]:
    """A service with a Ray of its own, and the body of a job on ``data`` that it has."""
    model = model.resolve()
    with tempfile.TemporaryDirectory() as directory:
        models = str(model.parents[1])
        with closing(ServiceProcess(Path(directory), ray=True, FINETUNING_MODELS_DIR=models)) as service:
            with open(data, "rb") as stream:
                upload = service.http.post(
                    "/v1/files", files={"file": ("data.json", stream)}, data={"purpose": "fine-tune"}
                )
            yield (
                service,
                JOB | {"model": "/".join(model.parts[-2:]), "training_file": upload.json()["id"]},
            )


def carry_out(service: ServiceProcess, body: dict[str, Any]) -> tuple[str, float]:
    """The id of a job that has succeeded, and when it was asked for."""
    began = time.time()
    path = f"/v1/fine_tuning/jobs/{service.http.post('/v1/fine_tuning/jobs', json=body).json()['id']}"
    while (job := service.http.get(path).json())["status"] != "succeeded":
        if job["error"]:
            raise SystemExit(f"a job has failed: {job['error']}")
        time.sleep(0.5)
    return job["id"], began


def phases(service: ServiceProcess, job: str, began: float) -> dict[str, float]:
    """Seconds from ``began`` to each phase of one job."""
    # The API tells whole seconds only.
    with closing(sqlite3.connect(service.data_dir / "finetuning.db")) as database:
        events = database.execute(
            "SELECT message, created_at FROM events WHERE job_id = ?", (job,)
        ).fetchall()
    lines = (service.data_dir / "jobs" / job / "events.jsonl").read_text().splitlines()
    found = {
        "validated": next(at for message, at in events if message.startswith("Files validated")),
        "submitted": next(at for message, at in events if message.startswith("The job is starting")),
    }
    for line in map(json.loads, lines):
        if "machine" in line.get("data", {}):
            found["its process begins (Ray's supervisor is up)"] = line["data"]["machine"]["process_began"]
        for words, name in PHASES.items():
            if words in line["message"]:
                found.setdefault(name, line["created_at"])
    return {name: at - began for name, at in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    starts: list[tuple[float, float]] = []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as directory:
            began = time.monotonic()
            with closing(ServiceProcess(Path(directory))) as service:
                wall = time.monotonic() - began
                used = psutil.Process(service.process.pid).cpu_times()
                starts.append((wall, used.user + used.system))
    with serving(arguments.model, arguments.data) as (service, body):
        load = Load()
        jobs = [phases(service, *carry_out(service, body)) for _ in range(arguments.repeats + 1)]
        busy = load.others(0)
    print(f"{describe()}; cores busy meanwhile: {busy:.2f}")
    wall, cpu = (statistics.median(values) for values in zip(*starts, strict=True))
    print(f"\nstart to healthy: {wall:.1f} s ({cpu:.1f} s of CPU), median of {len(starts)}\n")
    print("| seconds after the request | first job (Ray starts too) | later jobs, median |")
    print("|---|---|---|")
    for name in jobs[0]:
        later = statistics.median(job[name] for job in jobs[1:])
        print(f"| {name} | {jobs[0][name]:.1f} | {later:.1f} |")


if __name__ == "__main__":
    main()
