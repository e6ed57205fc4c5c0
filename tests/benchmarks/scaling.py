"""How a training step's time grows: with rows, tokens a row, rank, rank groups and layers; as a plot.

``python -m tests.benchmarks.scaling --output DIR``: models of SmolLM2-135M's width with random weights, NLS,
random tokens of which the last quarter is learnt and none is shared. One setting varies at a time, all
values by turns, ``--repeats`` times; the medians go to ``scaling.csv`` and ``scaling.png``.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from comps.tuning.data.masking import IGNORED
from comps.tuning.elastic.model import build_adapter
from comps.tuning.elastic.sampler import sample
from comps.tuning.fused import fuse
from comps.tuning.spec import LoraSpec, RankGroup
from comps.tuning.training.packing import pack, packs
from tests.benchmarks.machine import describe, sgemm

BASE = {"rows": 8, "tokens a row": 64, "rank": 16, "groups": 3, "layers": 6}
SWEEPS = {
    "rows": (1, 2, 4, 8, 16, 32),
    "tokens a row": (16, 32, 64, 128, 256, 512),
    "rank": (4, 8, 16, 32, 64),
    "groups": (1, 3, 5, 7),
    "layers": (2, 4, 8, 16, 30),
}
MODULES = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj", "o_proj")


class Step:
    """One setting, ready to be stepped."""

    def __init__(self, setting: dict[str, int]) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
            num_key_value_heads=3, num_hidden_layers=setting["layers"], tie_word_embeddings=True,
        )  # fmt: skip
        base = LlamaForCausalLM(config).eval()
        base.config.use_cache = False
        rank, count = setting["rank"], setting["groups"]
        # The same modules always, in so many groups.
        groups = tuple(
            RankGroup(modules=MODULES[number::count], ranks=(rank, rank * 3 // 4, rank // 2))
            for number in range(count)
        )
        self.model, _, self.controller = build_adapter(
            base, LoraSpec(r=rank, alpha=32, dropout=0, groups=groups)
        )
        if not packs(base, 512):
            raise SystemExit("this model cannot be packed")
        self.loss = fuse(base).loss
        self.model.train()
        ids = torch.randint(config.vocab_size, (setting["rows"], setting["tokens a row"]))
        ids[:, 0] = torch.arange(len(ids))  # nothing in common
        labels = ids.clone()
        labels[:, : ids.shape[1] * 3 // 4] = IGNORED
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def seconds(self, number: int) -> float:
        began = time.perf_counter()
        assert self.controller is not None
        self.controller.set(sample(self.controller.space, 0, number))
        inputs = pack(self.batch)
        labels = inputs.pop("labels")
        self.loss(self.model(**inputs), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def sweep(name: str, repeats: int) -> dict[int, float]:
    """Median seconds of a step for each value of the setting ``name``."""
    steps = {value: Step(BASE | {name: value}) for value in SWEEPS[name]}
    found: dict[int, list[float]] = {value: [] for value in steps}
    chance = random.Random(0)
    for number in range(-1, repeats):
        for value in chance.sample(list(steps), len(steps)):
            seconds = steps[value].seconds(number + 1)
            if number >= 0:
                found[value].append(seconds)
    return {value: statistics.median(each) for value, each in found.items()}


def plot(results: dict[str, dict[int, float]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.2), layout="constrained")
    for axes, (name, values) in zip(
        figure.subplots(1, len(results), sharey=True), results.items(), strict=True
    ):
        axes.plot(list(values), [1000 * seconds for seconds in values.values()], marker="o")
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ms a step")
    figure.axes[0].set_ylim(0, 1.05 * 1000 * max(max(values.values()) for values in results.values()))
    figure.savefig(file, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rate = sgemm()
    results = {name: sweep(name, arguments.repeats) for name in SWEEPS}
    with open(arguments.output / "scaling.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["setting", "value", "seconds"])
        for name, values in results.items():
            writer.writerows([name, value, f"{seconds:.4f}"] for value, seconds in values.items())
    plot(results, arguments.output / "scaling.png")
    print(f"{describe()}; otherwise {BASE}; sgemm {rate:.0f} and {sgemm():.0f} GFLOP/s")
    for name, values in results.items():
        print(f"{name}: {', '.join(f'{value}: {1000 * each:.0f} ms' for value, each in values.items())}")


if __name__ == "__main__":
    main()
