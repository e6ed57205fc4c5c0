"""Two ways to train, step by step by turns in one process, on the same batches.

``python -m tests.benchmarks.pairs elastic --model DIR --data FILE``: NLS against plain LoRA, both fused;
``packing``: packed batches against padded ones; ``fusing``: fused layers against the model's own;
``bf16``: products in bfloat16 against float32. Neighbours on the machine slow whole seconds
down, so both sides do each batch right after each other, in an order that changes, and what is reported is
the ratio of the two times: its median over the batches, and a 95 % interval of that median.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from comps.tuning.data.batching import LengthGroupedSampler
from comps.tuning.data.collate import Collator
from comps.tuning.data.dataset import build_datasets
from comps.tuning.elastic.model import build_adapter
from comps.tuning.elastic.sampler import sample
from comps.tuning.fused import fuse
from comps.tuning.models.load import load_base_model, load_tokenizer
from comps.tuning.spec import TrainSpec
from comps.tuning.training.loss import labelled_only, mean_loss
from comps.tuning.training.packing import pack, packed_loss, packs
from tests.benchmarks.machine import Load, describe, sgemm
from tests.benchmarks.train_once import spec

ROWS, SEED, WARM_UP = 16, 42, 3
# name -> (what is measured, what it is measured against), each the adapter and how it is computed
COMPARISONS = {
    "elastic": (("nls", "fused"), ("lora", "fused")),
    "packing": (("nls", "packed"), ("nls", "padded")),
    "fusing": (("nls", "fused"), ("nls", "packed")),
    "bf16": (("nls", "bf16"), ("nls", "fused")),
}


class Side:
    """One of the two trainings: a model, its optimizer, and the seconds of each of its steps."""

    def __init__(self, arguments: argparse.Namespace, adapter: str, way: str) -> None:
        arguments.variant = adapter
        run = self.spec(arguments)
        base = self.load(run)
        self.model, _, self.controller = build_adapter(base, run.lora)
        self.inputs, self.loss = (pack, packed_loss) if way != "padded" else (labelled_only, mean_loss)
        if way != "padded" and not packs(base, run.data.max_length):
            raise SystemExit("this model's batches cannot be packed")
        self.model.eval()  # new adapters have their dropout on
        if way in ("fused", "bf16"):
            fusion = fuse(base)
            if not fusion.layers:
                raise SystemExit("this model's layers cannot be fused")
            self.loss = fusion.loss
        self.precision = "bf16" if way == "bf16" else "ieee"
        self.model.train()
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
        self.seconds: list[float] = []
        self.name = f"{adapter}, {way}"

    def spec(self, arguments: argparse.Namespace) -> TrainSpec:
        """The run that ``arguments`` ask for."""
        return spec(arguments, Path(tempfile.gettempdir()))

    def load(self, run: TrainSpec) -> PreTrainedModel:
        """The base model."""
        return load_base_model(run.base_model, device="cpu")

    def step(self, batch: dict[str, torch.Tensor], number: int) -> float:
        """Returns the loss."""
        torch.backends.mkldnn.matmul.fp32_precision = self.precision
        began = time.perf_counter()
        if self.controller is not None:
            self.controller.set(sample(self.controller.space, SEED, number))
        inputs = self.inputs(batch)
        labels = inputs.pop("labels")
        loss = self.loss(self.model(**inputs), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"
        self.seconds.append(time.perf_counter() - began)
        return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", choices=list(COMPARISONS))
    parser.add_argument("--model", type=Path, required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="instruction records, Alpaca's fields")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sides = [Side(arguments, *each) for each in COMPARISONS[arguments.comparison]]
    run = spec(arguments, Path(tempfile.gettempdir()))
    tokenizer = load_tokenizer(run.base_model)
    rows = build_datasets(run.data, run.task, tokenizer, SEED).train
    order = LengthGroupedSampler(rows.lengths, ROWS, SEED).rows()
    collate, chance = Collator(tokenizer.pad_token_id), random.Random(SEED)
    rate, load, began = sgemm(), Load(), time.process_time()
    losses: list[list[float]] = [[], []]
    for number in range(WARM_UP + arguments.steps):
        batch = collate([rows[row] for row in order[number * ROWS : (number + 1) * ROWS]])
        for side in chance.sample([0, 1], 2):
            losses[side].append(sides[side].step(batch, number))
    others = load.others(time.process_time() - began)
    ours, theirs = (side.seconds[WARM_UP:] for side in sides)
    ratios = [slow / quick for quick, slow in zip(ours, theirs, strict=True)]
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(2000))
    print(f"{describe()}; {arguments.steps} pairs of steps of {ROWS} rows")
    for side, each in zip(sides, losses, strict=True):
        seconds = statistics.median(side.seconds[WARM_UP:])
        print(f"{side.name}: {seconds:.3f} s a step (median), loss of the last step {each[-1]:.4f}")
    print(
        f"throughput of the first against the second: {statistics.median(ratios):.3f} "
        f"(95 % interval {medians[50]:.3f}-{medians[-51]:.3f})"
    )
    print(f"sgemm {rate:.0f} GFLOP/s; cores used by others {others:.2f}")


if __name__ == "__main__":
    main()
