"""Several workers on Ray Train: one process each, a gloo (or nccl) process group between them.

A single worker needs none of this, and importing it takes seconds: see ``comps.tuning.__main__``.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import ray
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from comps.tuning import attempt
from comps.tuning.spec import TrainSpec, load_spec
from patches.transformers_imports import leave_out

# Ray Train passes these on to its controller and workers.
_RAY_TRAIN = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor less: dying runs are started again in any case
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # what is printed goes to the run's log, once
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the end is noticed at once
}


def _worker(config: dict[str, str]) -> None:
    """Runs in each worker. Heavy imports happen here, in the workers, side by side."""
    spec = load_spec(Path(config["spec"]))
    assert isinstance(spec, TrainSpec)
    attempt.log_to(spec.directory)
    leave_out()
    from comps.tuning.training.loop import train

    rank = ray.train.get_context().get_world_rank()
    workers = spec.resources.num_workers
    attempt.carry_out(spec.directory, lambda: train(spec, rank), rank=rank, workers=workers)


def train_on_ray(spec: TrainSpec, spec_path: Path) -> None:
    """Train ``spec`` on the Ray cluster this process belongs to; the workers write the run's result file.

    Raises ``ray.train.TrainingFailedError`` when one of them raised or died.
    """
    resources = spec.resources
    per_worker: dict[str, float] = {"CPU": resources.cpus or 1}
    if resources.gpus:
        per_worker["GPU"] = resources.gpus
    for name, value in _RAY_TRAIN.items():
        os.environ.setdefault(name, value)
    ray.init(log_to_driver=False)  # the workers write the run's log themselves
    # Ray stops jobs with SIGTERM, but Ray Train tidies up (it would leave an actor) on SIGINT only.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    storage = spec.directory / "ray_train"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"spec": str(spec_path)},
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            resources_per_worker=per_worker,
            use_gpu=resources.device == "cuda",
        ),
        run_config=RunConfig(name=spec.job_id, storage_path=str(storage)),
        torch_config=TorchConfig(backend="gloo" if resources.device == "cpu" else "nccl"),
    )
    try:
        trainer.fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)  # an empty marker: our checkpoints lie elsewhere
