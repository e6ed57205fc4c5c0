"""The search space: which modules share ranks, and what a configuration is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from comps.tuning.elastic.sampler import sample
from comps.tuning.elastic.space import SearchSpace
from comps.tuning.errors import AdapterError
from comps.tuning.spec import RankGroup


def group(*modules: str, ranks: tuple[int, ...] = (16, 12, 8)) -> RankGroup:
    return RankGroup(modules=modules, ranks=ranks)


def llama(layers: int) -> list[str]:
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    return [f"model.layers.{i}.{part}" for i in range(layers) for part in parts] + ["lm_head"]


ATTENTION = group("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize(
    ("layers", "groups", "values"),
    [
        (16, [ATTENTION], 16),  # Llama-3.2-1B
        (22, [ATTENTION, group("up_proj"), group("down_proj")], 66),  # TinyLlama-1.1B
        (32, [ATTENTION, group("up_proj"), group("down_proj")], 96),  # Llama-2-7b
    ],
)
def test_published_models_need_the_published_number_of_values(layers, groups, values):
    assert len(SearchSpace.from_modules(groups, llama(layers))) == values


def test_a_configuration_is_group_major_then_layer():
    space = SearchSpace.from_modules([ATTENTION, group("up_proj"), group("down_proj")], llama(22))
    for g in range(3):
        for layer in range(22):
            elastic = space.groups[g * 22 + layer]
            assert (elastic.group, elastic.layer) == (g, layer)
            assert all(module.startswith(f"model.layers.{layer}.") for module in elastic.modules)
    assert space.groups[23].modules == ("model.layers.1.mlp.up_proj",)
    assert space.groups[1].names == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def test_layers_are_ordered_by_number_however_the_names_are_sorted():
    space = SearchSpace.from_modules([ATTENTION], sorted(llama(12)))
    assert [elastic.layer for elastic in space.groups] == list(range(12))


def test_two_stacks_of_layers_have_groups_of_their_own():
    names = [f"model.{stack}.layers.{i}.self_attn.q_proj" for stack in ("encoder", "decoder") for i in (0, 1)]
    space = SearchSpace.from_modules([group("q_proj")], names)
    assert [elastic.prefix for elastic in space.groups] == [
        "model.encoder.layers.0",
        "model.encoder.layers.1",
        "model.decoder.layers.0",
        "model.decoder.layers.1",
    ]


def test_names_match_whole_components_only():
    names = ["h.0.attn.proj", "h.0.attn.q_proj", "h.0.mlp.c_proj", "h.0.attn.c_proj"]
    assert SearchSpace.from_modules([group("proj")], names).groups[0].modules == ("h.0.attn.proj",)
    assert SearchSpace.from_modules([group("attn.c_proj")], names).groups[0].modules == ("h.0.attn.c_proj",)


def test_a_layer_without_a_groups_modules_is_skipped_for_that_group():
    names = ["layers.0.attn.q", "layers.0.mlp.up", "layers.1.mlp.up", "layers.2.attn.q"]
    space = SearchSpace.from_modules([group("q"), group("up")], names)
    assert [(elastic.group, elastic.layer) for elastic in space.groups] == [(0, 0), (0, 2), (1, 0), (1, 1)]


def test_an_unknown_module_is_named_with_what_there_is():
    with pytest.raises(AdapterError, match=r"'qproj'.*q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj"):
        SearchSpace.from_modules([group("qproj")], llama(2))


def test_a_module_in_two_groups_is_refused():
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.self_attn\.q_proj.*two rank groups"):
        SearchSpace.from_modules([ATTENTION, group("self_attn.q_proj")], llama(2))


def test_a_module_outside_the_layers_cannot_be_elastic():
    with pytest.raises(AdapterError, match=r"'lm_head'.*none of the model's numbered layers"):
        SearchSpace.from_modules([group("lm_head")], llama(2))


def test_named_configurations_follow_their_rules():
    spaces = [
        group("q_proj", ranks=(16, 12, 8)),
        group("up_proj", ranks=(16, 8)),
        group("down_proj", ranks=(16,)),
    ]
    space = SearchSpace.from_modules(spaces, llama(1))
    assert space.maximal == space.resolve("maximal") == (16, 16, 16)
    assert space.heuristic == space.resolve("heuristic") == (12, 16, 16)
    assert space.minimal == space.resolve("minimal") == (8, 8, 16)


def test_a_custom_configuration_is_checked_value_by_value():
    space = SearchSpace.from_modules([ATTENTION, group("up_proj")], llama(2))
    assert space.resolve("mine", [8, 12, 16, 8]) == (8, 12, 16, 8)
    with pytest.raises(AdapterError, match=r"has 3 values.*4 ranks \(2 groups x 2 layers\)"):
        space.resolve("mine", [8, 12, 16])
    with pytest.raises(AdapterError, match=r"custom_config\[2\] is 10.*up_proj of layer 0.*16, 12, 8"):
        space.resolve("mine", [8, 12, 10, 8])
    with pytest.raises(AdapterError, match=r"custom_config\[0\] is True"):
        SearchSpace.from_modules([group("up_proj", ranks=(1,))], llama(1)).check([True])


def test_a_version_that_is_no_rule_needs_a_configuration():
    space = SearchSpace.from_modules([ATTENTION], llama(2))
    with pytest.raises(AdapterError, match="'best' needs a custom_config") as caught:
        space.resolve("best")
    assert caught.value.param == "custom_config"
    with pytest.raises(AdapterError, match="is not the heuristic configuration"):
        space.resolve("heuristic", [8, 8])
    assert space.resolve("heuristic", [12, 12]) == (12, 12)


def test_parameters_are_ranks_times_widths():
    names = llama(2)
    space = SearchSpace.from_modules([ATTENTION, group("up_proj")], names, dict.fromkeys(names, 100))
    assert space.parameters([16, 8, 12, 12]) == (16 + 8) * 300 + (12 + 12) * 100


def test_samples_depend_on_seed_and_step_alone():
    space = SearchSpace.from_modules([ATTENTION, group("up_proj")], llama(16))
    assert sample(space, 42, 7) == sample(space, 42, 7)
    assert sample(space, 42, 7) != sample(space, 42, 8)
    assert sample(space, 42, 7) != sample(space, 43, 7)
    assert sample(SearchSpace(space.groups[:4]), 42, 7) == (8, 8, 12, 8)  # must not change between versions


def test_samples_are_uniform_and_independent():
    space = SearchSpace.from_modules([group("q_proj"), group("up_proj", ranks=(16, 8))], llama(1))
    draws = [sample(space, 0, step) for step in range(6000)]
    for rank in (16, 12, 8):
        for other in (16, 8):
            # Expected 1000; five standard deviations of a binomial are 144.
            assert abs(draws.count((rank, other)) - 1000) < 144


def test_the_space_needs_no_torch():
    modules = (
        "comps.tuning.elastic.read_space, comps.tuning.elastic.sampler, comps.tuning.elastic.elastic_config"
    )
    code = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
