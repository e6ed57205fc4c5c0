"""What a job says beforehand against what it then takes: seconds, and bytes of memory at most.

``python -m tests.benchmarks.cost --model DIR --data FILE``: small NLS jobs of different shapes, each in a
process of its own, as the service runs them. Time is from the first step's begin to the written adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from comps.tuning import rundir
from comps.tuning.spec import TrainSpec
from tests.benchmarks.machine import Load, describe
from tests.benchmarks.train_once import spec

# name -> (records that make up one row, changes of the data block, changes of the training block)
JOBS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "128 rows, batch 16": (1, {}, {"batch_size": 16}),
    "128 rows, batch 4, 2 epochs": (1, {}, {"batch_size": 4, "epochs": 2}),
    "every token": (1, {"mask_input": False, "mask_response": False}, {"batch_size": 16}),
    "rows four times as long, batch 8": (4, {}, {"batch_size": 8}),
    "with 5 validations and checkpoints": (
        1,
        {"validation_split_percentage": 20},
        {"batch_size": 8, "save_strategy": "steps", "save_steps": 3},
    ),
}
ROWS = 128


def records(data: Path, joined: int, directory: Path) -> Path:
    """A file of rows whose outputs are the first ``joined`` records' whole texts, one after the other."""
    found = json.loads(data.read_text())
    found *= -(-ROWS * joined // len(found))
    rows = []
    for start in range(0, ROWS * joined, joined):
        first, *others = found[start : start + joined]
        texts = [f"{each['instruction']} {each['input']} {each['output']}" for each in others]
        rows.append(first | {"output": " ".join([first["output"], *texts])})
    file = directory / "records.json"
    file.write_text(json.dumps(rows))
    return file


def carry_out(run: TrainSpec) -> tuple[dict[str, Any], float, int]:
    """What was told, seconds that it took, and bytes of memory at most."""
    run.directory.mkdir()
    path = run.directory / rundir.SPEC
    path.write_text(run.model_dump_json())
    command = [sys.executable, "-m", "comps.tuning", str(path)]
    with open(run.directory / "log", "wb") as log:
        actions = [(os.POSIX_SPAWN_DUP2, log.fileno(), 1), (os.POSIX_SPAWN_DUP2, log.fileno(), 2)]
        child = os.posix_spawn(sys.executable, command, os.environ, file_actions=actions)
        _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit((run.directory / "log").read_text()[-3000:])
    events = [json.loads(line) for line in (run.directory / rundir.EVENTS).read_text().splitlines()]
    at = {event["message"].split(":")[0].split(" step")[0]: event for event in events}
    seconds = at["The adapter is written"]["created_at"] - at["Training from"]["created_at"]
    return at["The whole run"]["data"], seconds, 1024 * usage.ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    arguments.variant = "nls"
    print(f"{describe()}\n")
    print("| job | steps | seconds: told | taken | taken / told | GB: told | taken | taken / told | others |")
    print("|---|---|---|---|---|---|---|---|---|")
    for number, (name, (joined, data, training)) in enumerate(JOBS.items()):
        with tempfile.TemporaryDirectory() as directory:
            run = spec(arguments, Path(directory) / f"run-{number}")
            file = records(arguments.data, joined, Path(directory))
            run = run.model_copy(
                update={
                    "data": run.data.model_copy(update={"train_file": file, **data}),
                    "training": run.training.model_copy(update=training),
                }
            )
            load, before = Load(), os.times()
            told, seconds, memory = carry_out(run)
            after = os.times()
            own = sum(after[2:4]) - sum(before[2:4])
        cells = [name, told["steps"], f"{told['seconds']:.1f}", f"{seconds:.1f}"]
        cells += [f"{seconds / told['seconds']:.2f}", f"{told['memory'] / 1e9:.2f}", f"{memory / 1e9:.2f}"]
        cells += [f"{memory / told['memory']:.2f}", f"{load.others(own):.2f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
