"""How much longer a run takes, told from what it has done so far and what is known to lie ahead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np


def step_work(
    lengths: Sequence[int], order: Sequence[int], rows_per_step: int, fixed_length: int = 0
) -> list[int]:
    """The tokens, padding included, that each optimizer step of an epoch puts through the model.

    ``lengths`` are tokens of each row, ``order`` the rows as they come, ``fixed_length`` the length all
    are padded to, if they are. Padding is counted over the whole step, which holds rows of similar lengths.
    """
    ordered = np.asarray(lengths)[np.asarray(order)]
    starts = np.arange(0, len(ordered), rows_per_step)
    longest = np.maximum(np.maximum.reduceat(ordered, starts), fixed_length)
    rows = np.diff(np.append(starts, len(ordered)))
    work: list[int] = (longest * rows).tolist()
    return work


@dataclass
class Estimate:
    """Seconds that are left of a run.

    ``work`` is what each optimizer step costs, in any unit (:func:`step_work`); a step is taken to last a
    fixed time and a time in proportion to it. Every ``pause_every`` steps there is a pause for validation
    and checkpoint.
    """

    work: Sequence[float]
    pause_every: int
    _steps: list[tuple[float, float]] = field(default_factory=list)  # work, seconds
    _pauses: list[float] = field(default_factory=list)

    def step_done(self, step: int, seconds: float) -> None:
        """Step number ``step`` (from 1) took ``seconds``."""
        self._steps.append((self.work[step - 1], seconds))

    def pause_done(self, seconds: float) -> None:
        """A validation with its checkpoint took ``seconds``."""
        self._pauses.append(seconds)

    def seconds_left(self, step: int, pause: float | None = None) -> float | None:
        """Seconds from the end of ``step`` to the end of the run; ``None`` before any step was measured.

        ``pause`` stands in for the length of a pause while none has been measured whole.
        """
        if not self._steps:
            return None
        # The first step also pays for what happens only once (memory, choice of kernels).
        fixed, rate = _line(*zip(*(self._steps[1:] or self._steps), strict=True))
        ahead = self.work[step:]
        steps = fixed * len(ahead) + rate * sum(ahead)
        known = self._pauses or ([pause] if pause is not None else [])
        if not self.pause_every or not known:
            return steps
        pauses = math.ceil(len(self.work) / self.pause_every) - step // self.pause_every
        return steps + fmean(known) * pauses


def _line(work: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """The fixed seconds, and those for each unit of work, that fit best (least squares); none is negative."""
    mean_work, mean_seconds = fmean(work), fmean(seconds)
    spread = sum((each - mean_work) ** 2 for each in work)
    if spread:
        together = sum((w - mean_work) * (s - mean_seconds) for w, s in zip(work, seconds, strict=True))
        rate = max(0.0, together / spread)
        if (fixed := mean_seconds - rate * mean_work) >= 0:
            return fixed, rate
    return 0.0, mean_seconds / mean_work
