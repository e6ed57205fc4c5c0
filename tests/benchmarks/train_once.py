"""One training run in a process of its own; prints one line of JSON. Called by ``training.py``.

Variants: ``nls`` and ``lora`` are ours, ``nls_all`` with its loss on every token, ``nls_bf16`` with products
in bfloat16. ``stock`` is transformers' Trainer with PEFT's LoRA as the original stack runs it: dynamic
padding, random batches, gradient checkpointing, loss on every token; ``stock_padded`` pads to ``max_length``
besides. ``stock_grouped`` is the best of stock: batches by length, no checkpointing, loss on the answers.
``trl_packing`` is TRL's SFTTrainer with rows packed and without checkpointing, loss on every token. All train
on the same rows once, and are then asked for the loss of rows that they have not seen.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

from comps.tuning import rundir
from comps.tuning.spec import (
    DataSpec,
    LoraSpec,
    ModelSpec,
    OptimizationSpec,
    RankGroup,
    ResourcesSpec,
    TrainSpec,
)

MODULES = [("q_proj", "k_proj", "v_proj"), ("up_proj",), ("down_proj",)]
WARM_UP = 2  # steps that are not measured
ROWS = 16  # of a step
HELD_OUT = 64  # rows
OURS = ("lora", "nls", "nls_all", "nls_bf16")
PEERS = ("stock_padded", "stock", "stock_grouped", "trl_packing")
EVERY_TOKEN = ("stock_padded", "stock", "trl_packing", "nls_all")


def spec(arguments: argparse.Namespace, directory: Path) -> TrainSpec:
    groups = tuple(RankGroup(modules=names, ranks=(16, 12, 8)) for names in MODULES)
    targets = tuple(name for names in MODULES for name in names)
    return TrainSpec(
        job_id="benchmark",
        directory=directory,
        base_model=ModelSpec(name="SmolLM2-135M-Instruct", path=str(arguments.model)),
        lora=LoraSpec(
            r=16,
            alpha=32,
            dropout=0,
            target_modules=targets,
            groups=groups if arguments.variant.startswith("nls") else (),
        ),
        data=DataSpec(
            train_file=arguments.data,
            max_length=256,
            validation_split_percentage=0,
            mask_input=arguments.variant not in EVERY_TOKEN,
            mask_response=arguments.variant not in EVERY_TOKEN,
        ),
        training=OptimizationSpec(
            batch_size=16,
            learning_rate=1e-4,
            mixed_precision="bf16" if arguments.variant == "nls_bf16" else "no",
            logging_steps=1,
            save_strategy="no",
        ),
        resources=ResourcesSpec(cpus=arguments.threads),
    )


def first_rows(data: Path, count: int, directory: Path, held_out: int = 0) -> Path:
    """A file of the first ``count`` records in ``data``, or of the next ``held_out`` ones."""
    records = json.loads(data.read_text())
    if len(records) < count + held_out:
        raise SystemExit(f"{data} has {len(records)} records only; {count + held_out} are needed")
    file = directory / f"rows_{held_out}.json"
    file.write_text(json.dumps(records[count : count + held_out] if held_out else records[:count]))
    return file


def ours(spec: TrainSpec) -> tuple[list[tuple[float, int, float]], Any]:
    """(time, tokens so far, loss) after each step, and the trained model, as stock PEFT loads it."""
    import peft

    from comps.tuning.models.load import load_base_model
    from comps.tuning.training.loop import train

    train(spec)
    lines = (spec.directory / rundir.EVENTS).read_text().splitlines()
    events = [json.loads(line) for line in lines]
    marks = [
        (event["created_at"], event["data"]["trained_tokens"], event["data"]["train_loss"])
        for event in events
        if event["type"] == "metrics"
    ]
    base = load_base_model(spec.base_model)
    return marks, peft.PeftModel.from_pretrained(base, str(spec.directory / rundir.OUTPUT))


def losses(model: Any, rows: Any, pad: int) -> tuple[float, float]:
    """The mean loss of ``rows``, of a token of the answers and of any token, computed plainly."""
    import torch

    from comps.tuning.data.collate import Collator
    from comps.tuning.data.masking import IGNORED

    model.eval()
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(rows), ROWS):
        batch = Collator(pad)([rows[row] for row in range(start, min(start + ROWS, len(rows)))])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
        each = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        for place, which in ((0, batch["labels"][:, 1:] != IGNORED), (2, mask[:, 1:].bool())):
            sums[place] += each[which.flatten()].sum()
            sums[place + 1] += which.sum()
    return float(sums[0] / sums[1]), float(sums[2] / sums[3])


def flops(model: Any, rows: Any, variant: str, pad: int) -> float:
    """Of a training step, for each row: 4 for each weight of the frozen layers and token (forward, and the
    gradient of what goes in), and as many for the head's where a label is predicted. Padding does not count,
    nor what is computed twice; for ours, tokens and predictions are those of packed batches."""
    import torch

    from comps.tuning.data.batching import LengthGroupedSampler
    from comps.tuning.data.collate import Collator
    from comps.tuning.training.packing import pack

    head = model.get_base_model().get_output_embeddings()
    weights = sum(
        each.weight.numel() for name, each in model.named_modules()
        if type(each) is torch.nn.Linear and each is not head and ".lora_" not in name
    )  # fmt: skip
    if variant in OURS:
        order = LengthGroupedSampler(rows.lengths, ROWS, 42).rows()
        parts = [order[start : start + ROWS] for start in range(0, len(order), ROWS)]
        batches = [pack(Collator(pad)([rows[row] for row in part])) for part in parts]
        tokens = sum(batch["input_ids"].shape[1] for batch in batches)
        labels = sum(len(batch["logits_to_keep"]) for batch in batches)
    else:
        tokens = sum(rows.lengths)
        labels = sum(sum(label >= 0 for label in row["labels"][1:]) for row in rows)
    return float(4 * (weights * tokens + head.weight.numel() * labels)) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=[*PEERS, *OURS])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    from comps.tuning.data.dataset import build_datasets
    from comps.tuning.models.load import load_tokenizer

    with tempfile.TemporaryDirectory() as directory:
        count = ROWS * arguments.steps
        unseen = first_rows(arguments.data, count, Path(directory), HELD_OUT)
        arguments.data = first_rows(arguments.data, count, Path(directory))
        run = spec(arguments, Path(directory) / "run")
        tokenizer = load_tokenizer(run.base_model)
        rows = build_datasets(run.data, run.task, tokenizer, 42).train
        answers = run.data.model_copy(
            update={"train_file": unseen, "mask_input": True, "mask_response": True}
        )
        if arguments.variant in PEERS:
            from tests.benchmarks.peers import stock

            marks, model = stock(run, rows, tokenizer, arguments.variant)
        else:
            marks, model = ours(run)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        held_out = build_datasets(answers, run.task, tokenizer, 42).train
        of_answers, of_all = losses(model, held_out, tokenizer.pad_token_id)
    seconds = marks[-1][0] - marks[WARM_UP - 1][0]
    tokens = (marks[-1][1] - marks[WARM_UP - 1][1]) / seconds
    samples = tokens * len(rows) / sum(rows.lengths)
    result = {
        "samples_per_second": samples,
        "tokens_per_second": tokens,
        "gflops": 1e-9 * samples * flops(model, rows, arguments.variant, tokenizer.pad_token_id),
        "peak_gb": usage.ru_maxrss / 2**20,
        "loss_answers": of_answers,
        "loss_all": of_all,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }
    json.dump(result, sys.stdout)
    print()


if __name__ == "__main__":
    main()
