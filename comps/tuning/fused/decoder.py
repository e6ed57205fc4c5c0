"""Decoder layers of Llama's kind as two autograd functions around their attention.

Module by module such a layer is some hundred small operations forward and twice as many backward, each of
which reads and writes its whole input. Here a layer keeps what is dear to compute again (its input,
queries, keys and values, the attention's output, the MLP's two halves and its activation) and computes again
what is cheap (norms, products of two numbers); sums go into products (``addmm``); nothing is computed for
gradients that nobody asked for.

The formulas are those of the layer itself: RMSNorm ``x w / rms(x)``, rotary positions
``x cos + rotate(x) sin``, MLP ``W_d (silu(W_g x) * W_u x)``; so results differ by the order of additions
only.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from comps.tuning.fused.attention import Heads, attention, fits
from comps.tuning.fused.projections import restored, saved
from comps.tuning.fused.sparse import projections
from comps.tuning.training.packing import Layout, attend
from patches.transformers_layers import DecoderParts, checkpointing


class FusedDecoder:
    """The stand-in for one layer's forward.

    ``last``: whether nothing but the tokens that a label is predicted from is wanted of this layer's output;
    the others' is 0 then, and their part after the attention is not computed.
    """

    def __init__(self, parts: DecoderParts, last: bool = False) -> None:
        self.last = last
        linears = parts.linears
        self.inputs, self.output = projections(linears[:3]), projections(linears[3:4])
        self.gate_up, self.down = projections(linears[4:6]), projections(linears[6:])
        self.widths = [each.base.out_features for each in linears[:3]]
        self.norms, self.eps = parts.norms, parts.eps
        queries, keys, _ = (width // parts.head_size for width in self.widths)
        self.heads = Heads(keys, queries // keys, parts.head_size, parts.scaling)
        self._attention, self._layer = parts.attention, weakref.ref(parts.layer)
        self._second = [*self.output.parameters, *self.gate_up.parameters, *self.down.parameters]

    def __call__(
        self,
        own: Callable[..., Tensor],
        hidden_states: Tensor,
        *args: Any,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        layout: Layout | None = None,
        **others: Any,
    ) -> Tensor:
        """``hidden_states`` [1, tokens, hidden] of a packed batch; what is none is the layer's own affair."""
        if layout is None:
            return own(
                hidden_states, *args, attention_mask=attention_mask, position_embeddings=position_embeddings,
                **others,
            )  # fmt: skip
        assert position_embeddings is not None  # the models make them once for all layers
        compute = partial(self._compute, attention_mask, *position_embeddings, layout)
        checkpoint = checkpointing(self._layer())
        return checkpoint(compute, hidden_states) if checkpoint else compute(hidden_states)

    def _compute(
        self, attention_mask: Tensor | None, cos: Tensor, sin: Tensor, layout: Layout, hidden_states: Tensor
    ) -> Tensor:
        training = self._attention.training
        x, cos, sin = hidden_states.squeeze(0), cos[0], sin[0]
        projected = _Inputs.apply(x, cos, sin, self, training, *self.inputs.parameters)  # type: ignore[no-untyped-call]
        dropout = getattr(self._attention, "attention_dropout", 0.0) if training else 0.0
        if not dropout and fits(layout, len(x), self.heads):
            attended = attention(projected, layout, self.heads)
        else:
            query, key, value = (
                part.view(len(x), -1, self.heads.size).transpose(0, 1)[None]
                for part in projected.split(self.widths, 1)
            )
            found, _ = attend(
                self._attention, query, key, value, attention_mask,
                layout=layout, scaling=self.heads.scaling, dropout=dropout,
            )  # fmt: skip
            attended = found.reshape(len(x), -1)
        if self.last:
            attended, x = (each.index_select(0, layout.predicting) for each in (attended, x))
        output: Tensor = _Outputs.apply(attended, x, self, training, *self._second)  # type: ignore[no-untyped-call]
        if self.last:
            output = torch.zeros_like(hidden_states[0]).index_copy(0, layout.predicting, output)
        return output.unsqueeze(0)


class _Inputs(torch.autograd.Function):
    """Norm, and queries, keys and values with their positions side by side: ``[tokens, hidden]`` to
    ``[tokens, sum of widths]``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, layer: FusedDecoder, training: bool, *_: Tensor
    ) -> Tensor:
        normed, scale = rms_norm(x, layer.norms[0], layer.eps)
        found, used = layer.inputs.forward(normed, training)
        rotate_(_heads(found, layer), cos, sin)
        ctx.save_for_backward(x, scale, cos, sin, *saved(used))
        ctx.layer, ctx.ranks = layer, used.ranks
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, cos, sin, *rest = ctx.saved_tensors
        layer: FusedDecoder = ctx.layer
        grad = grad.clone()  # it may be somebody else's, too
        rotate_(_heads(grad, layer), cos, sin, back=True)
        normed = (x * scale).mul_(layer.norms[0])
        needs_input = ctx.needs_input_grad[0]
        dx, found = layer.inputs.backward(grad, normed, restored(rest, ctx.ranks), needs_input)
        if dx is not None:
            dx = rms_norm_backward_(dx, x, scale, layer.norms[0])
        return dx, None, None, None, None, *found


class _Outputs(torch.autograd.Function):
    """All after the attention: its output product, the norm and the MLP, each added to what came in.
    ``attended`` [tokens, heads * head size] and the layer's input ``x`` [tokens, hidden]."""

    @staticmethod
    def forward(
        ctx: Any, attended: Tensor, x: Tensor, layer: FusedDecoder, training: bool, *_: Tensor
    ) -> Tensor:
        middle, used_output = layer.output.forward(attended, training, x)
        normed, scale = rms_norm(middle, layer.norms[1], layer.eps)
        both, used_both = layer.gate_up.forward(normed, training)
        gate, up = both.chunk(2, 1)
        activated = functional.silu(gate)
        result, used_down = layer.down.forward(activated * up, training, middle)
        parts = [saved(each) for each in (used_output, used_both, used_down)]
        ctx.save_for_backward(
            attended, middle, scale, both, activated, *(each for part in parts for each in part)
        )
        ctx.sizes = [len(part) for part in parts]
        ctx.ranks = [each.ranks for each in (used_output, used_both, used_down)]
        ctx.layer = layer
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        attended, middle, scale, both, activated, *rest = ctx.saved_tensors
        layer: FusedDecoder = ctx.layer
        used = []
        for size, ranks in zip(ctx.sizes, ctx.ranks, strict=True):
            used.append(restored(rest[:size], ranks))
            rest = rest[size:]
        gate, up = both.chunk(2, 1)
        d_product, down_grads = layer.down.backward(grad, activated * up, used[2], True)
        assert d_product is not None
        d_both = torch.empty_like(both)
        d_gate, d_up = d_both.chunk(2, 1)
        torch.mul(d_product, activated, out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_product.mul_(up), gate, grad_input=d_gate)
        normed = (middle * scale).mul_(layer.norms[1])
        d_normed, both_grads = layer.gate_up.backward(d_both, normed, used[1], True)
        assert d_normed is not None
        d_middle = rms_norm_backward_(d_normed, middle, scale, layer.norms[1]).add_(grad)
        d_attended, output_grads = layer.output.backward(d_middle, attended, used[0], ctx.needs_input_grad[0])
        return d_attended, d_middle, None, None, *output_grads, *both_grads, *down_grads


def _heads(projected: Tensor, layer: FusedDecoder) -> Tensor:
    """The queries and keys in ``[tokens, sum of widths]``, as ``[tokens, heads, head size]``."""
    return projected[:, : sum(layer.widths[:2])].view(len(projected), -1, layer.heads.size)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x w / sqrt(mean(x^2) + eps)`` over the last axis, and the factor ``[tokens, 1]`` of x alone."""
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight), scale


def rms_norm_backward_(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x from that of :func:`rms_norm`'s result, in whose place it is put."""
    grad.mul_(weight)
    along = torch.linalg.vecdot(grad, x)[:, None].mul_(scale.pow(3)).div_(x.shape[-1])
    return grad.mul_(scale).addcmul_(x, along, value=-1)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> None:
    """Rotary positions in place: ``x`` [tokens, heads, size], ``cos`` and ``sin`` [tokens, size].
    ``back``: the transposed map, which gradients take."""
    first, second = x.chunk(2, -1)
    (cos_first, cos_second), (sin_first, sin_second) = (each[:, None].chunk(2, -1) for each in (cos, sin))
    if back:
        sin_first, sin_second = -sin_second, -sin_first
    kept = first * sin_second
    first.mul_(cos_first).addcmul_(second, sin_first, value=-1)
    second.mul_(cos_second).add_(kept)
