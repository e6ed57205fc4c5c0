"""``"auto"``: a learning rate and a batch size from what the worker knows, the base model and the data.

Both rules are functions of the run's spec, model and data alone, so that every data-parallel worker and a
resumed run come to the same values.
"""

from __future__ import annotations

from typing import Any

from comps.tuning.errors import TuningError
from comps.tuning.spec import TrainSpec

# The rule was found with Adam; other optimizers' rates are of another size.
_ADAM = ("adamw_torch", "adamw_torch_fused")
# A given rate so many times above or below the rule is warned of.
_ABOVE, _BELOW = 10, 30

_STEP_ROWS, _STEP_TOKENS, _EPOCH_STEPS, _LEAST_ROWS = 32, 2048, 50, 4

Note = tuple[str, str]  # the level of an event, and its message


def learning_rate(model_type: str, hidden_size: int) -> float:
    """The peak learning rate (per optimizer step, Adam) for LoRA on a model that is ``hidden_size`` wide.

    Source: the sweep over models published with Thinking Machines' tinker-cookbook (``hyperparam_utils``),
    made with ``lora_alpha`` 32; there the best rate did not depend on the LoRA rank. It is 5e-5, the rate of
    full fine-tuning, ten times, as LoRA wants it, and a power of the width that models like Qwen hardly
    follow. Models of other makes than these two are taken for Llama's kind.
    """
    power = 0.0775 if model_type.startswith("qwen") else 0.781
    return float(5e-5 * 10 * (2000 / hidden_size) ** power)


def step_rows(rows: int, tokens: int) -> int:
    """Rows of one optimizer step for a training set of ``rows`` rows with ``tokens`` tokens in all.

    A power of two: at most 32, at most 2048 tokens (what a step of short rows needs to keep the cores busy,
    and no more memory than that), and at most a 50th of the rows, for LoRA learns less from few large steps;
    but below 4 rows, where gradients are mostly noise, only for the sake of the tokens.
    """
    most = min(_STEP_ROWS, _STEP_TOKENS * rows // tokens, max(_LEAST_ROWS, rows // _EPOCH_STEPS))
    return 1 << (max(1, most).bit_length() - 1)


def resolve(spec: TrainSpec, config: Any, rows: int, tokens: int) -> tuple[TrainSpec, list[Note]]:
    """``spec`` with numbers for what is auto in it, and what is to be said about them and about the rate.

    ``config`` is the base model's; ``rows`` and ``tokens`` are those of the training set. Raises
    :class:`TuningError` when the rate is auto and the model does not tell its width.
    """
    chosen: dict[str, float | int] = {}
    notes = []
    training, name = spec.training, str(config.model_type)
    width = getattr(config.get_text_config(), "hidden_size", None)
    if "learning_rate" in training.auto:
        if not width:
            raise TuningError(
                'learning_rate is "auto", but the base model does not tell its hidden size; give a number',
                param="Training.learning_rate",
            )
        chosen["learning_rate"] = rate = learning_rate(name, width)
        text = f"learning_rate auto: {rate:.3g}, from the hidden size {width} of a {name} model"
        if training.optimizer in _ADAM:
            notes.append(("info", text))
        else:
            advice = f"which suits Adam; the optimizer is {training.optimizer}, so better give a number"
            notes.append(("warn", f"{text}, {advice}"))
    elif width and training.optimizer in _ADAM:
        notes += _warning(training.learning_rate, learning_rate(name, width), f"a {name} model {width} wide")
    if "batch_size" in training.auto:
        target = step_rows(rows, tokens)
        sharers = spec.resources.num_workers * training.gradient_accumulation_steps
        chosen["batch_size"] = size = max(1, target // sharers)
        text = (
            f"batch_size auto: {size}, for {target} rows a step, from {rows} rows of {tokens / rows:.0f} "
            f"tokens on average (a step has at most {_STEP_ROWS} rows and {_STEP_TOKENS} tokens, an epoch "
            f"{_EPOCH_STEPS} steps if {_LEAST_ROWS} rows a step allow that)"
        )
        notes.append(("info", text))
    return spec.model_copy(update={"training": training.model_copy(update=chosen)}), notes


def _warning(given: float, rule: float, model: str) -> list[Note]:
    if given >= _ABOVE * rule:
        relation, danger, change = f"{given / rule:.0f} times", "training may diverge", "lower"
    elif given * _BELOW <= rule:
        relation, danger, change = f"1/{rule / given:.0f} of", "hardly anything may be learnt", "higher"
    else:
        return []
    return [
        (
            "warn",
            f"learning_rate is {given:g}, {relation} what usually suits LoRA on {model} ({rule:.3g}): "
            f'{danger}. If that was not intended, give a {change} one, or "auto"',
        )
    ]
