"""The bodies of extraction and merge, in both spellings of the version's name, and their answer."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from comps.finetuning.schemas.jobs import Name
from comps.finetuning.schemas.tolerant import Integer, Tolerant, request_warnings
from comps.finetuning.store.tables import JobRow
from comps.tuning.sparse.report import filled_zeros

# Names that the output directory of a job has other uses for, whatever their case.
_RESERVED = re.compile(
    r"checkpoint.*|merged_model|events.*|runs|logs?|scratch|output|result|spec|tokenizer.*|adapter_.*"
    r"|.*\.(json|jsonl|safetensors|txt|md|model|bin|pt|tmp|old|csv|png)",
    re.IGNORECASE,
)


def _not_reserved(name: str) -> str:
    if _RESERVED.fullmatch(name):
        raise ValueError("this name is reserved; choose another one")
    return name


Version = Annotated[Name, AfterValidator(_not_reserved)]


class SourceRequest(Tolerant):
    """What is to be done with a job's adapter, or with a registered super-adapter.

    ``model`` is the id of the latter. It is only looked at without a ``fine_tuning_job_id``, since a job
    object, passed on as it is, has its base model there.
    """

    fine_tuning_job_id: str | None = Field(None, max_length=200)
    model: str | None = Field(None, max_length=1000)


class AdapterRequest(SourceRequest):
    """What extraction and merge have: the version, and whether the answer waits for the end of the work."""

    adapter_version: Version | None = None
    sub_adapter_version: Version | None = Field(None, description="Another name of `adapter_version`")
    wait: bool = Field(True, description="False: answer at once, with the state of the work")


class ExtractRequest(AdapterRequest):
    """Cut a sub-adapter out of a super-adapter."""

    # Without fail_fast a long list of nonsense is a hundred thousand errors.
    custom_config: Annotated[list[Integer], Field(max_length=100_000, fail_fast=True)] | None = Field(
        None, description="One rank for each group and layer: index = group * layers + layer"
    )
    search_id: str | None = Field(
        None, max_length=200, description="The search that found `best` or `pareto-<k>`; absent: the newest"
    )
    form: Literal["pattern", "uniform"] = Field(
        "pattern",
        description="Per-module ranks, or all of them padded with zeros to the super-adapter's rank",
    )


class MergeRequest(AdapterRequest):
    """Merge an adapter into its base model; without a version, the adapter as it was trained."""

    openvino: bool = Field(
        False, description="Of a quantization_aware job: write the INT4 model as an OpenVINO model, too"
    )


class AdapterAnswer(BaseModel):
    """The work's state and, once it succeeded, its result (``path`` and what else there is to say)."""

    model_config = ConfigDict(extra="allow")

    fine_tuning_job_id: str | None
    id: str
    object: Literal["fine_tuning.extract", "fine_tuning.merge"]
    created_at: int
    status: str
    model: str | None
    adapter_version: str | None
    path: str
    fine_tuned_model: str | None
    warnings: list[str]

    @classmethod
    def of(cls, job: JobRow, request: AdapterRequest) -> AdapterAnswer:
        """The answer to ``request`` in the present state of its run."""
        from_job = (job.source or "").startswith("ft-job-")
        known = {
            "fine_tuning_job_id": job.source if from_job else None,
            "id": job.id,
            "object": f"fine_tuning.{job.kind}",
            "created_at": int(job.created_at),
            "status": job.status,
            "model": None if from_job else job.source,
            "adapter_version": job.version,
            "path": job.spec["output"],
            "fine_tuned_model": job.fine_tuned_model,
            "warnings": [*request_warnings(request), *filled_zeros(job.result or {})],
        }
        result = {
            key: value for key, value in (job.result or {}).items() if key not in ("outcome", "version")
        }
        return cls.model_validate(known | {k: v for k, v in result.items() if k not in known})
