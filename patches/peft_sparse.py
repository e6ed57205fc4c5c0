"""Sparse LoRA adapters for PEFT (SparsePEFT): A and B count only where the base weight is not 0.

What:     with ``M = (W != 0)`` and ``D = s * (B[:, :rho] A[:rho]) * M`` a layer computes
          ``y = W x + D dropout(x)``; a merge gives ``W + D``, which keeps every zero of W. Where there is no
          dropout (its probability is 0, or the model is evaluated), ``y = (W + D) x`` is one product.
Why:      merged, an adapter of PEFT's fills the zeros of a pruned weight; an adapter that is to be masked by
          then must be trained so (SparsePEFT of the SQFT paper, 2024).
Seam:     the LoRA variants of :mod:`patches.peft`, for merges, batches of several adapters and dropout. PEFT
          computes the base layer's output before it asks a variant, so for the single product the class of
          the layer becomes :class:`SparseLinear`, a subclass of PEFT's; no class is changed. Tensors and
          checkpoints are stock. ``adapter_config.json`` has the key ``sparse_adapter``, of which stock PEFT
          warns at loading that it does not know it.
Checked:  peft 0.21.2.
Goes:     when PEFT itself offers masked adapters.

The mask is never stored: it is taken from W whenever it is needed, at the price of reading W once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from patches.peft import ElasticRank


@dataclass
class SparseLoraConfig(peft.LoraConfig):  # type: ignore[misc]  # peft is untyped
    """PEFT's, which also says that the adapter is masked, in every file that PEFT saves."""

    sparse_adapter: bool = True

    @classmethod
    def read(cls, directory: Path) -> SparseLoraConfig:
        """From the ``adapter_config.json`` in ``directory``; of other unknown keys PEFT warns as ever."""
        attributes = cls.from_json_file(directory / "adapter_config.json")
        attributes.pop("peft_type")  # else PEFT takes its own class for it, without our key
        config: SparseLoraConfig = cls.from_peft_type(**attributes)
        return config


def masked_(values: Tensor, weight: Tensor) -> Tensor:
    """``values * (weight != 0)`` in place. The derivative of ``hardshrink`` is this mask in one fast pass."""
    torch.ops.aten.hardshrink_backward.grad_input(values, weight, 0.0, grad_input=values)
    return values


def effective_weight(
    weight: Tensor, left: Tensor, right: Tensor, scale: float, *, base: bool = True, out: Tensor | None = None
) -> Tensor:
    """``W + s (left right) * (W != 0)``, or without ``base`` the second summand alone, as a new tensor.

    ``weight`` [n, m], ``left`` [n, rho], ``right`` [rho, m], all of one type.
    """
    # W is 0 wherever the mask is, so the mask may go over the sum.
    if out is None:
        out = torch.empty_like(weight)
    torch.addmm(weight, left, right, beta=1 if base else 0, alpha=scale, out=out)
    return masked_(out, weight)


class _Product(torch.autograd.Function):
    """``x E^T + bias`` with E of :func:`effective_weight`, made again in the backward pass: nothing of W's
    size is kept. For a weight that is stored as [in, out], left is ``A^T``, right ``B^T``, and x meets E."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, layer: _Layout
    ) -> Tensor:
        device = x.device.type
        lower = torch.is_autocast_enabled(device)
        ctx.kind = torch.get_autocast_dtype(device) if lower else torch.promote_types(x.dtype, down.dtype)
        ctx.save_for_backward(x, down, up, weight)
        ctx.layer = layer
        with torch.autocast(device, enabled=False):
            effective = layer.effective(weight, down, up).to(ctx.kind)
            y = x.to(ctx.kind) @ (effective if layer.transposed else effective.t())
            if bias is not None:
                y += bias
        return y if lower else y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, weight = ctx.saved_tensors
        layer: _Layout = ctx.layer
        grad = grad.to(ctx.kind)
        dx = None
        if ctx.needs_input_grad[0]:
            effective = layer.effective(weight, down, up).to(ctx.kind)
            dx = (grad @ (effective.t() if layer.transposed else effective)).to(x.dtype)
        ours, theirs = grad.flatten(0, -2), x.to(ctx.kind).flatten(0, -2)
        product = theirs.t() @ ours if layer.transposed else ours.t() @ theirs
        product = masked_(product.to(down.dtype), weight.to(down.dtype))
        if layer.transposed:
            product = product.t()
        return dx, layer.scale * (up.t() @ product), layer.scale * (product @ down.t()), None, None, None


@dataclass(frozen=True)
class _Layout:
    """How a layer's weight is stored, its scale, and whether its own weight is part of the product."""

    scale: float
    transposed: bool
    base: bool

    def effective(self, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        left, right = (down.t(), up.t()) if self.transposed else (up, down)
        return effective_weight(weight.to(down.dtype), left, right, self.scale, base=self.base)


class SparseRank(ElasticRank):
    """The variant of one sparse layer, of a fixed rank or an elastic one."""

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self._mask: Tensor | None = None  # while merged: a sum can be 0 by itself

    def supports_lora_conversion(self) -> bool:
        """It has no equal of low rank."""
        return False

    def forward(self, module: Linear, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """``result + D dropout(x)``: a second product of the base's size."""
        x = module.lora_dropout[active_adapter](x)
        return result + self.product(module, active_adapter, x, base=False)

    def product(self, module: Linear, adapter_name: str, x: Tensor, *, base: bool) -> Tensor:
        """``(W + D) x`` with the layer's bias, or ``D x`` alone."""
        rank, layer = self.group.rank, module.get_base_layer()
        y: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x,
            module.lora_A[adapter_name].weight[:rank],
            module.lora_B[adapter_name].weight[:, :rank],
            layer.weight,
            layer.bias if base else None,
            _Layout(module.scaling[adapter_name], module.fan_in_fan_out, base),
        )
        return y

    def delta(self, module: Linear, adapter_name: str, rank: int, weight: Tensor) -> Tensor:
        delta = super().delta(module, adapter_name, rank, weight)
        return delta * (weight != 0 if self._mask is None else self._mask)

    def merge_safe(self, module: Linear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        merged = super().merge_safe(module, active_adapter, orig_weight)
        self._mask = orig_weight != 0
        return merged

    def merge_unsafe(self, module: Linear, active_adapter: str, orig_weight: Tensor) -> None:
        mask = orig_weight != 0
        super().merge_unsafe(module, active_adapter, orig_weight)
        self._mask = mask

    def unmerge(self, module: Linear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        unmerged = super().unmerge(module, active_adapter, orig_weight)
        self._mask = None
        return unmerged


class SparseLinear(Linear):  # type: ignore[misc]
    """PEFT's layer, computing one product where that is the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names, layer = self.active_adapters, self.base_layer
        variant = self.lora_variant.get(names[0]) if len(names) == 1 else None
        if (
            isinstance(variant, SparseRank)
            and not (args or kwargs or self.disable_adapters or self.merged)
            and not (layer._forward_hooks or layer._forward_pre_hooks)
            and not self._drops(names[0])
        ):
            return variant.product(self, names[0], x, base=True)
        output: Tensor = super().forward(x, *args, **kwargs)
        return output

    def _drops(self, adapter_name: str) -> bool:
        """Whether dropout changes inputs at this moment."""
        dropout = self.lora_dropout[adapter_name]
        return not isinstance(dropout, nn.Identity) and bool(dropout.training)


class _Fixed:
    """The rank of a layer that is not elastic."""

    def __init__(self, rank: int) -> None:
        self.rank = rank


def make_layer_sparse(layer: Any, adapter_name: str) -> None:
    """Mask the adapter of ``layer``, elastic or not, by the zeros of the layer's weight.

    Raises:
        TypeError: ``layer`` is no LoRA layer with that adapter on a linear layer with a plain weight.
        ValueError: the adapter is of another variant already (DoRA, for example), or has a bias.
    """
    if type(layer) not in (Linear, SparseLinear) or adapter_name not in layer.lora_A:
        raise TypeError(
            f"a layer of the type {type(layer).__name__} has no linear LoRA adapter {adapter_name!r}"
        )
    if type(layer.base_layer) not in (nn.Linear, Conv1D):
        raise TypeError(f"a {type(layer.base_layer).__name__} has no plain weight to be a mask")
    variant = layer.lora_variant.get(adapter_name)
    if not (variant is None or isinstance(variant, ElasticRank)):
        raise ValueError(f"the adapter {adapter_name!r} is a {type(variant).__name__} and cannot be sparse")
    if layer.lora_bias[adapter_name]:
        raise ValueError(f"the adapter {adapter_name!r} has a bias, which no mask belongs to")
    group = _Fixed(layer.r[adapter_name]) if variant is None else variant.group
    layer.lora_variant[adapter_name] = SparseRank(group)
    layer.__class__ = SparseLinear
