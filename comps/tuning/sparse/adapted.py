"""Whether a sparse adapter makes sense: the zeros in the weights that it is on."""

from __future__ import annotations

import peft
from peft.tuners.lora import LoraLayer

from comps.tuning.errors import ModelError

# Dense models have zeros, too: 0.03 % of SmolLM2-135M's weights, which come from 4-bit ones, are zero.
LEAST = 0.01


def check_zeros(model: peft.PeftModel, base_model: str) -> float:
    """The fraction of exact zeros in the weights that the adapters of ``model`` are on.

    Raises:
        ModelError: it is below :data:`LEAST`, so that there is nothing to keep.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    count = sum(int(weight.numel()) for weight in weights)
    fraction = 1 - sum(int(weight.count_nonzero()) for weight in weights) / count
    if fraction < LEAST:
        raise ModelError(
            f"the base model {base_model} is not sparse: {fraction:.2%} of the weights that get an adapter "
            "are zero, and sparse_adapter is for a model whose zeros a merge shall keep; prune the model "
            "first, or leave sparse_adapter out",
            param="General.lora_config.sparse_adapter",
        )
    return fraction
