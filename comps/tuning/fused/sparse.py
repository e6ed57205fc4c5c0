"""Frozen linear layers that read the same input, with sparse adapters: forward and backward by hand.

``y_i = x W_i^T + b_i + dropout(x) D_i^T`` with ``D_i = s_i (B_i[:, :rho_i] A_i[:rho_i]) * (W_i != 0)``.
Without dropout the neighbours that have adapters are one product with ``W + D``, which is made for it, and
made again in the backward pass; there the gradient ``G = (g^T x) * (W != 0)`` of D takes its place. So one
matrix of a group's size is there at a time, and none is kept.

Against plain LoRA such a step does ``g^T x`` besides: three products of a frozen weight's size, not two.
With dropout, D is a product by itself, forward and backward: five.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from comps.tuning.fused.projections import Projections, Used
from patches.peft_sparse import effective_weight, masked_
from patches.transformers_layers import AdaptedLinear, Adapter


@dataclass
class _Part:
    """One layer's adapter: its rows in the group's weight and in its run's; its number in the group."""

    rows: slice
    inside: slice
    number: int
    adapter: Adapter


@dataclass
class _Run:
    """Rows of the group's weight: a layer without an adapter, or neighbours that all have one."""

    rows: slice
    parts: list[_Part] = field(default_factory=list)


def projections(linears: Sequence[AdaptedLinear]) -> Projections:
    """``linears`` as one group, of the kind that their adapters ask for."""
    sparse = any(each.adapter is not None and each.adapter.sparse for each in linears)
    return SparseProjections(linears) if sparse else Projections(linears)


class SparseProjections(Projections):
    """As its base class, for adapters that are all sparse. :class:`Used` has no ``lows``."""

    def __init__(self, linears: Sequence[AdaptedLinear]) -> None:
        super().__init__(linears)
        self._runs: list[_Run] = []
        start = number = 0
        for each in linears:
            rows = slice(start, start := start + each.base.out_features)
            if each.adapter is None:
                self._runs.append(_Run(rows))
                continue
            if not (self._runs and self._runs[-1].parts):
                self._runs.append(_Run(rows))
            run = self._runs[-1]
            run.rows = slice(run.rows.start, rows.stop)
            inside = slice(rows.start - run.rows.start, rows.stop - run.rows.start)
            run.parts.append(_Part(rows, inside, number, each.adapter))
            number += 1

    def forward(self, x: Tensor, training: bool, residual: Tensor | None = None) -> tuple[Tensor, Used]:
        adapters = [adapter for *_, adapter in self._adapters]
        ranks, noise = [adapter.rank for adapter in adapters], []
        if training and any(adapter.dropout for adapter in adapters):
            for adapter in adapters:
                kept = 1 - adapter.dropout
                noise.append(torch.empty_like(x).bernoulli_(kept).div_(kept))  # as torch's own dropout draws
        y = x.new_empty(len(x), len(self._weight))
        for run in self._runs:
            weight = self._weight[run.rows] if noise else self._effective(run, ranks)
            if residual is None:
                torch.mm(x, weight.t(), out=y[:, run.rows])
            else:
                torch.addmm(residual[:, run.rows], x, weight.t(), out=y[:, run.rows])
            if noise:
                deltas = self._effective(run, ranks, base=False)
                for part in run.parts:
                    y[:, part.rows].addmm_(x * noise[part.number], deltas[part.inside].t())
        if self._bias is not None:
            y += self._bias
        return y, Used(x.new_empty(0), noise, ranks)

    def backward(
        self, grad: Tensor, x: Tensor | None, used: Used, needs_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        assert x is not None
        dx = torch.empty_like(x) if needs_input else None
        grads: list[Tensor] = []
        for run in self._runs:
            outer, effective = grad[:, run.rows], None
            if dx is not None:
                weight = effective = self._effective(run, used.ranks, base=not used.noise)
                if used.noise:
                    weight = self._weight[run.rows]
                dx.addmm_(outer, weight, beta=1 if run.rows.start else 0)
                for part in run.parts if used.noise else ():
                    dx.addcmul_(grad[:, part.rows] @ effective[part.inside], used.noise[part.number])
            if not run.parts:
                continue
            whole = torch.empty_like(self._weight[run.rows]) if effective is None else effective
            if not used.noise:
                torch.mm(outer.t(), x, out=whole)
            for part in run.parts:
                found = whole[part.inside]
                if used.noise:
                    torch.mm(grad[:, part.rows].t(), x * used.noise[part.number], out=found)
                masked_(found, self._weight[part.rows])
                grads += _of_adapter(found, part.adapter, used.ranks[part.number])
        return dx, grads

    def _effective(self, run: _Run, ranks: Sequence[int], base: bool = True) -> Tensor:
        """``W + D`` of a run, or D alone: a new tensor, but for a layer without an adapter."""
        weight = self._weight[run.rows]
        if not run.parts:
            return weight
        found = torch.empty_like(weight)
        for part in run.parts:
            adapter, rank = part.adapter, ranks[part.number]
            effective_weight(
                weight[part.inside], adapter.up[:, :rank], adapter.down[:rank], adapter.scale,
                base=base, out=found[part.inside],
            )  # fmt: skip
        return found


def _of_adapter(gradient: Tensor, adapter: Adapter, rank: int) -> list[Tensor]:
    """Those of A and B, from that of their masked product [out, in]; zeros beyond the active rank."""
    down, up = adapter.down, adapter.up
    grads = [torch.zeros_like(down), torch.zeros_like(up)]
    torch.mul(up[:, :rank].t() @ gradient, adapter.scale, out=grads[0][:rank])
    torch.mul(gradient @ down[:rank].t(), adapter.scale, out=grads[1][:, :rank])
    return grads
