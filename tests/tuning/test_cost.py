"""What a run says that it will cost, and what it does when that is too much."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from fixtures_models import save_tiny_model
from fixtures_training import Run, assert_same_weights, run, train_spec, write_records

from comps.tuning import memory
from comps.tuning.errors import ResourceError
from comps.tuning.spec import ResourcesSpec
from comps.tuning.training import cost
from comps.tuning.training.trainer import TuningTrainer

SETTINGS = {"batch_size": 8, "epochs": 2, "mask_input": False, "validation_split_percentage": 10}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "tiny")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    # Large enough that a batch's activations are much of the process.
    return save_tiny_model(tmp_path / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=6)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    records = [
        {"instruction": f"say {number}", "output": " ".join(["word"] * (12 + number % 3))}
        for number in range(30)
    ]
    return write_records(tmp_path / "records.json", records)


def said(done: Run) -> dict[str, float]:
    (event,) = (event for event in done.events if event["message"].startswith("The whole run"))
    return dict(event["data"])


def test_steps_tokens_time_and_memory_are_told_before_the_first_step(
    tmp_path: Path, model: Path, data: Path
) -> None:
    done = run(train_spec(tmp_path / "run", model, data, **SETTINGS))
    assert done.result is not None
    facts = said(done)
    assert facts["steps"] == done.result["steps"] == 8
    assert facts["tokens"] == done.result["trained_tokens"]
    messages = done.messages
    assert messages.index(
        next(each for each in messages if each.startswith("The whole run"))
    ) < messages.index(next(each for each in messages if each.startswith("First step done")))
    # How near the seconds come is the benchmarks' business; but they are no guess.
    assert 0 < facts["seconds"] < 20 * done.result["seconds"]
    assert 100e6 < facts["memory"] < 20e9


def test_the_trial_leaves_the_run_as_it_would_be_without(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS | {"max_train_steps": 3}
    with_trial = run(train_spec(tmp_path / "with", tiny, data, **settings))
    monkeypatch.setattr("comps.tuning.training.loop._tell_cost", lambda *_: None)
    without = run(train_spec(tmp_path / "without", tiny, data, **settings))
    assert with_trial.losses == without.losses
    assert_same_weights(with_trial, without)


def test_gradient_checkpointing_comes_on_when_memory_asks_for_it(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, grown = cost._measured, list[int]()

    def recorded(trainer: TuningTrainer, rows: list[int]) -> tuple[int, int, float]:
        before, peak, seconds = measured(trainer, rows)
        grown.append(peak - before)
        return before, peak, seconds

    monkeypatch.setattr(cost, "_measured", recorded)
    plain = run(train_spec(tmp_path / "plain", model, data, **SETTINGS))
    assert "gradient checkpointing" not in " ".join(plain.messages)
    # Room for more than what half a batch took, but not for a whole one.
    monkeypatch.setattr(cost, "available_memory", lambda: int(1.4 * grown[1]))
    small = run(train_spec(tmp_path / "small", model, data, **SETTINGS))
    assert "with gradient checkpointing, which the memory asks for" in " ".join(small.messages)
    assert grown[-1] < 0.8 * grown[1], "the same batch, without and with checkpointing"
    assert small.losses == pytest.approx(plain.losses, rel=1e-5)


def test_a_run_that_cannot_fit_is_refused_with_what_to_change(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "available_memory", lambda: -(10**9))
    with pytest.raises(ResourceError, match="smaller batch_size") as raised:
        run(train_spec(tmp_path / "run", tiny, data, **SETTINGS))
    assert raised.value.param == "Training.batch_size"


def test_one_of_several_workers_is_refused_for_what_would_not_even_fit_alone(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = ResourcesSpec(num_workers=2, cpus=1)
    monkeypatch.setattr(cost, "available_memory", lambda: -(10**9))
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with pytest.raises(ResourceError, match=r"or for General\.enable_gradient_checkpointing"):
            run(train_spec(tmp_path / "run", tiny, data, **SETTINGS, resources=several))
    finally:
        dist.destroy_process_group()


def test_a_run_that_starts_from_another_jobs_checkpoint_has_not_fitted_before(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(train_spec(tmp_path / "first", tiny, data, **SETTINGS, save_steps=3, max_train_steps=3))
    monkeypatch.setattr(cost, "available_memory", lambda: -(10**9))
    further = SETTINGS | {"max_train_steps": 5, "resume_from": first.output / "checkpoint-3"}
    with pytest.raises(ResourceError, match="smaller batch_size"):
        run(train_spec(tmp_path / "second", tiny, data, **further))


@pytest.mark.parametrize("accumulation", [1, 4, 8])
def test_steps_and_tokens_with_accumulation(
    tmp_path: Path, tiny: Path, data: Path, accumulation: int
) -> None:
    settings = SETTINGS | {"batch_size": 2, "gradient_accumulation_steps": accumulation, "epochs": 1}
    done = run(train_spec(tmp_path / "run", tiny, data, **settings))
    assert done.result is not None
    facts = said(done)
    assert facts["steps"] == done.result["steps"]
    assert facts["tokens"] == done.result["trained_tokens"]


def test_a_run_that_asks_for_gradient_checkpointing_is_measured_with_it(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, on = cost._measured, list[bool]()

    def recorded(trainer: TuningTrainer, rows: list[int]) -> tuple[int, int, float]:
        on.append(any(getattr(each, "gradient_checkpointing", False) for each in trainer.model.modules()))
        return measured(trainer, rows)

    monkeypatch.setattr(cost, "_measured", recorded)
    settings = SETTINGS | {"max_train_steps": 1, "gradient_checkpointing": True}
    asked = run(train_spec(tmp_path / "asked", tiny, data, **settings))
    assert on == [True, True]
    assert "which the memory asks for" not in " ".join(asked.messages)


def test_a_resumed_run_is_not_refused(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(train_spec(tmp_path / "run", tiny, data, **SETTINGS, save_steps=3, max_train_steps=3))
    (first.directory / "result.json").unlink(missing_ok=True)
    monkeypatch.setattr(cost, "available_memory", lambda: -(10**9))
    finished = run(train_spec(tmp_path / "run", tiny, data, **SETTINGS, save_steps=3, max_train_steps=3))
    assert finished.result is not None
    further = run(train_spec(tmp_path / "run", tiny, data, **SETTINGS, save_steps=3, max_train_steps=5))
    assert further.result is not None
    assert further.result["steps"] == 5


def test_available_memory_leaves_out_what_is_taken_but_not_cached_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in {
        "max": 3000,
        "current": 2900,
        "stat": "anon 100\nactive_file 700\ninactive_file 800",
    }.items():
        (tmp_path / f"memory.{name}").write_text(f"{content}\n")
    monkeypatch.setattr(memory, "_GROUPS_AT", tmp_path)
    assert memory.available_memory() == 3000 - (2900 - 1500)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() > 10**8
