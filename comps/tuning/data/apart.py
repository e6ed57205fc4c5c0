"""Validation of data files and of questions, Parquet in a process of its own whose memory is limited.

A page of a Parquet file says how long it is once unpacked, and its reader has to believe that: some kilobytes
can become gigabytes. The other formats are read in pieces of our own choice.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from comps.tuning.data.formats import detect_format
from comps.tuning.data.records import Summary, validate_file
from comps.tuning.errors import DataError
from comps.tuning.evaluation.questions import check_questions

MEMORY = 1 << 30  # bytes; a batch of the longest records takes half of it
LONGEST = 600.0  # seconds
QUESTIONS = "questions"  # besides the tasks of records
_INHERITED = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
_SOURCE_ROOT = Path(__file__).resolve().parents[3]


def validate_safely(path: Path, name: str, task: str, **limits: Any) -> Summary:
    """As :func:`comps.tuning.data.records.validate_file`, whatever is in the file; with the task
    ``QUESTIONS`` as :func:`comps.tuning.evaluation.questions.check_questions`."""
    if detect_format(path, name or path.name) != "parquet":
        return _validate(path, name, task, **limits)
    command = [sys.executable, "-m", __name__, str(path), name, task, json.dumps(limits)]
    paths = filter(None, [str(_SOURCE_ROOT), os.environ.get("PYTHONPATH")])
    # No secret is within reach of whoever made the file. The system's allocator gives back what
    # the limit is to count.
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "ARROW_DEFAULT_MEMORY_POOL": "system"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{name}: takes longer than {LONGEST:g} seconds to read") from error
    if done.returncode < 0:
        raise DataError(
            f"{name}: is not a readable Parquet file: it ends its reader (signal {-done.returncode})"
        )
    if done.returncode:
        raise RuntimeError(f"validation in another process failed: {done.stderr.strip()[-500:]}")
    answer = json.loads(done.stdout)
    if kind := answer.pop("error", None):
        raise _error_class(kind)(answer["message"])
    return Summary(**answer | {"warnings": tuple(answer["warnings"])})


def _validate(path: Path, name: str, task: str, **limits: Any) -> Summary:
    if task == QUESTIONS:
        return check_questions(path, name, **limits)
    return validate_file(path, name, task, **limits)


def _error_class(name: str) -> type[DataError]:
    kinds: list[type[DataError]] = [DataError, *DataError.__subclasses__()]
    return next(kind for kind in kinds if kind.__name__ == name)


def main() -> None:
    path, name, task, limits = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    try:
        answer = dataclasses.asdict(_validate(Path(path), name, task, **json.loads(limits)))
    except DataError as error:
        answer = {"error": type(error).__name__, "message": error.message}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
