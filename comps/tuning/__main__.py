"""``python -m comps.tuning SPEC.json``: do one run and leave its result beside the spec.

With ``--ray`` (inside a Ray job) a training runs on Ray Train; without it in this very process. The
result file is written last. It is also written, with the error, when the run fails for a reason that
trying again would not change; a run that dies without one is started again by the service.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from comps.tuning import outcome, rundir
from comps.tuning.errors import TuningError
from comps.tuning.spec import ExtractSpec, MergeSpec, TrainSpec, load_spec


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m comps.tuning", description=__doc__)
    parser.add_argument("spec", type=Path, help="the run's spec.json")
    parser.add_argument("--ray", action="store_true", help="train on the Ray cluster this process belongs to")
    arguments = parser.parse_args()
    path = arguments.spec.resolve()
    try:
        spec = load_spec(path)
    except (OSError, ValidationError) as error:
        print(f"{path} is not a spec: {error}", file=sys.stderr)
        return 2
    spec.directory.mkdir(parents=True, exist_ok=True)
    (spec.directory / rundir.RESULT).unlink(missing_ok=True)
    _tee(spec.directory / rundir.LOG)
    try:
        if isinstance(spec, TrainSpec) and arguments.ray:
            from comps.tuning.training.on_ray import train_on_ray

            train_on_ray(spec, path)  # the workers record the outcome, or die without one
            return 0
    except Exception:
        traceback.print_exc()
        return 1
    try:
        outcome.succeeded(spec.directory, _train(spec) if isinstance(spec, TrainSpec) else _adapter(spec))
    except Exception as error:
        traceback.print_exc()
        outcome.failed(spec.directory, error)
        return 1
    return 0


def _train(spec: TrainSpec) -> dict[str, Any]:
    if spec.resources.num_workers > 1:
        raise TuningError("more than one worker needs Ray", param="Training.num_training_workers")
    from comps.tuning.training.loop import train

    return train(spec)


def _adapter(spec: ExtractSpec | MergeSpec) -> dict[str, Any]:
    if isinstance(spec, ExtractSpec):
        from comps.tuning.export.extract import extract

        return extract(spec)
    from comps.tuning.export.merge import merge

    return merge(spec)


def _tee(log: Path) -> None:
    """Send this process's output, and that of its children, to the run's log as well as to where it went."""
    tee = subprocess.Popen(["tee", "-a", str(log)], stdin=subprocess.PIPE, start_new_session=True)
    assert tee.stdin is not None
    for descriptor in (1, 2):
        os.dup2(tee.stdin.fileno(), descriptor)
    tee.stdin.close()


if __name__ == "__main__":
    raise SystemExit(main())
