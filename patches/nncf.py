"""Masked quantisers for NNCF's quantisation-aware NLS.

What:     the quantisers that ``nncf.compress_weights(..., compression_format=FQ_LORA_NLS)`` puts on weights
          compute ``FQ(W + (B[:, :rho] A[:rho]) * M)`` with ``M = (W != 0)``, in place of ``FQ(W + B A)``; and
          without a compiler.
Why:      NNCF's own fill the zeros of a pruned weight (a sparsity of 0.50 became 0.33). Their Python code
          is run through ``torch.compile`` at first use, which needs a C++ compiler and minutes; where there
          is none NNCF falls back after a warning.
Seam:     ``get_hook_storage`` and its ``named_hooks``; ``quantize``, ``get_active_adapters``, ``_lspec`` of
          ``AsymmetricLoraNLSQuantizer`` and ``SymmetricLoraNLSQuantizer``. The class of a quantiser becomes
          :class:`MaskedAsymmetric` or :class:`MaskedSymmetric`, subclasses of NNCF's; no class is changed.
          ``ReferenceQuantizedFunctions``' compiled functions are passed over by using the executor itself.
Checked:  nncf 3.4.0.
Goes:     when NNCF itself offers masks.

NNCF is no part of the core: ``pip install 'finetuning-service[int4]'``. The service's own jobs do not need
it (:mod:`comps.tuning.quantised.aware`: the same rounding, with scales that stay what they were fitted to,
where NNCF trains its scales, too); this is for those who train with NNCF. Its ``nncf.strip``, in the end,
also needs torchao.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from patches.errors import PatchError

try:
    import nncf
    from nncf.torch.function_hook.hook_storage import decode_hook_name
    from nncf.torch.function_hook.wrapper import get_hook_storage
    from nncf.torch.quantization.layers import AsymmetricLoraNLSQuantizer, SymmetricLoraNLSQuantizer
    from nncf.torch.quantization.quantize_functions import TuneRange
    from nncf.torch.quantization.reference import torch_executor
except ImportError as error:
    raise PatchError(
        f"masked quantisers need nncf (checked with 3.4.0), pip install 'finetuning-service[int4]': {error}"
    ) from error


class _Quantise(torch.autograd.Function):
    """NNCF's own forward and backward, not compiled."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, low: Tensor, width: Tensor, shape: tuple[int, ...], levels: tuple[int, int]
    ) -> Tensor:
        grouped = weight.reshape(shape).float()
        ctx.save_for_backward(grouped, low, width)
        ctx.levels, ctx.kind = levels, weight.dtype
        steps = levels[1] - levels[0] + 1
        found: Tensor = torch_executor.forward(grouped, low, width, steps)
        return found.reshape(weight.shape).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grouped, low, width = ctx.saved_tensors
        steps = ctx.levels[1] - ctx.levels[0] + 1
        d_weight, d_low, d_width = torch_executor.backward(
            grad.reshape(grouped.shape).float(), grouped, low, width, steps, *ctx.levels
        )
        return d_weight.reshape(grad.shape).to(ctx.kind), d_low, d_width, None, None


class _Masked:
    """What both have in common."""

    def _masked(self: Any, weight: Tensor) -> Tensor:
        down, up = self.get_active_adapters()
        found: Tensor = weight + (up @ down) * (weight != 0)
        return found.type(weight.dtype)


class MaskedAsymmetric(_Masked, AsymmetricLoraNLSQuantizer):  # type: ignore[misc]  # nncf is untyped
    """For INT4_ASYM."""

    def quantize(self, x: Tensor, execute_traced_op_as_identity: bool = False) -> Tensor:
        if execute_traced_op_as_identity:
            return x
        width = abs(self.input_range) + self.eps
        low, width = TuneRange.apply(self.input_low, width, self.levels)
        found: Tensor = _Quantise.apply(
            self._masked(x), low, width, self._lspec.weight_shape, (self.level_low, self.level_high)
        )  # type: ignore[no-untyped-call]
        return found


class MaskedSymmetric(_Masked, SymmetricLoraNLSQuantizer):  # type: ignore[misc]
    """For INT4_SYM. The range is ``[-scale, 7/8 scale]``, turned around where the scale is negative."""

    def quantize(self, x: Tensor, execute_traced_op_as_identity: bool = False) -> Tensor:
        if execute_traced_op_as_identity:
            return x
        scale = torch.where(self.scale.abs() < self.eps, self.eps, self.scale)
        low = torch.where(scale > 0, -scale, -scale / self.level_low * self.level_high)
        width = torch.abs((2 + 1 / self.level_low) * scale)
        found: Tensor = _Quantise.apply(
            self._masked(x), low, width, self._lspec.weight_shape, (self.level_low, self.level_high)
        )  # type: ignore[no-untyped-call]
        return found


_CLASSES = {AsymmetricLoraNLSQuantizer: MaskedAsymmetric, SymmetricLoraNLSQuantizer: MaskedSymmetric}


def mask_quantisers(model: nn.Module) -> dict[str, nn.Module]:
    """Have the NLS quantisers of ``model``, which NNCF has compressed, keep the zeros of its weights.

    Returns them by the path of the weight that each is on (``model.layers.0.mlp.up_proj.weight``).

    Raises:
        PatchError: there are none, or NNCF's insides are others than these.
    """
    try:
        hooks = list(get_hook_storage(model).named_hooks())
        found = {}
        for name, hook in hooks:
            if type(hook) in _CLASSES:
                hook.__class__ = _CLASSES[type(hook)]
            if type(hook) in _CLASSES.values():  # now, or by an earlier call
                found[decode_hook_name(name)[1].replace(":", ".")] = hook
    except (AttributeError, TypeError, ValueError) as error:
        raise PatchError(f"nncf {nncf.__version__} is another than 3.4.0 inside: {error}") from error
    if not found:
        raise PatchError("the model has no NLS quantisers: compress it with FQ_LORA_NLS first")
    return found
