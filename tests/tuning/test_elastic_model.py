"""Elastic models of every family: what they compute, and their gradients."""

from __future__ import annotations

import itertools
import time

import peft
import pytest
import torch
from fixtures_elastic import GROUPS, RANKS, logits, lora, randomise, super_adapter, tokens
from fixtures_models import tiny_model

from comps.tuning.elastic.model import build_adapter, make_elastic
from comps.tuning.elastic.sampler import sample
from comps.tuning.elastic.space import SearchSpace
from comps.tuning.errors import AdapterError
from comps.tuning.spec import LoraSpec, RankGroup

FAMILIES = sorted(GROUPS)
LORA_SCALE = 2.0  # alpha 16 over rank 8


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_group_per_layer_with_all_its_modules(family):
    _, space, _ = super_adapter(tiny_model(family), lora(family))
    assert [(g.group, g.layer) for g in space.groups] == list(itertools.product(range(3), range(2)))
    for group in space.groups:
        assert len(group.modules) == len(GROUPS[family][group.group])
    assert sum(len(group.modules) for group in space.groups) == 2 * sum(map(len, GROUPS[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_its_base_with_the_deltas_of_the_active_ranks(family):
    model, space, controller = super_adapter(tiny_model(family), lora(family))
    config = sample(space, 0, 1)
    controller.set(config)

    expected = tiny_model(family)
    weights = dict(expected.named_modules())
    adapted = dict(model.get_base_model().named_modules())
    with torch.no_grad():
        for rank, group in zip(config, space.groups, strict=True):
            for module in group.modules:
                a, b = adapted[module].lora_A["default"].weight, adapted[module].lora_B["default"].weight
                delta = LORA_SCALE * b[:, :rank] @ a[:rank]
                weights[module].weight += delta.T if family == "gpt2" else delta
    assert torch.allclose(logits(model), logits(expected), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_maximal_configuration_is_bit_identical_to_stock_peft(family):
    elastic, _, _ = super_adapter(tiny_model(family), lora(family))
    targets = sorted({name for group in GROUPS[family] for name in group})
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, fan_in_fan_out=family == "gpt2")
    stock = peft.get_peft_model(tiny_model(family), config).eval()
    randomise(stock)
    assert torch.equal(logits(elastic), logits(stock))


def test_ranks_go_back_after_a_block_even_when_it_fails():
    model, space, controller = super_adapter(tiny_model(), lora())
    assert controller.active == space.maximal
    at_maximal = logits(model)
    with controller.at(space.minimal):
        assert controller.active == space.minimal
        assert not torch.allclose(logits(model), at_maximal, atol=1e-3)
    assert torch.equal(logits(model), at_maximal)
    block = controller.at(space.minimal)
    block.__enter__()
    assert block.__exit__(RuntimeError, RuntimeError(), None) is False
    assert controller.active == space.maximal
    controller.set(space.heuristic)
    controller.maximal()
    assert controller.active == space.maximal
    with pytest.raises(AdapterError, match="has 1 values"):
        controller.set([8])


def _gradients(checkpointing: bool, options: dict[str, bool]) -> list[dict[str, torch.Tensor]]:
    model, space, controller = super_adapter(tiny_model(), lora(dropout=0.2))
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().activation_checkpointing_enable(options)
    found = []
    for step in range(3):
        torch.manual_seed(step)
        controller.set(sample(space, 0, step))
        model.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return found


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_gradients_with_checkpointing_are_those_without_it_at_every_rank(options):
    for plain, checkpointed in zip(_gradients(False, {}), _gradients(True, options), strict=True):
        assert len(plain) == 2 * 2 * 5  # A and B of five modules in two layers
        assert plain.keys() == checkpointed.keys()
        for name, gradient in plain.items():
            assert torch.allclose(gradient, checkpointed[name], atol=1e-7), name
            assert torch.count_nonzero(gradient) > 0, name


def test_set_up_of_a_thirty_layer_model_takes_well_under_a_second():
    model = peft.get_peft_model(
        tiny_model(num_hidden_layers=30), peft.LoraConfig(r=8, target_modules=["q_proj", "k_proj", "up_proj"])
    )
    names = [
        name for name, m in tiny_model(num_hidden_layers=30).named_modules() if isinstance(m, torch.nn.Linear)
    ]
    start = time.process_time()
    groups = [
        RankGroup(modules=("q_proj", "k_proj"), ranks=RANKS),
        RankGroup(modules=("up_proj",), ranks=RANKS),
    ]
    controller = make_elastic(model, SearchSpace.from_modules(groups, names))
    assert time.process_time() - start < 0.5
    assert len(controller.active) == 60


def test_plain_lora_targets_what_peft_would_or_what_is_asked():
    model, space, controller = build_adapter(tiny_model("opt"), LoraSpec())
    assert space is None
    assert controller is None
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    model, space, _ = build_adapter(
        tiny_model(), LoraSpec(r=8, target_modules=("o_proj",), groups=lora().groups[:1])
    )
    assert model.peft_config["default"].target_modules == {"o_proj", "q_proj", "k_proj", "v_proj"}
    assert not any("o_proj" in module for module in space.ranks)


def test_modules_that_do_not_exist_are_named():
    with pytest.raises(AdapterError, match=r"no module named 'c_attn'; it has .*q_proj"):
        build_adapter(tiny_model(), LoraSpec(target_modules=("q_proj", "c_attn")))
    with pytest.raises(AdapterError, match="no linear module named 'c_attn'"):
        build_adapter(tiny_model(), LoraSpec(groups=(RankGroup(modules=("c_attn",), ranks=(4,)),)))


@pytest.mark.parametrize(("family", "name"), [("llama", "embed_tokens"), ("gpt2", "wte")])
def test_an_embedding_gets_no_adapter(family, name):
    with pytest.raises(AdapterError, match=f"'{name}' is an embedding"):
        build_adapter(tiny_model(family), LoraSpec(target_modules=(name,)))


def test_an_architecture_without_defaults_needs_target_modules():
    model = tiny_model()
    model.config.model_type = "unheard_of"
    with pytest.raises(AdapterError, match="'unheard_of'; name them in target_modules"):
        build_adapter(model, LoraSpec())


def test_a_space_that_does_not_fit_the_adapter_is_refused():
    stock = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    q_proj, k_proj = (f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj"))
    for module, ranks, message in [
        (q_proj, (8, 4), "has rank 4, below the 8"),
        (k_proj, (4,), "k_proj' cannot be elastic: a Linear layer has no linear LoRA adapter"),
        ("model.layers.7.mlp.up_proj", (4,), "no module"),
    ]:
        space = SearchSpace.from_modules([RankGroup(modules=(module,), ranks=ranks)], [module])
        with pytest.raises(AdapterError, match=message):
            make_elastic(stock, space)
