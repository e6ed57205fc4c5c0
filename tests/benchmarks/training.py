"""Training throughput of NLS, plain LoRA and stock libraries, side by side in one run.

``python -m tests.benchmarks.training --model DIR --data FILE``: every variant in a process of its own, in
turn, ``--repeats`` times; then medians, spread, and ratios within each round. Half an hour; with ``--steps 5
--repeats 1`` or some ``--variants`` less. ``of sgemm``: the FLOPs that the variant's matrix products need,
against the rate of such products measured right before; the losses are those of rows that were not seen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.machine import Load, describe, layer_sgemm
from tests.benchmarks.train_once import OURS, PEERS, ROWS


def once(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.train_once", variant]
    command += ["--model", str(arguments.model), "--data", str(arguments.data)]
    command += ["--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    rate, load = layer_sgemm(), Load()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"sgemm": rate, "others": load.others(result["cpu_seconds"])}


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="instruction records, Alpaca's fields")
    parser.add_argument("--variants", nargs="+", default=[*PEERS, *OURS], choices=[*PEERS, *OURS])
    parser.add_argument("--steps", type=int, default=12, help="of 16 rows, the first two not measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    variants = arguments.variants
    bases = [name for name in ("stock", "lora") if name in variants]
    rounds = [{name: once(name, arguments) for name in variants} for _ in range(arguments.repeats)]
    print(f"{describe()}; {arguments.steps} steps of {ROWS} rows, {arguments.repeats} rounds\n")
    against = "".join(f" against {base} |" for base in bases)
    print(
        f"| variant | samples/s | real tokens/s |{against} of sgemm | peak GB | loss: answers | all tokens |"
    )
    print("|---" * (7 + len(bases)) + "|")
    for name in variants:
        runs = [each[name] for each in rounds]
        cells = [name, spread([run["samples_per_second"] for run in runs])]
        cells.append(spread([run["tokens_per_second"] for run in runs], 0))
        for base in bases:
            speeds = [[each[side]["samples_per_second"] for side in (name, base)] for each in rounds]
            cells.append(spread([own / other for own, other in speeds]))
        cells.append(spread([run["gflops"] / run["sgemm"] for run in runs]))
        cells.append(f"{statistics.median(run['peak_gb'] for run in runs):.1f}")
        for loss in ("loss_answers", "loss_all"):
            cells.append(f"{statistics.median(run[loss] for run in runs):.3f}")
        print(f"| {' | '.join(cells)} |")
    everything = [run for each in rounds for run in each.values()]
    print(f"\nsgemm {spread([run['sgemm'] for run in everything], 0)} GFLOP/s; ", end="")
    print(f"cores used by others {spread([run['others'] for run in everything])}")


if __name__ == "__main__":
    main()
