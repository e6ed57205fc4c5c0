"""How sparse a model is: the fraction of exact zeros in its decoder layers' linear weights.

Counted are the weight matrices of the linear modules within the numbered layers, which are what pruning
prunes; embeddings, norms, biases and the output head are not, nor are weights that are not stored as
floating-point numbers (of a weight that was quantised elsewhere the zeros are not to be seen). Both signs of
zero count.

Needs no torch to read a directory: shards are read in pieces, whatever their size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comps.tuning.models.weights import Header, WeightsError, read_headers, weights_files

if TYPE_CHECKING:
    import torch

COUNTED = "weights of the linear modules within the decoder layers"

# The fraction of zeros that a sparse adapter asks for. Dense models have zeros, too: 0.03 % of
# SmolLM2-135M's weights, which come from 4-bit ones, are zero.
LEAST = 0.01

# A module within a numbered layer, as model.layers.0.mlp.up_proj or h.0.attn.c_attn.
_IN_A_LAYER = re.compile(r"(?:.+\.)?\d+\.(?:.+\.)?([^.]+)")
# Position tables that some architectures keep within their layers.
_TABLE = re.compile(r".*(embed|embedding|relative_attention_bias).*")
# The manifest of a model that was quantised here (comps.tuning.quantised.files).
QUANTISED = "quantization.json"
INTEGER_GRID = "integer_grid"  # quant_method of those models in their config.json
_PIECE = 1 << 22  # elements

# A float is zero when all its bits but the sign are.
_BITS = {"F64": "<u8", "F32": "<u4", "F16": "<u2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}


@dataclass(frozen=True)
class Zeros:
    """The zeros among the ``weights`` of one linear module."""

    weights: int
    zeros: int

    @property
    def fraction(self) -> float:
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class SparsityReport:
    """``layers``: module path -> its zeros, in the order of the layers."""

    layers: dict[str, Zeros]

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers.values())

    @property
    def zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers.values())

    @property
    def total(self) -> float:
        """The fraction of zeros over all the modules; 0 when there are none."""
        return Zeros(self.weights, self.zeros).fraction

    def of(self, modules: Iterable[str]) -> Zeros:
        """The zeros of all modules with these last names (``q_proj``) together."""
        names = set(modules)
        found = [zeros for path, zeros in self.layers.items() if path.rpartition(".")[2] in names]
        return Zeros(sum(each.weights for each in found), sum(each.zeros for each in found))

    def facts(self) -> dict[str, Any]:
        """As JSON: ``{"total", "zeros", "weights", "counted", "layers": {module path: fraction}}``."""
        return {
            "total": self.total,
            "zeros": self.zeros,
            "weights": self.weights,
            "counted": COUNTED,
            "layers": {name: layer.fraction for name, layer in self.layers.items()},
        }


def is_dense(base_model: str, fraction: float) -> str:
    """Why a base model with this fraction of zeros where adapters go gets no sparse ones, in words."""
    return (
        f"the base model {base_model} is not sparse: {fraction:.2%} of the weights that get an adapter "
        "are zero, and sparse_adapter is for a model whose zeros a merge shall keep; prune the model "
        "first, or leave sparse_adapter out"
    )


def is_quantised(directory: Path) -> bool:
    """Whether the model there has integer weights of ours."""
    return (directory / QUANTISED).is_file()


def is_layer_linear(module: str) -> bool:
    """Whether a module with a weight matrix is, by its path, a linear module of a decoder layer."""
    found = _IN_A_LAYER.fullmatch(module)
    return found is not None and not _TABLE.fullmatch(found[1])


def sparsity_of_directory(directory: Path) -> SparsityReport:
    """The report of a model's directory (safetensors), read in pieces of some MB.

    Raises :class:`WeightsError`, with the rest of a sentence.
    """
    if is_quantised(directory):
        return _report(_zeros_of_integers(directory / QUANTISED))
    return _report(
        (header.name.removesuffix(".weight"), _zeros_in_file(header))
        for header in read_headers(weights_files(directory))
        if header.name.endswith(".weight")
        and len(header.shape) == 2
        and header.dtype in _BITS
        and is_layer_linear(header.name.removesuffix(".weight"))
    )


def sparsity_of_module(model: torch.nn.Module) -> SparsityReport:
    """The report of a model in memory; its linear modules are those with a ``weight`` [*, *]."""
    found = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2 or not is_layer_linear(name):
            continue
        if weight.is_floating_point():
            found.append((name, Zeros(weight.numel(), weight.numel() - int(weight.count_nonzero()))))
    return _report(found)


def _report(found: Iterable[tuple[str, Zeros]]) -> SparsityReport:
    return SparsityReport(dict(sorted(found, key=lambda item: _natural(item[0]))))


def _zeros_of_integers(manifest: Path) -> Iterator[tuple[str, Zeros]]:
    """As its manifest has counted them when a model was quantised here."""
    try:
        for name, module in json.loads(manifest.read_bytes())["modules"].items():
            if is_layer_linear(name):
                yield name, Zeros(int(module["weights"]), int(module["zeros"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"has a damaged {manifest.name}") from error


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _zeros_in_file(header: Header) -> Zeros:
    import numpy as np

    kind = np.dtype(_BITS[header.dtype])
    magnitude = kind.type((1 << (8 * kind.itemsize - 1)) - 1)  # all bits but the sign
    left = weights = header.bytes // kind.itemsize
    nonzero = 0
    with open(header.file, "rb") as stream:
        stream.seek(header.offset)
        while left:
            piece = np.fromfile(stream, kind, min(left, _PIECE))
            nonzero += int(np.count_nonzero(piece & magnitude))
            if not len(piece):
                raise WeightsError(f"has a truncated weights file, {header.file.name}")
            left -= len(piece)
    return Zeros(weights, weights - nonzero)


def filled_zeros(result: dict[str, Any]) -> list[str]:
    """A warning, if what a merge tells of itself says that its base model is less sparse now."""
    zeros = result.get("sparsity")
    if not zeros or zeros["before"] - zeros["after"] < LEAST:
        return []
    counted = zeros.get("counted", "weights of the adapted modules")
    return [
        f"The merge filled zeros: {zeros['before']:.1%} of the {counted} were 0, {zeros['after']:.1%} are "
        "now. An adapter that is trained with sparse_adapter keeps them."
    ]
