"""Load a model with integer weights into memory, as the floating-point numbers that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from comps.tuning.export.base_files import BaseFiles, find_base
from comps.tuning.quantised.files import METHOD, Reader
from comps.tuning.quantised.modules import empty_model
from comps.tuning.spec import ModelSpec


def find_quantised(model: ModelSpec) -> BaseFiles:
    """The files of a local model whose weights are integers. Raises :class:`ModelError`."""
    return find_base(model, quantised=METHOD)


def load_quantised(model: ModelSpec, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and transformers' report of keys that were missing.

    In float32 every weight is exactly on its grid. Raises :class:`ModelError`.
    """
    base = find_quantised(model)
    empty = empty_model(model, Path(model.path))
    loaded, report = type(empty).from_pretrained(
        None, config=empty.config, state_dict=Reader(base).state(), dtype=dtype, output_loading_info=True
    )
    return loaded, report
