"""Fused layers and losses give what the model's own layers and PyTorch's own loss give."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fixtures_batches import BATCHES, Rows, padded, textbook, with_gradients
from fixtures_elastic import lora, randomise
from fixtures_models import save_tiny_model, tiny_model
from fixtures_training import run, train_spec, write_records
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from comps.tuning.elastic.model import ElasticController, build_adapter
from comps.tuning.fused import Fusion, fuse
from comps.tuning.fused.decoder import FusedDecoder
from comps.tuning.fused.head import head_loss
from comps.tuning.fused.projections import Projections
from comps.tuning.training.packing import pack, packed_loss, packs

FAMILIES = ("llama", "qwen2", "mistral")


def adapted(family: str = "llama", **settings: Any) -> tuple[PreTrainedModel, ElasticController]:
    """A tiny model that packs, with a random super-adapter at mixed ranks."""
    base = tiny_model(family)
    _, space, controller = build_adapter(base, lora(family, **settings))
    assert space is not None
    assert controller is not None
    randomise(base)
    controller.set([group.ranks[number % 3] for number, group in enumerate(space.groups)])
    base.eval()  # new adapters have their dropout on
    assert packs(base, 64)
    return base, controller


def loss_of(model: PreTrainedModel, fusion: Fusion, rows: Rows, items: int | None = None) -> Tensor:
    inputs = pack(padded(rows))
    labels = inputs.pop("labels")
    return fusion.loss(model(**inputs), labels, None if items is None else torch.tensor(items))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("long", [False, True], ids=["short rows", "long rows"])
def test_loss_and_gradients_are_those_of_each_row_by_itself(
    family: str, rows: Rows, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = adapted(family)
    expected, gradients = with_gradients(model, textbook(model, rows, 7))
    fusion = fuse(model)
    assert (fusion.layers, fusion.head) == (model.config.num_hidden_layers, True)
    if long:  # their attention is PyTorch's
        monkeypatch.setattr("comps.tuning.fused.attention._LARGEST", 0)
    found, ours = with_gradients(model, loss_of(model, fusion, rows, 7))
    assert found == pytest.approx(expected, rel=1e-5)
    assert_close(ours, gradients)


@pytest.mark.parametrize("modules", [["o_proj"], ["gate_proj"], ["k_proj", "down_proj"], ["q_proj"]])
def test_plain_adapters_on_some_layers_only(modules: list[str]) -> None:
    model = tiny_model("qwen2")
    assert packs(model, 64)
    adapter = peft.LoraConfig(r=4, target_modules=modules, layers_to_transform=[1], use_rslora=True)
    peft.get_peft_model(model, adapter)
    randomise(model)
    rows = BATCHES["answers at the end"]
    expected, gradients = with_gradients(model, textbook(model, rows))
    found, ours = with_gradients(model, loss_of(model, fuse(model), rows))
    assert found == pytest.approx(expected, rel=1e-5)
    assert_close(ours, gradients)


def test_ranks_change_from_step_to_step() -> None:
    model, controller = adapted()
    rows = BATCHES["every token"]
    expected = []
    for config in (controller.space.minimal, controller.space.maximal, controller.space.heuristic):
        controller.set(config)
        expected.append((config, *with_gradients(model, textbook(model, rows))))
    fusion = fuse(model)
    for config, loss, gradients in reversed(expected):
        controller.set(config)
        found, ours = with_gradients(model, loss_of(model, fusion, rows))
        assert found == pytest.approx(loss, rel=1e-5)
        assert_close(ours, gradients)


def test_dropout_draws_what_it_draws_without_fusion() -> None:
    model, _ = adapted("qwen2", dropout=0.3)
    rows = BATCHES["every token"]  # else the last layer has fewer tokens to draw for
    model.train()
    fusion = Fusion(0, False, packed_loss)
    losses = []
    for fused in (False, True):
        if fused:
            model.eval()
            fusion = fuse(model)
            model.train()
        torch.manual_seed(3)
        inputs = pack(padded(rows))
        labels = inputs.pop("labels")
        if fused:
            loss = fusion.loss(model(**inputs), labels)
        else:
            each = functional.cross_entropy(model(**inputs).logits[0], labels[0], reduction="none")
            loss = (each * labels[1]).sum() / labels[1].sum()
        losses.append(with_gradients(model, loss))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
    assert_close(losses[1][1], losses[0][1])
    torch.manual_seed(4)
    assert loss_of(model, fusion, rows).item() != pytest.approx(losses[0][0], rel=1e-4)


def test_the_last_layer_goes_on_with_the_tokens_that_predict_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted()
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    fusion = fuse(model)
    tokens, forward = [], Projections.forward

    def counted(self: Projections, x: Tensor, *others: Any) -> Any:
        if x.shape[1] in widths:
            tokens.append(len(x))
        return forward(self, x, *others)

    monkeypatch.setattr(Projections, "forward", counted)
    loss_of(model, fusion, BATCHES["answers at the end"])
    assert tokens == [12, 5]


def test_gradient_checkpointing_computes_each_layer_twice_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = adapted()
    fusion = fuse(model)
    model.train()
    calls, compute = [], FusedDecoder._compute

    def counted(self: FusedDecoder, *inputs: Any) -> Tensor:
        calls.append(self)
        return compute(self, *inputs)

    monkeypatch.setattr(FusedDecoder, "_compute", counted)
    expected, gradients = with_gradients(model, loss_of(model, fusion, BATCHES["every token"]))
    assert len(calls) == fusion.layers
    model.activation_checkpointing_enable({"use_reentrant": False})
    found, ours = with_gradients(model, loss_of(model, fusion, BATCHES["every token"]))
    assert len(calls) == 3 * fusion.layers
    assert found == expected
    assert_close(ours, gradients)


def test_other_calls_of_a_fused_layer_are_its_own() -> None:
    model, _ = adapted()
    batch = padded(BATCHES["answers at the end"], left=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before = model.model(**inputs).last_hidden_state[:, -1]
        fuse(model)
        torch.testing.assert_close(model.model(**inputs).last_hidden_state[:, -1], before)


def test_the_weights_of_a_fused_model_are_what_they_were() -> None:
    model, _ = adapted("qwen2")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fuse(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi"])
def test_other_families_keep_their_layers_and_lose_the_logits(family: str) -> None:
    model, _ = adapted(family)
    rows = BATCHES["answers at the end"]
    expected, gradients = with_gradients(model, textbook(model, rows))
    fusion = fuse(model)
    assert (fusion.layers, fusion.head) == (0, True)
    found, ours = with_gradients(model, loss_of(model, fusion, rows))
    assert found == pytest.approx(expected, rel=1e-5)
    assert_close(ours, gradients)


def test_a_layer_whose_adapter_is_of_another_kind_is_left_alone() -> None:
    model = tiny_model()
    assert packs(model, 64)
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    assert fuse(model).layers == 0


def test_a_model_whose_base_is_trained_is_left_alone() -> None:
    model = tiny_model()
    assert packs(model, 64)
    fusion = fuse(model)
    assert (fusion.layers, fusion.head) == (0, False)


def test_layers_that_compute_something_else_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted()
    norm = type(model.model.layers[0].input_layernorm)
    monkeypatch.setattr(norm, "forward", lambda self, x: functional.layer_norm(x, x.shape[-1:], self.weight))
    rows = BATCHES["every token"]
    expected, _ = with_gradients(model, textbook(model, rows))
    fusion = fuse(model)
    assert (fusion.layers, fusion.head) == (0, True)
    assert loss_of(model, fusion, rows).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fault", ["no adapter in the output", "no gradient of A", "no adapter in dx"])
def test_a_fault_in_the_adapters_would_be_found_out_although_they_begin_at_zero(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    build_adapter(model, lora())
    model.eval()
    assert packs(model, 64)
    forward, backward = Projections.forward, Projections.backward

    def faulty_forward(self: Projections, x: Tensor, training: bool, residual: Tensor | None = None) -> Any:
        y, used = forward(self, x, training, residual)
        if fault == "no adapter in the output":
            y = functional.linear(x, self._weight, self._bias) + (0 if residual is None else residual)
        return y, used

    def faulty_backward(self: Projections, grad: Tensor, x: Any, used: Any, needs: bool) -> Any:
        dx, grads = backward(self, grad, x, used, needs)
        if fault == "no gradient of A":
            grads = [torch.zeros_like(each) if number % 2 == 0 else each for number, each in enumerate(grads)]
        if fault == "no adapter in dx" and dx is not None:
            dx = grad @ self._weight
        return dx, grads

    monkeypatch.setattr(Projections, "forward", faulty_forward)
    monkeypatch.setattr(Projections, "backward", faulty_backward)
    assert fuse(model).layers == 0
    assert not any(weight.any() for name, weight in model.named_parameters() if ".lora_B." in name)


def test_a_fused_model_goes_when_nobody_uses_it() -> None:
    model, _ = adapted()
    fuse(model)
    layer = weakref.ref(model.model.layers[0])
    gc.disable()
    try:
        del model, _
        assert layer() is None
    finally:
        gc.enable()


def test_logits_that_are_changed_after_the_head_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted()
    forward = model.forward

    def capped(**inputs: Any) -> Any:
        outputs = forward(**inputs)
        outputs.logits = torch.tanh(outputs.logits)
        return outputs

    monkeypatch.setattr(model, "forward", capped)
    fusion = fuse(model)
    assert (fusion.layers, fusion.head) == (model.config.num_hidden_layers, False)


@pytest.mark.parametrize("chunk", [1, 3 * 50, 2**24])
@pytest.mark.parametrize("biased", [False, True])
def test_the_loss_in_chunks_is_the_loss(chunk: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comps.tuning.fused.head._CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 12, generator=generator).requires_grad_()
    weight, bias = (torch.randn(*size, generator=generator) * 9 for size in ((50, 12), (50,)))
    labels, counts = torch.tensor([3, 0, 49, 3, 7, 7, 1, 2]), torch.tensor([1, 4, 1, 2, 1, 1, 3, 1])
    logits = functional.linear(hidden, weight, bias if biased else None)
    expected = (functional.cross_entropy(logits, labels, reduction="none") * counts).sum()
    (gradient,) = torch.autograd.grad(expected / 5, hidden)
    found = head_loss(hidden, weight, bias if biased else None, labels, counts)
    (ours,) = torch.autograd.grad(found / 5, hidden)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-5)
    assert not head_loss(hidden.detach(), weight, None, labels, counts).requires_grad


def test_a_run_is_the_same_with_and_without_fusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(tmp_path / "model")
    data = write_records(tmp_path / "records.json")
    settings = {"max_train_steps": 4, "validation_split_percentage": 10, "mask_input": False}
    fused = run(train_spec(tmp_path / "fused", model, data, **settings))
    assert any("2 fused layers" in message for message in fused.messages)
    unfused = Fusion(0, False, packed_loss)
    monkeypatch.setattr("comps.tuning.training.trainer.fuse", lambda model: unfused)
    plain = run(train_spec(tmp_path / "plain", model, data, **settings))
    assert not any("fused layers" in message for message in plain.messages)
    assert fused.losses == pytest.approx(plain.losses, rel=1e-4)
    assert [each for _, each in fused.series("valid_loss")] == pytest.approx(
        [each for _, each in plain.series("valid_loss")], rel=1e-4
    )
