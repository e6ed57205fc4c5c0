"""Merged models: they compute what the adapter computes, and nothing else in their files changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fixtures_elastic import GROUPS, logits, lora, randomise, super_adapter
from fixtures_models import save_tiny_model, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from comps.tuning.elastic.sampler import sample
from comps.tuning.errors import AdapterError, ModelError
from comps.tuning.export.extract import extract
from comps.tuning.export.merge import merge
from comps.tuning.spec import ExtractSpec, MergeSpec

# PEFT warns, rightly, that it cannot merge adapters of tied layers itself.
TIED = pytest.mark.filterwarnings("ignore:.*(tied layer is part|save_embedding_layers):UserWarning")


def spec(directory: Path, adapter: str = "super", **model: object) -> MergeSpec:
    base = {"name": "org/base", "path": str(directory / "base")} | model
    return MergeSpec.model_validate(
        {
            "job_id": "ft-job-1",
            "directory": directory,
            "adapter": directory / adapter,
            "base_model": base,
            "output": directory / "merged_model",
        }
    )


def cut(directory: Path, **more: Any) -> None:
    """Extract the sub-adapter ``mine`` from ``super``."""
    extract(
        ExtractSpec(
            job_id="ft-job-1",
            directory=directory,
            super_adapter=directory / "super",
            version="mine",
            output=directory / "mine",
            **more,
        )
    )


def load(directory: Path, family: str = "llama") -> PreTrainedModel:
    kind = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    return kind.from_pretrained(directory).eval()


def stock(directory: Path, targets: list[str], **config: Any) -> torch.Tensor:
    """Save a stock adapter on the base as ``super``; returns its logits."""
    base = AutoModelForCausalLM.from_pretrained(directory / "base")
    adapter = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **config))
    randomise(adapter)
    adapter.save_pretrained(directory / "super")
    return logits(adapter.eval())


@pytest.fixture
def job(tmp_path):
    """A directory with a llama model in ``base`` and a super-adapter for it in ``super``."""
    save_tiny_model(tmp_path / "base")
    return tmp_path, *super_adapter(load(tmp_path / "base"), lora(), tmp_path / "super")


@pytest.mark.parametrize("family", sorted(GROUPS))
def test_a_merged_sub_adapter_computes_what_the_elastic_model_computes(family, tmp_path):
    save_tiny_model(tmp_path / "base", family)
    model, space, controller = super_adapter(
        load(tmp_path / "base", family), lora(family), tmp_path / "super"
    )
    config = sample(space, 0, 5)
    cut(tmp_path, config=config)
    with controller.at(config):
        expected = logits(model)
    answer = merge(spec(tmp_path, "mine"))
    assert answer["merged_modules"] == len(space.ranks)
    assert torch.allclose(logits(load(tmp_path / "merged_model", family)), expected, atol=1e-5)
    assert not torch.allclose(logits(load(tmp_path / "base", family)), expected, atol=1e-3)


@pytest.mark.parametrize("form", ["pattern", "uniform", "original"])
def test_every_form_of_a_sub_adapter_merges_to_the_same(form, job):
    directory, model, space, controller = job
    cut(directory, config=space.minimal, form="uniform" if form == "uniform" else "pattern")
    if form == "original":  # the original code leaves the super-adapter's config as it was
        shutil.copy(directory / "super" / "adapter_config.json", directory / "mine")
    merge(spec(directory, "mine"))
    with controller.at(space.minimal):
        assert torch.allclose(logits(load(directory / "merged_model")), logits(model), atol=1e-5)


def test_a_super_adapter_merges_at_its_maximal_ranks(job):
    directory, model, *_ = job
    merge(spec(directory))
    assert torch.allclose(logits(load(directory / "merged_model")), logits(model), atol=1e-5)


def test_only_the_adapted_tensors_change_and_types_stay(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    super_adapter(load(tmp_path / "base"), lora(), tmp_path / "super")
    answer = merge(spec(tmp_path))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged_model"))
    adapter = load_file(tmp_path / "super" / "adapter_model.safetensors")
    assert answer["dtype"] == "bfloat16"
    assert answer["tensors"] == len(before) == len(after)
    for name, tensor in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in adapter:  # one cast, after the sum in float32
            product = adapter[f"{key}B.weight"].float() @ adapter[f"{key}A.weight"].float()
            tensor = (tensor.float() + 2 * product).to(torch.bfloat16)
        assert torch.equal(tensor, after[name]), name


def test_sparsity_is_the_fraction_of_zeros_in_the_adapted_weights(job):
    directory, *_ = job
    path = directory / "base" / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensor[: len(tensor) // 2] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    sparsity = merge(spec(directory))["sparsity"]
    assert sparsity["before"] == pytest.approx(0.5)
    assert sparsity["after"] < 0.01  # plain LoRA fills the zeros


def test_shards_are_kept_and_those_untouched_are_copied(job):
    directory, model, *_ = job
    load(directory / "base").save_pretrained(directory / "base", max_shard_size="20KB")
    (directory / "base" / "model.safetensors").unlink()
    merge(spec(directory))
    files = {p.name for p in (directory / "base").glob("*.safetensors")}
    assert len(files) > 2
    assert {p.name for p in (directory / "merged_model").glob("*.safetensors")} == files
    same = [
        name
        for name in files
        if (directory / "base" / name).read_bytes() == (directory / "merged_model" / name).read_bytes()
    ]
    assert same
    assert torch.allclose(logits(load(directory / "merged_model")), logits(model), atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_a_checkpoint_of_the_bare_model_is_matched(family, tmp_path):
    """The published GPT-2 and BLOOM files have ``h.0...`` where the live model has ``transformer.h.0...``."""
    save_tiny_model(tmp_path / "base", family)
    model, *_ = super_adapter(load(tmp_path / "base", family), lora(family), tmp_path / "super")
    path = tmp_path / "base" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    merge(spec(tmp_path))
    assert load_file(tmp_path / "merged_model" / "model.safetensors").keys() == tensors.keys()
    assert torch.allclose(logits(load(tmp_path / "merged_model", family)), logits(model), atol=1e-5)


@TIED
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapted_output_head_is_untied_from_the_embeddings(family, tmp_path):
    save_tiny_model(tmp_path / "base", family, tie_word_embeddings=True)
    expected = stock(tmp_path, ["lm_head"])
    merge(spec(tmp_path))
    merged = load(tmp_path / "merged_model", family)
    assert merged.config.tie_word_embeddings is False
    assert torch.allclose(logits(merged), expected, atol=1e-5)


# PEFT takes the one dimension of B's bias for a sharded tensor.
@pytest.mark.filterwarnings("ignore:.*lora_B.bias:peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(
    "config",
    [
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"use_rslora": True},
    ],
    ids=str,
)
def test_what_stock_adapters_may_hold_besides_is_merged(config, tmp_path):
    model = tiny_model(attention_bias=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    model.save_pretrained(tmp_path / "base")
    expected = stock(tmp_path, ["q_proj", "o_proj"], **config)
    path = tmp_path / "super" / "adapter_model.safetensors"
    if "bias" in config or "modules_to_save" in config:  # make the trained copies differ from the base's
        tensors = load_file(path)
        extra = [key for key in tensors if ".lora_" not in key]
        assert extra
        for key in extra:
            tensors[key] += 0.1
        save_file(tensors, path, metadata={"format": "pt"})
        loaded = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "super")
        expected = logits(loaded.eval())
    merge(spec(tmp_path))
    assert torch.allclose(logits(load(tmp_path / "merged_model")), expected, atol=1e-5)


def test_a_base_without_a_tokenizer_gets_the_adapters_or_none(job):
    directory, *_ = job
    for path in (directory / "base").glob("tokenizer*"):
        path.rename(directory / "super" / path.name)
    merge(spec(directory))
    assert (directory / "merged_model" / "tokenizer.json").is_file()
    for path in (directory / "super").glob("tokenizer*"):
        path.unlink()
    merge(spec(directory))
    assert not (directory / "merged_model" / "tokenizer.json").exists()
    assert (directory / "merged_model" / "generation_config.json").is_file()


def test_a_model_in_the_hugging_face_cache_is_found_there(job, monkeypatch):
    directory, model, *_ = job
    repository = directory / "hub" / "models--org--base"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(directory / "base", repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(directory / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    merge(spec(directory, path="org/base", local=False))
    assert torch.allclose(logits(load(directory / "merged_model")), logits(model), atol=1e-5)
    with pytest.raises(ModelError, match="org/base cannot be fetched from the hub"):
        merge(spec(directory, path="org/absent", local=False))


def a_tensor_less(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, base / "model.safetensors")


def no_weights(base: Path) -> None:
    (base / "model.safetensors").rename(base / "model.gguf")


def no_config(base: Path) -> None:
    (base / "config.json").unlink()


def quantised(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


def integers(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    save_file({name: t.to(torch.int8) for name, t in tensors.items()}, base / "model.safetensors")


def truncated(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def outside(base: Path) -> None:
    index = {"weight_map": {"a": "../base/model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_weights, r"org/base has no safetensors weights, only \.gguf files"),
        (no_config, r"org/base has no config\.json"),
        (quantised, r"org/base is quantised \(gptq\)"),
        (integers, r"stores 'model\.layers\.0\.\S+' as torch\.int8"),
        (truncated, r"model\.safetensors of the base model org/base is damaged"),
        (a_tensor_less, r"lacks the tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        (outside, "without a proper weight_map"),
    ],
)
def test_a_base_that_cannot_be_merged_into_is_refused_with_a_sentence(job, damage, message):
    directory, *_ = job
    damage(directory / "base")
    with pytest.raises(ModelError, match=message):
        merge(spec(directory))
    assert {path.name for path in directory.iterdir()} == {"base", "super"}


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("opt", {}, r"it has no tensor 'model\.layers\.0\."),
        ("llama", {"hidden_size": 64}, r"takes \d+ features to \d+, but the base model's weight is \["),
    ],
)
def test_an_adapter_of_another_model_is_refused_with_a_sentence(job, family, size, message):
    directory, *_ = job
    shutil.rmtree(directory / "base")
    save_tiny_model(directory / "base", family, **size)
    with pytest.raises(AdapterError, match=rf"does not fit the base model org/base: .*{message}"):
        merge(spec(directory))
    assert {path.name for path in directory.iterdir()} == {"base", "super"}


@TIED
def test_embeddings_retrained_without_their_tied_head_are_refused(tmp_path):
    save_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    stock(tmp_path, ["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(AdapterError, match="output head is tied"):
        merge(spec(tmp_path))


def test_merging_again_gives_the_same_files(job):
    directory, *_ = job
    first = merge(spec(directory))
    weights = (directory / "merged_model" / "model.safetensors").read_bytes()
    assert merge(spec(directory)) == first
    assert (directory / "merged_model" / "model.safetensors").read_bytes() == weights
    with safe_open(directory / "merged_model" / "model.safetensors", framework="pt") as merged:
        assert merged.metadata() == {"format": "pt"}
