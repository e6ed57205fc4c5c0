"""Directories appear whole, and readable by whom the umask lets read."""

from __future__ import annotations

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
