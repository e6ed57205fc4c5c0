"""Checkpoints: sealed, checked before they are used, and resumed from exactly where the run was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fixtures_elastic import lora
from fixtures_models import save_tiny_model
from fixtures_training import Run, assert_same_weights, run, train_spec, write_records

from comps.tuning.errors import TuningError
from comps.tuning.rundir import CHECKPOINT_PREFIX, OUTPUT
from comps.tuning.spec import TrainSpec
from comps.tuning.training.checkpoints import MANIFEST, damage, newest_good


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    """NLS with dropout, accumulation and a rank draw for each step; two epochs of 9 steps."""
    directory = tmp_path_factory.mktemp("undisturbed")
    model = save_tiny_model(directory / "model")
    data = write_records(directory / "records.json")
    return train_spec(
        directory / "run", model, data, adapter=lora(dropout=0.1), epochs=2, batch_size=2,
        gradient_accumulation_steps=2, validation_split_percentage=10, save_steps=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(spec: TrainSpec) -> Run:
    whole = run(spec)
    assert whole.checkpoints == [4, 8, 12, 16, 18]
    return whole


def killed_after(step: int, undisturbed: Run, directory: Path) -> Run:
    """A run in ``directory`` as a kill some time after the checkpoint of ``step`` leaves it."""
    for kept in undisturbed.checkpoints:
        if kept <= step:
            name = f"{OUTPUT}/{CHECKPOINT_PREFIX}{kept}"
            shutil.copytree(undisturbed.directory / name, directory / name)
    return Run(directory)


def resumed(spec: TrainSpec, directory: Path) -> Run:
    return run(spec.model_copy(update={"directory": directory}))


# In the middle of the first epoch, of the second, and after the last step but before the adapter was written.
@pytest.mark.parametrize("step", [4, 12, 18])
def test_a_resumed_run_ends_bit_by_bit_as_the_undisturbed_one(
    step: int, spec: TrainSpec, undisturbed: Run, tmp_path: Path
) -> None:
    killed_after(step, undisturbed, tmp_path)
    again = resumed(spec, tmp_path)
    assert f"Resuming from checkpoint-{step}" in again.messages
    assert again.series("train_loss") == [each for each in undisturbed.series("train_loss") if each[0] > step]
    assert again.series("valid_loss") == [each for each in undisturbed.series("valid_loss") if each[0] > step]
    assert_same_weights(again, undisturbed)
    assert again.result is not None
    assert undisturbed.result is not None
    assert again.result["trained_tokens"] == undisturbed.result["trained_tokens"]


def test_a_resume_at_the_boundary_of_two_epochs_is_exact_too(spec: TrainSpec, tmp_path: Path) -> None:
    training = spec.training.model_copy(update={"save_strategy": "epoch"})
    by_epoch = spec.model_copy(update={"training": training, "directory": tmp_path / "whole"})
    whole = run(by_epoch)
    assert whole.checkpoints == [9, 18]
    killed_after(9, whole, tmp_path / "killed")
    assert_same_weights(resumed(by_epoch, tmp_path / "killed"), whole)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "has changed since"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_torn_checkpoint_is_passed_over_and_an_event_says_so(
    harm: object, reason: str, spec: TrainSpec, undisturbed: Run, tmp_path: Path
) -> None:
    killed_after(12, undisturbed, tmp_path)
    harm(tmp_path / OUTPUT / "checkpoint-12" / "optimizer.pt")  # type: ignore[operator]
    again = resumed(spec, tmp_path)
    warning = next(event for event in again.events if event["level"] == "warn")
    assert warning["message"].startswith("checkpoint-12 is damaged and not used: optimizer.pt")
    assert reason in warning["message"]
    assert "Resuming from checkpoint-8" in again.messages
    assert again.series("train_loss")[0][0] == 9
    assert_same_weights(again, undisturbed)
    assert damage(again.output / "checkpoint-12") is None, "written anew when the run came by again"


def test_without_a_good_checkpoint_the_run_begins_anew(
    spec: TrainSpec, undisturbed: Run, tmp_path: Path
) -> None:
    killed_after(4, undisturbed, tmp_path)
    (tmp_path / OUTPUT / "checkpoint-4" / MANIFEST).write_text("{")
    again = resumed(spec, tmp_path)
    assert any("checkpoint-4 is damaged" in message for message in again.messages)
    assert_same_weights(again, undisturbed)


@pytest.mark.parametrize("steps", [4, 9])  # in the middle of an epoch, and at the end of one
def test_a_run_that_died_after_its_last_step_trains_no_step_more(
    spec: TrainSpec, tmp_path: Path, steps: int
) -> None:
    training = spec.training.model_copy(update={"max_train_steps": steps, "save_steps": 2})
    spec = spec.model_copy(update={"training": training, "directory": tmp_path / "whole"})
    whole = run(spec)
    shutil.copytree(whole.output / f"checkpoint-{steps}", tmp_path / "again" / OUTPUT / f"checkpoint-{steps}")
    again = run(spec.model_copy(update={"directory": tmp_path / "again"}))
    assert again.losses == []
    assert again.result is not None
    assert whole.result is not None
    same = ("steps", "trained_tokens", "train_loss", "valid_loss")
    assert [again.result[name] for name in same] == [whole.result[name] for name in same]
    assert_same_weights(again, whole)


def test_another_runs_checkpoint_is_where_a_run_may_start(
    spec: TrainSpec, undisturbed: Run, tmp_path: Path
) -> None:
    start = undisturbed.output / "checkpoint-18"
    training = spec.training.model_copy(update={"epochs": 3})
    longer = spec.model_copy(update={"directory": tmp_path, "training": training, "resume_from": start})
    continued = run(longer)
    assert continued.series("train_loss")[0][0] == 19
    assert continued.result is not None
    assert continued.result["steps"] == 27
    assert any(message.startswith("Starting from checkpoint-18") for message in continued.messages)
    # Its own checkpoints come first when it is resumed itself.
    assert newest_good(continued.output).path == continued.output / "checkpoint-27"


def test_another_runs_damaged_checkpoint_is_one_sentence(
    spec: TrainSpec, undisturbed: Run, tmp_path: Path
) -> None:
    start = tmp_path / "checkpoint-4"
    shutil.copytree(undisturbed.output / "checkpoint-4", start)
    (start / "adapter_model.safetensors").unlink()
    with pytest.raises(TuningError, match="checkpoint-4 cannot be used: adapter_model"):
        run(spec.model_copy(update={"directory": tmp_path / "run", "resume_from": start}))


def test_a_checkpoint_holds_a_stock_adapter_and_no_foreign_pickle(undisturbed: Run) -> None:
    names = {path.name for path in (undisturbed.output / "checkpoint-4").iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "checkpoint.json",
        "nls_statistics.jsonl", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json",
    }  # fmt: skip
    manifest = json.loads((undisturbed.output / "checkpoint-4" / MANIFEST).read_text())
    assert manifest["step"] == 4
    assert manifest["metrics"].keys() == {"step", "train_loss", "valid_loss"}
