"""The loss without logits for tokens that have no label.

Prompts are not learnt, so most positions need no output head, which is a large part of a small model's work
(a fifth of SmolLM2-135M's) and most of its memory. transformers' models take the positions as
``logits_to_keep``; the loss is the same number, the gradients are the same, but for the order of additions.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn import functional

from comps.tuning.data.masking import IGNORED


def keeps_positions(model: torch.nn.Module) -> bool:
    """Whether the base model's forward takes ``logits_to_keep``, as nearly all do."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def labelled_only(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's inputs for ``batch``, whose ``labels`` are ``[batch, length]``.

    ``labels`` become the N token ids to be predicted, ``logits_to_keep`` the positions before them; with
    these a model's logits are ``[N, vocabulary]``.
    """
    following = batch["labels"][:, 1:]
    wanted = following != IGNORED
    return batch | {"labels": following[wanted], "logits_to_keep": functional.pad(wanted, (0, 1))}


def mean_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of ``outputs.logits`` ``[N, vocabulary]`` with ``labels`` ``[N]``, a mean over
    ``num_items_in_batch`` labels (those of all micro-batches of the step), or over N.
    """
    total = functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return total / (max(1, labels.numel()) if num_items_in_batch is None else num_items_in_batch)
