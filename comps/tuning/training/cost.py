"""What a run will cost, from trying one of its batches before its first step; whether it fits into memory."""

from __future__ import annotations

import ctypes
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from comps.tuning.errors import TuningError
from comps.tuning.spec import TrainSpec
from comps.tuning.training.arguments import save_interval, total_steps
from comps.tuning.training.estimate import Line
from comps.tuning.training.trainer import TuningTrainer

# Of the memory that is there: the rest is for what the measurement does not see (fragments, checkpoints).
_USABLE = 0.9
_FORWARD_SHARE = 1 / 3  # of a training step's time: validation goes forward only


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
            f"{self.memory / 1e9:.1f} GB of memory{recompute} (tried with one of its batches)"
        )


def predict(trainer: TuningTrainer, spec: TrainSpec) -> Cost:
    """Train on a single row and on the middling micro-batch of the first epoch, and forget them.

    Neither weights nor random numbers change. Time is taken to grow by a straight line with the tokens,
    memory in proportion. When the largest micro-batch would not fit into the memory that is free, gradient
    checkpointing is turned on; with several workers, who share a machine or don't, that is left to the
    asker.

    Raises :class:`TuningError` when even that will not do.
    """
    batches = sorted(trainer.micro_batches(), key=trainer.batch_work)
    middle, largest = batches[len(batches) // 2], batches[-1]
    growth = trainer.batch_work(largest) / trainer.batch_work(middle)
    free = available_memory() * _USABLE
    checkpointing = False
    with torch.random.fork_rng(devices=[]):
        single = [trainer.try_batch(middle[:1]) for _ in range(2)][1]  # the first also loads kernels
        trial = _Trial(trainer, middle)
        if trial.grown * growth > free and spec.resources.num_workers == 1:
            if not spec.training.gradient_checkpointing:
                checkpointing = True
                trainer.recompute_activations()
                trial = _Trial(trainer, middle)
            if (needed := trial.grown * growth) > free:
                raise TuningError(
                    f"this run needs about {needed / 1e9:.1f} GB more memory for its largest batch of "
                    f"{len(largest)} rows, even with gradient checkpointing; {free / 1e9:.1f} GB are free. "
                    "Ask for a smaller batch_size (with more gradient_accumulation_steps) or max_length",
                    param="Training.batch_size",
                )
    line = Line()
    line.add(trainer.batch_work(middle[:1]), single)
    if len(middle) > 1:
        line.add(trainer.batch_work(middle), trial.seconds)
    fixed, rate = line.fit()
    rows = len(trainer.train_dataset)
    steps = total_steps(spec, rows)
    epochs = steps * spec.training.gradient_accumulation_steps / len(batches)
    seconds = epochs * sum(fixed + rate * trainer.batch_work(batch) for batch in batches)
    if trainer.eval_dataset:
        by_epoch = spec.training.save_strategy == "epoch"
        often = math.ceil(epochs if by_epoch else steps / save_interval(spec, rows))
        tokens = sum(trainer.eval_dataset.lengths) / spec.resources.num_workers
        seconds += often * tokens * rate * _FORWARD_SHARE
    state = 8 * sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    return Cost(
        steps=steps,
        tokens=round(sum(trainer.train_dataset.lengths) * epochs),
        seconds=seconds,
        memory=round(trial.peak + trial.grown * (growth - 1) + state),
        checkpointing=checkpointing,
    )


class _Trial:
    """One micro-batch: its seconds, the process's largest size meanwhile, and by how much it grew to that."""

    def __init__(self, trainer: TuningTrainer, rows: list[int]) -> None:
        process = psutil.Process()
        with suppress(AttributeError):  # glibc keeps what was freed; without it the next trial seems small
            ctypes.CDLL(None).malloc_trim(0)
        before = process.memory_info().rss
        with suppress(OSError):  # where this may not be reset, the peak is that of the process's life
            Path("/proc/self/clear_refs").write_text("5")
        self.seconds = trainer.try_batch(rows)
        self.peak = max(before, _peak())
        self.grown = self.peak - before


def _peak() -> int:
    """The largest resident size of this process, in bytes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return int(psutil.Process().memory_info().rss)
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def available_memory() -> int:
    """Bytes that this process could still take: of the machine, and of its control group if limited."""
    found: list[int] = [psutil.virtual_memory().available]
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no limit, or no such file
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        found.append(int(limit) - int(used))
    return max(0, min(found))
