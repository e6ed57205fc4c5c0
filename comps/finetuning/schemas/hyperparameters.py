"""OpenAI's hyperparameters and method.

``n_epochs`` and ``batch_size`` override ``Training``; ``learning_rate_multiplier`` multiplies the default
learning rate. ``"auto"`` leaves the value to ``Training``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from comps.finetuning.schemas.tolerant import Count, Number, Tolerant, unused


def _auto(value: object) -> object:
    return None if value == "auto" else value


def _auto_or(kind: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": kind}]})


class Hyperparameters(Tolerant):
    """Each ``"auto"`` (None here) or a number."""

    n_epochs: Annotated[
        Annotated[Number, Field(gt=0, le=10_000)] | None, BeforeValidator(_auto), _auto_or("number")
    ] = None
    batch_size: Annotated[
        Annotated[Count, Field(le=65_536)] | None, BeforeValidator(_auto), _auto_or("integer")
    ] = None
    learning_rate_multiplier: Annotated[
        Annotated[Number, Field(gt=0, le=1e6)] | None, BeforeValidator(_auto), _auto_or("number")
    ] = None


class Supervised(Tolerant):
    hyperparameters: Hyperparameters | None = None


class Method(Tolerant):
    """Only ``supervised`` is there; the other methods of OpenAI are refused."""

    type: Literal["supervised"] = "supervised"
    supervised: Supervised | None = None
    dpo: Any = unused(because="the method is supervised")
    reinforcement: Any = unused(because="the method is supervised")
