"""OpenAI's three hyperparameters over OPEA's ``Training`` block: what is in effect, and what is answered.

A number in ``hyperparameters`` comes first, then what ``Training`` says, then "auto" in ``hyperparameters``,
then the default. There is no rule for epochs: their "auto" is the default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comps.cores.errors import InvalidRequest
from comps.finetuning.schemas.hyperparameters import Hyperparameters
from comps.finetuning.schemas.jobs import JobRequest
from comps.finetuning.schemas.tolerant import Auto
from comps.finetuning.schemas.training import DEFAULT_LEARNING_RATE

_TRAINING_FIELDS = {
    "n_epochs": "epochs",
    "batch_size": "batch_size",
    "learning_rate_multiplier": "learning_rate",
}


@dataclass(frozen=True)
class Effective:
    """The values that the run uses; "auto" is left to it."""

    epochs: float
    batch_size: int | Auto
    learning_rate: float | Auto

    def answer(self) -> dict[str, Any]:
        """As OpenAI's ``hyperparameters``: whole epochs as an integer, the rate relative to the default."""
        rate = self.learning_rate
        multiplier = rate if rate == "auto" else float(f"{rate / DEFAULT_LEARNING_RATE:.12g}")
        return {
            "n_epochs": int(self.epochs) if self.epochs == int(self.epochs) else self.epochs,
            "batch_size": self.batch_size,
            "learning_rate_multiplier": multiplier,
        }

    def spec_fields(self) -> dict[str, Any]:
        """As fields of :class:`OptimizationSpec`."""
        fields = vars(self)
        auto = [name for name, value in fields.items() if value == "auto"]
        return {name: value for name, value in fields.items() if name not in auto} | {"auto": auto}


def effective(request: JobRequest) -> tuple[Effective, list[str]]:
    """The values in effect, and a warning for each of ``Training`` that was overridden.

    Raises :class:`InvalidRequest` when ``hyperparameters`` and ``method`` contradict each other.
    """
    supervised = request.method.supervised if request.method else None
    nested = (supervised.hyperparameters if supervised else None) or Hyperparameters()
    plain = request.hyperparameters or Hyperparameters()
    chosen: dict[str, Any] = {}
    warnings = []
    training = request.Training
    for name, field in _TRAINING_FIELDS.items():
        given = [value for block in (plain, nested) if (value := getattr(block, name)) is not None]
        numbers = [value for value in given if value != "auto"]
        if len(set(numbers)) > 1:
            outer, inner = numbers
            raise InvalidRequest(
                f"hyperparameters.{name} is {outer:g}, but method.supervised.hyperparameters.{name} "
                f"is {inner:g}; give one of them.",
                param=f"hyperparameters.{name}",
            )
        said = field in training.model_fields_set
        if not numbers:
            rule = given and not said and field != "epochs"
            chosen[field] = "auto" if rule else getattr(training, field)
            continue
        chosen[field] = numbers[0] * DEFAULT_LEARNING_RATE if field == "learning_rate" else numbers[0]
        if said and getattr(training, field) != chosen[field]:
            warnings.append(f"Training.{field} is overridden by hyperparameters.{name}.")
    return Effective(**chosen), warnings
