"""Whether a sparse adapter makes sense: the zeros in the weights that it is on."""

from __future__ import annotations

import peft
from peft.tuners.lora import LoraLayer

from comps.tuning.errors import ModelError
from comps.tuning.sparse.report import LEAST, is_dense

PARAM = "General.lora_config.sparse_adapter"


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
        raise ModelError(is_dense(base_model, fraction), param=PARAM)
    return fraction
