"""Loading base models: what works, and what is refused in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from fixtures_models import CHAT_TEMPLATE, save_tiny_model, tiny_model, tiny_tokenizer

from comps.tuning.errors import ModelError
from comps.tuning.models.load import check_causal, load_base_model, load_tokenizer
from comps.tuning.spec import ModelSpec


def spec(directory: Path) -> ModelSpec:
    return ModelSpec(name="org/tiny", path=str(directory))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2", "phi", "opt", "bloom", "gpt2"])
def test_a_saved_model_loads_with_its_own_weights(tmp_path: Path, family: str) -> None:
    model = load_base_model(spec(save_tiny_model(tmp_path, family)))
    saved = tiny_model(family).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert model.dtype == torch.float32
    assert model.config.use_cache is False
    assert not model.training


ENCODERS = ["bert", "roberta", "electra"]


@pytest.mark.parametrize("family", ENCODERS)
def test_families_of_encoders_are_loaded_as_decoders(tmp_path: Path, family: str) -> None:
    """A changed token moves the logits from its own place on, and none before: or labels would leak."""
    save_tiny_model(tmp_path, family)
    model = load_base_model(spec(tmp_path))
    rows = torch.tensor([[11, 12, 13, 14, 15, 16], [11, 12, 13, 20, 15, 16]])
    one, other = model(input_ids=rows).logits
    assert torch.allclose(one[:3], other[:3], rtol=0, atol=1e-6)
    assert not torch.allclose(one[3:], other[3:], rtol=0, atol=1e-3)
    check_causal(model, "org/tiny")


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "opt", "bloom", "gpt2"])
def test_causal_families_pass_for_causal(family: str) -> None:
    check_causal(tiny_model(family), "org/tiny")


def test_a_model_that_sees_what_comes_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_attention_heads=4, num_hidden_layers=2
    )
    with pytest.raises(ModelError, match="base model org/tiny looks at the tokens after the one"):
        check_causal(transformers.BertLMHeadModel(config).eval(), "org/tiny")


def test_a_model_loads_in_the_type_and_with_the_cache_asked_for(tmp_path: Path) -> None:
    model = load_base_model(spec(save_tiny_model(tmp_path)), dtype=torch.bfloat16, use_cache=True)
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache is True


def test_a_tokenizer_keeps_its_template_and_gets_padding_where_it_has_none(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, tokenizer=False)
    tiny_tokenizer(pad_token=None).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(spec(tmp_path))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template == CHAT_TEMPLATE


def damage_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def only_pickles(directory: Path) -> None:
    weights = torch.nn.Linear(2, 2).state_dict()
    torch.save(weights, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def foreign_code(directory: Path) -> None:
    edit_config(
        directory, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    )
    (directory / "own.py").write_text("raise SystemExit('this code must never run')")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda d: (d / "config.json").unlink(), "its directory does not exist or has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "cannot be loaded: It looks like the config file"),
        (lambda d: edit_config(d, model_type="unheard-of"), "has an architecture that transformers"),
        (
            lambda d: edit_config(d, hidden_size=64),
            "has weights whose shapes are not those of its config.json",
        ),
        (
            lambda d: edit_config(d, num_hidden_layers=3, layer_types=None),
            "its files lack the weight model.layers.2.input_layernorm.weight and 8 more",
        ),
        (damage_weights, "has a damaged safetensors file"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "has a damaged safetensors file"),
        (lambda d: (d / "model.safetensors").unlink(), "its directory has no safetensors file"),
        (only_pickles, "has its weights only as pickle files"),
        (foreign_code, "needs code of its own"),
        (lambda d: (d / "adapter_config.json").write_text("{}"), "its directory holds an adapter too"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_in_a_sentence(
    tmp_path: Path, spoil: Callable[[Path], object], sentence: str
) -> None:
    spoil(save_tiny_model(tmp_path))
    with pytest.raises(ModelError) as raised:
        load_base_model(spec(tmp_path))
    message = str(raised.value)
    assert message.startswith("base model org/tiny")
    assert sentence in message
    assert "\n" not in message


def test_an_adapter_is_not_taken_for_a_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="org/tiny is an adapter, not a base model"):
        load_base_model(spec(tmp_path))


def test_a_missing_directory_is_never_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="its directory does not exist"):
        load_base_model(spec(tmp_path / "none"))


def test_a_missing_tokenizer_and_a_damaged_one_are_refused_in_a_sentence(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, tokenizer=False)
    with pytest.raises(ModelError, match="org/tiny has no tokenizer, so it cannot be trained on text"):
        load_tokenizer(spec(tmp_path))
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer of base model org/tiny cannot be loaded"):
        load_tokenizer(spec(tmp_path))


def test_a_hub_model_that_is_not_here_is_refused_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub = ModelSpec(name="nobody/nothing", path="nobody/nothing", local=False)
    with pytest.raises(
        ModelError, match="nobody/nothing is not on this machine, and the hub cannot be reached"
    ):
        load_base_model(hub)
