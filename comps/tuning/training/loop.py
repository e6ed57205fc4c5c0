"""Train one adapter: what each data-parallel worker does, from the spec to the finished output.

With one worker this is an ordinary function call. With several, the process group must exist already
(Ray Train makes it, see ``on_ray``); rank 0 alone writes events and files. Who may run at all, and what
becomes of the outcome, is the caller's business (``comps.tuning.attempt``).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerState, set_seed

from comps.tuning import rundir
from comps.tuning.data.collate import Collator
from comps.tuning.data.dataset import TokenisedData, build_datasets
from comps.tuning.elastic.model import ElasticController, build_adapter
from comps.tuning.elastic.space import SearchSpace
from comps.tuning.errors import TuningError
from comps.tuning.models.load import check_causal, load_base_model, load_tokenizer
from comps.tuning.sparse.adapted import check_zeros
from comps.tuning.spec import TrainSpec
from comps.tuning.training import auto, checkpoints, facts, precision
from comps.tuning.training.arguments import total_steps, training_arguments
from comps.tuning.training.callbacks import (
    CheckpointPublisher,
    LogLastStep,
    Progress,
    RankSampler,
    StopOnRequest,
    Stopped,
)
from comps.tuning.training.cost import predict
from comps.tuning.training.finish import write_output
from comps.tuning.training.statistics import Statistics
from comps.tuning.training.trackers import trackers
from comps.tuning.training.trainer import TuningTrainer


def train(spec: TrainSpec, rank: int = 0) -> dict[str, Any] | None:
    """Run the job ``spec`` in this process as worker ``rank``.

    Returns the result (on every rank), or ``None`` when it was asked to stop before the end.
    Resumes from the run's own newest good checkpoint, else from ``spec.resume_from``.
    Raises :class:`TuningError` with a sentence for whatever a person can act on.
    """
    if rank:
        return _train(spec, None)
    shutil.rmtree(spec.directory / rundir.SCRATCH, ignore_errors=True)
    (spec.directory / rundir.OUTPUT).mkdir(parents=True, exist_ok=True)
    with closing(rundir.EventWriter(spec.directory)) as events:
        return _train(spec, events)


def train_alone(spec: TrainSpec) -> dict[str, Any] | None:
    """:func:`train` without Ray. Raises :class:`TuningError` for a spec that asks for several workers."""
    if spec.resources.num_workers > 1:
        raise TuningError("more than one worker needs Ray", param="Training.num_training_workers")
    return train(spec)


def _train(spec: TrainSpec, events: rundir.EventWriter | None) -> dict[str, Any] | None:
    """``events`` is ``None`` on all ranks but 0."""
    began = time.monotonic()
    output, scratch = spec.directory / rundir.OUTPUT, spec.directory / rundir.SCRATCH
    if spec.resources.cpus:
        torch.set_num_threads(spec.resources.cpus)
    if events:
        machine = facts.machine()
        events.write(
            f"Training with {spec.resources.num_workers} worker(s), {machine['threads']} thread(s) each, "
            f"on {facts.optional_stack()}",
            machine=machine, versions=facts.versions(),
        )  # fmt: skip
    choice = _resume_point(spec, output, events) if events else None
    resume = _agreed(choice, spec, output)
    set_seed(spec.training.seed)

    with ThreadPoolExecutor(1) as beside:
        loading = beside.submit(
            _timed, lambda: load_base_model(spec.base_model, device=spec.resources.device)
        )
        tokenizer = load_tokenizer(spec.base_model)
        data = build_datasets(spec.data, spec.task, tokenizer, spec.training.seed)
        if events:
            _report_data(events, data, time.monotonic() - began)
        model, seconds = loading.result()
    loaded = time.monotonic()
    check_causal(model, spec.base_model.name)
    _check_positions(model, data, events)
    spec, notes = auto.resolve(spec, model.config, data.report.train_rows, data.report.train_tokens)
    model, space, controller = build_adapter(model, spec.lora)
    zeros = check_zeros(model, spec.base_model.name) if spec.lora.sparse else None
    if events:
        for level, note in notes:
            events.write(note, level=level)
        _report_model(events, spec, model, space, seconds, time.monotonic() - loaded)
        if zeros is not None:
            events.write(
                f"The adapter is masked by the zeros of the base model: {zeros:.1%} of the weights it is on",
                sparsity=zeros,
            )

    statistics = _statistics(spec, controller, resume)
    trainer = TuningTrainer(
        model=model,
        args=training_arguments(spec, scratch, len(data.train), data.validation is not None),
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=Collator(
            tokenizer.pad_token_id,
            spec.data.padding_side,
            spec.data.max_length if spec.data.pad_to_max else None,
        ),
        controller=controller,
        statistics=statistics,
        shuffle=spec.data.shuffle,
        callbacks=_callbacks(spec, controller, statistics, events, output),
    )
    said = precision.use(spec.training.mixed_precision) if spec.resources.device == "cpu" else None
    if events:
        if said:
            events.write(said, level="info" if precision.native_bf16() else "warn")
        for callback in (Progress(events, trainer.work), *trackers(spec)):
            trainer.add_callback(callback)
        events.write(trainer.describe())
        events.write(f"Set-up took {time.monotonic() - began:.1f} s")
    try:
        if resume is None or not _restore_finished(spec, trainer, resume, len(data.train)):
            _tell_cost(spec, trainer, events, resume not in (None, spec.resume_from))
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except Stopped:
        if events:
            events.write(f"Stopped on request after step {trainer.state.global_step}")
        return None
    except UnpicklingError as error:
        # torch.load reads nothing but tensors and numbers out of a checkpoint, and runs nothing.
        assert resume is not None
        raise TuningError(
            f"the checkpoint {resume.name} holds more than tensors and is not read; somebody has changed it",
            param="General.resume_from_checkpoint",
        ) from error

    result = {
        "path": str(output),
        "steps": trainer.state.global_step,
        "trained_tokens": int(trainer.state.num_input_tokens_seen),
        "train_loss": _last(trainer.state.log_history, "loss"),
        "valid_loss": _last(trainer.state.log_history, "eval_loss"),
        "seconds": round(time.monotonic() - began, 2),
    }
    if events:
        write_output(spec, model, tokenizer, space, statistics, result)
        shutil.rmtree(scratch)
        events.write(
            f"The adapter is written: {result['steps']} steps in {result['seconds']} s",
            type="progress", step=result["steps"], seconds_left=0,
        )  # fmt: skip
    return result


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` returns, and its seconds."""
    began = time.monotonic()
    return work(), time.monotonic() - began


def _tell_cost(
    spec: TrainSpec, trainer: TuningTrainer, events: rundir.EventWriter | None, resumed: bool
) -> None:
    """An event with what the run will take. On a GPU other clocks and memories would have to be asked."""
    if spec.resources.device != "cpu":
        return
    cost = predict(trainer, spec, resumed)
    if events:
        events.write(
            cost.describe(), level="warn" if cost.checkpointing else "info",
            steps=cost.steps, tokens=cost.tokens, seconds=round(cost.seconds, 1), memory=cost.memory,
        )  # fmt: skip


def _statistics(
    spec: TrainSpec, controller: ElasticController | None, resume: Path | None
) -> Statistics | None:
    """For a super-adapter whose ranks stay the same through an optimizer step."""
    if controller is None or spec.lora.sample_per == "micro_batch":
        return None
    return Statistics(controller, resume)


def _callbacks(
    spec: TrainSpec,
    controller: ElasticController | None,
    statistics: Statistics | None,
    events: rundir.EventWriter | None,
    output: Path,
) -> list[Any]:
    callbacks: list[Any] = []
    if controller is not None:
        per_micro_batch = spec.lora.sample_per == "micro_batch"
        callbacks.append(RankSampler(controller, spec.training.seed, per_micro_batch))
    if statistics is not None:
        callbacks.append(statistics)
    return [
        *callbacks,
        LogLastStep(),
        CheckpointPublisher(output, events, spec.training.save_total_limit),
        StopOnRequest(spec.directory / rundir.STOP),
    ]


def _resume_point(spec: TrainSpec, output: Path, events: rundir.EventWriter) -> Path | None:
    """The checkpoint to go on from. Damaged ones are passed over, and an event says so."""
    found = checkpoints.newest_good(output)
    for path, damage in found.damaged.items():
        events.write(f"{path.name} is damaged and not used: {damage}", level="warn")
    if found.path is not None:
        events.write(f"Resuming from {found.path.name}")
        return found.path
    if spec.resume_from is not None:
        if reason := checkpoints.damage(spec.resume_from):
            raise TuningError(
                f"the checkpoint {spec.resume_from.name} cannot be used: {reason}",
                param="General.resume_from_checkpoint",
            )
        events.write(f"Starting from {spec.resume_from.name} of another job")
    return spec.resume_from


def _agreed(choice: Path | None, spec: TrainSpec, output: Path) -> Path | None:
    """Rank 0's choice, on all workers. Only rank 0 holds the run's directory; what the others see there
    may still be changed by an earlier attempt that is about to end."""
    if spec.resources.num_workers == 1:
        return choice
    # A number, since paths would be sent as pickles: a step of this run's own, or one of these.
    nowhere, other_job = -1, -2
    number = nowhere
    if choice is not None:
        step = choice.name.removeprefix(rundir.CHECKPOINT_PREFIX)
        number = other_job if choice == spec.resume_from else int(step)
    box = torch.tensor(number, device=spec.resources.device)
    torch.distributed.broadcast(box, src=0)
    number = int(box)
    if number == nowhere:
        return None
    return spec.resume_from if number == other_job else output / f"{rundir.CHECKPOINT_PREFIX}{number}"


def _restore_finished(spec: TrainSpec, trainer: TuningTrainer, checkpoint: Path, rows: int) -> bool:
    """Take weights and state from a checkpoint of the last step, if this is one: the run died between that
    and its result. (The Trainer itself would train one step too many.)

    Raises :class:`TuningError` for another job's checkpoint that leaves nothing to train.
    """
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    steps = total_steps(spec, rows)
    if state.global_step < steps:
        return False
    if checkpoint == spec.resume_from:
        raise TuningError(
            f"the checkpoint is of step {state.global_step}, but this job ends at step {steps}, so nothing "
            "would be trained; ask for more epochs or max_train_steps",
            param="General.resume_from_checkpoint",
        )
    weights = load_file(checkpoint / "adapter_model.safetensors")
    found = set_peft_model_state_dict(trainer.model, weights)
    if found.unexpected_keys:
        raise TuningError(f"{checkpoint.name} has weights of another adapter: {found.unexpected_keys[:3]}")
    trainer.state = state
    return True


def _report_data(events: rundir.EventWriter, data: TokenisedData, seconds: float) -> None:
    report = data.report
    events.write(
        f"{report.train_rows} training rows, {report.train_tokens} tokens, {report.validation_rows} "
        f"validation rows (read and tokenised in {seconds:.1f} s)",
        rows=report.train_rows, tokens=report.train_tokens, validation_rows=report.validation_rows,
    )  # fmt: skip
    for warning in report.warnings:
        events.write(warning, level="warn")


def _report_model(
    events: rundir.EventWriter,
    spec: TrainSpec,
    model: Any,
    space: SearchSpace | None,
    load: float,
    adapt: float,
) -> None:
    trainable, total = model.get_nb_trainable_parameters()
    adapter = f"NLS super-adapter with {space.describe()}" if space else "LoRA adapter"
    if grid := spec.lora.grid:
        adapter += f" within the rounding to {grid.mode} in groups of {grid.group_size}"
    events.write(
        f"Loaded {spec.base_model.name} ({total - trainable:,} parameters) in {load:.1f} s; "
        f"{adapter}, {trainable:,} parameters, set up in {adapt:.2f} s",
        parameters=total - trainable, trainable_parameters=trainable, setup_seconds=round(adapt, 3),
    )  # fmt: skip


def _check_positions(model: Any, data: TokenisedData, events: rundir.EventWriter | None) -> None:
    """Rows longer than the model has positions: an error where it has a table of them, else a warning.

    Raises :class:`TuningError`.
    """
    longest = max(max(rows.lengths) for rows in (data.train, data.validation) if rows)
    known = getattr(model.config, "max_position_embeddings", None)
    if known is None or longest <= known:
        return
    advice = f"rows have up to {longest} tokens, the base model knows {known} positions; set max_length"
    tables = ("wpe", "embed_positions", "position_embeddings")
    if any(name.rpartition(".")[2] in tables for name, _ in model.named_modules()):
        raise TuningError(f"{advice} to {known} at most", param="Dataset.max_length")
    if events:
        events.write(f"{advice[0].upper()}{advice[1:]} if that was not intended", level="warn")


def _last(history: list[dict[str, float]], key: str) -> float | None:
    return next((entry[key] for entry in reversed(history) if key in entry), None)
