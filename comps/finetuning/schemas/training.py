"""``Training``: the optimisation, and what it may use of the cluster."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from comps.finetuning.schemas.tolerant import (
    OTHER_TASK,
    Auto,
    Count,
    Integer,
    Number,
    Tolerant,
    no_boolean,
    or_auto,
    unused,
)
from comps.tuning.spec import Optimizer, Scheduler

MAX_SEED = 2**32 - 1  # what NumPy's generator takes
DEFAULT_LEARNING_RATE = 5e-5


def _device(value: object) -> object:
    lower = value.lower() if isinstance(value, str) else value
    return "cuda" if lower == "gpu" else lower


Device = Annotated[Literal["cpu", "cuda"], BeforeValidator(_device)]
BatchSize = Annotated[Count, Field(le=65_536)]
LearningRate = Annotated[Number, Field(gt=0)]
Seed = Annotated[int, BeforeValidator(no_boolean), Field(ge=0, le=MAX_SEED)]


class WorkerResources(Tolerant):
    """What each worker gets; an absent ``CPU`` is all the cores of the node it runs on."""

    CPU: Count | None = None
    GPU: Annotated[Number, Field(ge=0)] | None = None
    HPU: Any = unused(0, because="there is no support for HPUs")


class TrainingBlock(Tolerant):
    """OPEA's block of the same name."""

    epochs: Annotated[Number, Field(gt=0, le=10_000)] = 1
    batch_size: Annotated[BatchSize | Auto, or_auto(BatchSize)] = Field(
        2, description="Rows per worker and micro-batch; auto: from the number of rows and their length"
    )
    gradient_accumulation_steps: Annotated[Count, Field(le=65_536)] = 1
    max_train_steps: Count | None = None
    learning_rate: Annotated[LearningRate | Auto, or_auto(LearningRate)] = Field(
        DEFAULT_LEARNING_RATE, description="auto: from the width of the base model"
    )
    lr_scheduler: Scheduler = "linear"
    warmup_steps: Annotated[Integer, Field(ge=0)] = 0
    weight_decay: Annotated[Number, Field(ge=0)] = 0
    optimizer: Optimizer = "adamw_torch"
    logging_steps: Count = 10
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: Seed | None = None
    device: Device = "cpu"
    num_training_workers: Annotated[Count, Field(le=4096)] = 1
    resources_per_worker: WorkerResources = WorkerResources()
    accelerate_mode: Literal["DDP"] = "DDP"

    dpo_beta: Any = unused(0.1, because=OTHER_TASK)
    hpu_execution_mode: Any = unused("lazy", because="there is no support for HPUs")
    deepspeed_config_file: Any = unused("", because="DeepSpeed is not supported")
    embedding_training_config: Any = unused(because=OTHER_TASK)
