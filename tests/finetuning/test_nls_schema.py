"""Every spelling of an NLS block comes to the same groups; what does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures_documents import SQFT_MODULES, SQFT_ONE_GROUP, SQFT_THREE_GROUPS
from hypothesis import given
from hypothesis import strategies as st

from comps.cores.errors import InvalidRequest
from comps.finetuning.schemas.lora import LoraConfig
from comps.finetuning.schemas.nls import check_modules, lora_spec
from comps.tuning.spec import LoraSpec, RankGroup

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")
QKV = RankGroup(modules=("q_proj", "k_proj", "v_proj"), ranks=(16, 12, 8))


def config(**fields: Any) -> LoraConfig:
    return LoraConfig.model_validate({"neural_lora_search": True} | fields)


def spec_of(**fields: Any) -> LoraSpec:
    return lora_spec(config(**fields))[0]


def document(body: dict[str, Any]) -> LoraSpec:
    return lora_spec(LoraConfig.model_validate(body["General"]["lora_config"]))[0]


def test_the_documents_spellings() -> None:
    one, modules, three = document(SQFT_ONE_GROUP), document(SQFT_MODULES), document(SQFT_THREE_GROUPS)
    assert one.groups == (QKV,)
    assert modules == one
    assert [group.modules for group in three.groups] == [QKV.modules, ("up_proj",), ("down_proj",)]
    assert {group.ranks for group in three.groups} == {(16, 12, 8)}
    assert three.target_modules == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    "space", [[16, 12, 8], ["16,12,8"], [[16, 12, 8]], "16, 12, 8", ["16", "12", "8"], [8, 12, 16, 8]]
)
def test_one_space_for_all_modules_in_any_form_and_order(space: Any) -> None:
    assert spec_of(r=16, nls_target_modules=list(QKV.modules), search_space=space).groups == (QKV,)


def test_target_modules_beside_the_groups_are_plain_targets() -> None:
    spec = spec_of(
        r=16, nls_target_modules=["q_proj"], target_modules=["q_proj", "o_proj"], search_space=[16, 8]
    )
    assert spec.groups == (RankGroup(modules=("q_proj",), ranks=(16, 8)),)
    assert spec.target_modules == ("q_proj", "o_proj")


@st.composite
def nls_blocks(draw: st.DrawFn) -> tuple[list[list[str]], list[list[int]]]:
    names = draw(st.permutations(MODULES))
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda n: sum(n) <= len(MODULES)))
    groups = []
    for size in sizes:
        groups.append(list(names[:size]))
        names = names[size:]
    r = draw(st.integers(1, 64))
    smaller = st.lists(st.integers(1, r), max_size=5)
    return groups, [draw(st.permutations([*draw(smaller), r])) for _ in groups]


@given(block=nls_blocks(), data=st.data())
def test_any_groups_in_any_spelling_are_descending_unique_and_in_order(
    block: tuple[list[list[str]], list[list[int]]], data: st.DataObject
) -> None:
    groups, spaces = block

    def spelt(values: list[Any]) -> Any:
        return data.draw(st.sampled_from([values, ",".join(map(str, values)), " , ".join(map(str, values))]))

    spec = spec_of(
        r=max(spaces[0]),
        target_module_groups=[spelt(group) for group in groups],
        search_space=[spelt(space) for space in spaces],
    )
    assert [list(group.modules) for group in spec.groups] == groups
    assert [list(group.ranks) for group in spec.groups] == [sorted(set(s), reverse=True) for s in spaces]


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"target_module_groups": [["q_proj"]]}, "search_space", "is missing"),
        ({"search_space": ["8"]}, "target_module_groups", "is missing"),
        ({}, "target_module_groups", "is missing"),
        ({"target_module_groups": [["q_proj"]], "search_space": ["8", "8"]}, "search_space", "has 2 list"),
        (
            {"target_module_groups": [["q_proj"], ["k_proj"]], "search_space": ["8"]},
            "search_space",
            "2 group",
        ),
        ({"target_module_groups": [["q_proj"]], "search_space": [8, 4]}, "search_space", "bare numbers"),
        ({"target_module_groups": [["q_proj"]], "search_space": ["16,8"]}, "search_space", "rank 16"),
        ({"target_module_groups": [["q_proj"]], "search_space": [[8, 0]]}, "search_space", "rank 0"),
        ({"target_module_groups": [["q_proj"]], "search_space": [[8, -4]]}, "search_space", "rank -4"),
        ({"target_module_groups": [["q_proj"]], "search_space": ["4,2"]}, "search_space", "must be equal"),
        (
            {"target_module_groups": [["q_proj"], ["k_proj"]], "search_space": ["8,4", "4,2"]},
            "search_space",
            "has 4 as the largest rank of group 1, but r is 8",
        ),
        (
            {"target_module_groups": [["q_proj"], ["q_proj"]], "search_space": ["8", "8"]},
            "target_module_groups",
            "in group 0 and in group 1",
        ),
        (
            {"target_module_groups": [["q_proj"]], "nls_target_modules": ["q_proj"], "search_space": ["8"]},
            "nls_target_modules",
            "give one of them",
        ),
        ({"nls_target_modules": ["q_proj"], "search_space": ["8,4", "8"]}, "search_space", "one list"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_field(
    fields: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        spec_of(**fields)
    assert caught.value.param == f"General.lora_config.{field}"


def test_a_misspelt_key_is_mentioned_where_it_is_missed() -> None:
    with pytest.raises(InvalidRequest, match="the unknown key 'target_modul_groups' was ignored"):
        spec_of(target_modul_groups=[["q_proj"]], search_space=["8"])


def test_groups_without_neural_lora_search_give_plain_lora_and_say_so() -> None:
    spec, warnings = lora_spec(
        LoraConfig.model_validate(
            {"target_module_groups": [["q_proj"], ["up_proj"]], "search_space": ["8", "4"]}
        )
    )
    assert spec.groups == ()
    assert spec.target_modules == ("q_proj", "up_proj")
    assert len(warnings) == 1
    assert "neural_lora_search is false" in warnings[0]


def test_no_lora_config_is_a_lora_adapter_with_a_warning() -> None:
    spec, warnings = lora_spec(None)
    assert (spec.r, spec.groups, spec.target_modules) == (8, (), None)
    assert "adapters only" in warnings[0] or "trains adapters" in warnings[0]


def nncf_file(groups: list[list[str]], widths: list[list[int]], top: str = "SQFT") -> dict[str, Any]:
    width = {"overwrite_groups": groups, "overwrite_groups_widths": widths}
    return {top: {"training": {"algorithm": "nls", "elasticity": {"width": width}}}}


def node(layer: int | str, module: str) -> str:
    path = ["Peft", "LoraModel[base_model]", "M[model]", "M[model]", "List[layers]", f"Layer[{layer}]"]
    return "/".join(
        [*path, "Attention[self_attn]", f"Linear[{module}]", "D[lora_A]", "L[default]", "linear_0"]
    )


@pytest.mark.parametrize("top", ["SQFT", "bootstrapNAS"])
def test_an_nncf_config_gives_groups_by_what_lies_together_in_a_layer(top: str) -> None:
    qk = [[node(layer, "q_proj"), node(layer, "k_proj")] for layer in range(2)]
    o = [[node(layer, "o_proj")] for layer in range(2)]
    content = nncf_file(qk + o, [[16, 8], [16, 8], [4, 16], [16, 4]], top)
    spec = spec_of(r=16, nncf_config=json.loads(json.dumps(content)))
    assert [(group.modules, group.ranks) for group in spec.groups] == [
        (("self_attn.q_proj", "self_attn.k_proj"), (16, 8)),
        (("self_attn.o_proj",), (16, 4)),
    ]


def test_an_nncf_config_that_differs_between_layers_or_is_damaged_is_refused() -> None:
    content = nncf_file([[node(0, "q_proj")], [node(1, "q_proj")]], [[8, 4], [8, 2]])
    for wrong, message in [(content, "other ranks in some layers"), ({"SQFT": 5}, "overwrite_groups")]:
        with pytest.raises(InvalidRequest, match=message) as caught:
            spec_of(nncf_config=wrong)
        assert caught.value.param == "General.lora_config.nncf_config"


PATHS = {f"model.layers.{n}.self_attn.{m}" for n in range(2) for m in ("q_proj", "k_proj")} | {"lm_head"}


def test_modules_that_the_base_model_has_not_are_refused_with_those_it_has() -> None:
    block = config(target_module_groups=[["q_proj", "qproj"]], search_space=["8"])
    with pytest.raises(InvalidRequest, match=r"'qproj'.*q_proj") as caught:
        check_modules(block, lora_spec(block)[0], PATHS)
    assert caught.value.param == "General.lora_config.target_module_groups"
    block = config(nls_target_modules=["proj"], search_space=[8])  # not by substring
    with pytest.raises(InvalidRequest) as caught:
        check_modules(block, lora_spec(block)[0], PATHS)
    assert caught.value.param == "General.lora_config.nls_target_modules"
    block = config(target_modules=["o_proj"], nls_target_modules=["q_proj"], search_space=[8])
    with pytest.raises(InvalidRequest, match="o_proj") as caught:
        check_modules(block, lora_spec(block)[0], PATHS)
    assert caught.value.param == "General.lora_config.target_modules"


def test_known_modules_pass_also_by_a_longer_path() -> None:
    block = config(target_module_groups=[["self_attn.q_proj"], ["k_proj"]], search_space=["8", "8,4"])
    check_modules(block, lora_spec(block)[0], PATHS)


@pytest.mark.parametrize("outer", ["", "transformer."])
@pytest.mark.parametrize("layers", [(0, 1), ("{*}",)])
def test_an_nncf_config_must_name_all_layers_of_the_base_model(layers: Any, outer: str) -> None:
    """Also when the weights lack the outer part of the modules' paths, or have one more."""
    paths = {outer + path for path in PATHS} if outer else {path.removeprefix("model.") for path in PATHS}
    groups = [[node(layer, "q_proj")] for layer in layers]
    block = config(nncf_config=nncf_file(groups, [[8, 4]] * len(groups)))
    check_modules(block, lora_spec(block)[0], paths)


def test_an_nncf_config_of_some_layers_or_of_another_model_is_refused() -> None:
    for layers, message in [
        ((0,), "leaves out 'model.layers.1.self_attn.q_proj', where"),
        ((0, 1, 2, 3), "names 'model.layers.2.self_attn.q_proj' and 1 other module, which the base model"),
    ]:
        groups = [[node(layer, "q_proj")] for layer in layers]
        block = config(nncf_config=nncf_file(groups, [[8, 4]] * len(groups)))
        with pytest.raises(InvalidRequest, match=message) as caught:
            check_modules(block, lora_spec(block)[0], PATHS)
        assert caught.value.param == "General.lora_config.nncf_config"


def test_a_relative_path_of_files_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dict"):
        config(nncf_config=str(tmp_path / "nncf_config.json"))
