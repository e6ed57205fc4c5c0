"""Rows end to end without padding, and what all of them begin with only once.

Instruction data repeats its preamble in every row: with Alpaca's wording half of a short row is the same as
in all others. In a causal model nothing before a token depends on what follows, so the hidden states of the
common beginning are the same in every row. :func:`pack` puts it into the batch once; each row goes on from
it, and :func:`attend` has each token see the beginning and its own row. The loss and its gradients are those
of the padded batch but for the order of additions (with dropout: for its draws, which the rows then share at
the beginning). What no label depends on is left out: a row's last labelled token, and all that follows it.

A model has to take part: its attention must go through transformers' interface and pass on what it is given,
and nothing else may carry information from token to token. :func:`packs` finds out.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from comps.tuning.data.masking import IGNORED

log = logging.getLogger(__name__)

NAME = "packed"  # of our attention, in transformers' registry
# Tokens of a batch's longest row, above which its beginning is not shared: attention would need a mask as
# large as the square of that, for little that is saved.
_LONGEST_SHARING = 4096
_PROBE = 24  # tokens of the longest row that a model is tried with
# Settings of attention that depends on places in the batch, or on lengths that a trial does not reach.
_BY_PLACE = ("attention_chunk_size", "attn_temperature_tuning", "keep_window_size", "index_topk")


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a packed batch lie: ``shared`` common ones, then the rest of each of ``n`` rows.

    ``spread`` and ``collect`` are ``None`` when all rests have the same length L; otherwise ``spread``
    ``[n * L]`` holds, for each place of the rests as a padded ``[n, L]``, the token that goes there (any one
    for padding), and ``collect`` ``[tokens]`` the place of each token. ``mask`` ``[L, shared + L]``: what a
    row's tokens see; ``None`` when nothing is shared, so that it is what came before in the row.
    ``predicting`` [P]: the tokens that a label is predicted from, in order.
    """

    shared: int
    rows: int
    mask: Tensor | None
    spread: Tensor | None
    collect: Tensor | None
    predicting: Tensor
    _future: dict[tuple[int, int], Tensor] = field(default_factory=dict, compare=False, repr=False)

    def future(self, length: int, before: int) -> Tensor:
        """What is added to scores of ``length`` tokens with those ``before`` them and each other, ``[length,
        before + length]``: -inf for what comes later, else 0. Made once for all layers."""
        found = self._future.get((length, before))
        if found is None:
            like = self.predicting
            found = torch.full((length, before + length), -torch.inf, device=like.device).triu_(before + 1)
            self._future[length, before] = found
        return found

    @classmethod
    def of(cls, shared: int, rests: Tensor, predicting: Tensor) -> Layout:
        """``rests`` [n]: how many tokens each row has of its own, at least one."""
        rows, longest = len(rests), int(rests.max())
        mask = None
        if shared:
            mask = torch.ones(longest, shared + longest, dtype=torch.bool, device=rests.device).tril(shared)
        if bool((rests == longest).all()):
            return cls(shared, rows, mask, None, None, predicting)
        place = torch.arange(longest, device=rests.device)
        real = place < rests[:, None]
        starts = rests.cumsum(0) - rests
        spread = torch.where(real, starts[:, None] + place, 0).flatten()
        return cls(shared, rows, mask, spread, real.flatten().nonzero().squeeze(1), predicting)


def pack(batch: dict[str, Tensor]) -> dict[str, Any]:
    """A model's inputs for a padded batch of ``input_ids``, ``attention_mask``, ``labels`` ``[n, length]``.

    ``labels`` become ``[2, N]``: the ids to be predicted, each from one of the N positions in
    ``logits_to_keep``, and how many rows predict it there.
    """
    ids, labels = batch["input_ids"], batch["labels"].clone()
    real = batch["attention_mask"].bool()
    if not bool(real[:, 0].all()):  # padded on the left
        length = ids.shape[1]
        turn = (torch.arange(length, device=ids.device) + (length - real.sum(1))[:, None]) % length
        ids, labels = ids.gather(1, turn), labels.gather(1, turn)
    labels[:, 0] = IGNORED  # nothing comes before it
    places = torch.arange(ids.shape[1], device=ids.device)
    learnt = labels != IGNORED
    # Tokens that a label depends on; one at least, for rows without any.
    needed = torch.where(learnt, places, 1).amax(1)
    same = (ids == ids[0]).all(0).cumprod(0).sum()
    shared = int(torch.minimum(same, needed.min() - 1))
    if ids.shape[0] > 1 and int(needed.max()) > _LONGEST_SHARING:
        shared = 0
    rests = needed - shared
    used = (places >= shared) & (places < needed[:, None])

    row, place = learnt.nonzero(as_tuple=True)
    source = place - 1
    starts = shared + rests.cumsum(0) - rests
    source = torch.where(source < shared, source, starts[row] + source - shared)
    size = int(ids.max()) + 1
    code, count = torch.unique(source * size + labels[row, place], return_counts=True)
    return {
        "input_ids": torch.cat([ids[0, :shared], ids[used]])[None],
        "position_ids": torch.cat([places[:shared], places.expand_as(ids)[used]])[None],
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),  # so none is made
        "labels": torch.stack([code % size, count]),
        "logits_to_keep": code // size,
        "layout": Layout.of(shared, rests, torch.unique_consecutive(code // size)),
    }


def packed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """Cross-entropy of ``outputs.logits`` ``[1, N, vocabulary]`` with the ``labels`` of :func:`pack`, a mean
    over ``num_items_in_batch`` labels of rows (those of all micro-batches of the step), or over all here.
    """
    ids, counts = labels
    total: Tensor = (_losses(outputs.logits[0], ids) * counts).sum()
    return total / (counts.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: ``query`` ``[1, heads, tokens, size]``, ``key`` and ``value`` with
    as many or fewer heads; returns ``[1, tokens, heads, size]``. Without a layout: plain attention."""
    if layout is None:
        output: Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )[0]
        return output, None
    if others.get("softcap") is not None or others.get("position_bias") is not None:
        raise NotImplementedError("attention with a cap on its scores, or a bias of its own")
    if attention_mask is None or attention_mask.numel() != 1:
        raise NotImplementedError("attention with a mask of its own")

    def split(each: Tensor) -> tuple[Tensor, Tensor]:
        """``[1, heads, shared, size]``, and the rests as ``[n, heads, L, size]``."""
        heads, size = each.shape[1], each.shape[3]
        rest = each[0, :, layout.shared :]
        if layout.spread is not None:
            rest = rest.index_select(1, layout.spread)
        return each[:, :, : layout.shared], rest.view(heads, layout.rows, -1, size).transpose(0, 1)

    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.device.type != "cpu":  # with a mask, other kernels are slow unless heads agree
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
        groups = 1
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": groups > 1}
    (query_shared, query), (key_shared, key), (value_shared, value) = split(query), split(key), split(value)
    parts = []
    if layout.shared:
        parts.append(
            functional.scaled_dot_product_attention(
                query_shared, key_shared, value_shared, is_causal=True, **options
            )[0]
        )
        key = torch.cat([key_shared.expand(layout.rows, -1, -1, -1), key], 2)
        value = torch.cat([value_shared.expand(layout.rows, -1, -1, -1), value], 2)
    found = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=layout.mask, is_causal=layout.mask is None, **options
    )
    found = found.transpose(0, 1).flatten(1, 2)
    parts.append(found if layout.collect is None else found.index_select(1, layout.collect))
    return torch.cat(parts, 1).transpose(0, 1)[None], None


def packs(model: PreTrainedModel, max_length: int) -> bool:
    """Whether ``model`` gives for a packed batch what it gives for the padded one; it is tried out.

    Afterwards the attention of a model that does is ours; of one that does not, what it was.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config = model.config
    window = getattr(config, "sliding_window", None)
    if config._attn_implementation != "sdpa" or (window is not None and window < max_length):
        return False
    if any(getattr(config, name, None) for name in _BY_PLACE):
        return False
    batch = trial_batch(model)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        following = batch["labels"][:, 1:]
        expected = _losses(logits[following != IGNORED], following[following != IGNORED])
        model.set_attn_implementation(NAME)
        try:
            inputs = pack(batch)
            labels, counts = inputs.pop("labels")
            found = _losses(model(**inputs).logits[0], labels).repeat_interleave(counts)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # it takes no layout, or cannot work with one, for a reason of its own
            log.info("batches are padded, since the model fails on a packed one: %r", error)
            found = torch.full_like(expected, torch.nan)
    near = float(expected.std()) * (1e-3 if logits.dtype == torch.float32 else 0.1)
    if torch.allclose(found.sort().values, expected.sort().values, rtol=0, atol=near):
        return True
    model.set_attn_implementation("sdpa")
    return False


def trial_batch(model: PreTrainedModel) -> dict[str, Tensor]:
    """A small padded batch to try a way of computing with. Its rows begin alike, every other token has a
    label."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(1000, model.config.vocab_size), (3, _PROBE), generator=generator)
    ids[:, : _PROBE // 3] = ids[0, : _PROBE // 3]
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels = torch.where(mask.bool(), ids, IGNORED)
    labels[:, ::2] = IGNORED
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: each.to(model.device) for name, each in batch.items()}


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    losses: Tensor = functional.cross_entropy(logits.float(), labels, reduction="none")
    return losses
