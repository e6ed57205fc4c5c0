"""Stock libraries on the rows that we train on: transformers' Trainer and TRL's, with PEFT's LoRA."""

from __future__ import annotations

import time
from typing import Any

import datasets
import peft
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from comps.tuning.data.collate import Collator
from comps.tuning.data.dataset import TokenRows
from comps.tuning.spec import TrainSpec

Mark = tuple[float, int, float]  # the time, real tokens so far, and the loss after a step


class Clock(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.marks: list[Mark] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.marks.append((time.time(), state.num_input_tokens_seen, logs["loss"]))


def stock(spec: TrainSpec, rows: TokenRows, tokenizer: Any, variant: str) -> tuple[list[Mark], Any]:
    """One epoch over ``rows``; what happened, and the trained model."""
    torch.set_num_threads(spec.resources.cpus or 1)
    model = AutoModelForCausalLM.from_pretrained(spec.base_model.path, dtype=torch.float32)
    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules=list(spec.lora.target_modules or ()), task_type="CAUSAL_LM"
    )
    clock = Clock()
    common = {
        "output_dir": str(spec.directory), "learning_rate": 1e-4, "num_train_epochs": 1, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    if variant == "trl_packing":
        from trl import SFTConfig, SFTTrainer

        # Rows of 256 tokens, four to a step, as many as 18 of ours. (Its other way of packing, by best fit,
        # asks for attention kernels that CPUs lack.)
        trainer: Any = SFTTrainer(
            model=model,
            args=SFTConfig(
                **common, per_device_train_batch_size=4, max_length=spec.data.max_length, packing=True,
                packing_strategy="wrapped", bf16=False, gradient_checkpointing=False,
                include_num_input_tokens_seen="all",
            ),
            train_dataset=datasets.Dataset.from_dict({"input_ids": [row["input_ids"] for row in rows]}),
            processing_class=tokenizer,
            peft_config=config,
            callbacks=[clock],
        )  # fmt: skip
    else:
        grouped = variant == "stock_grouped"
        padded_to = spec.data.max_length if variant == "stock_padded" else None
        trainer = Trainer(
            model=peft.get_peft_model(model, config),
            args=TrainingArguments(
                **common, per_device_train_batch_size=16, remove_unused_columns=False,
                include_num_input_tokens_seen="non_padding", activation_checkpointing=not grouped,
                train_sampling_strategy="group_by_length" if grouped else "random",
            ),
            train_dataset=rows,
            data_collator=Collator(tokenizer.pad_token_id, length=padded_to),
            callbacks=[clock],
        )  # fmt: skip
    trainer.train()
    return clock.marks, trainer.model
