"""What becomes of a model that is pruned, fine-tuned and quantised: ``make sparse-table``.

    python -m tests.benchmarks.sparse_table --model DIR --data FILE --tasks DIR --work DIR [--steps N]

Prunes the model with Wanda, takes the four ways from there (an adapter beside the pruned model, SparsePEFT,
an adapter beside the INT4 model, QA-SparsePEFT), and scores every model on the same ARC-Easy questions:
accuracy by the answer's text (``acc`` of lm-evaluation-harness), and the perplexity of the right answers,
with their standard errors. Each run is a process of its own, as the service would start it. Results stay in
``--work``; begun again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comps.tuning.export.base_files import find_base
from comps.tuning.models.weights import read_headers, weights_files
from comps.tuning.sparse.report import is_quantised, sparsity_of_directory
from comps.tuning.spec import ModelSpec
from tests.benchmarks.machine import describe, sgemm

MODULES = [["q_proj", "k_proj", "v_proj"], ["up_proj"], ["down_proj"]]
RANKS = [16, 12, 8]
GRID = {"mode": "int4_asym", "group_size": 64}


@dataclass
class Bench:
    """Where things are, and what a run is asked for."""

    arguments: argparse.Namespace
    work: Path
    rows: list[str] = field(default_factory=list)

    def run(self, name: str, kind: str, /, **fields: Any) -> dict[str, Any]:
        """The result of a run of ``kind`` in the directory ``name``, if need be of one that was there."""
        directory = self.work / name
        directory.mkdir(parents=True, exist_ok=True)
        done, begun = directory / "result.json", directory / "spec.json"
        spec = {"kind": kind, "job_id": name, "directory": str(directory), **fields}
        same = begun.is_file() and json.loads(begun.read_text()) == json.loads(json.dumps(spec))
        if not (same and done.is_file() and json.loads(done.read_text())["outcome"] == "succeeded"):
            shutil.rmtree(directory)  # of another run, or a part of one
            directory.mkdir()
            (directory / "spec.json").write_text(json.dumps(spec, indent=1))
            began = time.perf_counter()
            log = open(directory / "log", "w")  # noqa: SIM115
            command = [sys.executable, "-m", "comps.tuning", str(directory / "spec.json")]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"{name} failed: {(directory / 'log').read_text()[-2000:]}")
            took = {"seconds": time.perf_counter() - began, "peak_mb": usage.ru_maxrss / 1024}
            (directory / "took.json").write_text(json.dumps(took))
        # The run's own seconds, if it tells them: those of imports say nothing.
        return {**json.loads((directory / "took.json").read_text()), **json.loads(done.read_text())}

    def calibration(self) -> dict[str, Any]:
        return {"file": str(self.arguments.data), "samples": 128, "max_length": 256}

    def train(self, name: str, base: Path, **lora: Any) -> dict[str, Any]:
        groups = (
            [{"modules": modules, "ranks": RANKS} for modules in MODULES] if lora.pop("nls", False) else []
        )
        targets = None if groups else [module for group in MODULES for module in group]
        return self.run(
            name, "train", base_model=model(base),
            lora={"r": 16, "alpha": 32, "dropout": 0, "groups": groups, "target_modules": targets, **lora},
            data={"train_file": str(self.arguments.data), "validation_split_percentage": 0},
            training={
                "epochs": 1, "batch_size": 16, "learning_rate": self.arguments.rate, "save_strategy": "no",
                "max_train_steps": self.arguments.steps, "warmup_steps": 5,
            },
        )  # fmt: skip

    def heuristic(self, name: str, trained: dict[str, Any]) -> Path:
        output = self.work / name / "output"
        self.run(name, "extract", super_adapter=trained["path"], version="heuristic", output=str(output))
        return output

    def merge(self, name: str, base: Path, adapter: str | Path, **more: Any) -> dict[str, Any]:
        output = self.work / name / "output"
        return self.run(
            name, "merge", adapter=str(adapter), base_model=model(base), output=str(output), **more
        )

    def score(
        self, name: str, base: Path, adapter: str | Path | None = None, train: float | None = None
    ) -> None:
        """A row of the table."""
        result = self.run(
            f"score-{name}".replace(" ", "-"), "evaluate", base_model=model(base), task="ARC-Easy",
            tasks_dir=str(self.arguments.tasks), texts=True, metrics=["acc", "acc_norm", "perplexity"],
            limit=self.arguments.items, adapter=str(adapter) if adapter else None,
        )  # fmt: skip
        metrics = {
            key: f"{each['value']:.3f} ± {each['stderr']:.3f}" for key, each in result["metrics"].items()
        }
        zeros = sparsity_of_directory(base).total
        size = megabytes(base) + (megabytes(Path(adapter)) if adapter else 0)
        seconds = "" if train is None else f"{train:.0f}"
        row = [name, metrics["acc"], metrics["acc_norm"], metrics["perplexity"], f"{zeros:.1%}"]
        self.rows.append("| " + " | ".join([*row, f"{size:.0f}", seconds, f"{result['seconds']:.0f}"]) + " |")
        print(self.rows[-1], flush=True)


def model(directory: Path) -> dict[str, Any]:
    return {"name": directory.name, "path": str(directory)}


def megabytes(directory: Path) -> float:
    """Of a model's or adapter's weights: integers as they are stored, all others with 16 bits each."""
    total = 0
    for header in read_headers(weights_files(directory)):
        count = 1
        for size in header.shape:
            count *= size
        total += header.bytes if header.dtype in ("U8", "I8") else 2 * count
    return total / 1e6


def openvino_against_torch(directory: Path, xml: Path) -> str:
    """How far the OpenVINO model's logits are from those of torch, in a sentence."""
    import numpy as np
    import openvino as ov
    import torch

    from comps.tuning.models.load import load_base_model

    ids = torch.randint(1000, 40000, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_base_model(ModelSpec(name="int4", path=str(directory)))(input_ids=ids).logits.numpy()
    inputs = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
    found = []
    for name, config in (
        ("in float32", {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}),
        ("with OpenVINO's own settings", {}),
    ):
        there = ov.Core().compile_model(xml, "CPU", config)(inputs)[0]
        agree = float((there.argmax(-1) == expected.argmax(-1)).mean())
        apart = float(np.abs(there - expected).max() / np.abs(expected).max())
        found.append(
            f"{name} logits differ by {apart:.1e} of the largest, {agree:.1%} of the first tokens agree"
        )
    size = xml.with_suffix(".bin").stat().st_size / 1e6
    return f"As an OpenVINO model it has {size:.0f} MB; {'; '.join(found)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="ARC-Easy as instruction records")
    parser.add_argument("--tasks", type=Path, required=True, help="a directory with ARC-Easy/test.json")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pruned", type=Path, help="the model pruned already")
    parser.add_argument("--steps", type=int, help="optimizer steps of 16 rows; default: one epoch")
    parser.add_argument("--items", type=int, help="questions; default: all")
    parser.add_argument("--rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    bench = Bench(arguments, arguments.work)
    print(describe(), f"sgemm {sgemm():.0f} GFLOP/s", sep="\n")
    print("| model | acc | acc_norm | perplexity | zeros | MB | s to make | s to score |")
    print("|---|---|---|---|---|---|---|---|", flush=True)

    pruned = arguments.pruned
    if pruned is None:
        pruned = bench.work / "wanda" / "output"
        bench.run(
            "wanda", "prune", name="pruned", base_model=model(arguments.model), method="wanda", sparsity=0.5,
            calibration=bench.calibration(), output=str(pruned),
        )  # fmt: skip
    bench.score("dense", arguments.model)
    bench.score("pruned", pruned)

    plain = bench.train("lora", pruned)
    bench.score("pruned, LoRA beside it", pruned, plain["path"], plain["seconds"])
    sparse = bench.train("sparsepeft", pruned, sparse=True)
    made = bench.merge("sparsepeft-merged", pruned, sparse["path"])
    bench.score("SparsePEFT", Path(made["path"]), None, sparse["seconds"] + made["seconds"])
    nls = bench.train("sparsepeft-nls", pruned, sparse=True, nls=True)
    made = bench.merge("sparsepeft-nls-merged", pruned, bench.heuristic("sparsepeft-nls-cut", nls))
    bench.score("SparsePEFT + NLS, heuristic", Path(made["path"]), None, nls["seconds"] + made["seconds"])

    quantise: Callable[..., dict[str, Any]] = lambda name, **fields: bench.run(  # noqa: E731
        name, "quantize", name=name, base_model=model(pruned), grid=GRID,
        output=str(bench.work / name / "output"), **fields,
    )  # fmt: skip
    rounded = quantise("int4")
    bench.score("pruned, INT4", Path(rounded["path"]), None, rounded["seconds"])
    gptq = quantise("int4-gptq", method="gptq", calibration=bench.calibration())
    bench.score("pruned, INT4 by GPTQ", Path(gptq["path"]), None, gptq["seconds"])
    beside = bench.train("int4-lora", Path(gptq["path"]))
    bench.score("INT4 by GPTQ, LoRA beside it", Path(gptq["path"]), beside["path"], beside["seconds"])
    aware = bench.train("qa", pruned, nls=True, grid=GRID)
    made = bench.merge("qa-merged", pruned, bench.heuristic("qa-cut", aware), openvino=True)
    bench.score(
        "QA-SparsePEFT + NLS, heuristic",
        Path(made["path"]),
        None,
        aware["seconds"] + made["seconds"],
    )
    assert is_quantised(find_base(ModelSpec(**model(Path(made["path"]))), "integer_grid").directory)
    print(openvino_against_torch(Path(made["path"]), Path(made["openvino"]["path"])))


if __name__ == "__main__":
    main()
