"""``General``: what is trained, on which model, and what is kept of the run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from comps.finetuning.schemas.integrations import for_environment
from comps.finetuning.schemas.lora import LoraConfig
from comps.finetuning.schemas.tolerant import Count, Tolerant, unused


def _no_remote_code(value: object) -> object:
    if value not in (False, "false"):
        raise ValueError(
            "only the operator can allow the code that comes with a model "
            "(FINETUNING_TRUST_REMOTE_CODE_MODELS); leave this out or set it to false"
        )
    return False


def _token(value: SecretStr) -> SecretStr:
    for_environment(value.get_secret_value())
    return value


class HubConfig(Tolerant):
    """How the base model is loaded. The token is kept encrypted, for this job alone."""

    token: Annotated[SecretStr, Field(max_length=500), AfterValidator(_token)] | None = None
    trust_remote_code: Annotated[Literal[False], BeforeValidator(_no_remote_code)] = False


class GeneralBlock(Tolerant):
    """OPEA's block of the same name."""

    base_model: str | None = Field(None, description="The base model; `model` overrides it")
    task: Literal["instruction_tuning", "pretraining"] = "instruction_tuning"
    lora_config: LoraConfig | None = LoraConfig()
    config: HubConfig = HubConfig()
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    resume_from_checkpoint: str | None = Field(
        None, max_length=4096, description="A checkpoint's id, or its `fine_tuned_model_checkpoint`"
    )
    save_strategy: Literal["no", "epoch", "steps"] = "steps"
    save_steps: Count | None = Field(None, description="Steps between checkpoints; absent: a tenth")
    save_total_limit: Count | None = Field(None, description="Checkpoints to keep; absent: all")
    enable_gradient_checkpointing: bool = False

    output_dir: str | None = Field(None, description="Ignored; the job's `output_dir` says where it is")
    tokenizer_name: Any = unused(because="the base model's own tokenizer is used")
    gaudi_config_name: Any = unused(because="there is no Gaudi support")
    gpt_base_model: Any = unused(False, because="prompts do not depend on it")
    xtune_config: Any = unused(because="Xtune is another component")
