"""Faster ways to compute what a model computes on packed batches, taken where they give the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from comps.tuning.fused.decoder import FusedDecoder
from comps.tuning.fused.head import HeadLoss
from comps.tuning.training.packing import pack, packed_loss, trial_batch
from patches.transformers_layers import decoder_layers, output_head, replace_forward, restore_forward

log = logging.getLogger(__name__)

Loss = Callable[..., Tensor]
# Of the loss, and of each gradient's norm; float32 sums in another order stay far below.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Fusion:
    """What has been fused: so many decoder layers; whether the output head is part of ``loss``, which takes
    the place of :func:`packed_loss`."""

    layers: int
    head: bool
    loss: Loss


def fuse(model: PreTrainedModel) -> Fusion:
    """Fuse what can be in ``model``, whose batches are packed, in evaluation mode.

    Both parts are tried with a small batch, and given up if they give another loss or other gradients.
    """
    with _adapters_that_count(model):
        return _fuse(model)


def _fuse(model: PreTrainedModel) -> Fusion:
    expected = _trial(model, packed_loss)
    every = list(decoder_layers(model))
    layers = [(layer, parts) for layer, parts in every if parts is not None]
    head = output_head(model)
    # Most models get what is tried first: all at once.
    for chosen, last in ((layers, head), (layers, None), ([], head)):
        if not chosen and last is None:
            continue
        for layer, parts in chosen:
            replace_forward(layer, FusedDecoder(parts, last=layer is every[-1][0]))
        loss: Loss = packed_loss
        if last is not None:
            replace_forward(last, _as_it_is)
            loss = HeadLoss(last)
        if _same(expected, _trial(model, loss)):
            return Fusion(len(chosen), last is not None, loss)
        for layer, _ in chosen:
            restore_forward(layer)
        if last is not None:
            restore_forward(last)  # something may follow the head: a factor, or a cap on the logits
        else:
            log.warning("the fused layers of this model do not give what its own give, and are not used")
    return Fusion(0, False, packed_loss)


def _as_it_is(own: Callable[..., Tensor], hidden: Tensor) -> Tensor:
    return hidden


@contextmanager
def _adapters_that_count(model: PreTrainedModel) -> Iterator[None]:
    """Small random weights where trained ones are all zero, as B is in new adapters: with those an adapter
    has no influence, nor A a gradient, and a fault in either would not show."""
    generator = torch.Generator().manual_seed(0)
    zeros = [weight for weight in model.parameters() if weight.requires_grad and not weight.any()]
    with torch.no_grad():
        for weight in zeros:
            weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight in zeros:
                weight.zero_()


def _trial(model: PreTrainedModel, loss: Loss) -> list[Tensor] | None:
    """The loss and all gradients; ``None`` when it fails."""
    inputs: dict[str, Any] = pack(trial_batch(model))
    labels = inputs.pop("labels")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        found = loss(model(**inputs), labels)
        return [
            found.detach(),
            *torch.autograd.grad(found, weights, allow_unused=True, materialize_grads=True),
        ]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever an unknown model does with what it gets
        log.warning("a faster way to compute failed with this model, and is not used", exc_info=True)
        return None


def _same(expected: list[Tensor] | None, found: list[Tensor] | None) -> bool:
    if expected is None or found is None:
        return False
    return all(
        float((mine - own).norm()) <= _TOLERANCE * float(own.norm()) + 1e-12
        for own, mine in zip(expected, found, strict=True)
    )
