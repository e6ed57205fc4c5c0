"""Quantisation-aware LoRA for PEFT: a layer computes with its weight and adapter rounded to a grid.

What:     a layer computes ``y = FQ(W + s * (B[:, :rho] A[:rho]) * M) x + b`` with ``M = (W != 0)``, where FQ
          is whatever the given :class:`Rounding` does; a merge gives just that weight.
Why:      the adapter is to end in one quantised weight, as sparse as the base, so it must be trained within
          the rounding (QA-SparsePEFT of the SQFT paper, 2024). PEFT's own forward adds an adapter's output
          to that of the unrounded weight.
Seam:     the LoRA variants of :mod:`patches.peft`. PEFT computes the base layer's output before it asks a
          variant, so the class of the layer becomes :class:`RoundedLinear`, a subclass of PEFT's; no class is
          changed. Tensors and checkpoints are stock; ``adapter_config.json`` has the key ``grid`` besides,
          of which stock PEFT warns at loading that it does not know it.
Checked:  peft 0.21.2.
Goes:     when PEFT itself offers adapters within a fake quantisation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import peft
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from patches.peft import ElasticRank, RankSource


class Rounding(Protocol):
    """The rounding of one layer's weight, which is ``weight`` in the layer's own layout throughout."""

    def product(
        self, x: Tensor, down: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        """``x`` times the rounded sum, with gradients for ``x``, ``down`` and ``up``."""

    def merged(self, down: Tensor, up: Tensor, weight: Tensor, scale: float) -> Tensor:
        """The rounded sum as a new float32 tensor."""


@dataclass
class RoundedLoraConfig(peft.LoraConfig):  # type: ignore[misc]  # peft is untyped
    """PEFT's, which also says what grid the adapter was trained for, in every file that PEFT saves."""

    grid: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> RoundedLoraConfig:
        """From the ``adapter_config.json`` in ``directory``; of other unknown keys PEFT warns as ever."""
        attributes = cls.from_json_file(directory / "adapter_config.json")
        attributes.pop("peft_type")  # else PEFT takes its own class for it, without our key
        config: RoundedLoraConfig = cls.from_peft_type(**attributes)
        return config


class RoundedRank(ElasticRank):
    """The variant of one layer, of a fixed rank or an elastic one."""

    def __init__(self, group: RankSource, rounding: Rounding) -> None:
        super().__init__(group)
        self.rounding = rounding
        self._before: Tensor | None = None  # while merged: what was rounded cannot be computed back

    def supports_lora_conversion(self) -> bool:
        """It has no equal of low rank."""
        return False

    def forward(self, module: Linear, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """The layer's output; ``result``, the base layer's, is not part of it."""
        return self.product(module, active_adapter, x)

    def product(self, module: Linear, adapter_name: str, x: Tensor) -> Tensor:
        layer = module.get_base_layer()
        return self.rounding.product(
            x, *self._factors(module, adapter_name), layer.weight, layer.bias, module.scaling[adapter_name]
        )

    def merge_safe(self, module: Linear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        self._before = orig_weight.detach().clone()
        down, up = self._factors(module, active_adapter)
        merged = self.rounding.merged(down, up, orig_weight, module.scaling[active_adapter])
        return merged.to(orig_weight.dtype)

    def merge_unsafe(self, module: Linear, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data.copy_(self.merge_safe(module, active_adapter, orig_weight.data))

    def unmerge(self, module: Linear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        before, self._before = self._before, None
        return orig_weight if before is None else before

    def _factors(self, module: Linear, adapter_name: str) -> tuple[Tensor, Tensor]:
        rank = self.group.rank
        return module.lora_A[adapter_name].weight[:rank], module.lora_B[adapter_name].weight[:, :rank]


class RoundedLinear(Linear):  # type: ignore[misc]
    """PEFT's layer, computing one product with the rounded weight."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self.active_adapters
        variant = self.lora_variant.get(names[0]) if len(names) == 1 else None
        if isinstance(variant, RoundedRank) and not (args or kwargs or self.disable_adapters or self.merged):
            return variant.product(self, names[0], x)
        output: Tensor = super().forward(x, *args, **kwargs)
        return output


class _Fixed:
    """The rank of a layer that is not elastic."""

    def __init__(self, rank: int) -> None:
        self.rank = rank


def make_layer_rounded(layer: Any, adapter_name: str, rounding: Rounding) -> None:
    """Have ``layer`` compute within ``rounding``, its adapter elastic or not.

    Raises:
        TypeError: ``layer`` is no LoRA layer with that adapter on a linear layer with a plain weight.
        ValueError: the adapter is of another variant already, or has a bias or dropout.
    """
    if type(layer) is not Linear or adapter_name not in layer.lora_A:
        raise TypeError(
            f"a layer of the type {type(layer).__name__} has no linear LoRA adapter {adapter_name!r}"
        )
    if type(layer.base_layer) not in (nn.Linear, Conv1D):
        raise TypeError(f"a {type(layer.base_layer).__name__} has no plain weight to round")
    variant = layer.lora_variant.get(adapter_name)
    if not (variant is None or type(variant) is ElasticRank):
        raise ValueError(f"the adapter {adapter_name!r} is a {type(variant).__name__} and cannot be rounded")
    if layer.lora_bias[adapter_name] or not isinstance(layer.lora_dropout[adapter_name], nn.Identity):
        raise ValueError(f"the adapter {adapter_name!r} has a bias or dropout, which no rounding includes")
    group = _Fixed(layer.r[adapter_name]) if variant is None else variant.group
    layer.lora_variant[adapter_name] = RoundedRank(group, rounding)
    layer.__class__ = RoundedLinear
