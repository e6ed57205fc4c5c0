"""Load a model with integer weights into memory, as the floating-point numbers that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from comps.tuning.errors import ModelError
from comps.tuning.export.base_files import BaseFiles, find_base, find_tensor
from comps.tuning.quantised.files import METHOD, Reader, is_quantised, read_manifest
from comps.tuning.quantised.grid import Steps
from comps.tuning.quantised.modules import empty_model, layer_linears
from comps.tuning.spec import GridSpec, ModelSpec


def find_quantised(model: ModelSpec) -> BaseFiles:
    """The files of a local model whose weights are integers. Raises :class:`ModelError`."""
    return find_base(model, quantised=METHOD)


def load_quantised(model: ModelSpec, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and transformers' report of keys that were missing.

    In float32 every weight is exactly on its grid. Raises :class:`ModelError`.
    """
    base = find_quantised(model)
    empty, reader = empty_model(model, Path(model.path)), Reader(base)
    state = dict(tensor for shard in base.shards for tensor in reader.tensors(shard))
    loaded, report = type(empty).from_pretrained(
        None, config=empty.config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    # PEFT looks for the base model's files by this, and would ask the hub for a model of no name.
    loaded.name_or_path = loaded.config._name_or_path = model.path
    return loaded, report


def check_grid(model: ModelSpec, grid: GridSpec) -> bool:
    """Whether the model is quantised. Raises :class:`ModelError` if to another grid than ``grid``."""
    if not (model.local and is_quantised(Path(model.path))):
        return False
    about = read_manifest(Path(model.path))
    if about["mode"] != grid.mode or about["group_size"] != grid.group_size:
        raise ModelError(
            f"the base model {model.name} is quantised to {about['mode']} with group_size "
            f"{about['group_size']}, not to {grid.mode} with {grid.group_size}",
            param="General.lora_config.quantization_aware",
        )
    return True


def known_steps(model: ModelSpec, grid: GridSpec) -> dict[str, Steps] | None:
    """The steps of a quantised model's modules, by their path in the live model; None for another model.

    Raises as :func:`check_grid`.
    """
    if not check_grid(model, grid):
        return None
    base = find_quantised(model)
    reader = Reader(base)
    weights = [f"{module}.weight" for module in reader.modules]
    found = {}
    for name in layer_linears(empty_model(model, base.directory)):
        if weight := find_tensor(f"{name}.weight", weights):
            found[name] = reader.read(weight.removesuffix(".weight"))[0]
    return found
