"""OpenAI's hyperparameters and method.

``n_epochs`` and ``batch_size`` override ``Training``; ``learning_rate_multiplier`` multiplies the default
learning rate. ``"auto"`` leaves the value to ``Training``; where that gives none either, the run chooses the
batch size and the learning rate by the rules of ``comps.tuning.training.auto``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from comps.finetuning.schemas.tolerant import Auto, Number, Tolerant, or_auto, unused
from comps.finetuning.schemas.training import BatchSize

_Epochs = Annotated[Number, Field(gt=0, le=10_000)]
_Multiplier = Annotated[Number, Field(gt=0, le=1e6)]


class Hyperparameters(Tolerant):
    """Each ``"auto"`` or a number."""

    n_epochs: Annotated[_Epochs | Auto, or_auto(_Epochs)] | None = None
    batch_size: Annotated[BatchSize | Auto, or_auto(BatchSize)] | None = None
    learning_rate_multiplier: Annotated[_Multiplier | Auto, or_auto(_Multiplier)] | None = None


class Supervised(Tolerant):
    hyperparameters: Hyperparameters | None = None


class Method(Tolerant):
    """Only ``supervised`` is there; the other methods of OpenAI are refused."""

    type: Literal["supervised"] = "supervised"
    supervised: Supervised | None = None
    dpo: Any = unused(because="the method is supervised")
    reinforcement: Any = unused(because="the method is supervised")
