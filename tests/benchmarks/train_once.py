"""One training run in a process of its own; prints one line of JSON. Called by ``training.py``.

Variants: ``nls`` and ``lora`` are ours, ``nls_all`` with its loss on every token, ``nls_bf16`` with products
in bfloat16. ``stock`` is transformers' Trainer with PEFT's LoRA as the original stack runs it: dynamic
padding, random batches, gradient checkpointing, loss on every token. ``stock_grouped`` is the best of stock:
batches by length, no checkpointing, loss on the answers. All train on the same rows, once.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
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
EVERY_TOKEN = ("stock", "nls_all")


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


def first_rows(data: Path, count: int, directory: Path) -> Path:
    """A file of the first ``count`` records in ``data``."""
    records = json.loads(data.read_text())[:count]
    if len(records) < count:
        raise SystemExit(f"{data} has {len(records)} records only; {count} are needed")
    file = directory / "rows.json"
    file.write_text(json.dumps(records))
    return file


def ours(spec: TrainSpec) -> list[tuple[float, int, float]]:
    """(time, tokens so far, loss) after each step."""
    from comps.tuning.training.loop import train

    train(spec)
    lines = (spec.directory / rundir.EVENTS).read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [
        (event["created_at"], event["data"]["trained_tokens"], event["data"]["train_loss"])
        for event in events
        if event["type"] == "metrics"
    ]


def stock(spec: TrainSpec, grouped: bool) -> list[tuple[float, int, float]]:
    """The same rows through transformers and PEFT alone."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from comps.tuning.data.collate import Collator
    from comps.tuning.data.dataset import build_datasets
    from comps.tuning.models.load import load_tokenizer

    torch.set_num_threads(spec.resources.cpus or 1)
    tokenizer = load_tokenizer(spec.base_model)
    rows = build_datasets(spec.data, spec.task, tokenizer, 42).train
    model = AutoModelForCausalLM.from_pretrained(spec.base_model.path, dtype=torch.float32)
    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules=list(spec.lora.target_modules or ()), task_type="CAUSAL_LM"
    )
    marks: list[tuple[float, int, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                marks.append((time.time(), state.num_input_tokens_seen, logs["loss"]))

    trainer = Trainer(
        model=peft.get_peft_model(model, config),
        args=TrainingArguments(
            output_dir=str(spec.directory), per_device_train_batch_size=16, learning_rate=1e-4,
            num_train_epochs=1, logging_steps=1, save_strategy="no", report_to="none",
            use_cpu=True, disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
            include_num_input_tokens_seen="non_padding",
            activation_checkpointing=not grouped,
            train_sampling_strategy="group_by_length" if grouped else "random",
        ),
        train_dataset=rows,
        data_collator=Collator(tokenizer.pad_token_id),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return marks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=["nls", "nls_all", "nls_bf16", "lora", "stock", "stock_grouped"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        arguments.data = first_rows(arguments.data, ROWS * arguments.steps, Path(directory))
        run = spec(arguments, Path(directory) / "run")
        if arguments.variant.startswith("stock"):
            marks = stock(run, grouped=arguments.variant == "stock_grouped")
        else:
            marks = ours(run)
    seconds = marks[-1][0] - marks[WARM_UP - 1][0]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "samples_per_second": ROWS * (len(marks) - WARM_UP) / seconds,
        "tokens_per_second": (marks[-1][1] - marks[WARM_UP - 1][1]) / seconds,
        "peak_gb": usage.ru_maxrss / 2**20,
        "loss": sum(mark[2] for mark in marks) / len(marks),
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }
    json.dump(result, sys.stdout)
    print()


if __name__ == "__main__":
    main()
