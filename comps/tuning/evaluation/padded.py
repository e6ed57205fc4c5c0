"""Log-likelihoods the plain way: rows in padded batches, for models whose batches cannot be packed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from comps.tuning.data.tokenise import Row
from comps.tuning.evaluation.scores import RowScore
from comps.tuning.training.loss import keeps_positions

CHUNK = 2**24  # logits at a time, 64 MB of them


@torch.inference_mode()
def score_rows(model: PreTrainedModel, rows: Sequence[Row]) -> list[RowScore]:
    """The score of each row of one batch."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    scored = torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        end = len(row.ids)
        ids[number, :end], mask[number, :end] = torch.tensor(row.ids), 1
        scored[number, 1:end] = torch.tensor(row.learnt[1:], dtype=torch.bool)
    ids, mask, scored = (each.to(model.device) for each in (ids, mask, scored))
    before = functional.pad(scored[:, 1:], (0, 1))
    if keeps_positions(model):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=before).logits
    else:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[before]
    logits, labels = logits.flatten(0, -2), ids[scored]
    size = max(1, CHUNK // logits.shape[-1])
    parts = [
        token_scores(part, torch.arange(len(part), device=part.device), label)
        for part, label in zip(logits.split(size), labels.split(size), strict=True)
    ]
    found, greedy = (torch.cat(each) for each in zip(*parts, strict=True))
    of_row = torch.arange(len(rows), device=ids.device)[:, None].expand_as(scored)[scored]
    return row_scores(found, greedy, of_row, len(rows))


def token_scores(logits: Tensor, places: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """``logits`` [N, vocabulary], which are used up, ``ids`` and ``places`` [M], whose of the N each is: each
    id's log-likelihood, and whether it is the likeliest.

    Less the log-sum-exp, and not by ``log_softmax``, which in float32 is off by 1e-5 where the vocabulary is
    large: that adds up over a row's tokens.
    """
    logits = logits.float()
    wanted = logits[places, ids]
    largest, likeliest = logits.max(1)
    rest = logits.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest)
    return wanted - rest[places], likeliest[places] == ids


def row_scores(found: Tensor, greedy: Tensor, of_row: Tensor, rows: int) -> list[RowScore]:
    """Sums over each row's tokens; ``of_row`` [N] says whose each token is."""
    sums = torch.zeros(rows, dtype=torch.float64, device=found.device).index_add_(0, of_row, found.double())
    counts = torch.zeros(2, rows, dtype=torch.long, device=found.device)
    counts[0].index_add_(0, of_row, torch.ones_like(of_row))
    counts[1].index_add_(0, of_row, greedy.long())
    tokens, right = counts.tolist()
    return [RowScore(*each) for each in zip(sums.tolist(), tokens, right, strict=True)]
