"""Requests for a new base model made of another one, and their answer."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from comps.finetuning.catalog import MAX_NAME
from comps.finetuning.schemas.lora import GroupSize
from comps.finetuning.schemas.models import free_name
from comps.finetuning.schemas.tolerant import Count, Integer, Number, Tolerant
from comps.finetuning.schemas.training import Seed, WorkerResources
from comps.finetuning.store.tables import JobRow
from comps.tuning.spec import Pattern

NewName = Annotated[
    str, AfterValidator(partial(free_name, param="name")), Field(min_length=1, max_length=MAX_NAME)
]


class NewBaseRequest(Tolerant):
    """What all have: the parent, what to calibrate on, and whether the answer waits for the work's end."""

    model: str = Field(
        min_length=1, description="A base model: `org/name`, or the id of a base or merged one"
    )
    name: NewName | None = Field(None, description="The new model's id; absent: made of the parent's")
    calibration_file: str | None = Field(
        None,
        min_length=1,
        max_length=1024,
        description="An uploaded file's id, or its name (the newest of it)",
    )
    calibration_samples: Annotated[Count, Field(le=65_536)] = Field(
        128, description="Records drawn from the calibration file"
    )
    max_length: Annotated[Integer, Field(ge=2)] = Field(512, description="Most tokens of a record")
    seed: Seed = 42
    resources_per_worker: WorkerResources = WorkerResources()
    priority: int = Field(0, ge=-100, le=100, description="Jobs of higher priority begin first")
    wait: bool = Field(True, description="False: answer at once, with the state of the work")


class PruneRequest(NewBaseRequest):
    """Make a sparse model of a base model. Exactly one of ``sparsity`` and ``pattern`` is given."""

    method: Literal["wanda", "magnitude"] = "wanda"
    sparsity: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None, description="The part of each output row's weights that become zero"
    )
    pattern: Pattern | None = Field(None, description="N:M: of M consecutive inputs N weights stay")


class QuantizeRequest(NewBaseRequest):
    """Make an INT4 model of a base model."""

    method: Literal["nearest", "gptq"] = Field(
        "nearest",
        description="Round each weight, or have others make up for its error on the calibration file",
    )
    mode: Literal["int4_asym", "int4_sym"] = Field(
        "int4_asym", description="With a zero point for each group of inputs, or symmetric about 0"
    )
    group_size: GroupSize = Field(64, description="Inputs that share a scale: 32, 64 or 128")
    embeddings: Literal["int8", "as_is"] = Field(
        "int8", description="Embeddings and output head: 8 bits, or as they are stored"
    )
    openvino: bool = Field(False, description="Write it as an OpenVINO model, too")


class NewBaseAnswer(BaseModel):
    """The work's state and, once it succeeded, what it gave. ``model`` is the parent, ``fine_tuned_model``
    the new base model."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: str
    created_at: int
    status: str
    model: str
    fine_tuned_model: str | None
    path: str
    warnings: list[str]

    @classmethod
    def of(cls, job: JobRow) -> NewBaseAnswer:
        """The answer in the present state of the run."""
        known = {
            "id": job.id,
            "object": f"sqft.{job.kind}",
            "created_at": int(job.created_at),
            "status": job.status,
            "model": job.model,
            "fine_tuned_model": job.fine_tuned_model,
            "path": job.spec["output"],
            "warnings": job.warnings,
        }
        unsaid = (*known, "outcome", "name", "base_model")
        result = {key: value for key, value in (job.result or {}).items() if key not in unsaid}
        return cls.model_validate(known | result)
