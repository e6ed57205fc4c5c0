"""OpenAI's ``integrations``: where a run reports to besides its events."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from comps.finetuning.schemas.tolerant import Tolerant


def for_environment(value: str) -> str:
    """``value``, if it can become an environment variable of a job as it is.

    Ray replaces ``$NAME`` and ``${NAME}`` in a job's variables by values of its own environment, so a project
    called ``$WANDB_API_KEY`` would show the operator's key to whoever reads the project's name.
    """
    if "$" in value or not value.isprintable():
        raise ValueError("'$', line ends and other control characters are not allowed here")
    return value


Text = Annotated[str, Field(max_length=200), AfterValidator(for_environment)]
# Tags travel in one variable, separated by commas.
Tag = Annotated[str, Field(max_length=200, pattern="^[^,]+$"), AfterValidator(for_environment)]


class WandbSettings(Tolerant):
    """Where the run goes; the address and the key are the operator's ``WANDB_*`` variables."""

    project: Text
    entity: Text | None = None
    name: Text | None = Field(None, json_schema_extra={"x-unused": "the run is named after the job"})
    tags: list[Tag] | None = Field(None, max_length=50)


class Integration(Tolerant):
    """OpenAI's only integration."""

    type: Literal["wandb"]
    wandb: WandbSettings


def tracking_environment(integrations: list[Any] | None) -> dict[str, str]:
    """The variables by which a run is told what a request's ``integrations`` (as JSON) ask for."""
    found: dict[str, str] = {}
    for integration in integrations or []:
        wandb = WandbSettings.model_validate(integration["wandb"])
        found["WANDB_PROJECT"] = wandb.project
        if wandb.entity:
            found["WANDB_ENTITY"] = wandb.entity
        if wandb.tags:
            found["WANDB_TAGS"] = ",".join(wandb.tags)
    return found
