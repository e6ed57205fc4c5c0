"""Attention over a packed batch of short rows, as a few batched products.

Each head's queries of all rows meet the keys of the common beginning in one product, and those of their own
row in another; the softmax goes over both. The beginning's keys are never copied for each row, and heads
that share keys (grouped queries) are one larger product. Probabilities are kept for the backward pass,
which is why this is for short rows: :func:`fits` says which.

Shapes: T tokens; n rows of L own tokens (with padding), s common ones; K key heads with G queries each; D a
head.
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
        shared = layout.shared
        output = projected.new_empty(len(projected), heads.queries)
        first, probabilities = None, list[Tensor]()
        if shared:
            first = _Block(projected[:shared], 1, heads)
            output[:shared] = first.attend(None, probabilities)
        own = _Block(_gather(projected[shared:], layout), layout.rows, heads).attend(first, probabilities)
        output[shared:] = own if layout.collect is None else own.index_select(0, layout.collect)
        ctx.save_for_backward(projected, *probabilities)
        ctx.layout, ctx.heads = layout, heads
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        projected, *probabilities = ctx.saved_tensors
        layout, heads = ctx.layout, ctx.heads
        shared = layout.shared
        first = _Block(projected[:shared], 1, heads) if shared else None
        rest = _Block(_gather(projected[shared:], layout), layout.rows, heads)
        result = torch.empty_like(projected)
        own, seen = rest.gradients(_spread(grad[shared:], layout), first, probabilities[-1])
        result[shared:] = own if layout.collect is None else own.index_select(0, layout.collect)
        if first is not None:
            assert seen is not None
            result[:shared] = first.gradients(grad[:shared], None, probabilities[0])[0]
            result[:shared, heads.queries :] += seen
        return result, None, None


class _Block:
    """Queries ``[K, n, G, L, D]``, keys and values ``[K, n, L, D]`` of ``rows`` rows, which lie one after
    another in ``projected`` [n L, ...]."""

    def __init__(self, projected: Tensor, rows: int, heads: Heads) -> None:
        self.heads, self.rows = heads, rows
        parts = projected.view(rows, -1, heads.keys * (heads.group + 2), heads.size)
        self.length = parts.shape[1]
        query, key, value = parts.split([heads.keys * heads.group, heads.keys, heads.keys], 2)
        self.query = query.unflatten(2, (heads.keys, heads.group)).permute(2, 0, 3, 1, 4).contiguous()
        self.key = key.permute(2, 0, 1, 3).contiguous()
        self.value = value.permute(2, 0, 1, 3).contiguous()

    def _own(self, each: Tensor) -> Tensor:
        """One matrix for each key head and row: ``[K n, ..., last]``."""
        return each.view(self.heads.keys * self.rows, -1, each.shape[-1])

    def _all(self, each: Tensor) -> Tensor:
        """One matrix for each key head: ``[K, ..., last]``."""
        return each.view(self.heads.keys, -1, each.shape[-1])

    def attend(self, first: _Block | None, probabilities: list[Tensor]) -> Tensor:
        """The output ``[n L, K G D]``. Appends ``[K, n, G, L, s + L]``: how much of each key of ``first``
        (s of them, if any) and of the row each query takes."""
        heads, length, shared = self.heads, self.length, first.length if first else 0
        scores = self.query.new_empty(*self.query.shape[:-1], shared + length)
        own = torch.bmm(self._own(self.query), self._own(self.key).transpose(1, 2))
        future = torch.full((length, length), -torch.inf, device=own.device).triu_(1)
        torch.add(
            future, own.view(*self.query.shape[:-1], length), alpha=heads.scaling, out=scores[..., shared:]
        )
        if first is not None:
            keys = first._all(first.key).transpose(1, 2)
            self._all(scores)[..., :shared].baddbmm_(self._all(self.query), keys, beta=0, alpha=heads.scaling)
        taken = torch.softmax(scores, -1)
        probabilities.append(taken)
        output = torch.bmm(self._own(taken)[..., shared:], self._own(self.value)).view(self.query.shape)
        if first is not None:
            self._all(output).baddbmm_(self._all(taken)[..., :shared], first._all(first.value))
        return output.permute(1, 3, 0, 2, 4).reshape(-1, heads.queries)

    def gradients(self, grad: Tensor, first: _Block | None, taken: Tensor) -> tuple[Tensor, Tensor | None]:
        """From the gradient ``[n L, K G D]`` of the output and what :meth:`attend` appended to the gradient
        of ``projected`` here; and of keys and values of ``first``, ``[s, 2 K D]``."""
        heads, shared = self.heads, first.length if first else 0
        grad = grad.reshape(self.rows, self.length, heads.keys, heads.group, heads.size)
        grad = grad.permute(2, 0, 3, 1, 4).contiguous()
        d_value = torch.bmm(self._own(taken)[..., shared:].transpose(1, 2), self._own(grad))
        d_taken = torch.empty_like(taken)
        d_own = torch.bmm(self._own(grad), self._own(self.value).transpose(1, 2))
        self._own(d_taken)[..., shared:] = d_own
        if first is not None:
            values = first._all(first.value).transpose(1, 2)
            self._all(d_taken)[..., :shared].baddbmm_(self._all(grad), values, beta=0)
        d_scores = torch.ops.aten._softmax_backward_data(d_taken, taken, -1, taken.dtype).mul_(heads.scaling)
        d_query = torch.bmm(self._own(d_scores)[..., shared:], self._own(self.key)).view(self.query.shape)
        d_key = torch.bmm(self._own(d_scores)[..., shared:].transpose(1, 2), self._own(self.query))
        d_first = None
        if first is not None:
            seen = self._all(d_scores)[..., :shared]
            self._all(d_query).baddbmm_(seen, first._all(first.key))
            parts = (
                torch.bmm(seen.transpose(1, 2), self._all(self.query)),
                torch.bmm(self._all(taken)[..., :shared].transpose(1, 2), self._all(grad)),
            )
            d_first = torch.cat([each.transpose(0, 1).flatten(1) for each in parts], 1)
        result = grad.new_empty(self.rows, self.length, heads.keys * (heads.group + 2), heads.size)
        queries = heads.keys * heads.group
        result[:, :, :queries].unflatten(2, (heads.keys, heads.group)).copy_(d_query.permute(1, 3, 0, 2, 4))
        for start, each in ((queries, d_key), (queries + heads.keys, d_value)):
            part = each.view(heads.keys, self.rows, self.length, heads.size)
            result[:, :, start : start + heads.keys].copy_(part.permute(1, 2, 0, 3))
        return result.flatten(2).flatten(0, 1), d_first


def _gather(rest: Tensor, layout: Layout) -> Tensor:
    """The rows' tokens as if padded, ``[n L, ...]``; what stands in padding does not matter."""
    return rest if layout.spread is None else rest.index_select(0, layout.spread)


def _spread(grad: Tensor, layout: Layout) -> Tensor:
    """The same for gradients, with 0 in padding."""
    if layout.spread is None or layout.collect is None:
        return grad
    return grad.new_zeros(len(layout.spread), grad.shape[1]).index_copy_(0, layout.collect, grad)
