"""Directories appear whole, and readable by whom the umask lets read."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from comps.tuning.rundir import new_directory


def test_weights_in_a_published_directory_are_as_readable_as_the_directory(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with new_directory(final) as directory:
        save_file({"weight": torch.zeros(2)}, directory / "model.safetensors")
    weights = final / "model.safetensors"
    assert weights.stat().st_mode & 0o777 == final.stat().st_mode & 0o666
    assert not weights.stat().st_mode & 0o111


def test_a_directory_that_was_not_filled_leaves_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "model"
    final.mkdir()
    (final / "old").touch()
    with pytest.raises(FileNotFoundError), new_directory(final) as directory:
        (directory / "missing" / "new").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "old"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from comps.tuning.rundir import new_directory\n"
        "with new_directory(Path(sys.argv[1])) as directory:\n"
        "    (directory / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    final = tmp_path / "model"
    assert subprocess.run([sys.executable, "-c", script, final], check=False).returncode == -signal.SIGKILL
    assert not final.exists()
    assert len(list(tmp_path.iterdir())) == 1
    with new_directory(final) as directory:
        (directory / "whole").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "whole"]
