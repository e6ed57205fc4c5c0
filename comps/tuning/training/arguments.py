"""A run's spec in the words of transformers' Trainer."""

from __future__ import annotations

import math
from pathlib import Path

from transformers import TrainingArguments

from comps.tuning.spec import TrainSpec

# A run saves (and validates) this many times unless it is told otherwise.
SAVES = 10


def total_steps(spec: TrainSpec, rows: int) -> int:
    """Optimizer steps of the whole run over ``rows`` training rows, as the Trainer counts them."""
    training, workers = spec.training, spec.resources.num_workers
    if training.max_train_steps:
        return training.max_train_steps
    full, rest = divmod(rows, training.batch_size * workers)
    micro_batches = full + (rest >= workers)
    per_epoch = max(1, math.ceil(micro_batches / training.gradient_accumulation_steps))
    return math.ceil(training.epochs * per_epoch)


def save_interval(spec: TrainSpec, rows: int) -> int:
    """Steps between two checkpoints under the strategy ``steps``."""
    return spec.training.save_steps or max(1, round(total_steps(spec, rows) / SAVES))


def training_arguments(spec: TrainSpec, scratch: Path, rows: int, validate: bool) -> TrainingArguments:
    """The Trainer's arguments. ``scratch`` takes what it saves; ``rows`` is the number of training rows;
    ``validate`` says whether there is a validation set, which is then measured before each checkpoint.
    """
    training = spec.training
    interval = save_interval(spec, rows)
    # Without checkpoints the validation loss is still worth knowing on the way.
    measured = "steps" if training.save_strategy == "no" else training.save_strategy
    distributed = spec.resources.num_workers > 1
    return TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=training.epochs,
        max_steps=training.max_train_steps or -1,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=max(8, training.batch_size),
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        # The same arithmetic, in one call for all tensors.
        optim="adamw_torch_fused" if training.optimizer == "adamw_torch" else training.optimizer,
        logging_steps=training.logging_steps,
        logging_first_step=True,
        # A diverging run must show its NaN, not the average of the losses before.
        logging_nan_inf_filter=False,
        save_strategy=training.save_strategy,
        save_steps=interval,
        eval_strategy=measured if validate else "no",
        eval_steps=interval,
        activation_checkpointing=training.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        bf16=training.mixed_precision == "bf16" and spec.resources.device != "cpu",  # there see precision
        fp16=training.mixed_precision == "fp16",
        use_cpu=spec.resources.device == "cpu",
        ddp_backend="gloo" if distributed and spec.resources.device == "cpu" else None,
        ddp_find_unused_parameters=False,
        include_num_input_tokens_seen="non_padding",
        report_to="none",  # see trackers
        run_name=spec.job_id,
        seed=training.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
