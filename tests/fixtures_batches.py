"""Batches of rows that begin alike, or don't, and the textbook's loss of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from comps.tuning.data.masking import IGNORED

Rows = list[tuple[list[int], list[int]]]  # ids, and the places that are learnt

# name -> rows
BATCHES: dict[str, Rows] = {
    "answers at the end": [
        ([5, 6, 7, 8, 9, 20, 21], [5, 6]),
        ([5, 6, 7, 9, 30], [4]),
        ([5, 6, 7, 8, 9, 20, 22, 23, 2], [7, 8]),
    ],
    "every token": [(ids, list(range(len(ids)))) for ids in ([5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8, 10, 11])],
    "answers within the beginning": [([5, 6, 7, 8, 1], [1, 2, 4]), ([5, 6, 7, 8, 2], [1, 4])],
    "prompts, not answers": [([5, 6, 7, 8, 9, 9], [1, 2]), ([5, 6, 3, 3], [0, 1, 2]), ([5, 6], [1])],
    "one length": [([5, 6, 7, number], [3]) for number in range(1, 6)],
    "nothing in common": [([number, 6, 7], [1, 2]) for number in range(1, 5)],
    "one row": [([5, 6, 7, 8], [2, 3])],
    "the same row twice": [([5, 6, 7, 8], [2, 3]), ([5, 6, 7, 8], [2, 3])],
    "a row of one token": [([5], [0]), ([5, 6, 7], [2])],
    "a row without labels": [([5, 6, 7, 8, 9], []), ([5, 6, 2, 2], [3])],
}


def padded(rows: Rows, left: bool = False) -> dict[str, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), IGNORED),
    }
    for number, (ids, learnt) in enumerate(rows):
        start = longest - len(ids) if left else 0
        batch["input_ids"][number, start : start + len(ids)] = torch.tensor(ids)
        batch["attention_mask"][number, start : start + len(ids)] = 1
        for place in learnt:
            batch["labels"][number, start + place] = ids[place]
    return batch


def textbook(model: torch.nn.Module, rows: Rows, items: int | None = None) -> Tensor:
    """Row by row, without any padding, with all logits."""
    total, count = torch.zeros(()), 0
    for ids, learnt in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        for place in learnt:
            if place:
                total = total + functional.cross_entropy(logits[place - 1], torch.tensor(ids[place]))
                count += 1
    return total / (items or count)


def with_gradients(model: torch.nn.Module, loss: Tensor) -> tuple[float, dict[str, Tensor]]:
    loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return loss.item(), found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for the order of additions. What cancels out (the gradient of a key's bias is 0) is noise as
    large as a rounding error of the terms, which grows with the largest gradient and differs by processor."""
    assert expected
    assert found.keys() >= expected.keys()
    largest = max(float(each.abs().max()) for each in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name],
            gradient,
            rtol=1e-4,
            atol=1e-5 * largest,
            msg=lambda said, name=name: f"{name}: {said}",
        )
