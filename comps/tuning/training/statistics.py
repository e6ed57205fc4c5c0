"""The loss and the ranks of every optimizer step: what a search can learn from a training for nothing.

``nls_statistics.jsonl`` has one line a step, ``{"step": 1, "loss": 2.31, "labels": 96, "config": [16]}``:
the mean loss of the step's labelled tokens, how many these were, and the ranks that were active. It travels
with every checkpoint, so that a resumed run has the very lines of an undisturbed one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from comps.tuning import rundir
from comps.tuning.elastic.model import ElasticController
from comps.tuning.search.learned import STATISTICS

FILE = STATISTICS


class Statistics(TrainerCallback):  # type: ignore[misc]
    """Collects the lines on rank 0. Must come after the callback that sets the ranks and before the one that
    publishes checkpoints.

    ``resume`` is the checkpoint that the run goes on from, if any. Losses stay on the device until a
    checkpoint, where all workers average theirs: nothing waits for them between.
    """

    def __init__(self, controller: ElasticController, resume: Path | None) -> None:
        self._controller = controller
        self._lines: list[str] = []
        if resume is not None and (resume / FILE).is_file():
            self._lines = (resume / FILE).read_text(encoding="utf-8").splitlines()
        self._losses: list[torch.Tensor] = []  # of the steps since the last checkpoint
        self._labels: list[torch.Tensor | int | None] = []
        self._configs: list[tuple[int, ...]] = []
        self._first = 0

    def add(self, loss: torch.Tensor, labels: torch.Tensor | int | None) -> None:
        """One micro-batch's share of the loss of the step, which has ``labels`` labelled tokens."""
        self._losses[-1] = self._losses[-1] + loss.detach().float()
        self._labels[-1] = labels

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not self._losses:
            self._first = state.global_step + 1
        self._losses.append(torch.zeros((), device=args.device))
        self._labels.append(None)
        self._configs.append(self._controller.active)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._settle(args)
        if state.is_world_process_zero:
            self.write(Path(args.output_dir) / f"{rundir.CHECKPOINT_PREFIX}{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._settle(args)

    def _settle(self, args: TrainingArguments) -> None:
        """Turn the losses since the last time into lines; all workers must come by."""
        if not self._losses:
            return
        losses = torch.stack(self._losses)
        if args.world_size > 1:
            torch.distributed.all_reduce(losses)
            losses /= args.world_size
        steps = zip(losses.tolist(), self._labels, self._configs, strict=True)
        for step, (loss, labels, config) in enumerate(steps, start=self._first):
            known = loss if math.isfinite(loss) else None
            line = {"step": step, "loss": known, "labels": int(labels or 0), "config": config}
            self._lines.append(json.dumps(line, separators=(",", ":")))
        self._losses, self._labels, self._configs = [], [], []

    def write(self, directory: Path) -> None:
        """Write the lines so far into ``directory``."""
        text = "".join(f"{line}\n" for line in self._lines)
        (directory / FILE).write_text(text, encoding="utf-8")
