"""The order of rows, and their padding into batches."""

from __future__ import annotations

import random

import pytest
import torch

from comps.tuning.data.batching import LengthGroupedSampler
from comps.tuning.data.collate import Collator

LENGTHS = random.Random(1).choices(range(5, 200), k=1003)


def chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 1003])
def test_every_row_comes_exactly_once_an_epoch(rows: int, group: bool) -> None:
    sampler = LengthGroupedSampler(LENGTHS[:rows], 16, seed=3, group_by_length=group)
    assert sorted(sampler) == list(range(rows))
    assert len(sampler) == rows


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(LENGTHS, 16, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(3, 0) == order(3, 0)
    assert len({tuple(order(seed, epoch)) for seed in (3, 4, -5) for epoch in (0, 1)}) == 6


def test_a_global_batch_holds_rows_of_similar_length() -> None:
    def efficiency(group: bool) -> float:
        batches = chunks(list(LengthGroupedSampler(LENGTHS, 16, seed=3, group_by_length=group)), 16)
        padded = sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in batches)
        return sum(LENGTHS) / padded

    assert efficiency(group=False) < 0.6
    assert efficiency(group=True) > 0.95


def test_batches_come_in_random_order_and_the_smaller_one_last() -> None:
    sampler = LengthGroupedSampler(LENGTHS, 16, seed=3)
    firsts = []
    for epoch in range(30):
        sampler.set_epoch(epoch)
        batches = chunks(list(sampler), 16)
        assert [len(batch) for batch in batches[-2:]] == [16, 1003 % 16]
        firsts.append(sum(LENGTHS[row] for row in batches[0]) / 16)
    assert min(firsts) < 60
    assert max(firsts) > 140


def test_without_shuffling_the_files_order_stays() -> None:
    assert list(LengthGroupedSampler(LENGTHS, 16, seed=3, shuffle=False)) == list(range(1003))


ROWS = [{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}, {"input_ids": [7], "labels": [7]}]


def test_padding_reaches_the_longest_row_and_is_told_by_length_not_by_id() -> None:
    batch = Collator(pad_id=2)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 2], [7, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_padding_on_the_left_and_to_a_fixed_length() -> None:
    batch = Collator(pad_id=0, padding_side="left", length=4)(ROWS)
    assert batch["input_ids"].tolist() == [[0, 5, 6, 2], [0, 0, 0, 7]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 2], [-100, -100, -100, 7]]
