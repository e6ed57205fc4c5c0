"""Training throughput of NLS, plain LoRA and stock libraries, side by side in one run.

``python -m tests.benchmarks.training --model DIR --data FILE``: every variant in a process of its own, in
turn, ``--repeats`` times; then medians, spread, and ratios within each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import Load, describe, sgemm

VARIANTS = ("stock", "stock_grouped", "lora", "nls", "nls_all", "nls_bf16")


def once(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.train_once", variant]
    command += ["--model", str(arguments.model), "--data", str(arguments.data)]
    command += ["--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    rate, load = sgemm(), Load()
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
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    rounds = [{name: once(name, arguments) for name in VARIANTS} for _ in range(arguments.repeats)]
    print(f"{describe()}; {arguments.steps} steps of 16 rows, {arguments.repeats} rounds\n")
    print("| variant | samples/s | real tokens/s | against stock | against lora | peak GB | loss |")
    print("|---|---|---|---|---|---|---|")
    for name in VARIANTS:
        runs = [each[name] for each in rounds]
        speed = [run["samples_per_second"] for run in runs]
        against = {
            base: spread(
                [each[name]["samples_per_second"] / each[base]["samples_per_second"] for each in rounds]
            )
            for base in ("stock", "lora")
        }
        tokens = spread([run["tokens_per_second"] for run in runs], 0)
        peak, loss = (statistics.median(run[key] for run in runs) for key in ("peak_gb", "loss"))
        print(f"| {name} | {spread(speed)} | {tokens} | {against['stock']} | {against['lora']} ", end="")
        print(f"| {peak:.1f} | {loss:.3f} |")
    everything = [run for each in rounds for run in each.values()]
    print(f"\nsgemm {spread([run['sgemm'] for run in everything], 0)} GFLOP/s; ", end="")
    print(f"cores used by others {spread([run['others'] for run in everything])}")


if __name__ == "__main__":
    main()
