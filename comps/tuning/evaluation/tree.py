"""Items as trees: what all begin with once, each item's prompt once, then its choices.

In a causal model nothing before a token depends on what follows. So a batch computes once what all its rows
begin with (an instruction's preamble), each item's prompt once for all its choices, and no padding; a token
sees the beginning, its item's prompt and its own choice. What no scored token depends on is left out: a
row's last token, and all that follows the last scored one. The numbers are those of rows by themselves but
for the order of additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from comps.tuning.data.tokenise import Row
from comps.tuning.evaluation.items import Item

NAME = "tree"  # of our attention, in transformers' registry
_LARGEST = 2**23  # attention scores computed at once as a tensor, 32 MB of them


@dataclass(frozen=True)
class Tree:
    """Where a batch's tokens lie: ``shared`` common ones, then those of each of ``n`` items.

    ``spread`` ``[n * L]``: for each place of the items as a padded ``[n, L]`` the token that goes there (any
    one for padding), counted from the first after the common ones; ``collect``: the place of each token.
    Both are ``None`` when all items are of one length. ``sees`` ``[n, L, L]``: which of its item's tokens a
    token sees; padding sees all, so that it has something to see.
    """

    shared: int
    items: int
    length: int
    spread: Tensor | None
    collect: Tensor | None
    sees: Tensor


@dataclass(frozen=True)
class Packed:
    """A batch of items. ``sources`` ``[M]``: the tokens that something is predicted from; ``labels`` ``[N]``:
    the distinct ids to be predicted, and ``predictors`` ``[N]``, in ascending order, which of the sources
    predicts each; ``wanted`` ``[S]`` and ``of_row`` ``[S]``: for every scored token which of the labels it
    is, and whose, with rows counted through all items."""

    ids: Tensor
    positions: Tensor
    tree: Tree
    sources: Tensor
    labels: Tensor
    predictors: Tensor
    wanted: Tensor
    of_row: Tensor
    rows: int


def sizes(items: Sequence[Item]) -> list[int]:
    """How many tokens each item adds to a batch of all of them."""
    if not items:
        return []
    shared = _common([row.ids for item in items for row in item.rows], len(items[0].rows[0].ids))
    found = []
    for item in items:
        needed = [_needed(row) for row in item.rows]
        common = _common([row.ids for row in item.rows], min(needed))
        found.append(common + sum(each - common for each in needed) - min(shared, common))
    return found


def pack(items: Sequence[Item], device: torch.device | str = "cpu") -> Packed:
    """All rows must have a scored token behind the first one."""
    needed = [[_needed(row) for row in item.rows] for item in items]
    shortest = min(map(min, needed))
    shared = _common([row.ids for item in items for row in item.rows], shortest - 1)
    ids = list(items[0].rows[0].ids[:shared])
    positions = list(range(shared))
    parts: list[list[int]] = []  # for each item, the choice that each token belongs to; 0: all
    scored: list[tuple[int, int, int]] = []  # token, label, row
    number = 0
    for item, ends in zip(items, needed, strict=True):
        common = _common([row.ids for row in item.rows], min(ends))
        start = len(ids) - shared  # a token at a place of the prompt lies at start + place
        ids += item.rows[0].ids[shared:common]
        positions += range(shared, common)
        part = [0] * (common - shared)
        for choice, (row, end) in enumerate(zip(item.rows, ends, strict=True), start=1):
            behind = len(ids) - common
            for place in range(1, end + 1):
                if row.learnt[place]:
                    source = place - 1
                    if source >= common:
                        source += behind
                    elif source >= shared:
                        source += start
                    scored.append((source, row.ids[place], number))
            ids += row.ids[common:end]
            positions += range(common, end)
            part += [choice] * (end - common)
            number += 1
        parts.append(part)
    sources, labels, of_row = torch.tensor(scored, device=device).unbind(1)
    size = int(labels.max()) + 1
    code, wanted = torch.unique(sources * size + labels, return_inverse=True)
    sources, predictors = torch.unique_consecutive(code // size, return_inverse=True)
    return Packed(
        ids=torch.tensor(ids, device=device),
        positions=torch.tensor(positions, device=device),
        tree=_tree(shared, parts, device),
        sources=sources,
        labels=code % size,
        predictors=predictors,
        wanted=wanted,
        of_row=of_row,
        rows=number,
    )


def _needed(row: Row) -> int:
    """The place of the last scored token: as many tokens come before it."""
    return next(place for place in range(len(row.ids) - 1, -1, -1) if row.learnt[place])


def _common(rows: Sequence[Sequence[int]], most: int) -> int:
    """How many ids all ``rows`` begin with, at most ``most``."""
    first, *others = rows
    for other in others:
        if first[:most] != other[:most]:
            most = next(place for place in range(most) if first[place] != other[place])
    return most


def _tree(shared: int, parts: list[list[int]], device: torch.device | str) -> Tree:
    lengths = torch.tensor([len(part) for part in parts])
    longest = int(lengths.max())
    part = torch.zeros(len(parts), longest, dtype=torch.long)
    for number, each in enumerate(parts):
        part[number, : len(each)] = torch.tensor(each)
    places = torch.arange(longest)
    real = places < lengths[:, None]
    sees = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    sees &= (places[:, None] >= places) & real[:, None, :]
    sees |= ~real[:, :, None]
    spread = collect = None
    if not bool(real.all()):
        starts = lengths.cumsum(0) - lengths
        spread = torch.where(real, starts[:, None] + places, 0).flatten().to(device)
        collect = real.flatten().nonzero().squeeze(1).to(device)
    return Tree(shared, len(parts), longest, spread, collect, sees.to(device))


def attention(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scaling: float | None) -> Tensor:
    """``query`` ``[P, T, K, G, D]``, ``key`` and ``value`` ``[P, T, K, D]`` of P copies of a batch of T
    tokens, with K key heads of G queries each; to ``[P, T, K, G, D]``."""
    copies, _, keys, group, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    places, shared = tree.items * tree.length, tree.shared
    if copies * keys * group * places * (shared + tree.length) > _LARGEST:
        return _by_torch(query, key, value, tree, scaling)
    output = torch.empty_like(query)

    def own(each: Tensor) -> Tensor:
        """``[K, P, n, (G,) L, D]``."""
        rest = each[:, shared:]
        if tree.spread is not None:
            rest = rest.index_select(1, tree.spread)
        rest = rest.reshape(copies, tree.items, tree.length, *rest.shape[2:]).movedim(3, 0)
        return rest.transpose(3, 4).contiguous() if each.dim() == 5 else rest.contiguous()

    q, k, v = own(query), own(key), own(value)
    many, one = keys * copies * tree.items, keys * copies  # matrices: one an item, one a copy
    scores = q.new_empty(*q.shape[:-1], shared + tree.length)
    within = torch.bmm(q.view(many, -1, size), k.view(many, -1, size).transpose(1, 2)).view(*q.shape[:-1], -1)
    hidden = torch.zeros_like(tree.sees, dtype=q.dtype).masked_fill_(~tree.sees, -torch.inf)
    torch.add(hidden[:, None], within, alpha=scaling, out=scores[..., shared:])
    if shared:
        first_q = query[:, :shared].permute(2, 0, 3, 1, 4).reshape(one, group * shared, size)
        first_k, first_v = (
            e[:, :shared].permute(2, 0, 1, 3).reshape(one, shared, size) for e in (key, value)
        )
        scores.view(one, -1, shared + tree.length)[..., :shared].baddbmm_(
            q.view(one, -1, size), first_k.transpose(1, 2), beta=0, alpha=scaling
        )
        seen = torch.bmm(first_q, first_k.transpose(1, 2)).mul_(scaling).view(one, group, shared, shared)
        seen += torch.full((shared, shared), -torch.inf, device=q.device, dtype=q.dtype).triu_(1)
        found = torch.bmm(torch.softmax(seen, -1).view(one, -1, shared), first_v)
        output[:, :shared] = found.view(keys, copies, group, shared, size).permute(1, 3, 0, 2, 4)
    taken = torch.softmax(scores, -1)
    found = torch.bmm(taken.view(many, -1, taken.shape[-1])[..., shared:], v.view(many, -1, size))
    if shared:
        found.view(one, -1, size).baddbmm_(taken.view(one, -1, taken.shape[-1])[..., :shared], first_v)
    rest = found.view(q.shape).permute(1, 2, 4, 0, 3, 5).flatten(1, 2)
    output[:, shared:] = rest if tree.collect is None else rest.index_select(1, tree.collect)
    return output


def _by_torch(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scaling: float) -> Tensor:
    """The same, without a tensor of all scores; for long rows."""
    copies, _, keys, group, _ = query.shape
    shared = tree.shared
    query = query.flatten(2, 3)
    if group > 1:
        key, value = (each.repeat_interleave(group, 2) for each in (key, value))
    output = torch.empty_like(query)
    if shared:
        q, k, v = (each[:, :shared].transpose(1, 2) for each in (query, key, value))
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        output[:, :shared] = found.transpose(1, 2)
    mask = functional.pad(tree.sees, (shared, 0), value=True)
    for copy in range(copies):
        rests = []
        for each in (query, key, value):
            rest = each[copy, shared:]
            if tree.spread is not None:
                rest = rest.index_select(0, tree.spread)
            rests.append(rest.unflatten(0, (tree.items, tree.length)).transpose(1, 2))
        q, k, v = rests
        if shared:
            first = [e[copy, :shared].transpose(0, 1).expand(tree.items, -1, -1, -1) for e in (key, value)]
            k, v = torch.cat([first[0], k], 2), torch.cat([first[1], v], 2)
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scaling)
        rest = found.transpose(1, 2).flatten(0, 1)
        output[copy, shared:] = rest if tree.collect is None else rest.index_select(0, tree.collect)
    result: Tensor = output.unflatten(2, (keys, group))
    return result


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Tree | None = None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: ``query`` ``[1, heads, tokens, size]``, ``key`` and ``value`` with
    as many or fewer heads; returns ``[1, tokens, heads, size]``. Without a tree: plain attention."""
    if tree is None:
        output: Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )[0]
        return output, None
    if others.get("softcap") is not None or others.get("position_bias") is not None:
        raise NotImplementedError("attention with a cap on its scores, or a bias of its own")
    if attention_mask is None or attention_mask.numel() != 1:
        raise NotImplementedError("attention with a mask of its own")
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    found = attention(q.unflatten(2, (k.shape[2], -1)), k, v, tree, scaling)
    return found.flatten(2, 3), None
