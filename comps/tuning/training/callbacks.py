"""What happens between the steps of transformers' Trainer: ranks, progress, checkpoints, and a stop."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from comps.tuning import rundir
from comps.tuning.elastic.model import ElasticController
from comps.tuning.elastic.sampler import sample
from comps.tuning.training import checkpoints
from comps.tuning.training.estimate import Estimate


class RankSampler(TrainerCallback):  # type: ignore[misc]
    """Activates one random sub-adapter for each optimizer step, or each micro-batch.

    The draw depends on (seed, step) alone: every data-parallel worker and a resumed run draw the same.
    """

    def __init__(self, controller: ElasticController, seed: int, per_micro_batch: bool = False) -> None:
        self._controller, self._seed, self._per_micro_batch = controller, seed, per_micro_batch
        self._micro = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._micro = 0
        self._activate(state, args)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._per_micro_batch:
            self._micro += 1
            self._activate(state, args)

    def _activate(self, state: TrainerState, args: TrainingArguments) -> None:
        draw = state.global_step
        if self._per_micro_batch:
            draw = draw * args.gradient_accumulation_steps + self._micro
        self._controller.set(sample(self._controller.space, self._seed, draw))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._controller.maximal()


class LogLastStep(TrainerCallback):  # type: ignore[misc]
    """Has the last step logged whatever ``logging_steps`` says, on all ranks, which gather the loss. Without
    it a run of few steps would tell the loss of its first one to the end."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True


class Progress(TrainerCallback):  # type: ignore[misc]
    """Rank 0's events: loss, rate, tokens and time left at every logging step; evaluations.

    Between them the step and the time left, every few seconds and when a tenth is done. ``work(epoch)`` is
    what each optimizer step of an epoch costs (see :class:`Estimate`).
    """

    every = 10.0  # seconds between two tellings of the time left

    def __init__(self, events: rundir.EventWriter, work: Callable[[int], list[int]]) -> None:
        self._events, self._work = events, work
        self._estimate: Estimate
        self._began = 0.0  # when this process began to train
        self._tokens = 0
        self._step_began = self._step_ended = 0.0
        self._paused = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._estimate = Estimate(self._work, state.max_steps, _pause_every(args, state))
        self._told = 0.0
        self._began, self._first = time.monotonic(), state.global_step + 1
        self._tokens = state.num_input_tokens_seen
        self._events.write(
            f"Training from step {state.global_step} to {state.max_steps}",
            type="progress", step=state.global_step, total_steps=state.max_steps,
        )  # fmt: skip

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._step_began = time.monotonic()
        if self._paused:
            self._estimate.pause_done(self._step_began - self._step_ended)
            self._paused = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._step_ended = time.monotonic()
        self._estimate.step_done(state.global_step, self._step_ended - self._step_began)
        if state.global_step == self._first:
            self._events.write(
                f"First step done in {self._step_ended - self._began:.1f} s",
                type="progress", step=state.global_step, total_steps=state.max_steps,
                seconds_left=self._seconds_left(state),
            )  # fmt: skip
        elif (
            state.global_step == math.ceil(state.max_steps / 10)
            or self._step_ended - self._told >= self.every
        ) and not control.should_log:
            left = self._seconds_left(state)
            self._events.write(
                f"Step {state.global_step}/{state.max_steps}, {left or 0:.0f} s left",
                type="progress", step=state.global_step, total_steps=state.max_steps, seconds_left=left,
            )  # fmt: skip

    def on_save(self, *_: Any, **__: Any) -> None:
        self._paused = True

    def _seconds_left(self, state: TrainerState) -> float | None:
        self._told = time.monotonic()
        pause = self._told - self._step_ended if self._paused else None
        left = self._estimate.seconds_left(state.global_step, pause)
        return None if left is None else round(left, 1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, float], **_: Any,
    ) -> None:  # fmt: skip
        if "eval_loss" in logs:
            loss = logs["eval_loss"]
            self._paused = True
            self._events.write(
                f"Step {state.global_step}: validation loss={loss:.4f}",
                type="metrics", step=state.global_step, valid_loss=loss,
                seconds_left=self._seconds_left(state),
            )  # fmt: skip
        elif "loss" in logs:
            tokens_per_second = (state.num_input_tokens_seen - self._tokens) / (
                time.monotonic() - self._began
            )
            left = self._seconds_left(state)
            self._events.write(
                f"Step {state.global_step}/{state.max_steps}: training loss={logs['loss']:.4f}, "
                f"{tokens_per_second:.0f} tokens/s, {left or 0:.0f} s left",
                type="metrics", step=state.global_step, total_steps=state.max_steps, epoch=state.epoch,
                train_loss=logs["loss"], learning_rate=logs["learning_rate"], grad_norm=logs.get("grad_norm"),
                trained_tokens=state.num_input_tokens_seen, tokens_per_second=round(tokens_per_second, 1),
                seconds_left=left,
            )  # fmt: skip


def _pause_every(args: TrainingArguments, state: TrainerState) -> int:
    """Optimizer steps between two validations or checkpoints; 0 when there are none."""
    strategies = {args.save_strategy.value, args.eval_strategy.value}
    if "steps" in strategies:
        return int(args.save_steps)  # eval_steps is the same
    return max(1, round(state.max_steps / state.num_train_epochs)) if "epoch" in strategies else 0


class CheckpointPublisher(TrainerCallback):  # type: ignore[misc]
    """Moves what the Trainer saved under the scratch directory to its final name, whole and sealed.

    All workers wait for each other first: each writes its own random state into the checkpoint.
    ``events`` is ``None`` on all ranks but 0.
    """

    def __init__(self, output: Path, events: rundir.EventWriter | None, keep: int | None) -> None:
        self._output, self._events, self._keep = output, events, keep

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()
        if self._events is None:
            return
        step = state.global_step
        written = Path(args.output_dir) / f"{rundir.CHECKPOINT_PREFIX}{step}"
        metrics = self._metrics(state)
        final = checkpoints.publish(written, self._output, step, metrics)
        published = checkpoints.steps(self._output)
        removed = list(published)[: -self._keep] if self._keep else []
        # Said first: a checkpoint that is on the list must be there.
        self._events.write(
            f"Checkpoint at step {step}",
            type="checkpoint", step=step, path=str(final), metrics=metrics, removed=removed,
        )  # fmt: skip
        for old in removed:
            shutil.rmtree(published[old])

    @staticmethod
    def _metrics(state: TrainerState) -> dict[str, Any]:
        """The newest training loss, and the validation loss if it was measured at this very step."""
        metrics: dict[str, Any] = {"step": state.global_step}
        for entry in reversed(state.log_history):
            if "loss" in entry:
                metrics.setdefault("train_loss", entry["loss"])
            if "eval_loss" in entry and entry["step"] == state.global_step:
                metrics.setdefault("valid_loss", entry["eval_loss"])
        return metrics


class Stopped(Exception):
    """The run was asked to stop, and has saved a checkpoint to go on from."""


class StopOnRequest(TrainerCallback):  # type: ignore[misc]
    """Ends the training after the step in which the file ``request`` appears, with a checkpoint.

    It must come after the :class:`CheckpointPublisher`. Raises :class:`Stopped` on every rank.
    """

    def __init__(self, request: Path) -> None:
        self._request = request
        self._asked = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        asked = self._request.exists()
        if args.world_size > 1:
            # One worker may see the file a moment before another; all must agree on the step.
            anyone = torch.tensor(float(asked), device=args.device)
            torch.distributed.all_reduce(anyone, torch.distributed.ReduceOp.MAX)
            asked = bool(anyone)
        self._asked = asked and state.global_step < state.max_steps
        if self._asked:
            control.should_save, control.should_evaluate = True, False

    def on_save(self, *_: Any, **__: Any) -> None:
        if self._asked:
            raise Stopped
