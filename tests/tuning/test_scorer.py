"""Scores of packed trees, fused layers and several configurations at once are those of rows by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures_elastic import lora, super_adapter
from fixtures_models import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from comps.tuning.evaluation.items import Items
from comps.tuning.evaluation.questions import to_question
from comps.tuning.evaluation.scorer import Scorer
from comps.tuning.evaluation.scores import RowScore

# family -> the fastest way that it allows
WAYS = {
    "llama": "fused",
    "qwen2": "fused",
    "mistral": "fused",
    "gemma2": "padded",
    "phi": "packed",
    "opt": "packed",
    "bloom": "padded",
    "gpt2": "packed",
}
QUESTIONS = [
    {"question": "Which is a metal?", "choices": ["iron", "wood", "water and air"], "answer": 0},
    {
        "question": "Which is larger, in the sky?",
        "choices": ["the sun", "the moon"],
        "answer": "the sun",
    },
    {"question": "True?", "choices": ["t", "f", "both of them, and neither", "it"], "answer": 3},
    {"question": "Which comes first?", "input": "a, b", "choices": ["a", "b"], "answer": 1},
    {"question": "Begins alike?", "choices": ["the same", "the same end"], "answer": 1},
]


def choice_items() -> Items:
    return Items.choices([to_question(record) for record in QUESTIONS], tiny_tokenizer())


def by_itself(model: PreTrainedModel, ids: list[int], learnt: list[bool]) -> RowScore:
    """The textbook's score of one row."""
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    places = [place for place in range(1, len(ids)) if learnt[place]]
    return RowScore(
        sum(found[place - 1, ids[place]].item() for place in places),
        len(places),
        sum(found[place - 1].argmax().item() == ids[place] for place in places),
    )


def assert_same(found: Any, expected: RowScore) -> None:
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-4)
    assert (found.tokens, found.greedy) == (expected.tokens, expected.greedy)


@pytest.mark.parametrize("way", ["fused", "packed", "padded"])
@pytest.mark.parametrize("family", WAYS)
def test_every_choice_scores_what_it_scores_by_itself(family: str, way: str) -> None:
    model = tiny_model(family)
    items = choice_items()
    expected = [[by_itself(model, row.ids, row.learnt) for row in item.rows] for item in items]
    scorer = Scorer(model, way=way, tokens=128)
    order = ("padded", "packed", "fused")
    assert scorer.way == min(way, WAYS[family], key=order.index)
    (scores,) = scorer.score(items)
    for result, rows in zip(scores.results, expected, strict=True):
        for found, each in zip(result, rows, strict=True):
            assert_same(found, each)


@pytest.mark.parametrize("copies", [1, 3, 8])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2", "bloom"])
def test_several_configurations_score_what_each_scores_alone(family: str, copies: int) -> None:
    model, space, controller = super_adapter(tiny_model(family), lora(family))
    items = choice_items()
    neighbour = list(space.heuristic)
    neighbour[-1] = space.minimal[-1]
    configurations = [space.maximal, space.minimal, tuple(neighbour), space.heuristic, space.maximal]
    expected = []
    for config in configurations:
        with controller.at(config):
            expected.append([[by_itself(model, row.ids, row.learnt) for row in item.rows] for item in items])
    assert expected[0] != expected[1] != expected[2] != expected[3]
    active = controller.active
    scorer = Scorer(model, controller, tokens=100, copies=copies)
    assert scorer.way == WAYS[family]
    mine = scorer.score(items, configurations)
    for scores, config, each in zip(mine, configurations, expected, strict=True):
        assert scores.configuration == config
        for result, rows in zip(scores.results, each, strict=True):
            for found, row in zip(result, rows, strict=True):
                assert_same(found, row)
    assert controller.active == active
    after = by_itself(model, items[0].rows[0].ids, items[0].rows[0].learnt)
    assert_same(after, expected[0][0][0])  # the model itself does what it did
