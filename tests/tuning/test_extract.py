"""Sub-adapters cut out of super-adapters: stock PEFT computes what the elastic model computes."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from fixtures_elastic import GROUPS, logits, lora, super_adapter
from fixtures_models import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from comps.tuning.elastic.sampler import sample
from comps.tuning.errors import AdapterError
from comps.tuning.export.adapter import read_adapter
from comps.tuning.export.extract import extract
from comps.tuning.spec import ExtractSpec

FAMILIES = sorted(GROUPS)


def spec(directory: Path, version: str = "heuristic", **more: object) -> ExtractSpec:
    return ExtractSpec.model_validate(
        {
            "job_id": "ft-job-1",
            "directory": directory,
            "super_adapter": directory / "super",
            "version": version,
            "output": directory / version,
        }
        | more
    )


def load_without_warning(family: str, directory: Path) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT 0.21 itself calls transformers 5 by an old name, whatever the adapter.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        return peft.PeftModel.from_pretrained(tiny_model(family), directory).eval()


@pytest.fixture
def job(tmp_path):
    """A directory with a llama super-adapter in ``super``; the elastic model and its parts."""
    return tmp_path, *super_adapter(tiny_model(), lora(), tmp_path / "super")


@pytest.mark.parametrize(("form", "rslora"), [("pattern", False), ("pattern", True), ("uniform", False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_computes_what_the_elastic_model_computes(family, form, rslora, tmp_path):
    model, space, controller = super_adapter(
        tiny_model(family), lora(family, use_rslora=rslora, alpha=13), tmp_path / "super"
    )
    seen = []
    for step in range(2):
        config = sample(space, 0, step)
        extract(spec(tmp_path, "mine", config=config, form=form))
        with controller.at(config):
            expected = logits(model)
        assert torch.allclose(logits(load_without_warning(family, tmp_path / "mine")), expected, atol=1e-5)
        seen.append(expected)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)


def test_the_answer_names_every_group(job):
    directory, _, space, _ = job
    answer = extract(spec(directory, "mine", config=(8, 5, 2, 8, 5, 2)))
    assert answer["version"] == "mine"
    assert answer["path"] == str(directory / "mine")
    assert answer["ranks"] == [8, 5, 2, 8, 5, 2]
    assert answer["groups"][3] == {"modules": ["model.layers.1.mlp.up_proj"], "layer": 1, "rank": 8}
    tensors = load_file(directory / "mine" / "adapter_model.safetensors")
    assert answer["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert answer["parameters"] == space.parameters([8, 5, 2, 8, 5, 2])


def test_the_config_keeps_r_and_alpha_and_adds_escaped_patterns(job):
    directory, *_ = job
    extract(spec(directory, "mine", config=(8, 8, 8, 8, 8, 2)))
    config = json.loads((directory / "mine" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["rank_pattern"] == {r"model\.layers\.1\.mlp\.down_proj": 2}
    assert config["alpha_pattern"] == {r"model\.layers\.1\.mlp\.down_proj": 4}


def test_named_versions_follow_their_rules(job):
    directory, *_ = job
    for version, rank in [("maximal", 8), ("heuristic", 5), ("minimal", 2)]:
        assert extract(spec(directory, version))["ranks"] == [rank] * 6
        assert {m.rank for m in read_adapter(directory / version).modules.values()} == {rank}


def test_modules_outside_the_groups_keep_their_rank(tmp_path):
    model, space, controller = super_adapter(
        tiny_model(), lora(target_modules=("o_proj",)), tmp_path / "super"
    )
    answer = extract(spec(tmp_path, "minimal"))
    modules = read_adapter(tmp_path / "minimal").modules
    assert {m.rank for name, m in modules.items() if name.endswith("o_proj")} == {8}
    assert answer["parameters"] == space.parameters(space.minimal) + 2 * 8 * 64
    with controller.at(space.minimal):
        expected = logits(model)
    assert torch.allclose(logits(load_without_warning("llama", tmp_path / "minimal")), expected, atol=1e-5)


def test_the_tokenizer_travels_along_and_the_space_does_not(job):
    directory, *_ = job
    tiny_tokenizer().save_pretrained(directory / "super")
    extract(spec(directory))
    names = {path.name for path in (directory / "heuristic").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "sub_adapter.json"} <= names
    assert not names & {"nncf_config.json", "elastic_adapter_config.json"}


def test_asked_again_it_leaves_what_is_there_and_what_was_derived_from_it(job):
    directory, *_ = job
    first = extract(spec(directory))
    (directory / "heuristic" / "merged_model").mkdir()
    assert extract(spec(directory)) == first
    assert (directory / "heuristic" / "merged_model").is_dir()


def test_another_configuration_under_the_same_name_replaces_everything(job):
    directory, *_ = job
    extract(spec(directory, "mine", config=(8,) * 6))
    (directory / "mine" / "merged_model").mkdir()
    extract(spec(directory, "mine", config=(2,) * 6))
    assert {m.rank for m in read_adapter(directory / "mine").modules.values()} == {2}
    assert not (directory / "mine" / "merged_model").exists()


def test_a_refused_request_leaves_nothing_behind(job):
    directory, *_ = job
    with pytest.raises(AdapterError, match="has 2 values, but this adapter needs 6 ranks"):
        extract(spec(directory, "mine", config=(8, 8)))
    assert [path.name for path in directory.iterdir()] == ["super"]


def test_sub_adapters_of_the_original_code_have_their_ranks_in_the_shapes(job):
    """The original cuts the tensors and copies the config unchanged, which stock PEFT refuses."""
    directory, *_ = job
    ours, theirs = directory / "heuristic", directory / "theirs"
    extract(spec(directory))
    shutil.copytree(ours, theirs)
    shutil.copy(directory / "super" / "adapter_config.json", theirs)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_without_warning("llama", theirs)
    for name, module in read_adapter(theirs).modules.items():
        assert module.rank == 5
        assert module.scale == pytest.approx(read_adapter(ours).modules[name].scale) == 2


def damage_truncate(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def damage_drop_b(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: t for key, t in tensors.items() if "layers.1.mlp.up_proj.lora_B" not in key}, path)


def damage_pickle(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def damage_config(**changes: object) -> object:
    def damage(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "super/adapter_model.safetensors is damaged"),
        (damage_drop_b, r"'model\.layers\.1\.mlp\.up_proj' lacks its A or B"),
        (damage_pickle, r"adapter_model\.bin is a pickle, which is not read"),
        (damage_config(peft_type="IA3"), "does not describe a LoRA adapter"),
        (damage_config(use_dora=True), "uses use_dora, which is not plain LoRA"),
        (damage_config(init_lora_weights="pissa"), "initialised with pissa"),
        (damage_config(r=4), "has rank 8, its config says 4"),
        (damage_config(r="8"), 'has the rank "8"'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_super_adapter_is_refused_with_a_sentence(job, damage, message):
    directory, *_ = job
    damage(directory / "super")
    with pytest.raises(AdapterError, match=message):
        extract(spec(directory))


def test_a_module_whose_name_ends_another_gets_an_anchored_pattern(tmp_path):
    """PEFT lets any prefix stand before a pattern, so the inner module must not take the outer's rank."""

    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4)})])

    class Outer(Inner):
        def __init__(self) -> None:
            super().__init__()
            self.wing = Inner()

    settings = peft.LoraConfig(r=4, target_modules=["fc"])
    peft.get_peft_model(Outer(), settings).save_pretrained(tmp_path / "super")
    targets = [f"base_model.model.{prefix}layers.0.fc.lora_A" for prefix in ("", "wing.")]
    space = [{"target": [target], "search_space": [4, 1]} for target in targets]
    (tmp_path / "super" / "elastic_adapter_config.json").write_text(json.dumps(space))
    extract(spec(tmp_path, "mine", config=(1, 4)))
    peft.PeftModel.from_pretrained(Outer(), tmp_path / "mine")
