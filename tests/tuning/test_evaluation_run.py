"""An evaluation from its spec to its result: what it refuses, what it tells, and that a kill costs little."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures_models import save_tiny_model
from fixtures_training import Run

from comps.tuning import failpoints
from comps.tuning.errors import DataError
from comps.tuning.evaluation.notes import FILE, Notes
from comps.tuning.evaluation.run import evaluate
from comps.tuning.spec import EvaluateSpec, ModelSpec

ROOT = Path(__file__).resolve().parents[2]
SUMS = [{"instruction": f"Add {n} and 2.", "output": f"The answer is {n + 2}."} for n in range(24)]
METRICS = ("numeric_match", "exact_match", "loss", "token_accuracy")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def spec(directory: Path, base: Path, records: list[dict[str, Any]], **fields: Any) -> EvaluateSpec:
    directory.mkdir(exist_ok=True)
    file = directory / "questions.json"
    file.write_text(json.dumps(records))
    wanted = {"metrics": METRICS, "max_new_tokens": 4, "batch_size": 4} | fields
    return EvaluateSpec(
        job_id="eval-1", directory=directory, base_model=ModelSpec(name="tiny", path=str(base)),
        file=file, file_name="questions.json", **wanted,
    )  # fmt: skip


def test_an_evaluation_that_is_killed_goes_on_and_ends_as_if_nothing_had_been(
    base: Path, tmp_path: Path
) -> None:
    whole = evaluate(spec(tmp_path / "whole", base, SUMS))
    assert whole is not None
    asked = spec(tmp_path / "killed", base, SUMS)
    (asked.directory / "spec.json").write_text(asked.model_dump_json())
    points = tmp_path / "points"
    points.mkdir()
    command = [sys.executable, "-m", "comps.tuning", str(asked.directory / "spec.json")]
    environment = os.environ | {failpoints.VARIABLE: str(points)}
    noted = []
    for _ in range(2):
        (points / "evaluation-noted").write_text("kill")
        assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == -9
        noted.append(len((asked.directory / FILE).read_text().splitlines()))
    assert noted == [4, 8]  # a batch each, and none twice
    with open(asked.directory / FILE, "a", encoding="utf-8") as stream:
        stream.write('["answer/torn by a ki')
    again = evaluate(asked)
    assert again is not None
    assert again["metrics"] == whole["metrics"]
    assert Path(again["path"]).read_bytes() == Path(whole["path"]).read_bytes()
    assert "Resuming: 8 answers or scores were there before" in Run(asked.directory).messages
    assert len(Notes(asked.directory / FILE).found) == 2 * len(SUMS)


def test_questions_that_cannot_be_scored_are_counted_and_told(base: Path, tmp_path: Path) -> None:
    long = {"instruction": "Add.", "input": "1 " * 3000, "output": "3000"}
    asked = spec(tmp_path / "run", base, [*SUMS, long], metrics=("loss",), max_length=500)
    found = evaluate(asked)
    assert found is not None
    assert (found["items"], found["unscored"]) == (25, 0)
    assert "1 questions with their responses exceed 500 tokens and were cut" in Run(asked.directory).messages


def test_numbers_are_looked_for_only_where_some_are_expected(base: Path, tmp_path: Path) -> None:
    colours = [{"question": "Snow?", "choices": ["white", "black"], "answer": 0}] * 2
    with pytest.raises(DataError, match="no question expects a number"):
        evaluate(spec(tmp_path / "run", base, colours, metrics=("numeric_match",)))
    numbers = [{"question": "3 + 4?", "choices": ["12", "7"], "answer": 1}] * 2
    found = evaluate(spec(tmp_path / "other", base, numbers, metrics=("numeric_match",)))
    assert found is not None
