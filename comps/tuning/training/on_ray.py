"""The same training on Ray Train: one process a worker, a gloo (or nccl) process group between them."""

from __future__ import annotations

from pathlib import Path

import ray
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from comps.tuning import outcome
from comps.tuning.errors import TuningError
from comps.tuning.spec import TrainSpec, load_spec


def _worker(config: dict[str, str]) -> None:
    """Runs in each Ray Train worker. Heavy imports happen here, in the workers, side by side."""
    spec = load_spec(Path(config["spec"]))
    assert isinstance(spec, TrainSpec)
    rank = ray.train.get_context().get_world_rank()
    try:
        from comps.tuning.training.loop import train

        result = train(spec, rank)
    except Exception as error:
        # Among several workers an unexpected error is often only the echo of another one's death
        # (a closed connection): then nothing is recorded, and the run is started again.
        if isinstance(error, TuningError) or spec.resources.num_workers == 1:
            outcome.failed(spec.directory, error)
        raise
    if rank == 0:
        outcome.succeeded(spec.directory, result)


def train_on_ray(spec: TrainSpec, spec_path: Path) -> None:
    """Train ``spec`` on the Ray cluster this process belongs to; the workers write the run's result file.

    Raises ``ray.train.TrainingFailedError`` when a worker died or raised.
    """
    resources = spec.resources
    per_worker: dict[str, float] = {"CPU": resources.cpus or 1}
    if resources.gpus:
        per_worker["GPU"] = resources.gpus
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"spec": str(spec_path)},
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            resources_per_worker=per_worker,
            use_gpu=resources.device == "cuda",
        ),
        run_config=RunConfig(name=spec.job_id, storage_path=str(spec.directory / "ray_train")),
        torch_config=TorchConfig(backend="gloo" if resources.device == "cpu" else "nccl"),
    )
    trainer.fit()
