"""The model object of the OpenAI models API, and what registers one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field

from comps.finetuning.catalog import MAX_NAME, check_name
from comps.finetuning.schemas.tolerant import Tolerant
from comps.finetuning.store.tables import ModelRow

RESERVED = ("ft-job-", "ft:", "file-")  # ids that the service itself gives


def free_name(value: str, param: str = "id") -> str:
    """A name that a client may give to a model. Raises :class:`ValueError` or :class:`InvalidRequest`
    for others."""
    if value.startswith(RESERVED):
        raise ValueError(f"the service itself gives ids that begin with {', '.join(RESERVED)}")
    return check_name(value, param)


class ModelObject(BaseModel):
    """One model that requests can name: OpenAI's fields, then ours. ``path`` is on the server.

    ``sparsity`` is of a base or merged model (``comps.tuning.sparse.report``); lists have it only of those
    that were pruned here, and without the layers.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    kind: str
    base_model: str | None = None
    path: str
    job_id: str | None = None
    details: dict[str, Any] = Field(default_factory=dict)
    sparsity: dict[str, Any] | None = None
    warnings: list[str] = Field(default_factory=list)

    @classmethod
    def of(cls, row: ModelRow, warnings: list[str] | None = None) -> ModelObject:
        made_with = row.kind == "base" and row.details.get("sparsity")
        return cls(
            id=row.id,
            created=int(row.created_at),
            owned_by=row.owner or "local",
            kind=row.kind,
            base_model=row.base_model,
            path=row.path,
            job_id=row.job_id,
            details={k: v for k, v in row.details.items() if not (made_with and k == "sparsity")},
            sparsity=made_with or None,
            warnings=warnings or [],
        )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class ModelDeleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: bool = True


class RegisterModel(Tolerant):
    """A directory under the models root that shall have a name. ``path`` is relative to that root."""

    id: Annotated[str, AfterValidator(free_name), Field(min_length=1, max_length=MAX_NAME)]
    path: str = Field(min_length=1, max_length=1000)
    base_model: str | None = None
