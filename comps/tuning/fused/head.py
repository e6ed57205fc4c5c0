"""Cross-entropy of an output head, in chunks, without a tensor of all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Logits at a time: 64 MB of them, a product large enough to run at full speed.
_CHUNK = 2**24


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, counts: Tensor
    ) -> Tensor:
        rows = min(len(hidden), max(1, _CHUNK // len(weight)))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = hidden.new_zeros(())
        # One for all chunks: memory as large as this is given back and taken anew, page by page, each time.
        space = hidden.new_empty(rows, len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = space[: len(hidden[part])]
            if bias is None:
                torch.mm(hidden[part], weight.t(), out=logits)
            else:
                torch.addmm(bias, hidden[part], weight.t(), out=logits)
            label, count = labels[part], counts[part, None]
            largest = logits.amax(1, keepdim=True)
            wanted = logits.gather(1, label[:, None]) - largest
            sums = logits.sub_(largest).exp_().sum(1, keepdim=True)
            total += ((sums.log() - wanted) * count).sum()
            if gradient is not None:
                # d loss / d logits = softmax - one at the label; its factors go onto the smaller product
                found = torch.mm(logits, weight, out=gradient[part])
                found.div_(sums).sub_(weight[label]).mul_(count)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, counts: Tensor) -> Tensor:
    """The sum over i of ``counts[i]`` times the cross-entropy of ``hidden[i] weight^T + bias`` with
    ``labels[i]``.

    ``hidden`` [N, width], the frozen ``weight`` [vocabulary, width], ``labels`` and ``counts`` [N]. The
    gradient of ``hidden`` is found on the way, while the logits of a chunk are there.
    """
    loss: Tensor = _Losses.apply(hidden, weight, bias, labels, counts)  # type: ignore[no-untyped-call]
    return loss


class HeadLoss:
    """As :func:`~comps.tuning.training.packing.packed_loss`, for a model whose ``head`` lets pass what it
    gets: ``outputs.logits`` are hidden states ``[1, N, width]``."""

    def __init__(self, head: nn.Linear) -> None:
        self._head = head

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        ids, counts = labels
        total = head_loss(outputs.logits[0], self._head.weight, self._head.bias, ids, counts)
        return total / (counts.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
