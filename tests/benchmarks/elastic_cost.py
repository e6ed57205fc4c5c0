"""What elastic ranks cost: steps of NLS and of plain LoRA by turns in one process, on the same batches.

``python -m tests.benchmarks.elastic_cost --model DIR --data FILE``. Neighbours on the machine slow whole
seconds down, so both sides do each batch right after each other, in an order that changes, and what is
reported is the ratio of the two times: its median over the batches, and a 95 % interval of that median.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from comps.tuning.data.collate import Collator
from comps.tuning.data.dataset import build_datasets
from comps.tuning.elastic.model import ElasticController, build_adapter
from comps.tuning.elastic.sampler import sample
from comps.tuning.models.load import load_base_model, load_tokenizer
from comps.tuning.training.loss import labelled_only, mean_loss
from tests.benchmarks.machine import Load, describe, sgemm
from tests.benchmarks.train_once import spec

ROWS, SEED, WARM_UP = 16, 42, 3


class Side:
    """One of the two trainings: a model, its optimizer, and the seconds of each of its steps."""

    def __init__(self, arguments: argparse.Namespace, variant: str) -> None:
        arguments.variant = variant
        run = spec(arguments, Path(tempfile.gettempdir()))
        base = load_base_model(run.base_model, device="cpu")
        self.model, _, self.controller = build_adapter(base, run.lora)
        self.model.train()
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
        self.seconds: list[float] = []

    def step(self, batch: dict[str, torch.Tensor], number: int) -> None:
        began = time.perf_counter()
        if isinstance(self.controller, ElasticController):
            self.controller.set(sample(self.controller.space, SEED, number))
        inputs = labelled_only(batch)
        mean_loss(self.model(**inputs), inputs["labels"]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="instruction records, Alpaca's fields")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sides = {name: Side(arguments, name) for name in ("lora", "nls")}
    run = spec(arguments, Path(tempfile.gettempdir()))
    tokenizer = load_tokenizer(run.base_model)
    rows = build_datasets(run.data, run.task, tokenizer, SEED).train
    by_length = sorted(range(len(rows)), key=rows.lengths.__getitem__)
    collate, chance = Collator(tokenizer.pad_token_id), random.Random(SEED)
    rate, load, began = sgemm(), Load(), time.process_time()
    for number in range(WARM_UP + arguments.steps):
        first = chance.randrange(len(rows) - ROWS)
        batch = collate([rows[row] for row in by_length[first : first + ROWS]])
        for name in chance.sample(sorted(sides), 2):
            sides[name].step(batch, number)
    others = load.others(time.process_time() - began)
    lora, nls = (sides[name].seconds[WARM_UP:] for name in ("lora", "nls"))
    ratios = [plain / elastic for plain, elastic in zip(lora, nls, strict=True)]
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(2000))
    print(f"{describe()}; {arguments.steps} pairs of steps of {ROWS} rows")
    print(f"plain LoRA {statistics.median(lora):.3f} s, NLS {statistics.median(nls):.3f} s a step (medians)")
    print(
        f"throughput of NLS against plain LoRA: {statistics.median(ratios):.3f} "
        f"(95 % interval {medians[50]:.3f}-{medians[-51]:.3f})"
    )
    print(f"sgemm {rate:.0f} GFLOP/s; cores used by others {others:.2f}")


if __name__ == "__main__":
    main()
