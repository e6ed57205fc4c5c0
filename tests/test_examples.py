"""The examples make what they say, and the shipped data is what they make."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
from fixtures_models import save_tiny_model
from fixtures_quantised import spec
from fixtures_search import make_super_adapter, write_questions
from transformers import AutoModelForCausalLM

from comps.tuning.data.records import validate_file
from comps.tuning.quantised.quantize import quantize
from comps.tuning.spec import GridSpec

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: str | Path) -> str:
    command = [sys.executable, EXAMPLES / script, *arguments]
    environment = {"PYTHONPATH": str(EXAMPLES.parent)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def load(name: str) -> list[dict[str, str]]:
    records: list[dict[str, str]] = json.loads((EXAMPLES / "data" / name).read_text(encoding="utf-8"))
    return records


def test_an_openvino_model_answers_rows_of_different_lengths(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    save_tiny_model(tmp_path / "base")
    made = quantize(spec(tmp_path, grid=GridSpec(group_size=32), openvino=True))
    assert made is not None
    command = [made["openvino"]["path"], "--max-new-tokens", "3"]
    both = run("run_openvino.py", *command, "Add.", "A much longer instruction than the other one.")
    alone = run("run_openvino.py", *command, "Add.")
    assert both.startswith(alone)
    assert both.count("\n") > alone.count("\n")


def test_the_shipped_bookings_are_what_the_generator_makes(tmp_path: Path) -> None:
    run("make_bookings.py", tmp_path)
    for name in ("bookings_train.json", "bookings_test.json"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "data" / name).read_bytes()
        assert validate_file(tmp_path / name, name, "instruction_tuning").shape == "alpaca"


def test_the_held_out_bookings_are_new_and_their_answers_complete() -> None:
    train, test = load("bookings_train.json"), load("bookings_test.json")
    assert (len(train), len(test)) == (400, 100)
    messages = [record["instruction"] for record in train + test]
    assert len(set(messages)) == 500
    keys = {
        "book": ["intent", "people", "day", "time", "name"],
        "cancel": ["intent", "day", "time", "name"],
        "order": ["intent", "count", "dish", "day", "time", "name"],
    }
    for record in train + test:
        answer = json.loads(record["output"])
        assert list(answer) == keys[answer["intent"]]
        assert re.fullmatch(r"(1[1-9]|2[01]):(00|15|30|45)", answer["time"])
        assert answer["name"] in record["instruction"]
    assert {json.loads(record["output"])["intent"] for record in test} == set(keys)


HUB = {
    "id": "1",
    "question": "What is red?",
    "choices": {"text": ["Grass", "Blood ", "Snow"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
INSTRUCTION = {
    "instruction": "Please choose the correct answer to the question: What is red?\n\n"
    "Answer1: Grass Answer2: Blood Answer3: Snow\n\nAnswer format: answer1/answer2/answer3",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}


@pytest.mark.parametrize("record", [HUB, INSTRUCTION], ids=["hub", "instructions"])
def test_arc_becomes_a_question_and_its_right_answer(tmp_path: Path, record: dict[str, Any]) -> None:
    source, target = tmp_path / "arc.json", tmp_path / "out.json"
    source.write_text(json.dumps([record, record]))
    assert "2 records" in run("prepare_arc.py", target, "--file", source)
    assert (
        json.loads(target.read_text())
        == [{"instruction": "What is red?", "input": "", "output": "Blood"}] * 2
    )


def test_a_search_without_a_service_leaves_a_report_and_its_best_adapter(tmp_path: Path) -> None:
    base, adapter = make_super_adapter(tmp_path)
    output = tmp_path / "out"
    arguments = ("--base_model_path", base, "--adapter_model_path", adapter, "--output_dir", output)
    more = (
        "--validation_file",
        write_questions(tmp_path / "questions.json"),
        "--num_evals",
        "6",
        "--population",
        "4",
    )
    said = run("search.py", *arguments, *more)
    assert re.search(r"^heuristic +0\.\d+ +0\.\d+ +\d", said, flags=re.M)
    assert "Best of " in said
    result = json.loads((output / "output" / "search_result.json").read_text())
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output / "best")
    cut = json.loads((output / "best" / "sub_adapter.json").read_text())
    assert (cut["ranks"], cut["parameters"]) == (result["best"]["config"], result["best"]["parameters"])
    scored = (output / "evaluations.jsonl").read_bytes()
    assert run("search.py", *arguments, *more).splitlines()[:5] == said.splitlines()[:5]
    assert (output / "evaluations.jsonl").read_bytes() == scored, "nothing is scored twice"
