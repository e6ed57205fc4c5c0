"""The image of the Dockerfile serves a job as its user and leaves nothing running (``image_check``)."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def in_image() -> list[str]:
    """What runs a command in a container: ``IMAGE_COMMAND``, or Docker with an image built now."""
    if command := os.environ.get("IMAGE_COMMAND"):
        return shlex.split(command)
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip(
            "no Docker engine answers, and IMAGE_COMMAND (what runs a command in a container) is not set"
        )
    build = subprocess.run(
        ["docker", "build", "-q", "."], cwd=TESTS.parent, check=True, stdout=subprocess.PIPE, text=True
    )
    return ["docker", "run", "--rm", build.stdout.strip()]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_image_trains_extracts_and_merges_as_its_user_and_stops_cleanly(in_image: list[str]) -> None:
    check, models = ((TESTS / name).read_text() for name in ("image_check.py", "fixtures_models.py"))
    done = subprocess.run([*in_image, "python", "-c", check, models], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    print(done.stdout)
