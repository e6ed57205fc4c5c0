"""What "auto" stands for: the rules, what is said about them, and runs that follow them."""

from __future__ import annotations

import json
import shutil
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
from fixtures_models import save_tiny_model, tiny_model
from fixtures_training import Run, assert_same_weights, run, train_spec, write_records
from transformers import LlamaConfig, PretrainedConfig

from comps.tuning.errors import TuningError
from comps.tuning.rundir import CHECKPOINT_PREFIX, OUTPUT
from comps.tuning.spec import ResourcesSpec, TrainSpec
from comps.tuning.training.arguments import total_steps
from comps.tuning.training.auto import learning_rate, resolve, step_rows


# Worked out by hand, with logarithms: 5e-4 at a width of 2000 whatever the kind; at a quarter of the width
# 4 ** 0.781 = 2.953 and 4 ** 0.0775 = 1.1134 times as much.
@pytest.mark.parametrize(
    ("kind", "width", "expected"),
    [
        ("llama", 2000, 5e-4),
        ("qwen3", 2000, 5e-4),
        ("llama", 500, 1.4765e-3),
        ("llama", 8000, 1.6932e-4),
        ("qwen2", 500, 5.567e-4),
        ("qwen2_moe", 8000, 4.4906e-4),
        ("llama", 576, 1.322e-3),  # SmolLM2-135M
        ("llama", 4096, 2.857e-4),  # Llama-3.1-8B
        ("mistral", 500, 1.4765e-3),
    ],
)
def test_the_rate_is_that_of_the_published_rule(kind: str, width: int, expected: float) -> None:
    assert learning_rate(kind, width) == pytest.approx(expected, rel=5e-4)
    power = 0.0775 if kind.startswith("qwen") else 0.781
    assert learning_rate(kind, width) == pytest.approx(exp(log(5e-4) + power * (log(2000) - log(width))))


@pytest.mark.parametrize(
    ("rows", "mean", "expected"),
    [
        (10_000, 20, 32),  # 102 rows would fit into 2048 tokens, 32 are the most
        (10_000, 64, 32),
        (10_000, 65, 16),
        (10_000, 97, 16),
        (10_000, 512, 4),
        (10_000, 1500, 1),
        (10_000, 5000, 1),
        (1_599, 20, 16),  # 31 rows, for 50 steps
        (1_600, 20, 32),
        (500, 20, 8),
        (100, 20, 4),
        (40, 20, 4),
        (1, 20, 4),
        (40, 900, 2),
    ],
)
def test_a_step_has_a_power_of_two_of_rows(rows: int, mean: int, expected: int) -> None:
    assert step_rows(rows, rows * mean) == expected


def spec_with(**changes: Any) -> TrainSpec:
    return train_spec(Path("run"), Path("model"), Path("data"), **changes)


WIDE = LlamaConfig(hidden_size=576)  # the rule says 1.322e-3


@pytest.mark.parametrize(
    ("workers", "accumulation", "expected"), [(1, 1, 16), (2, 1, 8), (1, 4, 4), (3, 1, 5), (8, 8, 1)]
)
def test_workers_and_micro_batches_share_the_rows_of_a_step(
    workers: int, accumulation: int, expected: int
) -> None:
    resources = ResourcesSpec(num_workers=workers)
    spec = spec_with(auto=("batch_size",), gradient_accumulation_steps=accumulation, resources=resources)
    found, notes = resolve(spec, WIDE, 1000, 100_000)
    assert found.training.batch_size == expected
    assert found.training.learning_rate == spec.training.learning_rate
    assert [level for level, _ in notes] == ["info"]
    assert f"auto: {expected}, for 16 rows a step, from 1000 rows of 100 tokens on average" in notes[0][1]


def test_what_was_chosen_is_said_with_its_reason() -> None:
    _, notes = resolve(spec_with(auto=("learning_rate",)), WIDE, 40, 400)
    assert notes == [("info", "learning_rate auto: 0.00132, from the hidden size 576 of a llama model")]
    _, [(level, text)] = resolve(spec_with(auto=("learning_rate",), optimizer="sgd"), WIDE, 40, 400)
    assert level == "warn"
    assert "suits Adam; the optimizer is sgd" in text


@pytest.mark.parametrize(
    ("rate", "warned"),
    [
        (1.4e-2, "learning_rate is 0.014, 11 times what usually suits LoRA on a llama model 576 wide "
         '(0.00132): training may diverge. If that was not intended, give a lower one, or "auto"'),
        (1.3e-2, None),
        (5e-5, None),
        (4.3e-5, "1/31 of what usually suits LoRA"),
    ],
)  # fmt: skip
def test_a_given_rate_far_off_the_rule_is_warned_of(rate: float, warned: str | None) -> None:
    spec = spec_with(learning_rate=rate)
    found, notes = resolve(spec, WIDE, 40, 400)
    assert found == spec
    assert [level for level, _ in notes] == (["warn"] if warned else [])
    assert not warned or warned in notes[0][1]
    assert resolve(spec_with(learning_rate=rate, optimizer="sgd"), WIDE, 40, 400)[1] == []


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "bloom", "gpt2"])
def test_each_family_tells_its_width(family: str) -> None:
    config = tiny_model(family).config
    found, _ = resolve(spec_with(auto=("learning_rate",)), config, 40, 400)
    assert found.training.learning_rate == learning_rate(family, 32)


def test_a_model_that_does_not_tell_its_width_needs_a_number() -> None:
    assert resolve(spec_with(), PretrainedConfig(), 40, 400)[1] == []
    with pytest.raises(TuningError, match="does not tell its hidden size; give a number") as caught:
        resolve(spec_with(auto=("learning_rate",)), PretrainedConfig(), 40, 400)
    assert caught.value.param == "Training.learning_rate"


def test_a_run_with_both_trains_by_the_rules_and_is_resumed_by_them(tmp_path: Path) -> None:
    model, data = save_tiny_model(tmp_path / "model"), write_records(tmp_path / "records.json")
    spec = train_spec(
        tmp_path / "run", model, data, auto=("learning_rate", "batch_size"), batch_size=3, epochs=2,
        save_steps=10,
    )  # fmt: skip
    whole = run(spec)
    given = {"learning_rate": learning_rate("llama", 32), "batch_size": 4}
    resolved = spec.model_copy(update={"training": spec.training.model_copy(update=given | {"auto": ()})})
    assert whole.result is not None
    assert whole.result["steps"] == total_steps(resolved, 40) == 20
    assert dict(whole.series("learning_rate"))[1] == pytest.approx(given["learning_rate"])
    said = [text for text in whole.messages if " auto: " in text]
    assert said[0] == "learning_rate auto: 0.0126, from the hidden size 32 of a llama model"
    assert said[1].startswith("batch_size auto: 4, for 4 rows a step, from 40 rows of ")
    manifest = json.loads((whole.output / "training_manifest.json").read_text())
    assert manifest["training"] | given == manifest["training"]

    killed = Run(tmp_path / "killed")
    name = f"{OUTPUT}/{CHECKPOINT_PREFIX}10"
    shutil.copytree(whole.directory / name, killed.directory / name)
    again = run(spec.model_copy(update={"directory": killed.directory}))
    assert again.series("learning_rate") == [each for each in whole.series("learning_rate") if each[0] > 10]
    assert_same_weights(again, whole)
    assert_same_weights(run(resolved.model_copy(update={"directory": tmp_path / "given"})), whole)
