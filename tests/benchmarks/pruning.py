"""What pruning costs and does: ``python -m tests.benchmarks.pruning --model DIR --data FILE``.

Each way prunes the model in a process of its own, calibrated on rows of the file's beginning, and is measured
by its seconds, its peak memory against that of a process which only loads and reads the model, and the
perplexity of the model it gives on the file's last rows, over all their tokens and over those of the answers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from comps.tuning.data.dataset import build_datasets
from comps.tuning.data.masking import IGNORED
from comps.tuning.models.load import load_base_model, load_tokenizer
from comps.tuning.spec import DataSpec, ModelSpec
from tests.benchmarks.machine import describe, sgemm

HELD_OUT = 100
WAYS: dict[str, dict[str, Any]] = {
    "wanda 0.5": {"method": "wanda", "sparsity": 0.5},
    "wanda 2:4": {"method": "wanda", "pattern": "2:4"},
    "wanda 4:8": {"method": "wanda", "pattern": "4:8"},
    "magnitude 0.5": {"method": "magnitude", "sparsity": 0.5},
}
LOAD = (
    "import sys; from comps.tuning.models.load import load_base_model;"
    "from comps.tuning.spec import ModelSpec;"
    "model = load_base_model(ModelSpec(name='m', path=sys.argv[1]));"
    "[weight.sum() for weight in model.parameters()]"  # files are only mapped until they are read
)


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak memory (MB) of a command."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


@torch.inference_mode()
def perplexities(directory: Path, rows: Path) -> tuple[float, float]:
    """Of all tokens after the first of each row, and of the answers' alone."""
    model = ModelSpec(name="pruned", path=str(directory))
    data = DataSpec(train_file=rows, validation_split_percentage=0, max_length=256)
    found = build_datasets(data, "instruction_tuning", load_tokenizer(model), 0).train
    live = load_base_model(model)
    losses, answers = [], []
    for row in found:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        logits = live(input_ids=ids[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        losses += loss.tolist()
        answers += loss[labels[1:] != IGNORED].tolist()
    return math.exp(sum(losses) / len(losses)), math.exp(sum(answers) / len(answers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a JSON array of records")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--only", nargs="*", choices=WAYS, default=list(WAYS))
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    records = json.loads(arguments.data.read_text())
    size = sum(path.stat().st_size for path in arguments.model.glob("*.safetensors")) / 2**20
    print(describe())
    print(f"model {size:.0f} MB, sgemm {sgemm():.0f} GFLOP/s")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        calibration, held_out = directory / "calibration.json", directory / "held_out.json"
        calibration.write_text(json.dumps(records[:-HELD_OUT]))
        held_out.write_text(json.dumps(records[-HELD_OUT:]))
        seconds, alone = measured(["-c", LOAD, str(arguments.model)])
        print("| way | seconds | in the run | peak MB | against loading | zeros | perplexity | answers |")
        print("|---|---|---|---|---|---|---|---|")
        whole, answers = perplexities(arguments.model, held_out)
        print(f"| only loaded | {seconds:.1f} | | {alone:.0f} | 1 | | {whole:.2f} | {answers:.2f} |")
        for name, way in WAYS.items():
            if name not in arguments.only:
                continue
            run = directory / "run"
            run.mkdir(exist_ok=True)
            spec = {
                "kind": "prune", "job_id": "prune-bench", "directory": str(run), "name": "pruned", **way,
                "base_model": {"name": "base", "path": str(arguments.model)},
                "calibration": {"file": str(calibration), "samples": arguments.samples},
                "output": str(run / "output"),
            }  # fmt: skip
            (run / "spec.json").write_text(json.dumps(spec))
            seconds, peak = measured(["-m", "comps.tuning", str(run / "spec.json")])
            result = json.loads((run / "result.json").read_text())
            whole, answers = perplexities(run / "output", held_out)
            print(
                f"| {name} | {seconds:.1f} | {result['seconds']:.1f} | {peak:.0f} | {peak / alone:.2f} "
                f"| {result['sparsity']['total']:.4f} | {whole:.2f} | {answers:.2f} |"
            )


if __name__ == "__main__":
    main()
