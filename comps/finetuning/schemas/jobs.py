"""The body of ``POST /v1/fine_tuning/jobs``: OpenAI's fields, and OPEA's three blocks beside them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from comps.finetuning.schemas.dataset import DatasetBlock
from comps.finetuning.schemas.general import GeneralBlock
from comps.finetuning.schemas.hyperparameters import Hyperparameters, Method
from comps.finetuning.schemas.integrations import Integration
from comps.finetuning.schemas.tolerant import Tolerant
from comps.finetuning.schemas.training import Seed, TrainingBlock

_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


def _check_name(value: str) -> str:
    if not re.fullmatch(_NAME, value):
        raise ValueError(
            "a name of at most 64 letters, digits, '.', '_' and '-' was expected, the first of them a letter "
            "or a digit"
        )
    return value


# A suffix or a sub-adapter's version: it becomes part of names and directories.
Name = Annotated[str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": f"^{_NAME}$"})]
MAX_METADATA = 16
MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


def _not_many(value: object) -> object:
    """Before the pairs are looked at, each of which may be an error of its own."""
    if isinstance(value, dict) and len(value) > MAX_METADATA:
        raise ValueError(f"at most {MAX_METADATA} keys are allowed, not {len(value)}")
    return value


Metadata = Annotated[
    dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA), BeforeValidator(_not_many)
]


class JobRequest(Tolerant):
    """See the module. ``General.base_model`` may stand in for ``model``."""

    model: str | None = Field(None, description="A base model: `org/name`, or a registered id")
    training_file: str = Field(
        min_length=1, max_length=1024, description="A file's id, or a stored file's name (the newest of it)"
    )
    validation_file: str | None = Field(None, max_length=1024)
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    suffix: Name | None = None
    seed: Seed | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[Integration], Field(max_length=1)] | None = None
    priority: int = Field(0, ge=-100, le=100, description="Jobs of higher priority begin first")
    time_limit: float | None = Field(
        None, gt=0, le=10 * 365 * 86400, description="Seconds of running after which the job fails"
    )
    retry_limit: int | None = Field(
        None, ge=0, le=1000, description="How often a run is started again that died without a new checkpoint"
    )

    General: GeneralBlock = GeneralBlock()
    Dataset: DatasetBlock = DatasetBlock()
    Training: TrainingBlock = TrainingBlock()


class JobId(Tolerant):
    """The body of OPEA's routes about one job."""

    fine_tuning_job_id: str = Field(min_length=1, max_length=200)
