"""Which weights of a base model go on a grid: the linear modules of its decoder layers, with 4 bits, and, if
asked, its embeddings and output head, with 8.

A model of the same configuration without any weights tells them, so that nothing is guessed from names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from comps.tuning.errors import ModelError
from comps.tuning.export.base_files import BaseFiles, find_tensor
from comps.tuning.quantised.grid import Grid
from comps.tuning.sparse.layers import Linear
from comps.tuning.sparse.report import is_layer_linear
from comps.tuning.spec import GridSpec, ModelSpec

# As NNCF's default for embeddings and the last layer: 256 values a row.
BYTES = Grid(bits=8, symmetric=False, group_size=None)


@dataclass(frozen=True)
class Target:
    """A weight and its grid. ``transposed``: the checkpoint has it as [in, out] (GPT-2's Conv1D)."""

    module: str
    grid: Grid
    transposed: bool = False


def grid_of(spec: GridSpec) -> Grid:
    """The grid that a spec asks for."""
    return Grid(4, spec.mode == "int4_sym", spec.group_size)


def empty_model(model: ModelSpec, directory: Path) -> PreTrainedModel:
    """The model's modules without weights (on the meta device)."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)


def layer_linears(model: nn.Module) -> dict[str, Linear]:
    """The linear modules of the decoder layers, by their path."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and is_layer_linear(name)
    }


def embeddings(model: PreTrainedModel) -> dict[str, nn.Embedding | nn.Linear]:
    """The embeddings and the output head, by their path."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: module for name, module in model.named_modules() if any(module is end for end in ends)}


def targets(base: BaseFiles, empty: PreTrainedModel, spec: GridSpec) -> dict[str, Target]:
    """The weights of ``base`` that go on a grid, by the checkpoint's name for them.

    Raises:
        ModelError: there are none, or the inputs of one cannot be cut into groups.
    """
    grid = grid_of(spec)
    found: dict[str, Target] = {}
    for module, linear in layer_linears(empty).items():
        tensor = find_tensor(f"{module}.weight", base.shard_of)
        if tensor is None:
            continue
        transposed = isinstance(linear, Conv1D)
        inputs = int(linear.weight.shape[0 if transposed else 1])
        if not grid.fits(inputs):
            fitting = [size for size in (128, 64, 32) if inputs % size == 0]
            hint = f"; {fitting[0]} does" if fitting else ""
            raise ModelError(
                f"group_size {grid.group_size} does not divide the {inputs} inputs of {module} in the base "
                f"model {base.name}{hint}",
                param="group_size",
            )
        found[tensor] = Target(module, grid, transposed)
    if not found:
        raise ModelError(
            f"the base model {base.name} has no linear modules in numbered layers, so there is nothing to "
            "quantise"
        )
    if spec.embeddings == "int8":
        for name in embeddings(empty):
            if tensor := find_tensor(f"{name}.weight", base.shard_of):
                found[tensor] = Target(name, BYTES)
    return found
