"""Exact match, by generation with the prompts of training."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from fixtures_models import save_tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from comps.tuning.data.collate import Collator
from comps.tuning.data.dataset import build_datasets
from comps.tuning.evaluation.__main__ import main
from comps.tuning.evaluation.generate import answers, exact_match
from comps.tuning.models.load import load_base_model, load_tokenizer
from comps.tuning.spec import DataSpec, ModelSpec

RECORDS = [
    {"instruction": "Color of snow?", "input": "", "output": '{"a": 1}'},
    {"instruction": "Sum", "input": "2 and 2", "output": "4"},
    {"instruction": "A longer one, so that the batch is padded on the left.", "output": "yes it is"},
]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learnt the records by heart, through our own data path."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them only wait for each other in products this small
    directory = save_tiny_model(tmp_path_factory.mktemp("model"))
    file = directory / "records.json"
    file.write_text(json.dumps(RECORDS))
    model, tokenizer = load(directory)
    data = DataSpec(train_file=file, validation_split_percentage=0)
    batch = Collator(tokenizer.pad_token_id)(
        list(build_datasets(data, "instruction_tuning", tokenizer, 0).train)
    )
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    torch.set_num_threads(threads)
    model.eval().save_pretrained(directory)
    return directory


def load(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    spec = ModelSpec(name="tiny", path=str(directory))
    return load_base_model(spec), load_tokenizer(spec)


def test_the_most_likely_token_comes_whatever_the_model_asks_for(learnt: Path) -> None:
    model, tokenizer = load(learnt)
    expected = answers(model, tokenizer, RECORDS)
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.temperature = 2.0
    assert answers(model, tokenizer, RECORDS) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_beyond_the_models_positions_loses_its_beginning(tmp_path: Path, family: str) -> None:
    model, tokenizer = load(save_tiny_model(tmp_path, family))
    cut: list[int] = []
    records = [*RECORDS, {"instruction": "word " * 3000, "output": "no"}]
    assert len(answers(model, tokenizer, records, max_new_tokens=4, cut=cut.append)) == 4
    assert cut == [1]


def test_answers_that_are_known_are_not_generated_again(
    learnt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load(learnt)
    known: dict[str, str] = {}
    first = answers(model, tokenizer, RECORDS[:2], known=known)
    assert sorted(known.values()) == sorted(first)
    seen: list[int] = []
    whole = answers(model, tokenizer, RECORDS, known=known, progress=lambda done, total: seen.append(total))
    assert whole[:2] == first
    assert seen == [1]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_model_that_knows_the_answers_stops_by_itself_and_scores_full(
    learnt: Path, batch_size: int
) -> None:
    model, tokenizer = load(learnt)
    result = exact_match(model, tokenizer, RECORDS, max_new_tokens=30, batch_size=batch_size)
    assert result["outputs"] == [record["output"] for record in RECORDS]
    assert (result["correct"], result["total"]) == (3, 3)
    assert result["seconds"] > 0


def test_as_json_the_order_and_the_blanks_do_not_count(learnt: Path) -> None:
    model, tokenizer = load(learnt)
    records = [{**RECORDS[0], "output": '{ "a":1 }'}, {**RECORDS[2], "output": "not what it says"}]
    assert exact_match(model, tokenizer, records)["correct"] == 0
    assert exact_match(model, tokenizer, records, as_json=True)["correct"] == 1


def test_the_command_prints_one_line_of_json_with_and_without_an_adapter(
    learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(learnt), "--file", str(learnt / "records.json"), "--max-new-tokens", "30"]
    assert main(arguments) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["correct"], line["total"]) == (3, 3)

    torch.manual_seed(0)
    model, tokenizer = load(learnt)
    config = peft.LoraConfig(r=2, lora_alpha=99, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.PeftModel(model, config).eval()
    adapted.save_pretrained(tmp_path)
    expected = exact_match(adapted, tokenizer, RECORDS[:2], max_new_tokens=30)
    assert main([*arguments, "--adapter", str(tmp_path), "--limit", "2", "--outputs"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["outputs"] == expected["outputs"] != [record["output"] for record in RECORDS[:2]]
    assert (line["correct"], line["total"]) == (expected["correct"], 2)


def test_the_command_refuses_what_is_no_adapter_or_no_model_in_a_sentence(
    learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(learnt / "records.json")
    assert main(["--model", str(learnt), "--adapter", str(tmp_path), "--file", file]) == 1
    assert "is no adapter: it has no adapter_config.json" in capsys.readouterr().err
    assert main(["--model", str(tmp_path), "--file", file]) == 1
    assert "has no config.json" in capsys.readouterr().err
