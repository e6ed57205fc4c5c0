"""Decoder layers of Llama's kind for scoring, several configurations of their adapters at a time.

Nothing is kept for a backward pass. A batch goes through the layers as P copies, one for each configuration,
and the base layer's products are those of one larger batch; an adapter's A is one product for all copies, a
0/1 mask on its result's rank axis gives each copy its rank, then comes B. Configurations that agree up to
some half of a layer (attention, MLP) have the same hidden states there and are one copy so far: neighbours
in a search share most of their way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from comps.tuning.evaluation.tree import Tree, attention
from comps.tuning.fused.decoder import rms_norm, rotate_
from patches.transformers_layers import AdaptedLinear, DecoderParts


@dataclass(frozen=True)
class Step:
    """One half of a layer: ``parents`` [P], which of the copies before each copy goes on from; ``ranks``
    [P][adapters]."""

    parents: list[int]
    ranks: list[list[int]]


class Joined:
    """Linear layers that read the same input, as one product, with their adapters; P copies of a batch."""

    def __init__(self, linears: Sequence[AdaptedLinear]) -> None:
        bases = [each.base for each in linears]
        if len(bases) > 1:
            joined = torch.cat([base.weight.data for base in bases])
            for base, part in zip(bases, joined.split([b.out_features for b in bases]), strict=True):
                base.weight.data = part  # views, so that no weight is in memory twice
            self._weight = joined
        else:
            self._weight = bases[0].weight.data
        self._bias: Tensor | None = None
        if any(base.bias is not None for base in bases):
            zeros = [base.weight.new_zeros(base.out_features) for base in bases]
            self._bias = torch.cat(
                [zero if b.bias is None else b.bias.data for b, zero in zip(bases, zeros, strict=True)]
            )
        self.adapters = []
        start = 0
        for each in linears:
            end = start + each.base.out_features
            if each.adapter is not None:
                self.adapters.append((start, end, each.adapter))
            start = end

    @property
    def ranks(self) -> list[int]:
        """The active rank of each adapter."""
        return [adapter.rank for *_, adapter in self.adapters]

    def __call__(self, x: Tensor, ranks: list[list[int]], residual: Tensor | None = None) -> Tensor:
        """``x`` [P T, in] to ``[P T, sum of out]``, plus ``residual``; ``ranks`` [P][adapters]."""
        y = x @ self._weight.t() if residual is None else torch.addmm(residual, x, self._weight.t())
        if self._bias is not None:
            y += self._bias
        if not self.adapters:
            return y
        largest = [max(each) for each in zip(*ranks, strict=True)]
        downs = [adapter.down[:rank] for (*_, adapter), rank in zip(self.adapters, largest, strict=True)]
        lows = x @ torch.cat(downs).t()
        if any(each != largest for each in ranks):
            places = [torch.arange(rank) for rank in largest]
            kept = [torch.cat([p < r for p, r in zip(places, each, strict=True)]) for each in ranks]
            lows.view(len(ranks), -1, lows.shape[1]).mul_(torch.stack(kept)[:, None].to(lows))
        place = 0
        for (start, end, adapter), rank in zip(self.adapters, largest, strict=True):
            low = lows[:, place : place + rank]
            y[:, start:end].addmm_(low, adapter.up[:, :rank].t(), alpha=adapter.scale)
            place += rank
        return y


class TreeDecoder:
    """The stand-in for the forward of layer ``number``. It keeps nothing of a batch.

    Of the ``last`` layer nothing is wanted but the tokens that something is predicted from (``sources``, if
    they are given), so what comes after its attention is computed of these alone.
    """

    def __init__(self, parts: DecoderParts, number: int, last: bool = False) -> None:
        self._number, self._last = number, last
        linears = parts.linears
        self._inputs, self._output = Joined(linears[:3]), Joined(linears[3:4])
        self._gate_up, self._down = Joined(linears[4:6]), Joined(linears[6:])
        self._widths = [each.base.out_features for each in linears[:3]]
        self._norms, self._eps = parts.norms, parts.eps
        self._size, self._scaling = parts.head_size, parts.scaling

    @property
    def ranks(self) -> tuple[list[int], list[int]]:
        """The active ranks of the adapters of attention and MLP."""
        return self._inputs.ranks + self._output.ranks, self._gate_up.ranks + self._down.ranks

    def __call__(
        self,
        own: Callable[..., Tensor],
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        tree: Tree | None = None,
        steps: Sequence[Step] | None = None,
        sources: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """``hidden_states`` [1, P T, hidden] of packed copies; what is none is the layer's own affair.
        ``steps``: of :func:`plan`; without them the adapters have their active ranks."""
        if tree is None:
            return own(hidden_states, *args, position_embeddings=position_embeddings, **others)
        assert position_embeddings is not None  # the models make them once for all layers
        cos, sin = position_embeddings[0][0], position_embeddings[1][0]
        if steps is None:
            first, second = (Step([0], [ranks]) for ranks in self.ranks)
        else:
            first, second = steps[2 * self._number : 2 * self._number + 2]
        x = _branch(hidden_states[0], first.parents, len(cos))
        cut = len(self._inputs.adapters)
        before = [each[:cut] for each in first.ranks]
        projected = self._inputs(rms_norm(x, self._norms[0], self._eps)[0], before)
        copies = len(first.parents)
        turning = projected[:, : sum(self._widths[:2])].view(len(x), -1, self._size)
        rotate_(turning, cos.repeat(copies, 1), sin.repeat(copies, 1))
        query, key, value = (
            part.view(copies, len(cos), -1, self._size) for part in projected.split(self._widths, 1)
        )
        heads = key.shape[2]
        found = attention(query.unflatten(2, (heads, -1)), key, value, tree, self._scaling)
        found, tokens = found.reshape(len(x), -1), len(cos)
        if self._last and sources is not None:
            found, x = (e.unflatten(0, (copies, tokens))[:, sources].flatten(0, 1) for e in (found, x))
            tokens = len(sources)
        x = self._output(found, [each[cut:] for each in first.ranks], x)

        x = _branch(x, second.parents, tokens)
        cut = len(self._gate_up.adapters)
        both = self._gate_up(rms_norm(x, self._norms[1], self._eps)[0], [each[:cut] for each in second.ranks])
        gate, up = both.chunk(2, 1)
        product = functional.silu(gate).mul_(up)
        return self._down(product, [each[cut:] for each in second.ranks], x)[None]


def _branch(x: Tensor, parents: list[int], tokens: int) -> Tensor:
    """``x`` [copies T, width] to a copy for each of ``parents``."""
    if parents == list(range(len(x) // tokens)):
        return x
    return x.view(-1, tokens, x.shape[1])[parents].flatten(0, 1)


def plan(ranks: Sequence[Sequence[list[int]]]) -> tuple[list[Step], list[int]]:
    """The steps through all half layers for configurations whose ``ranks`` are given [configurations][half
    layers][adapters], and the copy in which each configuration ends."""
    copy = [0] * len(ranks)
    steps = []
    for half in range(len(ranks[0])):
        known: dict[tuple[int, ...], int] = {}
        parents: list[int] = []
        used: list[list[int]] = []
        for number, each in enumerate(ranks):
            way = (copy[number], *each[half])
            if way not in known:
                known[way] = len(parents)
                parents.append(copy[number])
                used.append(each[half])
            copy[number] = known[way]
        steps.append(Step(parents, used))
    return steps, copy
