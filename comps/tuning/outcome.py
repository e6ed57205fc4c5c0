"""The end of a run, as evidence on disk: ``result.json``, written last and atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comps.tuning import rundir
from comps.tuning.errors import TuningError


def succeeded(directory: Path, result: dict[str, Any]) -> None:
    """Record success with what the run gave (at least ``path``)."""
    rundir.write_json(directory / rundir.RESULT, {"outcome": "succeeded", **result})


def failed(directory: Path, error: Exception) -> None:
    """Record a failure that trying again would not change.

    A run that merely died (killed, lost its machine) must leave no result: then it is started again.
    """
    if isinstance(error, TuningError):
        facts = {"code": error.code, "message": error.message, "param": error.param}
    else:
        message = f"unexpected {type(error).__name__}: {error}".strip()
        facts = {"code": "server_error", "message": message, "param": None}
    rundir.write_json(directory / rundir.RESULT, {"outcome": "failed", "error": facts})
