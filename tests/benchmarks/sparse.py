"""Sparse adapters against plain LoRA and against the original way to compute them.

``python -m tests.benchmarks.sparse --model DIR --data FILE``: all ways by turns in one process, each batch in
an order that changes (see ``pairs``), and the time of a step as a ratio to plain LoRA's: its median over the
batches, and a 95 % interval of that median. Then the peak memory of each way in a process of its own. The
smaller half of each layer's weights is made zero at first; how good the model still is does not matter here.

``original`` is what the original code does, written down from its description: the base's product, and beside
it a product with ``(s B A) * (W != 0)``, whose mask is made at each forward and kept for the backward pass.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.nn import functional
from transformers import PreTrainedModel

from comps.tuning.data.batching import LengthGroupedSampler
from comps.tuning.data.collate import Collator
from comps.tuning.data.dataset import build_datasets
from comps.tuning.models.load import load_tokenizer
from comps.tuning.spec import TrainSpec
from tests.benchmarks.machine import Load, describe, peak_memory, sgemm
from tests.benchmarks.pairs import ROWS, SEED, WARM_UP, Side
from tests.benchmarks.train_once import spec

SPARSE: dict[str, Any] = {"sparse": True}
# name -> adapter, way to compute it, changes of its spec; the first is what the others are measured against
WAYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LoRA": ("lora", "fused", {}),
    "SparsePEFT": ("lora", "fused", SPARSE),
    "SparsePEFT, NLS": ("nls", "fused", SPARSE),
    "SparsePEFT, dropout 0.1": ("lora", "fused", SPARSE | {"dropout": 0.1}),
    "LoRA, layers not fused": ("lora", "packed", {}),
    "SparsePEFT, layers not fused": ("lora", "packed", SPARSE),
    "original": ("lora", "packed", {}),
}


def original(layer: Any, x: torch.Tensor) -> torch.Tensor:
    weight = layer.base_layer.weight
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    delta = product * layer.scaling["default"] * (weight != 0)
    return layer.base_layer(x) + functional.linear(x, delta)


class Way(Side):
    """One of the ways to train the half-zero model."""

    def __init__(self, arguments: argparse.Namespace, name: str) -> None:
        adapter, way, self._changes = WAYS[name]
        super().__init__(arguments, adapter, way)
        if name == "original":
            for layer in self.model.modules():
                if isinstance(layer, LoraLinear):
                    layer.forward = partial(original, layer)

    def spec(self, arguments: argparse.Namespace) -> TrainSpec:
        run = super().spec(arguments)
        return run.model_copy(update={"lora": run.lora.model_copy(update=self._changes)})

    def load(self, run: TrainSpec) -> PreTrainedModel:
        model = super().load(run)
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                size = weight.data.abs()
                weight.data[size <= size.median()] = 0
        return model


def batches(arguments: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    arguments.variant = "lora"
    run = spec(arguments, Path(tempfile.gettempdir()))
    tokenizer = load_tokenizer(run.base_model)
    rows = build_datasets(run.data, run.task, tokenizer, SEED).train
    order = LengthGroupedSampler(rows.lengths, ROWS, SEED).rows()
    collate = Collator(tokenizer.pad_token_id)
    starts = range(0, ROWS * (WARM_UP + arguments.steps), ROWS)
    return [collate([rows[row] for row in order[start : start + ROWS]]) for start in starts]


def alone(arguments: argparse.Namespace, name: str) -> dict[str, float]:
    """The peak memory of one way in this process, and its last loss."""
    way = Way(arguments, name)
    for number, batch in enumerate(batches(arguments)):
        loss = way.step(batch, number)
    return {"gb": peak_memory() / 2**30, "loss": loss}


def memory(arguments: argparse.Namespace, name: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.sparse", "--only", name, "--steps", "4"]
    command += ["--model", str(arguments.model), "--data", str(arguments.data)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="instruction records, Alpaca's fields")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of these, LoRA first")
    parser.add_argument("--only", choices=WAYS, help="one way alone; prints its peak memory")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        print(json.dumps(alone(arguments, arguments.only)))
        return
    ways = {name: Way(arguments, name) for name in arguments.ways}
    chance, losses = random.Random(SEED), dict.fromkeys(ways, 0.0)
    rate, load, began = sgemm(), Load(), time.process_time()
    for number, batch in enumerate(batches(arguments)):
        for name in chance.sample(list(ways), len(ways)):
            losses[name] = ways[name].step(batch, number)
    others = load.others(time.process_time() - began)
    peaks = {name: memory(arguments, name)["gb"] for name in ways}
    print(f"{describe()}; {arguments.steps} steps of {ROWS} rows each, half of the weights zero\n")
    print("| way | s a step | of LoRA's time | peak GB | of LoRA's | loss of the last step |")
    print("|---|---|---|---|---|---|")
    first = next(iter(ways))
    for name, way in ways.items():
        seconds, base = way.seconds[WARM_UP:], ways[first].seconds[WARM_UP:]
        ratios = [own / plain for own, plain in zip(seconds, base, strict=True)]
        medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(2000))
        print(f"| {name} | {statistics.median(seconds):.3f} | {statistics.median(ratios):.2f} ", end="")
        print(f"({medians[50]:.2f}-{medians[-51]:.2f}) | {peaks[name]:.2f} ", end="")
        print(f"| {peaks[name] / peaks[first]:.2f} | {losses[name]:.4f} |")
    print(f"\nsgemm {rate:.0f} GFLOP/s; cores used by others {others:.2f}")


if __name__ == "__main__":
    main()
