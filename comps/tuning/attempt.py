"""One attempt of a run: alone in its directory, heard in its log, its outcome on record."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from comps.tuning import outcome, rundir
from comps.tuning.failpoints import failpoint
from comps.tuning.sealed import unseal_environment

# An older attempt whose machine or Ray is lost ends by itself within seconds (seconds).
PATIENCE = 60.0


class Superseded(Exception):
    """Another attempt of the run still lives, or has ended it meanwhile. Says nothing about the run."""


@contextmanager
def alone(directory: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the run's directory, so that no two attempts ever write into it.

    An older attempt that still lives is waited for; the operating system lets go for one that was
    killed. Raises :class:`Superseded` when it outlives ``patience`` seconds, or has left a result.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / rundir.LOCK, "w") as lock:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Superseded(f"another attempt still runs in {directory}") from None
                time.sleep(0.2)
        if (directory / rundir.RESULT).exists():
            raise Superseded(f"another attempt has ended the run in {directory}")
        yield


def is_held(directory: Path) -> bool:
    """Whether an attempt is :func:`alone` in the run's directory at this moment."""
    try:
        with open(directory / rundir.LOCK, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def log_to(directory: Path) -> None:
    """Send what this process and its children print to the run's log, from now on."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(directory / rundir.LOG, "ab") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)


def carry_out(
    directory: Path, work: Callable[[], dict[str, Any] | None], *, rank: int = 0, workers: int = 1
) -> None:
    """Do ``work`` and record how it ended; ``None`` from it means that it was asked to stop and did.

    Called by each of ``workers`` workers. What ``work`` raises is recorded and raised.
    """
    with alone(directory) if rank == 0 else nullcontext():
        try:
            failpoint("run-begun")
            unseal_environment()
            result = work()
        except Exception as error:
            # Among several workers a RuntimeError is often only the echo of another one's death (gloo's
            # closed connection): then nothing is recorded, and the run is started again.
            echo = workers > 1 and isinstance(error, RuntimeError)
            if not echo or outcome.disk_is_full(error, directory):
                outcome.failed(directory, error)
            else:
                outcome.suspect(directory, error)
            raise
        if rank == 0 and result is not None:
            outcome.succeeded(directory, result)
