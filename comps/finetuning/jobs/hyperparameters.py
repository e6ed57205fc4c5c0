"""OpenAI's three hyperparameters over OPEA's ``Training`` block: what is in effect, and what is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comps.cores.errors import InvalidRequest
from comps.finetuning.schemas.hyperparameters import Hyperparameters
from comps.finetuning.schemas.jobs import JobRequest
from comps.finetuning.schemas.training import DEFAULT_LEARNING_RATE

_TRAINING_FIELDS = {
    "n_epochs": "epochs",
    "batch_size": "batch_size",
    "learning_rate_multiplier": "learning_rate",
}


@dataclass(frozen=True)
class Effective:
    """The values that the run uses."""

    epochs: float
    batch_size: int
    learning_rate: float

    def answer(self) -> dict[str, Any]:
        """As OpenAI's ``hyperparameters``: whole epochs as an integer, the rate relative to the default."""
        return {
            "n_epochs": int(self.epochs) if self.epochs == int(self.epochs) else self.epochs,
            "batch_size": self.batch_size,
            "learning_rate_multiplier": float(f"{self.learning_rate / DEFAULT_LEARNING_RATE:.12g}"),
        }


def effective(request: JobRequest) -> tuple[Effective, list[str]]:
    """The values in effect, and a warning for each of ``Training`` that was overridden.

    Raises :class:`InvalidRequest` when ``hyperparameters`` and ``method`` contradict each other.
    """
    supervised = request.method.supervised if request.method else None
    nested = (supervised.hyperparameters if supervised else None) or Hyperparameters()
    plain = request.hyperparameters or Hyperparameters()
    chosen: dict[str, float | int] = {}
    warnings = []
    training = request.Training
    for name, field in _TRAINING_FIELDS.items():
        inner, outer = getattr(nested, name), getattr(plain, name)
        if inner is not None and outer is not None and inner != outer:
            raise InvalidRequest(
                f"hyperparameters.{name} is {outer:g}, but method.supervised.hyperparameters.{name} "
                f"is {inner:g}; give one of them.",
                param=f"hyperparameters.{name}",
            )
        value = inner if inner is not None else outer
        if value is None:
            chosen[field] = getattr(training, field)
            continue
        chosen[field] = value * DEFAULT_LEARNING_RATE if field == "learning_rate" else value
        if field in training.model_fields_set and getattr(training, field) != chosen[field]:
            warnings.append(f"Training.{field} is overridden by hyperparameters.{name}.")
    return Effective(chosen["epochs"], int(chosen["batch_size"]), chosen["learning_rate"]), warnings
