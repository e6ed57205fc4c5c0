"""Training a tiny model in this process: what each setting does to losses, checkpoints and output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from fixtures_elastic import lora
from fixtures_models import save_tiny_model
from fixtures_training import Run, assert_same_weights, run, train_spec, write_records
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from comps.tuning.errors import AdapterError, DataError, ModelError, TuningError
from comps.tuning.rundir import EVENTS, OUTPUT, REPORTS, STOP
from comps.tuning.spec import LoraSpec, ModelSpec, OptimizationSpec, Optimizer, Scheduler
from comps.tuning.training import precision
from comps.tuning.training.arguments import total_steps
from comps.tuning.training.callbacks import Progress
from comps.tuning.training.trainer import TuningTrainer

PLAIN = LoraSpec(r=4, dropout=0, target_modules=("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "records.json")


@pytest.fixture(scope="module")
def nls(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> Run:
    """Ten steps of NLS, one epoch of the 40 records."""
    return run(train_spec(tmp_path_factory.mktemp("nls"), model, data))


def test_a_run_leaves_an_adapter_that_stock_peft_loads_and_no_scratch(nls: Run, model: Path) -> None:
    assert nls.result is not None
    assert nls.result["steps"] == 10
    assert nls.result["trained_tokens"] > 0
    assert {path.name for path in nls.directory.iterdir()} == {"events.jsonl", OUTPUT}
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), nls.output)


def test_accumulated_steps_equal_those_of_the_larger_batch(
    nls: Run, tmp_path: Path, model: Path, data: Path
) -> None:
    accumulated = run(train_spec(tmp_path, model, data, batch_size=2, gradient_accumulation_steps=2))
    assert accumulated.losses == pytest.approx(nls.losses, rel=1e-4)


def test_gradient_checkpointing_changes_nothing(nls: Run, tmp_path: Path, model: Path, data: Path) -> None:
    assert run(train_spec(tmp_path, model, data, gradient_checkpointing=True)).losses == nls.losses


def test_the_seed_decides_the_run(nls: Run, tmp_path: Path, model: Path, data: Path) -> None:
    assert_same_weights(run(train_spec(tmp_path / "same", model, data)), nls)
    assert run(train_spec(tmp_path / "other", model, data, seed=1)).losses != nls.losses


def test_plain_lora_has_no_search_space(tmp_path: Path, model: Path, data: Path) -> None:
    plain = run(train_spec(tmp_path, model, data, adapter=PLAIN, epochs=3))
    assert plain.losses[-1] < plain.losses[0] - 0.1
    assert not (plain.output / "nncf_config.json").exists()


def test_pretraining_learns_from_plain_text_in_blocks(tmp_path: Path, model: Path) -> None:
    texts = write_records(tmp_path / "texts.json", [{"text": "a plain sentence " * 20}] * 10)
    spec = train_spec(
        tmp_path / "run", model, texts, task="pretraining", block_size=32, max_length=32, max_train_steps=5
    )
    trained = run(spec)
    assert trained.losses[-1] < trained.losses[0]
    assert trained.result is not None
    assert 19 * 32 < trained.result["trained_tokens"] <= 20 * 32  # the last block may be shorter


@pytest.mark.parametrize("name", get_args(Scheduler))
def test_every_schedule_trains(name: Scheduler, tmp_path: Path, model: Path, data: Path) -> None:
    spec = train_spec(
        tmp_path, model, data, lr_scheduler=name, warmup_steps=2, max_train_steps=4, save_strategy="no"
    )
    rates = dict(run(spec).series("learning_rate"))
    warmed_up = name != "constant"
    assert rates[1] == (0 if warmed_up else 1e-2)
    assert max(rates.values()) == pytest.approx(1e-2)


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_every_optimizer_trains(name: Optimizer, tmp_path: Path, model: Path, data: Path) -> None:
    spec = train_spec(tmp_path, model, data, optimizer=name, weight_decay=0.01, max_train_steps=3)
    assert len(run(spec).losses) == 3


def test_schedules_that_need_settings_of_their_own_are_refused_before_training() -> None:
    with pytest.raises(ValidationError, match="lr_scheduler"):
        OptimizationSpec(lr_scheduler="warmup_stable_decay")  # type: ignore[arg-type]


def test_max_train_steps_ends_the_run(tmp_path: Path, model: Path, data: Path) -> None:
    ended = run(train_spec(tmp_path, model, data, max_train_steps=4))
    assert ended.result is not None
    assert ended.result["steps"] == 4
    assert len(ended.losses) == 4


@pytest.mark.parametrize(("interval", "logged"), [(3, [1, 3, 4]), (4, [1, 4]), (10, [1, 4])])
def test_the_last_step_is_logged_once_whatever_the_interval(
    interval: int, logged: list[int], tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress, "every", 0.0)
    ended = run(train_spec(tmp_path, model, data, max_train_steps=4, logging_steps=interval))
    lines = (tmp_path / EVENTS).read_text().splitlines()
    told = [event["data"] for event in map(json.loads, lines) if event["type"] == "metrics"]
    assert [each["step"] for each in told] == logged
    assert sum("Step 4/4" in line for line in lines) == 1
    assert ended.result is not None
    assert ended.result["train_loss"] == told[-1]["train_loss"]
    assert ended.result["trained_tokens"] == told[-1]["trained_tokens"]


@pytest.mark.parametrize("rows", [40, 39, 37])
@pytest.mark.parametrize(("batch_size", "accumulation", "epochs"), [(4, 1, 1), (3, 2, 2), (16, 4, 1.5)])
def test_the_steps_of_a_run_are_known_before_it(
    rows: int, batch_size: int, accumulation: int, epochs: float, tmp_path: Path, model: Path, data: Path
) -> None:
    spec = train_spec(
        tmp_path, model, data, adapter=PLAIN, batch_size=batch_size, gradient_accumulation_steps=accumulation,
        epochs=epochs, max_train_samples=rows,
    )  # fmt: skip
    result = run(spec).result
    assert result is not None
    assert result["steps"] == total_steps(spec, rows)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "epoch", "epochs": 2}, [10, 20]),
        ({"save_strategy": "steps", "save_steps": 4}, [4, 8, 10]),
        ({"save_strategy": "steps", "save_steps": None, "epochs": 2}, list(range(2, 21, 2))),
    ],
)
def test_checkpoints_are_written_when_asked(
    changes: dict[str, object], expected: list[int], tmp_path: Path, model: Path, data: Path
) -> None:
    assert run(train_spec(tmp_path, model, data, adapter=PLAIN, **changes)).checkpoints == expected


def test_only_the_newest_checkpoints_are_kept_when_limited(tmp_path: Path, model: Path, data: Path) -> None:
    limited = run(train_spec(tmp_path, model, data, adapter=PLAIN, save_steps=2, save_total_limit=2))
    assert limited.checkpoints == [8, 10]
    removed = [event["data"]["removed"] for event in limited.events if event["type"] == "checkpoint"]
    assert removed == [[], [], [2], [4], [6]]


def test_validation_at_each_checkpoint_lands_in_its_metrics(tmp_path: Path, model: Path, data: Path) -> None:
    validated = run(train_spec(tmp_path, model, data, validation_split_percentage=10, save_steps=3))
    checkpoints = {
        e["data"]["step"]: e["data"]["metrics"] for e in validated.events if e["type"] == "checkpoint"
    }
    measured = dict(validated.series("valid_loss"))
    assert list(checkpoints) == [3, 6, 9] == list(measured)
    assert all(checkpoints[step]["valid_loss"] == measured[step] for step in measured)
    assert all("train_loss" in metrics for metrics in checkpoints.values())


def test_tensorboard_writes_into_the_directory_of_the_run(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    reported = run(train_spec(tmp_path / "run", model, data, report_to="tensorboard", max_train_steps=2))
    assert list((reported.directory / REPORTS).glob("events.out.tfevents.*"))
    assert not list((tmp_path / "cwd").iterdir())


def test_a_tracker_that_is_not_installed_is_one_sentence(tmp_path: Path, model: Path, data: Path) -> None:
    with pytest.raises(TuningError, match=r"General\.report_to is wandb, but wandb is not installed"):
        run(train_spec(tmp_path, model, data, report_to="wandb"))


def test_a_run_that_is_asked_to_stop_saves_the_step_and_goes_on_later(
    nls: Run, tmp_path: Path, model: Path, data: Path
) -> None:
    spec = train_spec(tmp_path, model, data)
    (tmp_path / STOP).touch()
    stopped = run(spec)
    assert stopped.result is None
    assert stopped.checkpoints == [1]
    assert stopped.messages[-1] == "Stopped on request after step 1"
    (tmp_path / STOP).unlink()
    assert_same_weights(run(spec), nls)


def test_a_run_that_is_asked_to_stop_in_its_last_step_ends(
    nls: Run, tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_step = TuningTrainer.training_step

    def asked(trainer: TuningTrainer, *arguments: Any, **named: Any) -> torch.Tensor:
        if trainer.state.global_step == 9:
            (tmp_path / STOP).touch()
        loss: torch.Tensor = training_step(trainer, *arguments, **named)
        return loss

    monkeypatch.setattr(TuningTrainer, "training_step", asked)
    ended = run(train_spec(tmp_path, model, data))
    assert (tmp_path / STOP).exists()
    assert ended.result is not None
    assert ended.result["steps"] == 10
    assert_same_weights(ended, nls)


def test_a_draw_for_each_micro_batch_goes_on_where_it_was(tmp_path: Path, model: Path, data: Path) -> None:
    micro = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 6}
    adapter = lora(sample_per="micro_batch")
    whole = run(train_spec(tmp_path / "whole", model, data, adapter=adapter, **micro))
    spec = train_spec(tmp_path / "stopped", model, data, adapter=adapter, **micro)
    spec.directory.mkdir()
    (spec.directory / STOP).touch()
    assert run(spec).checkpoints == [1]
    (spec.directory / STOP).unlink()
    assert_same_weights(run(spec), whole)
    per_step = run(train_spec(tmp_path / "step", model, data, **micro))
    assert per_step.losses != whole.losses


def test_a_bert_is_trained_as_a_decoder(tmp_path: Path, data: Path) -> None:
    bert = save_tiny_model(tmp_path / "bert", "bert")
    trained = run(train_spec(tmp_path / "run", bert, data, adapter=lora("bert"), epochs=3))
    assert trained.losses[-1] < trained.losses[0]
    decoder = AutoModelForCausalLM.from_pretrained(bert, is_decoder=True)
    peft.PeftModel.from_pretrained(decoder, trained.output)


def test_a_base_model_without_a_tokenizer_is_not_trained(tmp_path: Path, data: Path) -> None:
    bare = save_tiny_model(tmp_path / "bare", tokenizer=False)
    with pytest.raises(ModelError, match="org/tiny has no tokenizer"):
        run(train_spec(tmp_path / "run", bare, data))


def test_a_module_that_is_not_there_is_one_sentence(tmp_path: Path, model: Path, data: Path) -> None:
    with pytest.raises(AdapterError, match="no module named 'no_proj'"):
        run(train_spec(tmp_path, model, data, adapter=LoraSpec(target_modules=("no_proj",))))


def test_a_damaged_data_set_is_one_sentence(tmp_path: Path, model: Path) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text('[{"instruction": "a", "output": ')
    with pytest.raises(DataError, match="damaged\\.json"):
        run(train_spec(tmp_path / "run", model, damaged))


def test_bf16_is_used_where_the_cpu_has_it_and_said(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(name: str, mixed_precision: str) -> tuple[list[float], str, list[str]]:
        spec = train_spec(tmp_path / name, model, data, mixed_precision=mixed_precision, max_train_steps=3)
        done = run(spec)
        return done.losses, torch.backends.mkldnn.matmul.fp32_precision, done.messages

    exact, setting, _ = losses("exact", "no")
    assert setting == "ieee"
    monkeypatch.setattr(precision, "native_bf16", lambda: "amx_bf16")
    found, setting, messages = losses("native", "bf16")
    assert setting == "bf16"
    assert found == pytest.approx(exact, rel=1e-2)
    assert any("in bf16 (amx_bf16)" in message for message in messages)
    monkeypatch.setattr(precision, "native_bf16", lambda: None)
    found, setting, messages = losses("foreign", "bf16")
    assert setting == "ieee"
    assert found == exact
    assert any("training is in float32" in message for message in messages)


def test_a_model_that_is_nowhere_is_one_sentence(tmp_path: Path, data: Path) -> None:
    nowhere = ModelSpec(name="org/none", path=str(tmp_path / "none"))
    with pytest.raises(ModelError, match="org/none"):
        run(train_spec(tmp_path / "run", tmp_path / "none", data, base_model=nowhere))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_rows_longer_than_a_table_of_positions_are_refused(tmp_path: Path, family: str) -> None:
    model = save_tiny_model(tmp_path / "model", family)
    data = write_records(tmp_path / "records.json", [{"instruction": "x" * 2000, "output": "y"}] * 8)
    spec = train_spec(
        tmp_path / "run", model, data, adapter=lora(family), max_length=4000, max_source_length=4000
    )
    with pytest.raises(TuningError, match=r"base model knows 512 positions; set max_length to 512 at most"):
        run(spec)


def test_rows_longer_than_rotary_positions_were_trained_for_are_warned_of(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    data = write_records(tmp_path / "records.json", [{"instruction": "x" * 2000, "output": "y"}] * 8)
    done = run(
        train_spec(tmp_path / "run", model, data, max_length=4000, max_source_length=4000, max_train_steps=1)
    )
    assert any("set max_length if that was not intended" in message for message in done.messages)
