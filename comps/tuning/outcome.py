"""The end of a run, as evidence on disk: ``result.json``, written last and atomically."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from comps.tuning import rundir
from comps.tuning.errors import ResourceError, TuningError
from comps.tuning.failpoints import failpoint

# With less than this free (bytes), PyTorch's "writing failed" is put down to a full disk.
_NEXT_TO_NOTHING = 64 * 1024


def succeeded(directory: Path, result: dict[str, Any]) -> None:
    """Record success with what the run gave (at least ``path``)."""
    failpoint("result-unwritten")
    rundir.write_json(directory / rundir.RESULT, {"outcome": "succeeded", **result})


def failed(directory: Path, error: Exception) -> None:
    """Record a failure that trying again would not change; of several workers' the first stands.

    A run that merely died (killed, lost its machine) must leave no result: then it is started again.
    What was half-written goes first: on a full disk, that makes room for the result.
    """
    facts = _facts(error, directory)
    shutil.rmtree(directory / rundir.SCRATCH, ignore_errors=True)
    result = json.dumps({"outcome": "failed", "error": facts}, ensure_ascii=False)
    rundir.create_file(directory / rundir.RESULT, result.encode())


def suspect(directory: Path, error: Exception) -> None:
    """Keep an attempt's first error, which may only be the echo of another worker's death, for the sentence
    that the job ends with if all its attempts die."""
    text = f"{type(error).__name__}: {error}"[:2000]
    rundir.create_file(directory / rundir.SUSPECT, text.encode(errors="replace"))


def disk_is_full(error: Exception, directory: Path) -> bool:
    """Whether a full disk is behind ``error``, which a run in ``directory`` met.

    Python's own writes have a number for it, safetensors has it in its text, and PyTorch only says that
    writing failed: then the disk is asked.
    """
    if isinstance(error, OSError) and rundir.disk_is_full(error):
        return True
    if any(os.strerror(code) in str(error) for code in rundir.DISK_FULL):
        return True
    return isinstance(error, RuntimeError) and shutil.disk_usage(directory).free < _NEXT_TO_NOTHING


def _facts(error: Exception, directory: Path) -> dict[str, Any]:
    if isinstance(error, TuningError):
        return {"code": error.code, "message": error.message, "param": error.param}
    # PyTorch has a class for an accelerator's memory only.
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        code = ResourceError.code
        message = (
            "there is not enough memory; use a smaller batch_size or max_length, or gradient checkpointing"
        )
    elif disk_is_full(error, directory):
        code, message = ResourceError.code, "the disk is full"
    else:
        code, message = "server_error", f"unexpected {type(error).__name__}: {error}".strip()
    return {"code": code, "message": message, "param": None}
