"""A search from its spec to its report: what it counts, what it says, and that a kill changes nothing."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
from fixtures_models import save_tiny_model
from fixtures_search import make_super_adapter, search_spec, write_questions
from fixtures_training import Run, run, train_spec, write_records
from transformers import AutoModelForCausalLM, AutoTokenizer

from comps.tuning import failpoints
from comps.tuning.errors import AdapterError, DataError
from comps.tuning.evaluation.items import Items
from comps.tuning.evaluation.questions import read_questions
from comps.tuning.evaluation.scorer import Scorer
from comps.tuning.export.extract import extract
from comps.tuning.rundir import STOP
from comps.tuning.search import report
from comps.tuning.search.candidates import open_candidates
from comps.tuning.search.ledger import FILE, Ledger
from comps.tuning.search.run import search
from comps.tuning.spec import ExtractSpec, ModelSpec, SearchSpec

ROOT = Path(__file__).resolve().parents[2]
Made = tuple[Path, Path, Path]  # base model, super-adapter, questions


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    directory = tmp_path_factory.mktemp("made")
    return *make_super_adapter(directory), write_questions(directory / "questions.json")


@pytest.fixture(scope="module")
def spec(made: Made, tmp_path_factory: pytest.TempPathFactory) -> SearchSpec:
    return search_spec(tmp_path_factory.mktemp("search") / "whole", *made, algorithm="nsga2")


@pytest.fixture(scope="module")
def found(spec: SearchSpec) -> dict[str, Any]:
    result = search(spec)
    assert result is not None
    return result


def without_times(result: dict[str, Any] | None) -> dict[str, Any]:
    assert result is not None
    return {name: value for name, value in result.items() if name not in ("seconds", "path")}


def progression(output: Path) -> list[dict[str, str]]:
    with open(output / report.CSV, newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_best_sub_adapter_scores_with_stock_peft_what_the_search_says(
    made: Made, spec: SearchSpec, found: dict[str, Any], tmp_path: Path
) -> None:
    base, adapter, file = made
    best = found["best"]
    cut = extract(
        ExtractSpec(
            job_id="e", directory=tmp_path, super_adapter=adapter, version="best", config=best["config"],
            output=tmp_path / "best",
        )
    )  # fmt: skip
    assert cut["parameters"] == best["parameters"]
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), cut["path"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    questions = read_questions(file)
    values = Scorer(model).score(Items.choices(questions, tokenizer))[0].per_item("acc")
    by_question = dict(zip((question.where for question in questions), values, strict=True))
    # The search has drawn its items: the first so many of an order of its own.
    order = [item.where for item in open_candidates(spec).items]
    assert len(order) == 36
    drawn = [by_question[where] for where in order]
    assert best["score"] == pytest.approx(sum(drawn[:24]) / 24)
    assert best["rescored"]["score"] == pytest.approx(sum(drawn) / 36)
    # By half of what the search has not seen it was chosen; the other half says what it is worth.
    assert best["fresh"]["score"] == pytest.approx(sum(drawn[30:]) / 6)
    assert best["deciding"]["score"] == pytest.approx(sum(drawn[:30]) / 30)
    p = best["score"]
    assert best["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 23))


def test_too_few_items_to_tell_what_the_best_is_worth_are_warned_of(
    spec: SearchSpec, found: dict[str, Any]
) -> None:
    warnings = [event["message"] for event in Run(spec.directory).events if event["level"] == "warn"]
    assert any(message.startswith("Nothing is chosen by 6 items") for message in warnings)


def test_the_report_has_a_front_that_nothing_dominates_and_the_named_ones(
    spec: SearchSpec, found: dict[str, Any]
) -> None:
    output = Path(found["path"])
    assert output == spec.directory / "output"
    assert {path.name for path in output.iterdir()} == set(report.FILES)
    assert (output / report.PNG).read_bytes().startswith(b"\x89PNG")
    assert without_times(json.loads((output / report.RESULT).read_text())) == without_times(found)
    rows = progression(output)
    assert list(rows[0])[:4] == ["config", "macs", "top1_acc", "generation"]
    assert len({row["config"] for row in rows}) == len(rows) == found["configurations"]
    whole = [(float(row["top1_acc"]), int(row["parameters"])) for row in rows if int(row["items"]) == 24]
    front = [(entry["score"], entry["parameters"]) for entry in found["front"]]
    assert front == sorted(
        {one for one in whole if not any(o != one and o[0] >= one[0] and o[1] <= one[1] for o in whole)},
        reverse=True,
    )
    assert [entry["version"] for entry in found["front"]] == [f"pareto-{k}" for k in range(len(front))]
    assert found["references"].keys() == {"heuristic", "minimal", "maximal"}
    configs = [entry["config"] for entry in found["finalists"]]
    assert all(entry["config"] in configs for entry in found["references"].values())
    finalists = [(each["deciding"]["score"], -each["parameters"]) for each in found["finalists"]]
    assert (found["best"]["deciding"]["score"], -found["best"]["parameters"]) == max(finalists)


def test_macs_are_those_of_the_linear_layers_for_256_tokens(found: dict[str, Any]) -> None:
    # Two layers of width 32: q, o (32 x 32), k, v (16 x 32), gate, up, down (64 x 32); the head is 300 x 32.
    linear = 2 * 32 * (2 * 32 + 2 * 16 + 3 * 64) + 300 * 32
    for entry in found["front"]:
        assert entry["macs"] == 256 * (linear + entry["parameters"])


@pytest.mark.parametrize("halving", [True, False])
def test_evaluations_are_counted_by_the_items_they_took(made: Made, tmp_path: Path, halving: bool) -> None:
    spec = search_spec(tmp_path / "run", *made, algorithm="random", num_evals=6, halving=halving)
    result = search(spec)
    assert result is not None
    rows = progression(tmp_path / "run" / "output")
    asked = [row for row in rows if row["generation"] != "0"]
    assert result["evaluations"]["search"] == pytest.approx(
        sum(int(row["items"]) for row in asked) / 24, abs=0.01
    )
    assert 5 < result["evaluations"]["search"] <= 6
    assert len(asked) == (6 if not halving else 12)
    assert {int(row["items"]) for row in asked} == ({24} if not halving else {6, 12, 24})
    # All that was scored is in the ledger, once.
    lines = [json.loads(line) for line in (tmp_path / "run" / FILE).read_text().splitlines()[1:]]
    scored = sum(len(line["configs"]) * (line["last"] - line["first"]) for line in lines)
    rescored = len(result["finalists"]) * 12
    assert scored == sum(int(row["items"]) for row in asked) + 3 * 24 + rescored


@pytest.mark.parametrize("lines", [2, -1])
def test_a_killed_search_ends_as_an_undisturbed_one(
    spec: SearchSpec, found: dict[str, Any], tmp_path: Path, lines: int
) -> None:
    """With some batches in its ledger, the next torn in the middle."""
    ledger = (spec.directory / FILE).read_bytes().splitlines(keepends=True)
    torn = ledger[lines][: len(ledger[lines]) // 2]
    (tmp_path / FILE).write_bytes(b"".join(ledger[:lines]) + torn)
    again = search(spec.model_copy(update={"directory": tmp_path}))
    assert without_times(again) == without_times(found)
    assert (tmp_path / FILE).read_bytes() == (spec.directory / FILE).read_bytes()
    assert (tmp_path / "output" / report.CSV).read_bytes() == (
        spec.directory / "output" / report.CSV
    ).read_bytes()


@pytest.mark.trust
def test_a_search_killed_between_two_batches_costs_nothing_but_the_set_up(
    spec: SearchSpec, found: dict[str, Any], tmp_path: Path
) -> None:
    directory, points = tmp_path / "run", tmp_path / "points"
    directory.mkdir()
    points.mkdir()
    (directory / "spec.json").write_text(spec.model_copy(update={"directory": directory}).model_dump_json())
    command = [sys.executable, "-m", "comps.tuning", "--ray", str(directory / "spec.json")]
    environment = os.environ | {failpoints.VARIABLE: str(points)}
    for point in ("evaluations-written", "evaluations-unwritten", "result-unwritten"):
        (points / point).write_text("kill")
        assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == -9
    assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0
    result = json.loads((directory / "result.json").read_text())
    assert result.pop("outcome") == "succeeded"
    assert without_times(result) == without_times(found)


def test_a_search_that_is_asked_to_stop_does_so_and_goes_on_later(
    spec: SearchSpec, found: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / STOP).touch()
    stopped = spec.model_copy(update={"directory": tmp_path})
    assert search(stopped) is None
    assert Run(tmp_path).messages[-1] == "Stopped on request"
    (tmp_path / STOP).unlink()
    assert without_times(search(stopped)) == without_times(found)


def test_an_earlier_search_is_used_where_it_fits_and_changes_no_result(
    spec: SearchSpec, found: dict[str, Any], tmp_path: Path
) -> None:
    again = spec.model_copy(
        update={"directory": tmp_path, "known": (spec.directory / FILE, tmp_path / "none")}
    )
    assert without_times(search(again)) == without_times(found)
    assert len((tmp_path / FILE).read_text().splitlines()) == 1, "nothing was scored"
    fewer = again.model_copy(update={"directory": tmp_path / "fewer", "items": 20, "num_evals": 3})
    result = search(fewer)
    assert result is not None
    assert result["items"] == 20
    other = again.model_copy(update={"directory": tmp_path / "other", "metric": "acc_norm"})
    assert without_times(search(other)) != without_times(found)


def test_scores_of_another_base_or_of_other_settings_are_not_used(
    spec: SearchSpec, made: Made, tmp_path: Path
) -> None:
    _, adapter, _ = made
    keys = {open_candidates(spec).key}
    other = save_tiny_model(tmp_path / "base", seed=7)
    keys.add(
        open_candidates(spec.model_copy(update={"base_model": ModelSpec(name="o", path=str(other))})).key
    )
    stronger = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    config = json.loads((stronger / "adapter_config.json").read_text())
    (stronger / "adapter_config.json").write_text(
        json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]})
    )
    keys.add(open_candidates(spec.model_copy(update={"super_adapter": stronger})).key)
    assert len(keys) == 3


def test_progress_and_the_time_left_are_told(spec: SearchSpec, found: dict[str, Any]) -> None:
    told = [event["data"] for event in Run(spec.directory).events if event["type"] == "progress"]
    steps = [data["step"] for data in told]
    assert steps == sorted(steps)
    assert told[-1]["step"] == told[-1]["total_steps"] == 24
    assert told[-1]["seconds_left"] == 0
    assert all(data["seconds_left"] > 0 for data in told[:-1])


def test_the_loss_on_what_the_training_held_out_is_a_metric_too(tmp_path: Path, made: Made) -> None:
    base = made[0]
    records = write_records(tmp_path / "records.json")
    training = train_spec(
        tmp_path / "training", base, records, validation_split_percentage=30, epochs=2, save_strategy="no"
    )
    trained = run(training)
    spec = search_spec(
        tmp_path / "search", base, trained.output, None, metric=None, algorithm="learned", num_evals=4,
        data=training.data, data_seed=training.training.seed, items=None, all_items=None,
    )  # fmt: skip
    result = search(spec)
    assert result is not None
    assert (result["metric"], result["items"], result["all_items"]) == ("loss", 8, 12)
    assert "learned" in result["references"]
    learned = json.loads((trained.output / "nls_learned.json").read_text())["config"]
    assert result["references"]["learned"]["config"] == learned
    scores = [entry["score"] for entry in result["finalists"]]
    assert all(-10 < score < 0 for score in scores)
    with pytest.raises(DataError, match="no choices"):
        search(spec.model_copy(update={"metric": "acc"}))


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"algorithm": "learned"}, AdapterError, "nothing was learned"),
        ({"validation_file": "few"}, DataError, "has 5 usable"),
        ({"validation_file": "none"}, DataError, "nothing to choose from"),
        ({"validation_file": None}, DataError, "no choices"),
        ({"super_adapter": "base"}, AdapterError, "adapter_config.json"),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(
    made: Made, tmp_path: Path, changes: dict[str, Any], error: type[Exception], reason: str
) -> None:
    if changes.get("validation_file") == "few":
        changes = {"validation_file": write_questions(tmp_path / "few.json", 5)}
    elif changes.get("validation_file") == "none":
        changes = {"validation_file": write_records(tmp_path / "none.json")}
    elif "super_adapter" in changes:
        changes = {"super_adapter": made[0]}
    with pytest.raises(error, match=reason):
        search(search_spec(tmp_path / "run", *made, **changes))


def test_a_ledger_reads_what_was_written_in_any_order(tmp_path: Path) -> None:
    def score(configs: Any, first: int, last: int) -> list[list[float]]:
        return [[config[0] + item / 10 for item in range(first, last)] for config in configs]

    ledger = Ledger(tmp_path / FILE, "key", score)
    asked = [([(1,), (2,)], 3), ([(2,), (3,)], 5), ([(1,), (2,), (3,)], 5), ([(3,)], 4)]
    for configs, last in asked:
        ledger.extend(configs, last)
    assert ledger.scored == 15
    for again in (
        Ledger(tmp_path / FILE, "key", score),
        Ledger(tmp_path / "new", "key", score, [tmp_path / FILE]),
    ):
        assert again.values == ledger.values == {(c,): score([(c,)], 0, 5)[0] for c in (1, 2, 3)}
    assert Ledger(tmp_path / "new", "other", score, [tmp_path / FILE]).values == {}
    assert list(itertools.chain(*ledger.values.values())) != []
