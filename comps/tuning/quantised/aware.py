"""Training within the rounding: ``y = x FQ(W + s (B A) * M)^T + b`` with ``M = (W != 0)``.

FQ is the nearest value on the grid that is fitted to W once, before the training (or that W came with, if
it is of a quantised model): its scales do not move, so what is trained is what is written. Gradients go
straight through the rounding where it stays within the grid, as in torch's own fake quantisation:
``dD = (g^T x) * M * [q within the grid]``, ``dB = s dD A^T``, ``dA = s B^T dD``, ``dx = g FQ(...)``. Zeros of
W stay 0.0: the mask keeps the adapter off them, and the grid has a zero.

Between the passes one byte for each weight is kept, the integers before they are clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from comps.tuning.errors import AdapterError
from comps.tuning.quantised.grid import Steps
from comps.tuning.quantised.load import known_steps
from comps.tuning.quantised.modules import BYTES, embeddings, grid_of, layer_linears
from comps.tuning.spec import GridSpec
from patches.peft_rounded import make_layer_rounded
from patches.peft_sparse import masked_


@dataclass(frozen=True)
class GridRounding:
    """The rounding of one layer. ``transposed``: its weight is [in, out], as GPT-2 keeps it."""

    steps: Steps
    transposed: bool = False

    def product(
        self, x: Tensor, down: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        """``x`` [..., in] to [..., out]."""
        y: Tensor = _Product.apply(x, down, up, self._rows(weight), bias, self.steps, scale)  # type: ignore[no-untyped-call]
        return y

    @torch.no_grad()
    def merged(self, down: Tensor, up: Tensor, weight: Tensor, scale: float) -> Tensor:
        """The rounded sum, in the layout of ``weight``."""
        found = self.steps.values(merged_integers(self.steps, down, up, self._rows(weight), scale))
        return found.T if self.transposed else found

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.detach().T if self.transposed else weight.detach()


def merged_integers(steps: Steps, down: Tensor, up: Tensor, weight: Tensor, scale: float) -> Tensor:
    """What :meth:`GridRounding.merged` stands for: integers [out, in]. ``weight`` is [out, in]."""
    return clipped(steps, _codes(down, up, weight, steps, scale))


def clipped(steps: Steps, codes: Tensor) -> Tensor:
    """Integers within the grid, from any."""
    return codes.clamp(steps.grid.low, steps.grid.high)


def _codes(down: Tensor, up: Tensor, weight: Tensor, steps: Steps, scale: float) -> Tensor:
    """The integers of ``W + s (B A) * M`` [out, in] as int8, not yet clipped to the grid (but to int8)."""
    weight = weight.float()
    # W is 0 wherever the mask is, so the mask may go over the sum.
    found = masked_(torch.addmm(weight, up.float(), down.float(), alpha=scale), weight)
    groups = steps.grid.grouped(found).div_(steps.scale[..., None])
    if steps.zero is not None:
        groups += steps.zero[..., None]
    return found.round_().clamp_(-128, 127).to(torch.int8)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        steps: Steps,
        scale: float,
    ) -> Tensor:
        device = x.device.type
        lower = torch.is_autocast_enabled(device)
        ctx.kind = torch.get_autocast_dtype(device) if lower else x.dtype
        ctx.steps, ctx.scale = steps, scale
        with torch.autocast(device, enabled=False):  # the rounding is in float32, or it is another one
            codes = _codes(down, up, weight, steps, scale)
            ctx.save_for_backward(x, down, up, weight, codes)
            rounded = steps.values(clipped(steps, codes)).to(ctx.kind)
            return nn.functional.linear(x.to(ctx.kind), rounded, None if bias is None else bias.to(ctx.kind))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, weight, codes = ctx.saved_tensors
        steps: Steps = ctx.steps
        grad, dx = grad.to(ctx.kind), None
        if ctx.needs_input_grad[0]:
            dx = (grad @ steps.values(clipped(steps, codes)).to(ctx.kind)).to(x.dtype)
        product = (grad.flatten(0, -2).t() @ x.to(ctx.kind).flatten(0, -2)).to(down.dtype)
        masked_(product, weight.to(product.dtype)).mul_(clipped(steps, codes) == codes)
        return dx, ctx.scale * (up.t() @ product), ctx.scale * (product @ down.t()), None, None, None, None


@torch.no_grad()
def roundings(model: PreTrainedModel, grid: GridSpec) -> dict[str, GridRounding]:
    """The rounding of each linear module of the decoder layers of ``model``, by its path: to steps fitted to
    their weights, or to those that the model came with. Its embeddings are rounded at once, if ``grid`` asks
    for that.

    Raises:
        AdapterError: a module's inputs cannot be cut into groups.
        ModelError: the model is quantised to another grid.
    """
    known, cut = known_steps(model, grid), grid_of(grid)
    found = {}
    for name, linear in layer_linears(model).items():
        transposed = isinstance(linear, Conv1D)
        weight = linear.weight.detach().T if transposed else linear.weight.detach()
        if not cut.fits(weight.shape[1]):
            raise AdapterError(
                f"group_size {grid.group_size} does not divide the {weight.shape[1]} inputs of {name}",
                param="group_size",
            )
        found[name] = GridRounding(known.get(name) or cut.fit(weight), transposed)
    if grid.embeddings == "int8" and not known:
        # By their tensors: a tied head is its embeddings.
        for weight in {id(end.weight): end.weight for end in embeddings(model).values()}.values():
            weight.copy_(BYTES.fit(weight).nearest(weight))
    return found


@torch.no_grad()
def make_rounded(
    model: peft.PeftModel, rounding: Mapping[str, GridRounding], adapter_name: str = "default"
) -> None:
    """Have the modules of ``rounding`` compute on their grids: those with an adapter within the rounding, the
    others with their weights rounded once.

    Raises:
        AdapterError: an adapter cannot be rounded, or is on another module.
    """
    base = model.get_base_model()
    adapted = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    if outside := adapted.keys() - rounding.keys():
        raise AdapterError(
            f"{min(outside)!r} is not a linear module of a decoder layer; a quantisation-aware adapter can "
            "be on no other",
            param="target_modules",
        )
    for name, rounds in rounding.items():
        if (layer := adapted.get(name)) is None:
            weight = base.get_submodule(name).weight
            rows = rounds.steps.nearest(weight.T if rounds.transposed else weight)
            weight.copy_(rows.T if rounds.transposed else rows)
            continue
        try:
            make_layer_rounded(layer, adapter_name, rounds)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"the module {name!r} cannot be quantisation-aware: {error}") from error
