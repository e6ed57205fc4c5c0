"""What a run will cost, from trying half a batch of its rows before its first step; whether it fits."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from comps.tuning.errors import ResourceError, TuningError
from comps.tuning.memory import available_memory
from comps.tuning.spec import TrainSpec
from comps.tuning.training.arguments import save_interval, total_steps
from comps.tuning.training.estimate import Line
from comps.tuning.training.trainer import TuningTrainer

# Of the memory that is there: the rest is for what the measurement does not see (fragments, checkpoints).
_USABLE = 0.9
_FORWARD_SHARE = 1 / 2  # of a step's time: the base is frozen, so backward is hardly more than forward
_PATIENCE = 60.0  # seconds that trying half a batch may take; else a single row must do


@dataclass(frozen=True)
class Cost:
    """Optimizer steps; tokens of all rows, as often as they come; seconds, validations included; bytes of
    memory at most; and whether gradient checkpointing had to be turned on to stay within them."""

    steps: int
    tokens: int
    seconds: float
    memory: int
    checkpointing: bool

    def describe(self) -> str:
        """In a sentence."""
        minutes, seconds = divmod(round(self.seconds), 60)
        hours, minutes = divmod(minutes, 60)
        time = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
        recompute = ", with gradient checkpointing, which the memory asks for" if self.checkpointing else ""
        return (
            f"The whole run: {self.steps} steps, {self.tokens:,} tokens, about {time} and "
            f"{self.memory / 1e9:.1f} GB of memory a worker{recompute} "
            "(tried with half a batch of its rows)"
        )


def predict(trainer: TuningTrainer, spec: TrainSpec, resumed: bool = False) -> Cost:
    """Train on a single row and on half as many as a micro-batch has, short and long ones as often as the
    data has them, and forget them.

    Neither weights nor random numbers change. Time and memory are taken to grow by straight lines with the
    tokens. When the largest micro-batch would not fit into the memory that is free, gradient checkpointing is
    turned on; with several workers that is left to the asker, since each looks at its own memory and all
    must compute alike. They may share a machine or not, so one of them is refused for what would not even
    fit alone. A run that is ``resumed`` from a checkpoint of its own has fitted before and is not refused for
    memory that others take now; should it die of it, its attempts are counted.

    Raises :class:`ResourceError` when even that will not do, :class:`TuningError` for too few rows.
    """
    batches, workers = trainer.micro_batches(), spec.resources.num_workers
    if not batches:
        raise TuningError(
            f"there are fewer training rows than the {workers} workers", param="Training.num_training_workers"
        )
    works = [trainer.batch_work(rows) for rows in batches]
    by_work = sorted(range(len(batches)), key=works.__getitem__)
    largest, most = batches[by_work[-1]], works[by_work[-1]]
    rows = _spread(trainer.train_dataset.lengths, [row for batch in batches for row in batch], len(largest))
    free = available_memory() * _USABLE
    asked = spec.training.gradient_checkpointing
    on = asked and trainer.recompute_activations()
    with torch.random.fork_rng(devices=[]):
        if trainer.fusion is None:  # or trying that has loaded the kernels
            trainer.try_batch(rows[:1])
        trial = _Trial(trainer, rows, most, free)
        if not trial.fits and workers == 1 and not on and (on := trainer.recompute_activations()):
            trial = _Trial(trainer, rows, most, free)
    if not trial.fits and not resumed:
        even = ", even with gradient checkpointing" if on else ""
        raise ResourceError(
            f"this run needs about {trial.needed / 1e9:.1f} GB more memory for its largest batch of "
            f"{len(largest)} rows{even}; {max(0.0, free) / 1e9:.1f} GB are free. "
            "Ask for a smaller batch_size (with more gradient_accumulation_steps) or max_length"
            + ("" if on else ", or for General.enable_gradient_checkpointing"),
            param="Training.batch_size",
        )
    fixed, rate = trial.time.fit()
    rows_in_all = len(trainer.train_dataset)
    steps = total_steps(spec, rows_in_all)
    epochs = steps / math.ceil(len(batches) / spec.training.gradient_accumulation_steps)
    seconds = epochs * sum(fixed + rate * work for work in works)
    tokens = sum(trainer.train_dataset.lengths)
    if trainer.eval_dataset:
        by_epoch = spec.training.save_strategy == "epoch"
        often = math.ceil(epochs if by_epoch else steps / save_interval(spec, rows_in_all))
        computed = sum(trainer.eval_dataset.lengths) * sum(works) / tokens
        seconds += often * computed * rate * _FORWARD_SHARE
    trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    return Cost(
        steps=steps,
        tokens=round(tokens * epochs),
        seconds=seconds,
        memory=round(trial.before + trial.needed + 8 * trainable),  # two numbers of Adam for each weight
        checkpointing=on and not asked,
    )


def _spread(lengths: Sequence[int], rows: Sequence[int], batch: int) -> list[int]:
    """Half as many of ``rows`` as a ``batch`` has (four, if it has them), at equal steps through their
    lengths: their mean costs what the mean row does, also where cost does not grow in proportion to length.
    The first one is middling.
    """
    ordered = sorted(rows, key=lengths.__getitem__)
    count = min(len(ordered), max(-(-batch // 2), min(batch, 4)))
    chosen = [ordered[(2 * place + 1) * len(ordered) // (2 * count)] for place in range(count)]
    middle = chosen.pop(len(chosen) // 2)
    return [middle, *chosen]


class _Trial:
    """What one of ``rows`` and all of them say of a micro-batch that computes on ``most`` tokens.

    ``time`` is the line of seconds over tokens, ``needed`` the bytes that the process would grow by from
    ``before``, ``fits`` whether the bytes ``free`` are enough for that.
    """

    def __init__(self, trainer: TuningTrainer, rows: list[int], most: int, free: float) -> None:
        self.time, growth = Line(), Line()
        parts = (rows[:1], rows) if len(rows) > 1 else (rows,)
        for part in parts:
            work = trainer.batch_work(part)
            if growth.count and (self.time.at(work) > _PATIENCE or growth.at(most) > 2 * free):
                break
            before, peak, seconds = _measured(trainer, part)
            growth.add(work, peak - before)
            self.before = before
            # Memory that is touched for the first time takes its time; the next batch does not pay for it.
            again = trainer.try_batch(part) if seconds < _PATIENCE / 6 else seconds
            self.time.add(work, min(again, seconds))
        self.needed = growth.at(most)
        # A single row says too much: what a batch needs but once counts for each of its rows.
        self.fits = self.needed <= (free if growth.count == len(parts) else 2 * free)


def _measured(trainer: TuningTrainer, rows: list[int]) -> tuple[int, int, float]:
    """Train on one micro-batch: bytes of the process before, at most meanwhile, and seconds."""
    with suppress(AttributeError):  # glibc keeps what was freed; without it the next trial seems small
        ctypes.CDLL(None).malloc_trim(0)
    before = int(psutil.Process().memory_info().rss)
    with suppress(OSError):  # where this may not be reset, the peak is that of the process's life
        Path("/proc/self/clear_refs").write_text("5")
    seconds = trainer.try_batch(rows)
    return before, max(before, _peak()), seconds


def _peak() -> int:
    """The largest resident size of this process, in bytes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return int(psutil.Process().memory_info().rss)
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])
