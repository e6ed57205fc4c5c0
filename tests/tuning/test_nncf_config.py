"""The two files that describe a search space, as we write them and as others have."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fixtures_elastic import GROUPS, lora, super_adapter
from fixtures_models import tiny_model

from comps.tuning.elastic.read_space import load_space
from comps.tuning.errors import AdapterError

EXAMPLES = Path(__file__).parents[2] / "example_nncf_config"
NNCF, ELASTIC = "nncf_config.json", "elastic_adapter_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A llama super-adapter's directory and its space."""
    directory = tmp_path_factory.mktemp("super")
    _, space, _ = super_adapter(tiny_model(), lora(), directory)
    return directory, space


@pytest.fixture
def directory(saved, tmp_path):
    return Path(shutil.copytree(saved[0], tmp_path / "super"))


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def example_maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make", EXAMPLES / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_files_are_what_the_writer_makes_now():
    maker = example_maker()
    assert {path.name for path in EXAMPLES.glob("*.json")} == set(maker.FILES)
    values = []
    for name in maker.FILES:
        content = json.loads((EXAMPLES / name).read_text())
        assert content == maker.content(name)
        values.append(len(content["SQFT"]["training"]["elasticity"]["width"]["overwrite_groups"]))
    assert values == [16, 66]


def test_the_nncf_file_has_the_published_form(directory):
    content = json.loads((directory / NNCF).read_text())
    training = content["SQFT"]["training"]
    assert [info["keyword"] for info in content["input_info"]] == ["input_ids", "attention_mask"]
    assert training["algorithm"] == "nls"
    assert training["elasticity"]["available_elasticity_dims"] == ["width"]
    assert training["elasticity"]["width"]["overwrite_groups_widths"] == [[8, 5, 2]] * 6
    assert training["elasticity"]["width"]["overwrite_groups"][0][0] == (
        "PeftModelForCausalLM/LoraModel[base_model]/LlamaForCausalLM[model]/LlamaModel[model]/"
        "ModuleList[layers]/LlamaDecoderLayer[0]/LlamaAttention[self_attn]/Linear[q_proj]/"
        "ModuleDict[lora_A]/NNCFLinear[default]/linear_0"
    )
    stage = {"train_dims": ["width"], "width_indicator": 3, "init_lr": 1e-4, "epochs": 1, "epochs_lr": 1}
    assert training["schedule"] == {"list_stage_descriptions": [stage]}


def test_the_elastic_file_is_layer_major(directory):
    content = json.loads((directory / ELASTIC).read_text())
    prefix = "base_model.model.model.layers"
    assert content[0]["target"] == [f"{prefix}.0.self_attn.{name}_proj.lora_A" for name in "qkv"]
    assert [item["target"][0].split(".")[4] for item in content] == list("000111")
    assert all(item["search_space"] == [8, 5, 2] for item in content)


@pytest.mark.parametrize("family", sorted(GROUPS))
@pytest.mark.parametrize("absent", [None, NNCF, ELASTIC])
def test_every_family_reads_back_what_was_written(family, absent, tmp_path):
    _, space, _ = super_adapter(tiny_model(family), lora(family), tmp_path)
    if absent is not None:
        (tmp_path / absent).unlink()
    assert load_space(tmp_path) == space


def test_old_keys_and_other_class_names_are_read(saved, directory):
    def age(content):
        training = content["SQFT"]["training"] | {"algorithm": "progressive_shrinking"}
        width = training["elasticity"]["width"]
        width["overwrite_groups"] = [
            [re.sub(r"\w+\[", "Whatever[", node) for node in group] for group in width["overwrite_groups"]
        ]
        return {"input_info": content["input_info"], "bootstrapNAS": {"training": training}}

    edit(directory / NNCF, age)
    assert load_space(directory) == saved[1]


def test_a_group_written_once_for_all_layers_is_repeated(saved, directory):
    def template(content):
        width = content["SQFT"]["training"]["elasticity"]["width"]
        groups = width["overwrite_groups"][::2]  # those of layer 0
        width["overwrite_groups"] = [
            ["{re}" + node.replace("DecoderLayer[0]", "DecoderLayer[{*}]") for node in group]
            for group in groups
        ]
        width["overwrite_groups_widths"] = width["overwrite_groups_widths"][::2]

    edit(directory / NNCF, template)
    assert load_space(directory) == saved[1]


def test_ascending_ranks_are_sorted_before_they_get_names(directory):
    def ascending(content):
        return [item | {"search_space": [2, 5, 8]} for item in content]

    (directory / NNCF).unlink()
    edit(directory / ELASTIC, ascending)
    space = load_space(directory)
    assert set(space.maximal) == {8}
    assert set(space.minimal) == {2}


TRAINING = ("SQFT", "training")
GROUPS_AT = (*TRAINING, "elasticity", "width", "overwrite_groups")
WIDTHS_AT = (*TRAINING, "elasticity", "width", "overwrite_groups_widths")
Q_0, Q_1, K_0 = (
    f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_A"
    for layer, name in ("0q", "1q", "0k")
)


@pytest.mark.parametrize(
    ("file", "place", "value", "message"),
    [
        (NNCF, ("SQFT",), None, "super/nncf_config.json does not have overwrite_groups"),
        (NNCF, (*TRAINING, "algorithm"), "depth", "is for the algorithm 'depth'"),
        (NNCF, GROUPS_AT, [], "does not have one list of widths for each"),
        (NNCF, (*GROUPS_AT, 1), [], "group 1 is not a list of module names"),
        (NNCF, (*GROUPS_AT, 1), ["Linear[fc]"], "the node 'Linear.fc.', which is not the A"),
        (NNCF, (*WIDTHS_AT, 2), [-1], r"the ranks of group 2 are \[-1\]"),
        (NNCF, (*WIDTHS_AT, 2), [16], "the rank 16, but its tensors have 8"),
        (NNCF, (*WIDTHS_AT, 2), [8], "describe different spaces"),
        (ELASTIC, (), {"a": 1}, "is not a list of groups"),
        (ELASTIC, (1,), {"search_space": [8]}, "group 1 does not have target and search_space"),
        (ELASTIC, (0, "target"), ["x.lora_A"], "the target 'x.lora_A', which is not the A"),
        (ELASTIC, (0, "target"), ["base_model.model.x.lora_A"], "names 'x', for which"),
        (ELASTIC, (1, "target"), [Q_0], "q_proj' in two groups"),
        (ELASTIC, (0, "target"), [K_0, Q_1], "not within one layer"),
    ],
)
def test_a_damaged_file_is_refused_with_a_sentence(directory, file, place, value, message):
    def damage(content):
        if not place:
            return value
        for step in place[:-1]:
            content = content[step]
        content[place[-1]] = value
        return None

    edit(directory / file, damage)
    with pytest.raises(AdapterError, match=message):
        load_space(directory)


def test_a_file_that_is_not_json_is_refused_with_a_sentence(directory):
    (directory / NNCF).write_bytes(b"\xff{")
    with pytest.raises(AdapterError, match=r"super/nncf_config\.json is not JSON"):
        load_space(directory)


@pytest.mark.parametrize("node", ["[" * 2_000_000, "base_model.model." + "9" * 10_000 + ".q.lora_A"])
def test_an_absurd_name_is_refused_at_once(directory, node):
    edit(directory / ELASTIC, lambda content: content[0].update(target=[node]))
    edit(
        directory / NNCF,
        lambda content: content["SQFT"]["training"]["elasticity"]["width"]["overwrite_groups"][0].append(
            node
        ),
    )
    begun = time.process_time()
    with pytest.raises(AdapterError):
        load_space(directory)
    assert time.process_time() - begun < 5


def test_an_adapter_without_a_space_is_no_super_adapter(directory):
    (directory / NNCF).unlink()
    (directory / ELASTIC).unlink()
    with pytest.raises(AdapterError, match=r"super has neither nncf_config\.json nor elastic_adapter"):
        load_space(directory)
