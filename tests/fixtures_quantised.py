"""Sparse weights and tiny sparse models, and what quantises them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from comps.tuning.spec import GridSpec, ModelSpec, QuantizeSpec


def sparse_weight(rows: int = 96, inputs: int = 256, seed: int = 0) -> Tensor:
    """Half of it exact zeros, one group of nothing else, one of one sign only."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator) * 0.05
    weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    weight[0, :64] = 0
    weight[1, :64] = weight[1, :64].abs() + 0.3
    return weight


def sparsify(directory: Path, fraction: float = 0.5) -> Path:
    """Zero the smallest weights of the decoder layers' matrices of the model in ``directory``."""
    tensors = load_file(directory / "model.safetensors")
    for name, weight in tensors.items():
        if weight.ndim == 2 and any(part.isdigit() for part in name.split(".")):
            weight[weight.abs() <= weight.abs().flatten().quantile(fraction)] = 0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def spec(directory: Path, **fields: Any) -> QuantizeSpec:
    standard: dict[str, Any] = {
        "base_model": ModelSpec(name="org/base", path=str(directory / "base")),
        "name": "org/int4",
        "output": directory / "int4",
        "grid": GridSpec(group_size=32),
    }
    return QuantizeSpec(job_id="quantize-1", directory=directory, **(standard | fields))
