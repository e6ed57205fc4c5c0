"""How much longer a run takes, told from what it has done so far and what is known to lie ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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


def packed_work(
    lengths: Sequence[int], order: Sequence[int], rows_per_step: int, common: int, batches_per_step: int = 1
) -> list[int]:
    """As :func:`step_work`, without padding, and with the ``common`` first tokens of all rows once in each of
    the batches that make up a step."""
    own = np.asarray(lengths)[np.asarray(order)] - common
    steps = np.add.reduceat(own, np.arange(0, len(own), rows_per_step))
    work: list[int] = (steps + common * batches_per_step).tolist()
    return work


class Estimate:
    """Seconds that are left of a run of ``steps`` optimizer steps.

    ``work(epoch)`` is what each step of an epoch costs, in any unit (:func:`step_work`); a step is taken to
    last a fixed time and a time in proportion to it, as fits best so far (least squares). What is left of the
    present epoch is added up step by step, later epochs are taken for its like. Every ``pause_every`` steps
    there is a pause for validation and checkpoint. Neither memory nor time grow with ``steps``.
    """

    def __init__(self, work: Callable[[int], Sequence[float]], steps: int, pause_every: int) -> None:
        self._work, self._steps, self._pause_every = work, steps, pause_every
        self._epoch = -1
        self._done = Line()
        self._first: tuple[float, float] | None = None
        self._pauses, self._paused = 0, 0.0

    def step_done(self, step: int, seconds: float) -> None:
        """Step number ``step`` (from 1) took ``seconds``."""
        work = self._of_epoch(step)[self._place(step)]
        if self._first is None:
            # It also pays for what happens only once (memory, choice of kernels).
            self._first = (work, seconds)
        else:
            self._done.add(work, seconds)

    def pause_done(self, seconds: float) -> None:
        """A validation with its checkpoint took ``seconds``."""
        self._pauses += 1
        self._paused += seconds

    def seconds_left(self, step: int, pause: float | None = None) -> float | None:
        """Seconds from the end of ``step`` to the end of the run; ``None`` before any step was measured.

        ``pause`` stands in for the length of a pause while none has been measured whole.
        """
        if self._first is None:
            return None
        if not self._done.count:
            work, seconds = self._first
            fixed, rate = 0.0, seconds / work
        else:
            fixed, rate = self._done.fit()
        left = self._steps - step
        epoch = self._of_epoch(step)
        here = epoch[self._place(step) + 1 :][:left]
        ahead = sum(here) + (left - len(here)) * sum(epoch) / len(epoch)
        seconds = fixed * left + rate * ahead
        mean_pause = self._paused / self._pauses if self._pauses else pause
        if not self._pause_every or mean_pause is None:
            return seconds
        pauses = math.ceil(self._steps / self._pause_every) - step // self._pause_every
        return seconds + mean_pause * pauses

    def _of_epoch(self, step: int) -> Sequence[float]:
        """The work of the steps of the epoch that ``step`` lies in."""
        if self._epoch < 0:
            self._epoch, self._now = 0, self._work(0)
        if (epoch := (step - 1) // len(self._now)) != self._epoch:
            self._epoch, self._now = epoch, self._work(epoch)
        return self._now

    def _place(self, step: int) -> int:
        return (step - 1) % len(self._now)


class Line:
    """A straight line through points, by least squares (Welford's running means), with neither a fixed part
    nor a slope below 0."""

    def __init__(self) -> None:
        self.count = 0
        self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        self.count += 1
        dx = x - self._x
        self._x += dx / self.count
        self._y += (y - self._y) / self.count
        self._xx += dx * (x - self._x)
        self._xy += dx * (y - self._y)

    def fit(self) -> tuple[float, float]:
        """The fixed part and the slope."""
        if self._xx:
            slope = max(0.0, self._xy / self._xx)
            if (fixed := self._y - slope * self._x) >= 0:
                return fixed, slope
        return 0.0, self._y / self._x

    def at(self, x: float) -> float:
        """The line's height."""
        fixed, slope = self.fit()
        return fixed + slope * x
