"""A run whose disk fills up says so, and leaves nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fixtures_models import save_tiny_model
from fixtures_training import Run, train_spec, write_records
from small_disk import SmallDisk, small_disk

from comps.tuning import rundir


@dataclass(frozen=True)
class Place:
    """A run's directory on a disk of 2 MB: ``directory`` as the run sees it, ``seen`` as the test does."""

    disk: SmallDisk
    directory: Path
    seen: Path
    spec: Path

    def run(self) -> subprocess.CompletedProcess[str]:
        """``python -m comps.tuning`` of the spec."""
        command = [*self.disk.prefix, sys.executable, "-m", "comps.tuning", str(self.spec)]
        return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with small_disk(tmp_path / "disk", "2m") as disk:
        directory = tmp_path / "disk" / "run"
        model = save_tiny_model(tmp_path / "model")
        data = write_records(tmp_path / "records.json")
        # A checkpoint at every step, all of them kept.
        spec = train_spec(directory, model, data, max_train_steps=200, save_steps=1, epochs=100)
        (tmp_path / "spec.json").write_text(spec.model_dump_json())
        yield Place(disk, directory, disk.path / "run", tmp_path / "spec.json")


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_run_that_fills_the_disk_ends_with_a_typed_error_and_whole_checkpoints(place: Place) -> None:
    ended = place.run()
    assert ended.returncode == 1, ended.stderr
    result: dict[str, Any] = json.loads((place.seen / rundir.RESULT).read_text())
    assert result == {
        "outcome": "failed",
        "error": {"code": "insufficient_resources", "message": "the disk is full", "param": None},
    }
    run = Run(place.seen)
    assert len(run.checkpoints) > 1
    assert names(run.output) == {f"{rundir.CHECKPOINT_PREFIX}{step}" for step in run.checkpoints}
    assert names(place.seen) <= {rundir.RESULT, rundir.EVENTS, rundir.OUTPUT, rundir.LOCK}


def test_a_run_without_room_for_a_result_dies_without_one_and_says_why(place: Place) -> None:
    place.disk.fill()
    ended = place.run()
    assert ended.returncode == 1
    assert "No space left on device" in ended.stderr
    assert names(place.seen) <= {rundir.EVENTS, rundir.OUTPUT, rundir.LOCK}
    place.disk.clear()
    shorter = json.loads(place.spec.read_text())
    shorter["training"] |= {"max_train_steps": 2}
    place.spec.write_text(json.dumps(shorter))
    assert place.run().returncode == 0, "with room again, the same run goes its way"
    assert json.loads((place.seen / rundir.RESULT).read_text())["outcome"] == "succeeded"
