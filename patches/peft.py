"""Elastic LoRA ranks for PEFT.

What:     a LoRA layer gets an active rank ``rho`` at most its own rank ``r`` and computes
          ``h = W x + s * B[:, :rho] (A[:rho] dropout(x))`` with its unchanged scale ``s``.
Why:      neural low-rank adapter search (NLS) trains one super-adapter whose sub-ranks are sampled.
          PEFT has fixed ranks only.
Seam:     ``LoraLayer.lora_variant``, the dictionary of :class:`LoraVariant` objects that
          ``lora.Linear.forward``, ``merge`` and ``unmerge`` consult for each adapter. A variant is put
          there after PEFT's own ``get_peft_model``; no class is changed, so checkpoints and
          ``adapter_config.json`` are stock. PEFT calls the interface "prone to change", hence
          :func:`check_seam`.
Checked:  peft 0.21.2.
Goes:     when PEFT itself offers ranks that can be set between forward passes.

The active rank lives on an object shared by the layers of a group and is set from outside. It is
never drawn inside ``forward``: activation checkpointing runs ``forward`` again in the backward pass
and must meet the same rank, or its gradients are wrong.
"""

from __future__ import annotations

from typing import Any, Protocol

import peft
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn

from patches.errors import PatchError


class RankSource(Protocol):
    """Whatever knows the active rank of a group of layers."""

    rank: int


class ElasticRank(LoraVariant):  # type: ignore[misc]  # peft is untyped
    """The variant of one elastic layer. PEFT's methods are static; instances may override them."""

    def __init__(self, group: RankSource) -> None:
        self.group = group
        self._merged_rank: int | None = None

    def init(self, module: Linear, adapter_name: str, **_: Any) -> None:
        """Nothing to set up: A and B are those of plain LoRA."""

    def forward(self, module: Linear, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """``result + s * B[:, :rho] A[:rho] dropout(x)``.

        ``x`` [..., in] is already cast to A's type by PEFT, ``result`` [..., out] is the base layer's
        output. The operations and their order are PEFT's, so the full rank is bit-identical to it.
        """
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        rank = self.group.rank
        x = module.lora_dropout[active_adapter](x)
        low: Tensor
        if rank == down.out_features:
            low = up(down(x))
        else:
            low = F.linear(F.linear(x, down.weight[:rank]), up.weight[:, :rank], up.bias)
        scale: float = module.scaling[active_adapter]
        return result + low * scale

    def merge_safe(self, module: Linear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The merged weight as a new tensor of ``orig_weight``'s type."""
        self._merged_rank = self.group.rank
        delta = self.delta(module, active_adapter, self.group.rank, orig_weight)
        return orig_weight + delta.to(orig_weight.dtype)

    def merge_unsafe(self, module: Linear, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge into ``orig_weight`` in place."""
        self._merged_rank = self.group.rank
        orig_weight.data += self.delta(module, active_adapter, self.group.rank, orig_weight)

    def unmerge(self, module: Linear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Take out what was merged, also when the active rank has changed since."""
        rank = self.group.rank if self._merged_rank is None else self._merged_rank
        self._merged_rank = None
        return orig_weight - self.delta(module, active_adapter, rank, orig_weight).to(orig_weight.dtype)

    def delta(self, module: Linear, adapter_name: str, rank: int, weight: Tensor) -> Tensor:
        """What a merge adds to ``weight``, in its layout."""
        return _delta(module, adapter_name, rank)


def _delta(module: Linear, adapter_name: str, rank: int) -> Tensor:
    """``s * B[:, :rank] A[:rank]`` in the layout of the base weight, computed as PEFT computes it."""
    down: Tensor = module.lora_A[adapter_name].weight.detach()[:rank]
    up: Tensor = module.lora_B[adapter_name].weight.detach()[:, :rank]
    kind = down.dtype
    if down.device.type == "cpu" and kind in (torch.float16, torch.bfloat16):
        down, up = down.float(), up.float()  # half precision products are slow on many CPUs
    product: Tensor = up @ down
    if module.fan_in_fan_out:
        product = product.T
    scale: float = module.scaling[adapter_name]
    return (product * scale).to(kind)


def make_layer_elastic(layer: nn.Module, adapter_name: str, group: RankSource) -> None:
    """Let ``group`` decide the active rank of ``layer``'s adapter.

    Raises:
        TypeError: ``layer`` is not a linear LoRA layer with that adapter.
        ValueError: the adapter is of another variant already (DoRA, for example).
    """
    if not isinstance(layer, Linear) or adapter_name not in layer.lora_A:
        raise TypeError(f"a {type(layer).__name__} layer has no linear LoRA adapter named {adapter_name!r}")
    variant = layer.lora_variant.get(adapter_name)
    if variant is not None and not isinstance(variant, ElasticRank):
        raise ValueError(f"the adapter {adapter_name!r} is a {type(variant).__name__} and cannot be elastic")
    if variant is None:
        layer.lora_variant[adapter_name] = ElasticRank(group)
    else:  # it may be sparse, too
        variant.group = group


def check_seam() -> None:
    """Run a tiny layer and see that PEFT asks the variant.

    Raises:
        PatchError: it does not.
    """

    class One:
        rank = 1

    # The caller's random numbers and default device are left alone.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        try:
            config = peft.LoraConfig(init_lora_weights=False)
            layer = Linear(nn.Linear(2, 2), "default", config, r=2, lora_alpha=2)
            make_layer_elastic(layer, "default", One())
            x = torch.ones(1, 2)
            adapted = layer(x)
            layer.merge()
            merged = layer(x)
            layer.unmerge()
            expected = layer.base_layer(x) + x @ _delta(layer, "default", 1).T
        except (AttributeError, TypeError) as error:
            raise PatchError(_missing(str(error))) from error
    if not (torch.allclose(adapted, expected, atol=1e-5) and torch.allclose(merged, expected, atol=1e-5)):
        raise PatchError(_missing("a LoraVariant is not asked for the layer's output"))


def _missing(reason: str) -> str:
    return (
        f"peft {peft.__version__} lacks the LoRA-variant seam that elastic ranks need "
        f"(checked with 0.21.2): {reason}"
    )
