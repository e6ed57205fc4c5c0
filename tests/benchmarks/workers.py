"""One worker with two cores against two workers with one core each, and against one with one core.

``python -m tests.benchmarks.workers --model DIR --data FILE``: NLS jobs over a real service and its Ray, of
16 rows a step in all. Rows each second from the end of the second step to that of the last; seconds from the
request to the first step's end. The first job, which also starts Ray, is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.machine import Load, describe, layer_sgemm
from tests.benchmarks.startup import carry_out, phases, serving
from tests.service_process import ServiceProcess

ROWS, SKIPPED = 16, 2
WAYS = {"1 worker, 2 cores": (1, 2), "2 workers, 1 core each": (2, 1), "1 worker, 1 core": (1, 1)}


def run(service: ServiceProcess, body: dict[str, Any]) -> tuple[float, float, float]:
    """Rows each second, seconds to the first step's end, and the mean loss of the measured steps."""
    job, began = carry_out(service, body)
    reached = phases(service, job, began)
    lines = (service.data_dir / "jobs" / job / "events.jsonl").read_text().splitlines()
    steps = [event for event in map(json.loads, lines) if event["type"] == "metrics"]
    seconds = steps[-1]["created_at"] - steps[SKIPPED - 1]["created_at"]
    losses = [event["data"]["train_loss"] for event in steps[SKIPPED:]]
    return ROWS * len(losses) / seconds, reached["first step done"], statistics.mean(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    rate = layer_sgemm()
    with serving(arguments.model, arguments.data) as (service, common):
        bodies = {
            name: common
            | {
                "Training": {
                    "batch_size": ROWS // workers, "max_train_steps": arguments.steps, "logging_steps": 1,
                    "num_training_workers": workers, "resources_per_worker": {"CPU": cores}, "seed": 1,
                }
            }
            for name, (workers, cores) in WAYS.items()
        }  # fmt: skip
        run(service, bodies["1 worker, 2 cores"])
        load = Load()
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in bodies}
        for _ in range(arguments.repeats):
            for name, body in bodies.items():
                found[name].append(run(service, body))
        busy = load.others(0)
    print(f"{describe()}; sgemm before {rate:.0f} GFLOP/s; cores busy {busy:.2f}\n")
    print("| | rows each second | s to the first step's end | loss |\n|---|---|---|---|")
    for name, runs in found.items():
        speeds, starts, losses = zip(*runs, strict=True)
        print(
            f"| {name} | {statistics.median(speeds):.2f} ({min(speeds):.2f}-{max(speeds):.2f}) "
            f"| {statistics.median(starts):.1f} | {statistics.mean(losses):.4f} |"
        )


if __name__ == "__main__":
    main()
