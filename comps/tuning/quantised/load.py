"""Load a model with integer weights into memory, as the floating-point numbers that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from comps.tuning.errors import ModelError
from comps.tuning.export.base_files import BaseFiles, find_base, find_tensor
from comps.tuning.quantised.files import METHOD, Reader, read_manifest
from comps.tuning.quantised.grid import Steps
from comps.tuning.quantised.modules import empty_model, layer_linears
from comps.tuning.sparse.report import is_quantised
from comps.tuning.spec import GridSpec, ModelSpec

# What loaded models came with: their grid, and the steps of their modules.
_STEPS: WeakKeyDictionary[PreTrainedModel, tuple[GridSpec, dict[str, Steps]]] = WeakKeyDictionary()


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
    about = read_manifest(base.directory)
    steps = {}
    for name in layer_linears(loaded):
        if weight := find_tensor(f"{name}.weight", [f"{module}.weight" for module in reader.modules]):
            steps[name] = reader.read(weight.removesuffix(".weight"))[0]
    _STEPS[loaded] = GridSpec(mode=about["mode"], group_size=about["group_size"]), steps
    return loaded, report


def check_grid(model: ModelSpec, grid: GridSpec) -> None:
    """Raises :class:`ModelError` for a model that is quantised to another grid than ``grid``."""
    if model.local and is_quantised(Path(model.path)):
        about = read_manifest(Path(model.path))
        _same(GridSpec(mode=about["mode"], group_size=about["group_size"]), grid)


def known_steps(model: PreTrainedModel, grid: GridSpec) -> Mapping[str, Steps]:
    """The steps of the modules of ``model`` by their path, if it was loaded with integer weights.

    Raises as :func:`check_grid`.
    """
    if model not in _STEPS:
        return {}
    found, steps = _STEPS[model]
    _same(found, grid)
    return steps


def _same(found: GridSpec, asked: GridSpec) -> None:
    if (found.mode, found.group_size) != (asked.mode, asked.group_size):
        raise ModelError(
            f"the base model is quantised to {found.mode} with group_size "
            f"{found.group_size}, not to {asked.mode} with {asked.group_size}",
            param="General.lora_config.quantization_aware",
        )
