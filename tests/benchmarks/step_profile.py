"""Where the time of a fused training step goes, by operator, with one thread and with two.

``python -m tests.benchmarks.step_profile --model DIR --data FILE``: the same eight batches of 16 rows, first
without the profiler, by turns, then with it. Seconds are those that an operator spent in itself. Beside them
what the arithmetic would take at the rate of sgemm in the same run, and what the same steps take of a model
36 wide, in which there is little to compute: that is dispatch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from comps.tuning.data.batching import LengthGroupedSampler
from comps.tuning.data.collate import Collator
from comps.tuning.data.dataset import build_datasets
from comps.tuning.models.load import load_tokenizer
from comps.tuning.training.packing import pack
from tests.benchmarks.machine import Load, describe, layer_sgemm
from tests.benchmarks.pairs import ROWS, SEED, Side
from tests.benchmarks.train_once import spec

BATCHES = 8
KINDS = {  # operators by what they are for
    "products with frozen weights, adapters' A": ("mm", "addmm"),
    "adapters' B": ("addmm_",),
    "attention's products": ("bmm", "baddbmm"),
    "attention's softmax": ("_softmax", "_softmax_backward_data"),
    "activation, norms, rotary positions, sums": (
        "mul", "mul_", "silu", "silu_backward", "add_", "addcmul_", "linalg_vector_norm", "sum", "pow",
        "rsqrt_", "exp_", "sub_", "div_", "linalg_vecdot",
    ),
    "copies (heads apart and together, rows spread)": (
        "copy_", "index_select", "index_copy_", "clone", "fill_", "zero_", "cat",
    ),
}  # fmt: skip


def tiny(model: Path, directory: Path) -> Path:
    """A model of as many layers, heads and kinds of operations, in which there is little to compute."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(model)
    width = 4 * config.num_attention_heads
    config.update({"hidden_size": width, "head_dim": 4, "intermediate_size": width})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    return directory


def run(side: Side, batches: list[dict[str, torch.Tensor]]) -> float:
    """Seconds of all of them."""
    side.seconds.clear()
    for number, batch in enumerate(batches):
        side.step(batch, number)
    return sum(side.seconds)


def by_kind(found: Any) -> dict[str, float]:
    """Seconds of each kind, and of the rest."""
    seconds = {each.key.removeprefix("aten::"): each.self_cpu_time_total / 1e6 for each in found}
    kinds = {name: sum(seconds.pop(key, 0.0) for key in keys) for name, keys in KINDS.items()}
    return kinds | {"the rest: dispatch, Python, views, optimizer": sum(seconds.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="instruction records, Alpaca's fields")
    arguments = parser.parse_args()
    arguments.variant, arguments.threads = "nls", 2
    side = Side(arguments, "nls", "fused")
    settings = spec(arguments, Path(tempfile.gettempdir()))
    tokenizer = load_tokenizer(settings.base_model)
    rows = build_datasets(settings.data, settings.task, tokenizer, SEED).train
    order, collate = LengthGroupedSampler(rows.lengths, ROWS, SEED).rows(), Collator(tokenizer.pad_token_id)
    parts = [order[start : start + ROWS] for start in range(0, BATCHES * ROWS, ROWS)]
    batches = [collate([rows[row] for row in part]) for part in parts]
    packed = [pack(dict(batch)) for batch in batches]
    tokens = sum(each["input_ids"].shape[1] for each in packed)
    predicting = sum(len(each["logits_to_keep"]) for each in packed)
    base = side.model.get_base_model()
    head = base.get_output_embeddings().weight.numel()
    weights = sum(
        each.weight.numel() for name, each in base.named_modules()
        if type(each) is torch.nn.Linear and ".lora_" not in name and "lm_head" not in name
    )  # fmt: skip
    gflop = 4e-9 * (weights * tokens + head * predicting)
    with tempfile.TemporaryDirectory() as directory:
        arguments.model = tiny(arguments.model, Path(directory))
        small = Side(arguments, "nls", "fused")
    load, began = Load(), time.process_time()
    plain: dict[int, list[float]] = {1: [], 2: []}
    nothing: dict[int, list[float]] = {1: [], 2: []}
    rates: dict[int, list[float]] = {1: [], 2: []}
    for threads in (2, 1, 2, 1):
        torch.set_num_threads(threads)
        rates[threads].append(layer_sgemm())
        for each, times in ((side, plain), (small, nothing)):
            run(each, batches[:2])
            times[threads].append(run(each, batches))
    kinds = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            run(side, batches)
        kinds[threads] = by_kind(profiled.key_averages())
    print(f"{describe()}; {BATCHES} steps of {ROWS} rows, {tokens} tokens, {gflop:.0f} GFLOP")
    print(f"cores used by others {load.others(time.process_time() - began):.2f}\n")
    print("| | one thread, s | two, s | ratio |\n|---|---|---|---|")
    rows_ = {
        "all, without the profiler": {n: min(times) for n, times in plain.items()},
        "that arithmetic at the rate of sgemm": {n: gflop / max(each) for n, each in rates.items()},
        "the same steps of a model 36 wide": {n: min(times) for n, times in nothing.items()},
        **{name: {n: kinds[n][name] for n in (1, 2)} for name in kinds[1]},
    }
    for name, seconds in rows_.items():
        print(f"| {name} | {seconds[1]:.2f} | {seconds[2]:.2f} | {seconds[1] / seconds[2]:.2f} |")
    print(f"\nsgemm {max(rates[1]):.0f} and {max(rates[2]):.0f} GFLOP/s")


if __name__ == "__main__":
    main()
