"""From files to token rows: masks, lengths, splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures_models import CHAT_TEMPLATE, tiny_tokenizer

from comps.tuning.data.dataset import TokenisedData, build_datasets
from comps.tuning.data.prompts import render
from comps.tuning.data.tokenise import prompt_ids
from comps.tuning.errors import DataError, ModelError, RecordTooLarge, TooManyRecords
from comps.tuning.spec import DataSpec

EOS = 2
RECORD = {"instruction": "Say hello.", "input": "", "output": "Hello 12 there."}


def build(
    directory: Path,
    records: list[dict[str, Any]],
    task: str = "instruction_tuning",
    seed: int = 7,
    **spec: Any,
) -> TokenisedData:
    tokenizer = spec.pop("tokenizer", None) or tiny_tokenizer()
    path = directory / "train.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    options = {"train_file": path, "validation_split_percentage": 0} | spec
    return build_datasets(DataSpec(**options), task, tokenizer, seed)


def learnt(row: dict[str, list[int]]) -> str:
    return str(tiny_tokenizer().decode([label for label in row["labels"] if label != -100]))


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"number {index}", "completion": str(index)} for index in range(count)]


def test_by_default_the_response_and_its_eos_are_learnt_and_the_prompt_is_not(tmp_path: Path) -> None:
    [row] = build(tmp_path, [RECORD]).train
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == EOS  # and the EOS is learnt all the same
    assert row["input_ids"][-1] == row["labels"][-1] == EOS
    assert learnt(row) == "Hello 12 there.<|im_end|>"
    assert row["input_ids"].count(EOS) == 1
    assert tokenizer.decode(row["input_ids"]) == render(RECORD, tokenizer).prompt + learnt(row)


@pytest.mark.parametrize("mask_response", [True, False])
def test_masking_the_input_wins_over_masking_the_response(tmp_path: Path, mask_response: bool) -> None:
    [row] = build(tmp_path, [RECORD], mask_input=True, mask_response=mask_response).train
    assert learnt(row) == "Hello 12 there.<|im_end|>"


def test_masking_the_response_alone_leaves_the_prompt(tmp_path: Path) -> None:
    [row] = build(tmp_path, [RECORD], mask_input=False, mask_response=True).train
    assert learnt(row) == render(RECORD, tiny_tokenizer()).prompt


def test_masking_nothing_learns_every_token(tmp_path: Path) -> None:
    [row] = build(tmp_path, [RECORD], mask_input=False, mask_response=False).train
    assert row["labels"] == row["input_ids"]


def test_the_trained_prompt_is_token_by_token_the_one_that_generation_starts_from(tmp_path: Path) -> None:
    records = [RECORD, {**RECORD, "input": "x"}, {**RECORD, "output": "\nHello"}]
    tokenizer = tiny_tokenizer()
    rows = build(tmp_path, records).train
    prompts = prompt_ids([render(record, tokenizer) for record in records], tokenizer)
    for row, ids in zip(rows, prompts, strict=True):
        assert row["input_ids"][: len(ids)] == ids
        assert row["labels"][: len(ids)] == [-100] * len(ids)
    # A token of the tokenizer spans this border when the two are read together.
    split = {"prompt": "Write a respo", "completion": "nse."}
    [row] = build(tmp_path, [split]).train
    assert learnt(row) == "nse.<|im_end|>"


def test_a_chat_of_several_turns_carries_loss_on_the_assistants_turns_only(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Eins. 🙂"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Zwei."},
    ]
    [row] = build(tmp_path, [{"messages": messages}]).train
    assert learnt(row) == "Eins. 🙂<|im_end|>Zwei.<|im_end|>"
    [row] = build(tmp_path, [{"messages": messages}], mask_input=False, mask_response=True).train
    assert "Zwei" not in learnt(row)
    assert "Two?" in learnt(row)


def test_a_chat_has_the_templates_special_tokens_and_no_others(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template="<|endoftext|>" + CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Eins."}]
    [row] = build(tmp_path, [{"messages": messages}], tokenizer=tokenizer).train
    assert row["input_ids"][0] == 0
    assert row["input_ids"].count(0) == 1


def test_the_end_of_a_long_prompt_goes_but_the_cue_stays(tmp_path: Path) -> None:
    record = {**RECORD, "instruction": "first " + "word " * 200 + "last"}
    data = build(tmp_path, [record], max_source_length=150)
    [row] = data.train
    text = tiny_tokenizer().decode(row["input_ids"])
    assert row["labels"].index(row["input_ids"][150]) == 150
    assert "first" in text
    assert "last" not in text
    assert text.endswith("### Response:\nHello 12 there.<|im_end|>")
    assert data.report.warnings == [
        "train.json: 1 record was longer than max_length=512 or max_source_length=150 and cut"
    ]
    [row] = build(tmp_path, [record], max_source_length=150, truncation_side="left").train
    text = tiny_tokenizer().decode(row["input_ids"])
    assert "first" not in text
    assert text.endswith("last\n\n### Response:\nHello 12 there.<|im_end|>")


def test_a_response_cut_at_its_end_does_not_learn_to_stop_there(tmp_path: Path) -> None:
    data = build(tmp_path, [{"prompt": "a", "completion": "word " * 200}], max_length=50)
    [row] = data.train
    assert len(row["input_ids"]) == 50
    assert EOS not in row["input_ids"]
    [row] = build(
        tmp_path, [{"prompt": "a" * 99, "completion": "b"}], max_length=9, truncation_side="left"
    ).train
    assert row["input_ids"][-1] == EOS


def test_records_with_nothing_left_to_learn_are_dropped_and_counted(tmp_path: Path) -> None:
    records = [{"prompt": "x " * 100, "completion": "y"}, {"prompt": "x", "completion": "y"}]
    data = build(tmp_path, records, max_length=40)
    assert len(data.train) == 1
    assert data.report.warnings == [
        "train.json: 1 record was left out, because max_length=40 or max_source_length=384 "
        "left no token of the response to learn"
    ]
    with pytest.raises(DataError, match="left no token of the response to learn"):
        build(tmp_path, records[:1], max_length=40)


def test_plain_texts_are_joined_and_cut_into_blocks_and_nothing_is_lost(tmp_path: Path) -> None:
    texts = ["one two three " * 9, "four", "", "five six " * 20]
    rows = list(build(tmp_path, [{"text": text} for text in texts], "pretraining", block_size=32).train)
    assert {len(row["input_ids"]) for row in rows[:-1]} == {32}
    joined = [token for row in rows for token in row["input_ids"]]
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(joined) == "".join(text + "<|im_end|>" for text in texts if text)
    assert all(row["labels"] == row["input_ids"] for row in rows)


def test_plain_texts_may_be_rows_of_their_own(tmp_path: Path) -> None:
    records = [{"text": "one"}, {"text": "two " * 50}]
    data = build(tmp_path, records, "pretraining", group=False, max_length=20)
    assert [len(row["input_ids"]) for row in data.train][1] == 20
    assert data.train[0]["input_ids"][-1] == EOS
    assert "1 record was longer" in data.report.warnings[0]


def test_a_split_is_drawn_with_the_seed_and_parts_the_rows(tmp_path: Path) -> None:
    first = build(tmp_path, numbered(100), validation_split_percentage=5)
    again = build(tmp_path, numbered(100), validation_split_percentage=5)
    other = build(tmp_path, numbered(100), validation_split_percentage=5, seed=8)
    assert first.validation is not None
    assert again.validation is not None
    assert other.validation is not None
    assert (len(first.train), len(first.validation)) == (95, 5)
    assert list(first.validation) == list(again.validation) != list(other.validation)
    both = [learnt(row) for rows in (first.train, first.validation) for row in rows]
    assert sorted(both) == sorted(f"{index}<|im_end|>" for index in range(100))


def test_few_rows_are_not_split_and_twenty_give_at_least_one(tmp_path: Path) -> None:
    assert build(tmp_path, numbered(19), validation_split_percentage=5).validation is None
    validation = build(tmp_path, numbered(20), validation_split_percentage=0.1).validation
    assert validation is not None
    assert len(validation) == 1


def test_a_validation_file_is_used_instead_of_a_split_and_faults_in_it_bear_its_name(tmp_path: Path) -> None:
    file = tmp_path / "stored"
    file.write_text(json.dumps(numbered(3)))
    options = {"validation_file": file, "validation_name": "check.json", "validation_split_percentage": 5}
    data = build(tmp_path, numbered(30), **options)
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (30, 3)
    file.write_text("[{}]")
    with pytest.raises(DataError, match=r"check\.json, record 1"):
        build(tmp_path, numbered(30), **options)


def test_sample_limits_keep_the_first_rows(tmp_path: Path) -> None:
    data = build(tmp_path, numbered(30), max_train_samples=4)
    assert [learnt(row) for row in data.train] == [f"{index}<|im_end|>" for index in range(4)]
    data = build(
        tmp_path, numbered(100), validation_split_percentage=20, max_train_samples=9, max_eval_samples=2
    )
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (9, 2)


def test_the_report_counts_rows_and_tokens(tmp_path: Path) -> None:
    data = build(tmp_path, numbered(40), validation_split_percentage=10)
    lengths = [len(row["input_ids"]) for row in data.train]
    assert data.train.lengths == lengths
    assert data.report.train_tokens == sum(lengths)
    assert (data.report.train_rows, data.report.validation_rows) == (36, 4)


def test_a_tokenizer_without_eos_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no EOS token"):
        build(tmp_path, numbered(1), tokenizer=tiny_tokenizer(eos_token=None))


def test_a_run_refuses_what_validation_would_have_refused(tmp_path: Path) -> None:
    assert len(build(tmp_path, numbered(5), max_records=5, max_record_bytes=100).train) == 5
    with pytest.raises(TooManyRecords, match="record 5: the file has more than 4 records"):
        build(tmp_path, numbered(5), max_records=4)
    with pytest.raises(RecordTooLarge, match="record 1: is larger than 10 bytes"):
        build(tmp_path, numbered(5), max_record_bytes=10)
