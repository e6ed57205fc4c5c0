"""One attempt at a time in a run's directory, and what it leaves as evidence."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from comps.tuning import rundir
from comps.tuning.attempt import Superseded, alone, carry_out
from comps.tuning.errors import DataError

_HOLD = """
import sys
from pathlib import Path
from comps.tuning.attempt import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def result(directory: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((directory / rundir.RESULT).read_text())
    return read


def fails(error: Exception) -> Any:
    def work() -> dict[str, Any]:
        raise error

    return work


def test_an_attempt_waits_for_an_older_one_that_lives_and_follows_one_that_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as older:
        assert older.stdout is not None
        assert older.stdout.readline() == "held\n"
        with pytest.raises(Superseded, match="still runs"), alone(tmp_path, patience=0.3):
            pass
        assert not (tmp_path / rundir.RESULT).exists()
        older.kill()
        with alone(tmp_path, patience=10):
            pass


def test_a_run_that_has_its_result_is_not_run_again(tmp_path: Path) -> None:
    carry_out(tmp_path, lambda: {"path": "here"})
    with pytest.raises(Superseded, match="has ended the run"):
        carry_out(tmp_path, fails(AssertionError("it ran")))
    assert result(tmp_path) == {"outcome": "succeeded", "path": "here"}


def test_a_run_that_stopped_on_request_leaves_no_result(tmp_path: Path) -> None:
    carry_out(tmp_path, lambda: None)
    assert not (tmp_path / rundir.RESULT).exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("a.json: record 3", param="training_file"), "invalid_training_file", "a.json: record 3"),
        (ZeroDivisionError("oh"), "server_error", "unexpected ZeroDivisionError: oh"),
        (OSError(errno.ENOSPC, "No space left"), "insufficient_resources", "the disk is full"),
        (
            SafetensorError("Error while serializing: No space left on device (os error 28)"),
            "insufficient_resources",
            "the disk is full",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "insufficient_resources",
            "not enough memory",
        ),
    ],
)
def test_what_a_run_raises_is_recorded_with_its_type(
    error: Exception, code: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(type(error)):
        carry_out(tmp_path, fails(error))
    assert result(tmp_path)["outcome"] == "failed"
    assert result(tmp_path)["error"]["code"] == code
    assert message in result(tmp_path)["error"]["message"]


def test_a_closed_connection_among_several_workers_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        carry_out(tmp_path, fails(RuntimeError("Connection closed by peer")), rank=1, workers=2)
    assert not (tmp_path / rundir.RESULT).exists()
    with pytest.raises(RuntimeError):
        carry_out(tmp_path, fails(RuntimeError("an echo")), rank=0, workers=2)
    assert (tmp_path / rundir.SUSPECT).read_text() == "RuntimeError: Connection closed by peer"
    with pytest.raises(DataError):
        carry_out(tmp_path, fails(DataError("empty")), rank=1, workers=2)
    assert result(tmp_path)["error"]["message"] == "empty"


def test_of_the_failures_of_several_workers_the_first_stands(tmp_path: Path) -> None:
    for error in (DataError("empty"), DataError("its echo")):
        with pytest.raises(DataError):
            carry_out(tmp_path, fails(error), rank=1, workers=2)
    assert result(tmp_path)["error"]["message"] == "empty"


def test_a_failed_run_keeps_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / rundir.SCRATCH / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(DataError):
        carry_out(tmp_path, fails(DataError("empty")))
    assert {path.name for path in tmp_path.iterdir()} == {rundir.LOCK, rundir.RESULT}
