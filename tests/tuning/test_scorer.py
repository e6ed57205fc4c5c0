"""Scores of packed trees, fused layers and several configurations at once are those of rows by themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_elastic import lora, super_adapter
from fixtures_models import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from comps.tuning.elastic.model import load_adapter, make_elastic
from comps.tuning.errors import AdapterError
from comps.tuning.evaluation import padded, tree
from comps.tuning.evaluation.engine import Engine
from comps.tuning.evaluation.items import Items
from comps.tuning.evaluation.questions import to_question
from comps.tuning.evaluation.scorer import Scorer
from comps.tuning.evaluation.scores import RowScore
from comps.tuning.spec import DataSpec

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


@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("way", ["fused", "packed", "padded"])
def test_logits_of_a_few_tokens_at_a_time(way: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = tiny_model("llama"), choice_items()
    (expected,) = Scorer(model, way=way).score(items)
    monkeypatch.setattr(padded, "CHUNK", at_once * model.config.vocab_size)
    (scores,) = Scorer(model, way=way).score(items)
    for found, each in zip(scores.results, expected.results, strict=True):
        for mine, row in zip(found, each, strict=True):
            assert_same(mine, row)


def test_what_several_choices_begin_with_is_predicted_once() -> None:
    batch = tree.pack(list(choice_items()))
    pairs = list(zip(batch.sources[batch.predictors].tolist(), batch.labels.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert batch.sources.tolist() == sorted({source for source, _ in pairs})
    assert len(batch.sources) < len(pairs)


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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_long_rows_take_another_way_through_attention(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comps.tuning.evaluation.tree._LARGEST", 0)
    model, space, controller = super_adapter(tiny_model(family), lora(family))
    items = choice_items()
    scorer = Scorer(model, controller)
    assert scorer.way == WAYS[family]
    found = scorer.score(items, [space.minimal, space.heuristic])
    for scores, config in zip(found, [space.minimal, space.heuristic], strict=True):
        with controller.at(config):
            for item, result in zip(items, scores.results, strict=True):
                for row, mine in zip(item.rows, result, strict=True):
                    assert_same(mine, by_itself(model, row.ids, row.learnt))


def test_rows_beyond_the_window_of_attention_are_padded() -> None:
    model = tiny_model("mistral", sliding_window=24)
    items = choice_items()
    scorer = Scorer(model)
    assert scorer.way == "fused"
    assert max(len(row.ids) for item in items for row in item.rows) > 24
    (scores,) = scorer.score(items)
    for item, result in zip(items, scores.results, strict=True):
        for row, mine in zip(item.rows, result, strict=True):
            assert_same(mine, by_itself(model, row.ids, row.learnt))


def test_a_slice_that_grows_costs_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    model, space, controller = super_adapter(tiny_model(), lora())
    items, scorer = choice_items(), Scorer(model, controller)
    asked: list[tuple[list[str], list[Any]]] = []
    score = Engine.score

    def counted(self: Engine, batch: Any, configurations: Any) -> Any:
        asked.append((sorted(item.where for item in batch), list(configurations)))
        return score(self, batch, configurations)

    monkeypatch.setattr(Engine, "score", counted)
    told: list[tuple[int, int]] = []
    first = scorer.score(items[:2], [space.minimal], progress=lambda *each: told.append(each))
    whole = scorer.score(items, [space.minimal, space.maximal])
    assert told == [(2, 2)]
    assert sum(len(batch) * len(configs) for batch, configs in asked) == 2 * len(items)
    assert whole[0].results[:2] == first[0].results
    asked.clear()
    assert scorer.score(items, [space.maximal, space.minimal])[1].results == whole[0].results
    assert not asked
    with controller.at(space.minimal):  # the model as it is
        assert scorer.score(items)[0].configuration == space.minimal
    with pytest.raises(AdapterError, match="needs 6 ranks"):
        scorer.score(items, [(8,)])


def test_responses_are_scored_where_training_has_loss() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    records = [
        {"instruction": "Say it", "output": "a b c"},
        {"instruction": "And", "input": "x", "output": "d"},
    ]
    items = Items.responses(
        [to_question(record) for record in records], tokenizer, DataSpec(train_file=Path("none"))
    )
    (scores,) = Scorer(model).score(items)
    for item, (found,) in zip(items, scores.results, strict=True):
        (row,) = item.rows
        assert row.ids[-1] == tokenizer.eos_token_id
        assert_same(found, by_itself(model, row.ids, row.learnt))
    losses = [-result[0].log_likelihood for result in scores.results]
    tokens = [sum(item.rows[0].learnt) for item in items]
    assert scores.metric("loss").value == pytest.approx(sum(losses) / sum(tokens))


def test_of_rows_longer_than_the_model_the_beginning_is_dropped() -> None:
    questions = [to_question(record) for record in QUESTIONS]
    whole, cut = (Items.choices(questions, tiny_tokenizer(), length) for length in (None, 20))
    assert (whole.truncated, cut.truncated) == (0, len(questions))
    assert whole.hash != cut.hash
    for one, other in zip(whole, cut, strict=True):
        for row, kept in zip(one.rows, other.rows, strict=True):
            assert kept.ids == row.ids[-21:]  # the last token is only predicted
            assert kept.learnt == row.learnt[-21:]


def test_a_model_is_left_as_it_was() -> None:
    """Training and generation go on as before, with the attention and the layers that they had."""
    model, space, controller = super_adapter(tiny_model(), lora())
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    before = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, use_cache=True)
    learning = [name for name, weight in model.named_parameters() if weight.requires_grad]
    Scorer(model, controller).score(choice_items(), [space.minimal])
    assert torch.equal(
        model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, use_cache=True), before
    )
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == learning


def test_layers_that_compute_something_else_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    norm = type(model.model.layers[0].input_layernorm)
    monkeypatch.setattr(norm, "forward", lambda self, x: torch.nn.functional.layer_norm(x, x.shape[-1:]))
    items = choice_items()
    scorer = Scorer(model)
    assert scorer.way == "packed"
    (scores,) = scorer.score(items)
    row = items[0].rows[0]
    assert_same(scores.results[0][0], by_itself(model, row.ids, row.learnt))


def test_choices_that_see_each_other_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tree.pack

    def leaking(*args: Any) -> Any:
        batch = right(*args)
        length = batch.tree.length
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return replace(batch, tree=replace(batch.tree, sees=batch.tree.sees | causal))

    monkeypatch.setattr(tree, "pack", leaking)
    for scale in (0.02, 0.1, 0.5):
        assert Scorer(tiny_model(initializer_range=scale)).way == "padded"


def test_items_too_long_to_be_trees_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    items, model = choice_items(), tiny_model()
    whole = Scorer(model).score(items)[0].results
    monkeypatch.setattr("comps.tuning.evaluation.engine._LONGEST", 5)
    monkeypatch.setattr(tree, "pack", lambda *_: pytest.fail("packed"))
    monkeypatch.setattr(Engine, "_packs", lambda self: True)
    for one, other in zip(Scorer(model, way="packed").score(items)[0].results, whole, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)


def test_several_scorers_of_one_model_do_not_disturb_each_other() -> None:
    model, space, controller = super_adapter(tiny_model(), lora())
    items = choice_items()
    first, second, third = (Scorer(model, controller, way=way) for way in ("fused", "fused", "packed"))
    configurations = [space.minimal, space.heuristic]
    found = [scorer.score(items, configurations) for scorer in (first, second, third)]
    for config, *scores in zip(configurations, *found, strict=True):
        with controller.at(config):
            expected = by_itself(model, items[0].rows[0].ids, items[0].rows[0].learnt)
        for each in scores:
            assert_same(each.results[0][0], expected)


@pytest.mark.parametrize("size", [1.0, 1e-2])
def test_a_sparse_super_adapter_is_scored_through_its_own_layers(tmp_path: Path, size: float) -> None:
    base = tiny_model()
    with torch.no_grad():
        for weight in base.model.layers.parameters():
            weight[weight.abs() < 0.01] = 0
    zeroed = {name: weight.clone() for name, weight in base.state_dict().items()}
    _, space, _ = super_adapter(base, lora(sparse=True), tmp_path)
    # So little that a mask left out would pass for rounding.
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for name, weight in weights.items():
        weight.mul_(size if ".lora_B" in name else 1)
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    fresh = tiny_model()
    fresh.load_state_dict(zeroed)
    model = load_adapter(fresh, tmp_path)
    controller = make_elastic(model, space)
    items, scorer = choice_items(), Scorer(model, controller)
    assert scorer.way == "packed"
    found = scorer.score(items, [space.minimal, space.maximal])
    assert found[0].results != found[1].results
    for scores in found:
        assert scores.configuration is not None
        with controller.at(scores.configuration):
            for row, mine in zip(items[1].rows, scores.results[1], strict=True):
                assert_same(mine, by_itself(model, row.ids, row.learnt))


def test_only_configurations_that_share_layers_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, space, controller = super_adapter(tiny_model(), lora())
    asked: list[list[Any]] = []
    score = Engine.score

    def counted(self: Engine, batch: Any, configurations: Any) -> Any:
        asked.append(list(configurations))
        return score(self, batch, configurations)

    monkeypatch.setattr(Engine, "score", counted)
    late = (*space.maximal[:-1], space.minimal[-1])  # differs in the last layer only
    Scorer(model, controller).score(choice_items(), [space.maximal, space.minimal, late])
    assert sorted(map(sorted, asked)) == [[space.minimal], sorted([late, space.maximal])]
