"""What a training tells of its ranks: noted exactly, kept through a resume, and fitted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_elastic import RANKS, lora
from fixtures_models import save_tiny_model
from fixtures_training import Run, run, train_spec, write_records

from comps.tuning.elastic.read_space import load_space
from comps.tuning.elastic.sampler import sample
from comps.tuning.elastic.space import ElasticGroup, SearchSpace
from comps.tuning.errors import AdapterError
from comps.tuning.export.extract import extract
from comps.tuning.search import learned
from comps.tuning.search.additive import cheapest, fit, predict
from comps.tuning.spec import ExtractSpec, TrainSpec


def space_of(groups: int, kinds: int = 3) -> SearchSpace:
    """``groups`` groups of three ranks in ``kinds`` kinds."""
    return SearchSpace(
        tuple(
            ElasticGroup((f"model.layers.{g // kinds}.m{g % kinds}",), (16, 12, 8), g % kinds, 100)
            for g in range(groups)
        )
    )


def steps(space: SearchSpace, count: int, effects: np.ndarray, noise: float) -> tuple[np.ndarray, ...]:
    """Choices, losses and labels of a training whose ranks do what ``effects`` ``[groups, 3]`` say."""
    generator = np.random.default_rng(0)
    choices = generator.integers(0, 3, (count, len(space)))
    labels = generator.integers(50, 150, count)
    trend = 2 + np.exp(-np.arange(count) / 100) - 0.3 * np.log(labels)
    planted = effects[np.arange(len(space)), choices].sum(1)
    return choices, trend + planted + generator.normal(0, noise, count), labels


def test_the_additive_model_recovers_planted_effects() -> None:
    space = space_of(24)
    planted = np.random.default_rng(1).normal(0, 0.02, (24, 3))
    planted -= planted.mean(1, keepdims=True)
    model = fit(space, *steps(space, 2000, planted, noise=0.05))
    found = np.array(model.effects)
    assert np.corrcoef(found.ravel(), planted.ravel())[0, 1] > 0.95
    best = cheapest(model.effects, [np.zeros(3)] * 24)
    right = tuple(int(index) for index in planted.argmin(1))
    assert predict(list(planted), best) < 0.95 * predict(list(planted), right) < 0


def test_a_slope_that_all_groups_share_is_seen_through_noise_that_hides_each_groups_own() -> None:
    space = space_of(60)
    planted = np.tile([-0.004, 0, 0.004], (60, 1))
    model = fit(space, *steps(space, 600, planted, noise=0.15))
    found = cheapest(model.effects, [np.zeros(3)] * 60)
    assert found.count(0) >= 45  # by itself the largest of three would be taken in little more than 20
    assert found.count(2) <= 5


def test_where_ranks_do_nothing_the_model_says_so() -> None:
    space = space_of(24)
    model = fit(space, *steps(space, 600, np.zeros((24, 3)), noise=0.1))
    assert np.abs(np.array(model.effects)).max() < 0.01
    assert model.explained < 0.1


def test_draws_spread_around_the_effects_as_far_as_the_steps_leave_open() -> None:
    space = space_of(6)
    planted = np.tile([-0.05, 0, 0.05], (6, 1))
    sure, unsure = (fit(space, *steps(space, count, planted, noise=0.1)) for count in (5000, 100))
    generator = np.random.default_rng(0)
    widths = [
        np.std([np.array(model.draw(generator)) for _ in range(50)], axis=0).mean()
        for model in (sure, unsure)
    ]
    assert widths[0] < 0.5 * widths[1]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    directory = tmp_path_factory.mktemp("undisturbed")
    model = save_tiny_model(directory / "model")
    data = write_records(directory / "records.json")
    return train_spec(
        directory / "run", model, data, adapter=lora(dropout=0.1), epochs=2, batch_size=2,
        gradient_accumulation_steps=2, save_steps=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(spec: TrainSpec) -> Run:
    return run(spec)


def lines(of: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (of.output / learned.STATISTICS).read_text().splitlines()]


def test_a_training_notes_the_loss_and_the_ranks_of_every_step(spec: TrainSpec, undisturbed: Run) -> None:
    noted = lines(undisturbed)
    assert [each["step"] for each in noted] == list(range(1, 21))
    assert [each["loss"] for each in noted] == pytest.approx(undisturbed.losses, rel=1e-6)
    space = load_space(undisturbed.output)
    drawn = [list(sample(space, spec.training.seed, step)) for step in range(20)]
    assert [each["config"] for each in noted] == drawn
    assert all(each["labels"] > 0 for each in noted)


def test_a_resumed_training_has_the_very_lines_of_an_undisturbed_one(
    spec: TrainSpec, undisturbed: Run, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed.output / "checkpoint-8", tmp_path / "output" / "checkpoint-8")
    again = run(spec.model_copy(update={"directory": tmp_path}))
    for name in (learned.STATISTICS, learned.FILE):
        assert (again.output / name).read_bytes() == (undisturbed.output / name).read_bytes()


def test_the_learned_sub_adapter_is_extracted_without_being_told(undisturbed: Run, tmp_path: Path) -> None:
    spec = ExtractSpec(
        job_id="e", directory=tmp_path, super_adapter=undisturbed.output, version="learned",
        output=tmp_path / "learned",
    )  # fmt: skip
    found = json.loads((undisturbed.output / learned.FILE).read_text())
    assert extract(spec)["ranks"] == found["config"]
    effects = [np.array(each) for each in found["effects"]]
    assert found["config"] == [RANKS[int(each.argmin())] for each in effects]


def test_a_training_too_short_to_tell_has_no_learned_version(spec: TrainSpec, tmp_path: Path) -> None:
    training = spec.training.model_copy(update={"max_train_steps": 4})
    short = run(spec.model_copy(update={"directory": tmp_path, "training": training}))
    assert len(lines(short)) == 4
    with pytest.raises(AdapterError, match="at least 10 steps"):
        learned.read(short.output, load_space(short.output))


def test_draws_for_each_micro_batch_are_not_noted(spec: TrainSpec, tmp_path: Path) -> None:
    training = spec.training.model_copy(update={"max_train_steps": 2})
    adapter = spec.lora.model_copy(update={"sample_per": "micro_batch"})
    done = run(spec.model_copy(update={"directory": tmp_path, "training": training, "lora": adapter}))
    assert not (done.output / learned.STATISTICS).exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"step": 1, "loss": 2.0, "labels": 3, "config": [8]}', "does not fit"),
        ('{"step": 1, "loss": 2.0, "labels": 3, "config": [7, 8, 8, 8, 8, 8]}', "does not fit"),
        ('{"step": 1', "does not fit"),
        ("[]", "does not fit"),
        ("", "has 0 steps"),
    ],
)
def test_damaged_statistics_are_one_sentence(
    content: str, reason: str, undisturbed: Run, tmp_path: Path
) -> None:
    (tmp_path / learned.STATISTICS).write_text(content)
    with pytest.raises(AdapterError, match=reason):
        learned.load_model(tmp_path, load_space(undisturbed.output))
