"""Batches of padded tensors from rows of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from comps.tuning.data.masking import IGNORED


@dataclass(frozen=True)
class Collator:
    """Pads rows to the longest of the batch, or to ``length`` tokens when given.

    Returns ``input_ids``, ``attention_mask`` and ``labels``, each a LongTensor ``[batch, length]``. The
    attention mask comes from the rows' real lengths: the padding id may be the EOS, which is learnt.
    """

    pad_id: int
    padding_side: Literal["left", "right"] = "right"
    length: int | None = None

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(self.length or 0, *(len(row["input_ids"]) for row in rows))
        shape = (len(rows), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED, dtype=torch.long),
        }
        for index, row in enumerate(rows):
            count = len(row["input_ids"])
            place = slice(0, count) if self.padding_side == "right" else slice(length - count, length)
            batch["input_ids"][index, place] = torch.tensor(row["input_ids"])
            batch["attention_mask"][index, place] = 1
            batch["labels"][index, place] = torch.tensor(row["labels"])
        return batch
