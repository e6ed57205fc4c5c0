"""Attention over a packed batch of short rows, as a few batched products.

The keys of the common beginning are copied before those of each row, and heads that share keys (grouped
queries) are one larger product: few large operations cost less here than few numbers. Probabilities are kept
for the backward pass, which is why this is for short rows: :func:`fits` says which.

Shapes: T tokens; n rows of L own tokens (with padding), s common ones, S = s + L; K key heads with G queries
each; D a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comps.tuning.training.packing import Layout

_LARGEST = 2**20  # probabilities, 4 MB a layer


@dataclass(frozen=True)
class Heads:
    """How queries, keys and values lie side by side in ``[T, (K G + 2 K) D]``."""

    keys: int
    group: int
    size: int
    scaling: float

    @property
    def queries(self) -> int:
        """Columns of the queries."""
        return self.keys * self.group * self.size


def fits(layout: Layout, tokens: int, heads: Heads) -> bool:
    """Whether the rows are short enough."""
    places = len(layout.spread) if layout.spread is not None else tokens - layout.shared
    seen = layout.shared + places // layout.rows
    return heads.keys * heads.group * (places * seen + layout.shared**2) <= _LARGEST


def attention(projected: Tensor, layout: Layout, heads: Heads) -> Tensor:
    """``projected`` [T, (K G + 2 K) D] to what each token attends to, ``[T, K G D]``."""
    found: Tensor = _Attention.apply(projected, layout, heads)  # type: ignore[no-untyped-call]
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, layout: Layout, heads: Heads) -> Tensor:
        shared, columns = layout.shared, heads.queries
        own = (
            projected[shared:] if layout.spread is None else projected[shared:].index_select(0, layout.spread)
        )
        length = len(own) // layout.rows
        query = _by_head(own[:, :columns], layout.rows, heads)
        both = own.new_empty(2, heads.keys, layout.rows, shared + length, heads.size)  # keys, values
        both[:, :, :, shared:] = _keys(own[:, columns:], layout.rows, heads)
        output = projected.new_empty(len(projected), columns)
        first: tuple[Tensor, ...] = ()
        if shared:
            both[:, :, :, :shared] = _keys(projected[:shared, columns:], 1, heads)
            early = _by_head(projected[:shared, :columns], 1, heads)
            found, taken = _attend(early, both[:, :, 0, :shared], layout.future(shared, 0), heads)
            output[:shared] = _by_token(found, 1, heads)
            first = early, taken
        found, taken = _attend(query, both.flatten(1, 2), layout.future(length, shared), heads)
        found = _by_token(found, layout.rows, heads)
        output[shared:] = found if layout.collect is None else found.index_select(0, layout.collect)
        ctx.save_for_backward(query, both, taken, *first)
        ctx.layout, ctx.heads = layout, heads
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, both, taken, *first = ctx.saved_tensors
        layout, heads = ctx.layout, ctx.heads
        shared, columns = layout.shared, heads.queries
        rest = grad[shared:]
        if layout.collect is not None:  # 0 in padding
            rest = grad.new_zeros(len(layout.spread), columns).index_copy_(0, layout.collect, rest)
        d_both = torch.empty_like(both)
        d_query = _gradients(
            _by_head(rest, layout.rows, heads), query, both.flatten(1, 2), taken, d_both.flatten(1, 2), heads
        )
        own = grad.new_empty(len(rest), columns + 2 * heads.keys * heads.size)
        _by_token(d_query, layout.rows, heads, own[:, :columns])
        _keys(own[:, columns:], layout.rows, heads).copy_(d_both[:, :, :, shared:])
        if not shared:
            return own if layout.collect is None else own.index_select(0, layout.collect), None, None
        result = grad.new_empty(len(grad), own.shape[1])
        result[shared:] = own if layout.collect is None else own.index_select(0, layout.collect)
        seen = d_both[:, :, :, :shared].sum(2)
        d_first = torch.empty_like(seen)
        d_query = _gradients(
            _by_head(grad[:shared], 1, heads), first[0], both[:, :, 0, :shared], first[1], d_first, heads
        )
        _by_token(d_query, 1, heads, result[:shared, :columns])
        _keys(result[:shared, columns:], 1, heads).copy_(seen.add_(d_first)[:, :, None])
        return result, None, None


def _attend(query: Tensor, both: Tensor, future: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """``query`` [B, G L, D], keys and values ``both`` [2, B, S, D], ``future`` [L, S] to the output, as the
    queries, and how much of each key they take, ``[B, G L, S]``."""
    keys, values = both
    future = future.expand(heads.group, *future.shape).reshape(-1, future.shape[1])
    taken = torch.softmax(torch.baddbmm(future, query, keys.transpose(1, 2), alpha=heads.scaling), -1)
    return torch.bmm(taken, values), taken


def _gradients(
    grad: Tensor, query: Tensor, both: Tensor, taken: Tensor, d_both: Tensor, heads: Heads
) -> Tensor:
    """The gradient of ``query`` from that of :func:`_attend`'s output; that of keys and values into
    ``d_both``."""
    keys, values = both
    torch.bmm(taken.transpose(1, 2), grad, out=d_both[1])
    d_taken = torch.bmm(grad, values.transpose(1, 2))
    d_scores = torch.ops.aten._softmax_backward_data(d_taken, taken, -1, taken.dtype).mul_(heads.scaling)
    torch.bmm(d_scores.transpose(1, 2), query, out=d_both[0])
    return torch.bmm(d_scores, keys)


def _by_head(columns: Tensor, rows: int, heads: Heads) -> Tensor:
    """``[n L, K G D]`` to ``[K n, G L, D]``."""
    parts: Tensor = columns.unflatten(0, (rows, -1)).unflatten(2, (heads.keys, heads.group, heads.size))
    return parts.permute(2, 0, 3, 1, 4).reshape(heads.keys * rows, -1, heads.size)


def _by_token(found: Tensor, rows: int, heads: Heads, into: Tensor | None = None) -> Tensor:
    """The other way around, into the columns ``into`` if they are given."""
    found = found.view(heads.keys, rows, heads.group, -1, heads.size).permute(1, 3, 0, 2, 4)
    if into is None:
        return found.reshape(-1, heads.queries)
    into.unflatten(0, (rows, -1)).unflatten(2, (heads.keys, heads.group, heads.size)).copy_(found)
    return into


def _keys(columns: Tensor, rows: int, heads: Heads) -> Tensor:
    """A view of ``[n L, 2 K D]`` as ``[2, K, n, L, D]``."""
    parts: Tensor = columns.unflatten(0, (rows, -1)).unflatten(2, (2, heads.keys, heads.size))
    return parts.permute(2, 3, 0, 1, 4)
