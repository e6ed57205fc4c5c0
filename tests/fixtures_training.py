"""Short trainings of a tiny model in this very process, and what they leave behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fixtures_elastic import lora
from safetensors.torch import load_file

from comps.tuning import rundir
from comps.tuning.spec import DataSpec, LoraSpec, ModelSpec, OptimizationSpec, ResourcesSpec, TrainSpec
from comps.tuning.training.checkpoints import steps
from comps.tuning.training.loop import train

# 40 records of different lengths.
RECORDS = [
    {"instruction": "Count.", "input": "x" * (1 + number % 7), "output": f"number {number}"}
    for number in range(40)
]


def write_records(path: Path, records: list[dict[str, str]] = RECORDS) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def train_spec(
    directory: Path, model: Path, data: Path, *, adapter: LoraSpec | None = None, **changes: Any
) -> TrainSpec:
    """A run in ``directory`` on the base model and the file of records given.

    NLS without dropout, batches of four rows, every step logged, one thread (more would wait for each other).
    ``changes`` are fields of any of the blocks: ``batch_size=2, shuffle=False``.
    """
    optimization = {"batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 3}
    rows: dict[str, Any] = {"train_file": data, "validation_split_percentage": 0}
    optimization |= {name: changes.pop(name) for name in [*changes] if name in OptimizationSpec.model_fields}
    rows |= {name: changes.pop(name) for name in [*changes] if name in DataSpec.model_fields}
    fields = {
        "job_id": directory.name,
        "directory": directory,
        "base_model": ModelSpec(name="org/tiny", path=str(model)),
        "lora": adapter or lora(),
        "data": DataSpec(**rows),
        "training": OptimizationSpec(**optimization),
        "resources": ResourcesSpec(cpus=1),
    }
    return TrainSpec(**(fields | changes))


@dataclass(frozen=True)
class Run:
    """What a run has left in ``directory``."""

    directory: Path
    result: dict[str, Any] | None = None

    @property
    def output(self) -> Path:
        return self.directory / rundir.OUTPUT

    @property
    def events(self) -> list[dict[str, Any]]:
        lines = (self.directory / rundir.EVENTS).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def messages(self) -> list[str]:
        return [event["message"] for event in self.events]

    def series(self, name: str) -> list[tuple[int, float]]:
        """``(step, value)`` of every metrics event that has ``name``."""
        data = [event["data"] for event in self.events if event["type"] == "metrics"]
        return [(each["step"], each[name]) for each in data if name in each]

    @property
    def losses(self) -> list[float]:
        return [loss for _, loss in self.series("train_loss")]

    @property
    def checkpoints(self) -> list[int]:
        return list(steps(self.output))

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.output / "adapter_model.safetensors")


def run(spec: TrainSpec) -> Run:
    return Run(spec.directory, train(spec))


def assert_same_weights(one: Run, other: Run, tolerance: float = 0) -> None:
    """Bit by bit, or as far apart as ``tolerance``."""
    ours, theirs = one.weights, other.weights
    assert ours.keys() == theirs.keys()
    same = (lambda a, b: torch.allclose(a, b, rtol=0, atol=tolerance)) if tolerance else torch.equal
    assert [name for name in ours if not same(ours[name], theirs[name])] == []
