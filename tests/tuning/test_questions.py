"""Records as questions: every format that there is, and a sentence for all that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from comps.tuning.errors import DataError
from comps.tuning.evaluation.questions import check_questions, read_questions, spread, to_question
from comps.tuning.evaluation.tasks import NAMES, known_name, load_task, metrics_of

ARC = {
    "instruction": "Please choose the correct answer to the question: What: a b?\n\nAnswer1: one: 1 "
    "Answer2: two Answer3: the Answer4: three\n\nAnswer format: answer1/answer2/answer3",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}
BOOLQ = {
    "instruction": "Please answer the following question with true or false, question: is it?\n\n"
    "Answer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}
CHAT = [{"role": "user", "content": "Which?"}]

# name -> (record, the training record, choices, answer)
GOOD: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...], int | None]] = {
    "a list and a place": (
        {"question": "Q", "choices": ["a", "b"], "answer": 1},
        {"instruction": "Q", "input": None, "output": "b"}, ("a", "b"), 1,
    ),
    "a list and a text": (
        {"instruction": "Q", "input": "I", "choices": ["a", "b"], "answer": "a"},
        {"instruction": "Q", "input": "I", "output": "a"}, ("a", "b"), 0,
    ),
    "a prompt": (
        {"prompt": "P", "choices": ["a", "b"], "answer": 0},
        {"prompt": "P", "completion": "a"}, ("a", "b"), 0,
    ),
    "a chat": (
        {"messages": CHAT, "choices": ["a", "b"], "answer": 1},
        {"messages": [*CHAT, {"role": "assistant", "content": "b"}]}, ("a", "b"), 1,
    ),
    "as on the hub": (
        {"question": "Q", "choices": {"label": ["A", "B"], "text": ["a", "b"]}, "answerKey": "B"},
        {"instruction": "Q", "input": None, "output": "b"}, ("a", "b"), 1,
    ),
    "labels that are texts of others": (
        {"question": "Q", "choices": {"label": ["1", "2", "3"], "text": ["2", "3", "1"]}, "answerKey": "3"},
        {"instruction": "Q", "input": None, "output": "1"}, ("2", "3", "1"), 2,
    ),
    "LLM-Adapters' labels": (
        ARC, ARC, tuple(f"the correct answer is answer{n}" for n in (1, 2, 3)), 1,
    ),
    "nothing to choose": (
        {"instruction": "Q", "output": "O"}, {"instruction": "Q", "output": "O"}, (), None,
    ),
    "a question and its answer": (
        {"question": "1 + 1?", "answer": 2}, {"instruction": "1 + 1?", "input": None, "output": "2"}, (),
        None,
    ),
    "a chat that says its question again": (
        {"messages": [*CHAT, {"role": "assistant", "content": "a"}], "question": "Q", "answer": "a"},
        {"messages": [*CHAT, {"role": "assistant", "content": "a"}], "question": "Q", "answer": "a"}, (),
        None,
    ),
    "an empty response with an answer": (
        {"instruction": "Q", "output": "", "answer": "4"},
        {"instruction": "Q", "output": "", "answer": "4"}, (), None,
    ),
}  # fmt: skip

# name -> (record, choices needed, texts, a part of the sentence)
BAD: dict[str, tuple[dict[str, Any], bool, bool, str]] = {
    "a place beyond": ({"question": "Q", "choices": ["a", "b"], "answer": 2}, True, False, "from 0 to 1"),
    "a negative place": ({"question": "Q", "choices": ["a", "b"], "answer": -1}, True, False, "not '-1'"),
    "true": ({"question": "Q", "choices": ["a", "b"], "answer": True}, True, False, "not 'True'"),
    "no answer": ({"question": "Q", "choices": ["a", "b"]}, True, False, "not 'None'"),
    "another text": ({"question": "Q", "choices": ["a", "b"], "answer": "c"}, True, False, "'c'"),
    "one choice": ({"question": "Q", "choices": ["a"], "answer": 0}, True, False, "2 to 100 texts"),
    "too many choices": (
        {"question": "Q", "choices": ["a"] * 101, "answer": 0},
        True,
        False,
        "2 to 100 texts",
    ),
    "too many labels": (
        {**BOOLQ, "instruction": "Q Answer format: " + "/".join(["true"] * 101)},
        True,
        False,
        "101 labels",
    ),
    "a sentence too long for its labels": (
        {**BOOLQ, "output": "true" + "." * 6_000_000},
        True,
        False,
        "too long to be made a choice",
    ),
    "choices as a text": ({"question": "Q", "choices": "ab", "answer": 0}, True, False, "list"),
    "numbers as choices": ({"question": "Q", "choices": [1, 2], "answer": 0}, True, False, "texts"),
    "an empty choice": ({"question": "Q", "choices": ["a", " "], "answer": 0}, True, False, "choices[1]"),
    "no question": ({"choices": ["a", "b"], "answer": 0}, True, False, "no 'question'"),
    "an empty question": ({"question": "", "choices": ["a", "b"], "answer": 0}, True, False, "is empty"),
    "nothing to choose": ({"instruction": "Q", "output": "O"}, True, False, "nothing to choose from"),
    "a question about what is left out": (
        {"question": "Q", "answer": "A", "context": "C"},
        False,
        False,
        "is no question",
    ),
    "labels listed otherwise": (
        {
            **ARC,
            "instruction": ARC["instruction"]
            .replace(": one", ":one")
            .replace(": two", ":two")
            .replace("Answer3: ", "Answer3:"),
        },
        True,
        True,
        "only the labels can be chosen from",
    ),
    "plain text": ({"text": "T"}, False, False, "is no question"),
    "an empty response": ({"instruction": "Q", "output": ""}, False, False, "'output' is empty"),
    "another label": ({**ARC, "answer": "answer9"}, True, False, "one of answer1, answer2, answer3"),
    "an output without its label": ({**ARC, "output": "yes"}, True, False, "names 'answer2' once"),
    "a label without its text": (
        {**ARC, "instruction": ARC["instruction"].replace("Answer3", "Answer")},
        True,
        True,
        "only the labels can be chosen from",
    ),
    "messages of nonsense": ({"messages": 3, "choices": ["a", "b"], "answer": 0}, True, False, "'messages'"),
}


@pytest.mark.parametrize(("record", "asked", "choices", "answer"), GOOD.values(), ids=GOOD.keys())
def test_every_format_becomes_a_question(
    record: dict[str, Any], asked: dict[str, Any], choices: tuple[str, ...], answer: int | None
) -> None:
    question = to_question(record)
    assert (question.record, question.choices, question.answer) == (asked, choices, answer)


def test_the_texts_of_the_labels_are_found_in_the_instruction() -> None:
    question = to_question(ARC, texts=True)
    assert question.record == {"instruction": "What: a b?", "input": "", "output": "two"}
    assert question.choices == ("one: 1", "two", "the Answer4: three")
    # True and false are texts themselves.
    question = to_question(BOOLQ, texts=True)
    assert question.record["instruction"] == "is it?"
    assert (question.record["output"], question.choices, question.answer) == ("true", ("true", "false"), 0)
    assert to_question(BOOLQ).choices == ("the correct answer is true", "the correct answer is false")


@pytest.mark.parametrize(("record", "choices", "texts", "part"), BAD.values(), ids=BAD.keys())
def test_what_is_no_question_is_said_with_its_place(
    record: dict[str, Any], choices: bool, texts: bool, part: str
) -> None:
    with pytest.raises(DataError, match=r"^file\.json, record 3: ") as error:
        to_question(record, "file.json, record 3", choices=choices, texts=texts)
    assert part in error.value.message


def test_files_of_every_format_give_the_same_questions(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    records = [{"instruction": f"Q{n}", "choices": ["a", "b"], "answer": n % 2} for n in range(5)]
    (tmp_path / "q.json").write_text(json.dumps(records))
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, records)))
    write_table(pyarrow.Table.from_pylist(records), tmp_path / "q.parquet")
    found = [read_questions(tmp_path / f"q.{each}", choices=True) for each in ("json", "jsonl", "parquet")]
    for questions in found:
        assert [each.choices for each in questions] == [("a", "b")] * 5
        assert [each.answer for each in questions] == [0, 1, 0, 1, 0]
    drawn = spread(found[0], 3, seed=1)
    assert drawn == spread(found[0], 3, seed=1) != spread(found[0], 3, seed=2)
    assert [found[0].index(each) for each in drawn] == sorted(found[0].index(each) for each in drawn)
    assert spread(found[0], 9, seed=1) == spread(found[0], None, seed=1) == found[0]


def test_tasks_have_names_and_are_found_in_their_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert known_name("arc_easy") == "ARC-Easy"
    assert known_name("social-i-qa") == "social_i_qa"
    assert known_name("none") is None
    assert {metrics_of(name) for name in NAMES} == {("acc", "acc_norm"), ("numeric_match",)}
    (tmp_path / "ARC-Easy").mkdir()
    (tmp_path / "ARC-Easy" / "test.json").write_text(json.dumps([ARC]))
    assert load_task("ARC-Easy", tmp_path, choices=True)[0].answer == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="hub is not asked"):
        load_task("boolq", tmp_path)


def test_a_record_full_of_blanks_takes_no_longer_than_another(tmp_path: Path) -> None:
    """A regular expression that looked for blanks before the format took days for this."""
    file = tmp_path / "blanks.json"
    file.write_text(json.dumps([{"instruction": "x" + 5_000_000 * " " + "y", "output": "z"}]))
    assert check_questions(file).records == 1
    assert read_questions(file, texts=True)[0].choices == ()


# A row as each data set has it on the hub, and the answer that is right.
HUB: dict[str, tuple[dict[str, Any], int | str]] = {
    "boolq": ({"question": "is it", "passage": "It is.", "answer": True}, 1),
    "piqa": ({"goal": "g", "sol1": "a", "sol2": "b", "label": 1}, 1),
    "social_i_qa": (
        {"context": "C.", "question": "Q?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"}, 2,
    ),
    "hellaswag": ({"ctx": "A man", "endings": ["a", "b", "c", "d"], "label": "2"}, 2),
    "winogrande": ({"sentence": "The _ is", "option1": "a", "option2": "b", "answer": "2"}, 1),
    "ARC-Easy": (
        {"question": "Q", "choices": {"label": ["1", "2"], "text": ["a", "b"]}, "answerKey": "2"}, 1,
    ),
    "openbookqa": (
        {"question_stem": "Q", "choices": {"label": ["A", "B"], "text": ["a", "b"]}, "answerKey": "A"}, 0,
    ),
    "gsm8k": ({"question": "Q", "answer": "3+4=<<3+4=7>>7\n#### 7"}, "7"),
    "SVAMP": ({"Body": "B.", "Question": "Q?", "Answer": 8.0}, "8.0"),
    "mawps": ({"Question": "N_00 and N_01 ?", "Numbers": "3.0 4.0", "Answer": 7.0}, "7.0"),
    "AQuA": ({"question": "Q", "options": ["A)1", "B)2"], "rationale": "R", "correct": "B"}, "B"),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_rows_of_the_hub_become_questions(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    row, right = HUB[name]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: [row])
    (question,) = load_task(name, tmp_path, choices=isinstance(right, int))
    assert (question.answer if isinstance(right, int) else question.value) == right
    if name == "mawps":
        assert question.record["instruction"] == "3.0 and 4.0 ?"
