"""Packed batches give the loss and the gradients of padded ones, which the textbook's formula gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures_batches import BATCHES, Rows, assert_same_gradients, padded, textbook, with_gradients
from fixtures_elastic import lora, randomise
from fixtures_models import save_tiny_model, tiny_model
from fixtures_training import run, train_spec, write_records
from torch import Tensor

from comps.tuning.elastic.model import build_adapter
from comps.tuning.training.packing import NAME, pack, packed_loss, packs

PACKED = ("llama", "qwen2", "mistral", "phi", "opt", "gpt2")
PADDED = ("gemma2", "bloom")  # a cap on the scores of attention; an attention of its own


def through_packing(model: torch.nn.Module, batch: dict[str, Tensor], items: int | None = None) -> Tensor:
    inputs = pack(batch)
    labels = inputs.pop("labels")
    return packed_loss(model(**inputs), labels, None if items is None else torch.tensor(items))


def assert_equal(model: torch.nn.Module, rows: Rows, left: bool = False, items: int | None = None) -> None:
    expected, gradients = with_gradients(model, textbook(model, rows, items))
    found, ours = with_gradients(model, through_packing(model, padded(rows, left), items))
    assert found == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(ours, gradients)


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("family", PACKED)
def test_loss_and_gradients_are_those_of_each_row_by_itself(family: str, rows: Rows) -> None:
    model = tiny_model(family)
    assert packs(model, 64)
    assert_equal(model, rows)


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
def test_padding_on_the_left_is_left_out_as_well(rows: Rows) -> None:
    model = tiny_model()
    packs(model, 64)
    assert_equal(model, rows, left=True, items=7)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_holds_for_elastic_adapters_with_gradient_checkpointing(family: str) -> None:
    base = tiny_model(family)
    assert packs(base, 64)
    model, space, controller = build_adapter(base, lora(family))
    assert space is not None
    assert controller is not None
    randomise(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    controller.set(space.minimal)
    model.train()
    rows = BATCHES["answers at the end"]
    expected, gradients = with_gradients(model, textbook(model, rows))
    base.activation_checkpointing_enable({"use_reentrant": False})
    found, ours = with_gradients(model, through_packing(model, padded(rows)))
    assert found == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(ours, gradients)


@pytest.mark.parametrize("family", PADDED)
def test_an_architecture_that_cannot_take_part_is_left_as_it_was(family: str) -> None:
    model = tiny_model(family)
    before = model.config._attn_implementation
    assert not packs(model, 64)
    assert model.config._attn_implementation == before


def test_rows_longer_than_the_window_of_attention_are_not_packed() -> None:
    model = tiny_model("mistral")
    model.config.sliding_window = 16
    assert not packs(model, 17)
    assert model.config._attn_implementation == "sdpa"


def test_the_beginning_of_long_rows_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comps.tuning.training.packing._LONGEST_SHARING", 7)
    model = tiny_model()
    rows = BATCHES["answers at the end"]
    assert pack(padded(rows))["layout"].shared == 0
    assert packs(model, 64)
    assert_equal(model, rows)


@pytest.mark.parametrize("setting", ["attention_chunk_size", "attn_temperature_tuning"])
def test_attention_that_depends_on_places_in_the_batch_is_not_packed(setting: str) -> None:
    model = tiny_model()
    setattr(model.config, setting, 8)
    assert not packs(model, 64)


def test_a_model_that_fails_on_packed_batches_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    forward = model.forward

    def strict(*, attention_mask: Tensor, **inputs: Tensor) -> object:
        assert attention_mask.dim() == 2
        return forward(attention_mask=attention_mask, **inputs)

    monkeypatch.setattr(model, "forward", strict)
    assert not packs(model, 64)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_leaks_between_tokens_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    norm = model.model.norm

    def leaking(hidden: Tensor) -> Tensor:
        return type(norm).forward(norm, hidden) + 1e-2 * hidden.cumsum(1)

    monkeypatch.setattr(norm, "forward", leaking)
    assert not packs(model, 64)


def test_what_is_common_is_computed_once_and_what_no_label_needs_not_at_all() -> None:
    rows = BATCHES["answers at the end"]
    inputs = pack(padded(rows))
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 20, 9, 8, 9, 20, 22, 23]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 3, 3, 4, 5, 6, 7]]
    assert inputs["layout"].shared == 3
    once = pack(padded(BATCHES["every token"]))
    assert once["labels"][1].sum() == 3 + 2 + 5, "each label of each row"
    assert len(once["logits_to_keep"]) < 10, "some of them from one position"


def test_other_calls_of_the_same_model_are_as_ever() -> None:
    model = tiny_model()
    batch = padded(BATCHES["answers at the end"], left=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before = model(**inputs).logits[:, -1]
        generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert packs(model, 64)
        assert model.config._attn_implementation == NAME
        torch.testing.assert_close(model(**inputs).logits[:, -1], before)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), generated)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_is_the_same_with_and_without_packing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    model = save_tiny_model(tmp_path / "model")
    data = write_records(tmp_path / "records.json")
    settings = {"max_train_steps": 4, "gradient_accumulation_steps": accumulation, "mask_input": False}
    settings["validation_split_percentage"] = 10
    packed = run(train_spec(tmp_path / "packed", model, data, **settings))
    monkeypatch.setattr("comps.tuning.training.trainer.packs", lambda model, longest: False)
    plain = run(train_spec(tmp_path / "plain", model, data, **settings))
    assert not any("padded" in message for message in packed.messages)
    assert any("batches are padded" in message for message in plain.messages)
    assert packed.losses == pytest.approx(plain.losses, rel=1e-5)
    assert [each for _, each in packed.series("valid_loss")] == pytest.approx(
        [each for _, each in plain.series("valid_loss")], rel=1e-5
    )
    assert packed.result is not None
    assert plain.result is not None
    assert packed.result["trained_tokens"] == plain.result["trained_tokens"]
