"""``report_to``: TensorBoard, Weights & Biases or MLflow, writing into the run's directory."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from comps.tuning import rundir
from comps.tuning.errors import TuningError
from comps.tuning.spec import TrainSpec


def trackers(spec: TrainSpec) -> list[Any]:
    """The Trainer's callbacks for ``spec.training.report_to``: one, or none.

    A place that the operator has chosen by the trackers' own variables is kept. Raises
    :class:`TuningError` when the tracker is not installed.
    """
    name = spec.training.report_to
    directory = spec.directory / rundir.REPORTS
    if name == "none":
        return []
    if name == "tensorboard":  # always there: tensorboardX comes with Ray
        callback = TensorBoardCallback()
        callback.logging_dir = str(directory)
        return [callback]
    if importlib.util.find_spec(name) is None:
        raise TuningError(
            f"General.report_to is {name}, but {name} is not installed where the job runs",
            param="General.report_to",
        )
    directory.mkdir(exist_ok=True)
    if name == "wandb":
        os.environ.setdefault("WANDB_DIR", str(directory))
        return [WandbCallback()]
    os.environ.setdefault("MLFLOW_TRACKING_URI", directory.as_uri())
    return [MLflowCallback()]
