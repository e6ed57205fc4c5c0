"""``python -m comps.tuning SPEC.json``: do one run and leave its result beside the spec.

With ``--ray`` (as a Ray job of the service) what is printed goes to the run's log, a run that has its result
is not run again, and several workers train on Ray Train; all else happens in this very process, whose cores
the job was submitted with. (With an actor for a single worker and five for Ray Train's bookkeeping its first
step would come after three times the CPU time.)
The result file is written last. It is also written, with the error, when the run fails for a reason that
trying again would not change; a run that dies without one is started again by the service.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from comps.tuning import attempt, rundir
from comps.tuning.spec import AnySpec, TrainSpec, load_spec
from patches.transformers_imports import leave_out


def main() -> int:
    """The command. Returns its exit code: 0 also for a run that was asked to stop."""
    parser = argparse.ArgumentParser(prog="python -m comps.tuning", description=__doc__)
    parser.add_argument("spec", type=Path, help="the run's spec.json")
    parser.add_argument("--ray", action="store_true", help="run as a Ray job of the service")
    arguments = parser.parse_args()
    path = arguments.spec.resolve()
    try:
        spec = load_spec(path)
    except (OSError, ValidationError) as error:
        print(f"{path} is not a spec: {error}", file=sys.stderr)
        return 2
    spec.directory.mkdir(parents=True, exist_ok=True)
    if arguments.ray:
        attempt.log_to(spec.directory)
    else:
        (spec.directory / rundir.RESULT).unlink(missing_ok=True)
        (spec.directory / rundir.STOP).unlink(missing_ok=True)
    try:
        if isinstance(spec, TrainSpec) and spec.resources.num_workers > 1 and arguments.ray:
            from comps.tuning.training.on_ray import train_on_ray

            train_on_ray(spec, path)  # the workers record the outcome, or die without one
        else:
            attempt.carry_out(spec.directory, lambda: _run(spec))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _run(spec: AnySpec) -> dict[str, Any] | None:
    """The work itself, in this process; what it needs is imported only now."""
    if isinstance(spec, TrainSpec):
        leave_out()
    module, _, function = _WORK[spec.kind].partition(":")
    gc.disable()  # importing makes many objects, hardly any of them garbage
    work = getattr(importlib.import_module(module), function)
    gc.enable()
    found: dict[str, Any] | None = work(spec)
    return found


# What does the work of each kind of spec: a function of the spec that returns the run's result, or None when
# it was asked to stop and did.
_WORK = {
    "train": "comps.tuning.training.loop:train_alone",
    "extract": "comps.tuning.export.extract:extract",
    "merge": "comps.tuning.export.merge:merge",
    "search": "comps.tuning.search.run:search",
    "quantize": "comps.tuning.quantised.quantize:quantize",
    "prune": "comps.tuning.sparse.prune:prune",
    "evaluate": "comps.tuning.evaluation.run:evaluate",
}

if __name__ == "__main__":
    raise SystemExit(main())
