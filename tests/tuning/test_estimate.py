"""The time left is told from a tenth of a run, on a clock of the test's own."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fixtures_models import save_tiny_model
from fixtures_training import run, train_spec, write_records

from comps.tuning.data.batching import LengthGroupedSampler
from comps.tuning.data.dataset import TokenRows
from comps.tuning.data.tokenise import Row
from comps.tuning.training.estimate import Estimate, packed_work, step_work


def test_the_work_of_a_step_is_its_rows_padded_to_the_longest() -> None:
    assert step_work([3, 5, 2, 9, 1], [0, 1, 2, 3, 4], 2) == [10, 18, 1]
    assert step_work([3, 5, 2, 9, 1], [4, 3, 2, 1, 0], 2) == [18, 10, 3]
    assert step_work([3, 5], [0, 1], 1, fixed_length=16) == [16, 16]


def test_the_work_of_a_packed_step_is_its_tokens_and_the_common_ones_once_a_batch() -> None:
    assert packed_work([3, 5, 2, 9, 1], [0, 1, 2, 3, 4], 2, common=1) == [7, 10, 1]
    assert packed_work([3, 5, 4, 9], [0, 1, 2, 3], 4, common=2, batches_per_step=2) == [17]


def test_what_all_rows_begin_with_is_found_and_never_longer_than_any() -> None:
    def rows(*ids: list[int]) -> TokenRows:
        return TokenRows.collect(Row(each, [True] * len(each)) for each in ids)

    assert rows([1, 2, 3, 4], [1, 2, 5], [1, 2, 3]).common_beginning() == 2
    assert rows([1, 2, 3], [4]).common_beginning() == 0
    assert rows([1, 2]).common_beginning() == 2
    # Every other row is not looked at, and is shorter than what the others have in common.
    odd = rows(*([1, 2, 3, 4, 5] if number % 2 == 0 else [9] for number in range(1200)))
    assert odd.common_beginning() == 1
    work = packed_work(odd.lengths, list(LengthGroupedSampler(odd.lengths, 4, 0)), 4, odd.common_beginning())
    assert min(work) >= 1


@pytest.mark.parametrize("common", [None, 0, 20])
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("overhead", [0.0, 0.05])
def test_after_a_tenth_the_estimate_is_right_within_a_fifth(
    seed: int, overhead: float, common: int | None
) -> None:
    """Rows of very different lengths, steps that vary by a fifth besides, a slow first step, pauses; padded
    (``None``) or packed."""
    random.seed(seed)
    lengths = [20 + min(512, int(random.lognormvariate(4, 0.8))) for _ in range(800)]
    order = list(LengthGroupedSampler(lengths, 8, seed))
    work = step_work(lengths, order, 8) if common is None else packed_work(lengths, order, 8, common)
    seconds = [
        (overhead + tokens * 1e-4) * random.uniform(0.8, 1.2) + (3 if step == 0 else 0)
        for step, tokens in enumerate(work)
    ]
    pause_every, pause = 10, 0.4
    pauses = [pause * random.uniform(0.8, 1.2) if (step + 1) % pause_every == 0 else 0 for step in range(100)]
    estimate = Estimate(lambda epoch: work, 100, pause_every)
    for step in range(1, 100):
        estimate.step_done(step, seconds[step - 1])
        if pauses[step - 1]:
            estimate.pause_done(pauses[step - 1])
        left = sum(seconds[step:]) + sum(pauses[step:])
        if step >= 10:
            # Towards the end the little that is left depends on a few steps: then it is right within a
            # small part of the whole.
            near = {"rel": 0.2} if step <= 50 else {"abs": 0.05 * (sum(seconds) + sum(pauses))}
            assert estimate.seconds_left(step) == pytest.approx(left, **near)


def test_nothing_is_told_before_anything_was_measured() -> None:
    assert Estimate(lambda epoch: [1, 1, 1], 3, 0).seconds_left(0) is None


def test_a_run_that_goes_on_from_a_checkpoint_counts_what_is_left_only() -> None:
    estimate = Estimate(lambda epoch: [10] * 30, 100, 0)
    estimate.step_done(91, 5)
    estimate.step_done(92, 1)
    assert estimate.seconds_left(92) == pytest.approx(8)


def test_a_run_knows_the_work_of_all_its_steps(tmp_path: Path) -> None:
    """Several epochs, accumulation, a last step that is not full: as many as the Trainer makes."""
    model = save_tiny_model(tmp_path / "model")
    data = write_records(tmp_path / "records.json")
    spec = train_spec(
        tmp_path / "run",
        model,
        data,
        epochs=2,
        batch_size=3,
        gradient_accumulation_steps=2,
        save_steps=5,
        logging_steps=10,
    )
    events = run(spec).events
    progress = [each["data"] for each in events if "seconds_left" in each["data"]]
    assert progress[-1]["seconds_left"] == 0
    assert 2 in [each["step"] for each in progress], "a tenth of 14 steps is done"
    told = [each["seconds_left"] for each in progress if each["step"] > 1]
    assert all(seconds is not None and seconds >= 0 for seconds in told)
    assert max(each["step"] for each in progress) == 14
