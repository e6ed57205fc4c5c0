"""Metrics and their standard errors, by formulas written down anew."""

from __future__ import annotations

import math
import statistics

import pytest

from comps.tuning.data.tokenise import Row
from comps.tuning.evaluation.generate import is_exact, is_numeric, last_number
from comps.tuning.evaluation.items import Item, Items
from comps.tuning.evaluation.scores import RowScore, Scores, mean, ratio

ROW = Row([1, 2], [False, True])


def choice(
    lls: list[float], answer: int, characters: list[int], sizes: list[int]
) -> tuple[Item, tuple[RowScore, ...]]:
    rows = tuple(RowScore(ll, 2, 1) for ll in lls)
    return Item((ROW,) * len(lls), "here", answer, tuple(characters), tuple(sizes)), rows


def test_the_three_accuracies_differ_by_what_lengths_they_divide_by() -> None:
    pairs = [
        choice([-4.0, -5.0], 0, [2, 10], [2, 10]),  # acc right, acc_norm wrong
        choice([-4.0, -5.0], 1, [2, 10], [2, 2]),  # only acc_norm right
        choice([-6.0, -6.0, -6.5], 0, [3, 3, 3], [3, 3, 3]),  # of equal ones the first
        choice([-1.0, -6.0], 1, [1, 1], [1, 9]),  # only acc_bytes right
    ]
    scores = Scores(None, Items(item for item, _ in pairs), tuple(rows for _, rows in pairs))
    assert scores.per_item("acc") == [1, 0, 1, 0]
    assert scores.per_item("acc_norm") == [0, 1, 1, 0]
    assert scores.per_item("acc_bytes") == [0, 0, 1, 1]
    metric = scores.metric("acc")
    assert metric.value == 0.5
    assert metric.stderr == pytest.approx(statistics.stdev([1, 0, 1, 0]) / 2)
    records = list(scores.records())
    assert records[1]["acc_norm"] == 1
    assert (records[1]["chosen"], records[1]["chosen_norm"]) == (
        1 - records[1]["answer"],
        records[1]["answer"],
    )
    assert records[1]["log_likelihoods"] == [-4.0, -5.0]
    assert scores.metric("loss").value == pytest.approx((4 + 5 + 6 + 6) / 8)  # of the right choices


def test_losses_are_means_over_tokens_and_their_errors_those_of_a_ratio() -> None:
    rows = [RowScore(-3.0, 3, 1), RowScore(-10.0, 4, 4), RowScore(-2.0, 1, 0)]
    scores = Scores(None, Items([Item((ROW,), "here")] * 3), tuple((row,) for row in rows))
    loss = scores.metric("loss")
    assert loss.value == pytest.approx(15 / 8)
    residuals = [3 - 15 / 8 * 3, 10 - 15 / 8 * 4, 2 - 15 / 8 * 1]
    expected = math.sqrt(sum(each**2 for each in residuals) / 2 / 3) / (8 / 3)
    assert loss.stderr == pytest.approx(expected)
    perplexity = scores.metric("perplexity")
    assert perplexity.value == pytest.approx(math.exp(15 / 8))
    assert perplexity.stderr == pytest.approx(math.exp(15 / 8) * expected)
    assert scores.metric("token_accuracy").value == pytest.approx(5 / 8)
    assert scores.per_item("loss") == pytest.approx([1, 2.5, 2])
    with pytest.raises(ValueError, match="needs choices"):
        scores.metric("acc")
    with pytest.raises(ValueError, match="no metric"):
        scores.metric("accuracy")


def test_a_single_item_has_no_standard_error() -> None:
    assert math.isnan(mean([1.0]).stderr)
    assert math.isnan(ratio([1.0], [2.0]).stderr)
    assert mean([1.0, 1.0]).stderr == 0


@pytest.mark.parametrize(
    ("output", "expected", "right"),
    [
        ("The answer is 4.", "4.0", True),
        ("2 + 2 = 4, so 5", "4", False),
        ("It costs $1,234.50", "1234.5", True),
        ("-3", "3", False),
        ("7.0004", "7", True),
        ("no number", "7", False),
        ("", "7", False),
        ("So the answer is B.", "B", True),
        ("A or B", "A", False),
        ("A Big one", "B", False),
        ("Because", "B", False),
    ],
)
def test_numbers_and_letters_are_the_last_of_an_answer(output: str, expected: str, right: bool) -> None:
    assert is_numeric(output, expected) is right


def test_answers_are_compared_without_the_blanks_around_them() -> None:
    assert is_exact(" a b\n", "a b")
    assert not is_exact("a  b", "a b")
    assert last_number("1" * 5000) == float("1" * 300)
