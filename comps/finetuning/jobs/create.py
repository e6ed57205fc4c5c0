"""From a validated request to a job's row: the spec is built, then the row is written, then it is answered.

Everything that can be said without reading the data or asking the network is said here, before there is a
row; the dispatcher's validation says the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from comps.cores.errors import InvalidRequest, ServiceError
from comps.finetuning import catalog
from comps.finetuning.jobs.find import find_base_model, find_checkpoint, find_data_file
from comps.finetuning.jobs.hyperparameters import Effective, effective
from comps.finetuning.jobs.repeats import Repeat, claim, keep
from comps.finetuning.jobs.secrets import Secrets
from comps.finetuning.jobs.states import ACTIVE, add_event
from comps.finetuning.owner import Owner
from comps.finetuning.schemas.job_object import FineTuningJob
from comps.finetuning.schemas.jobs import JobRequest
from comps.finetuning.schemas.nls import check_modules, lora_spec
from comps.finetuning.schemas.tolerant import request_warnings
from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import FileRow, JobRow, new_id
from comps.tuning.spec import (
    DataSpec,
    LoraSpec,
    ModelSpec,
    OptimizationSpec,
    ResourcesSpec,
    TrainSpec,
)

DEFAULT_SEED = 42


class QueueFull(ServiceError):
    """As many jobs wait as the operator allows."""

    status, type, code = 429, "rate_limit_error", "queue_full"
    # A queue of trainings is not shorter within the client's few seconds of retries.
    headers: ClassVar[Mapping[str, str]] = {"x-should-retry": "false", "retry-after": "60"}


def create_fine_tuning_job(
    database: Database,
    settings: Settings,
    secrets: Secrets,
    request: JobRequest,
    owner: Owner,
    repeat: Repeat | None = None,
) -> JobRow:
    """Write the row of a new job, in ``validating_files``, with its warnings as events.

    Raises :class:`InvalidRequest` or :class:`NotFound` for what the request gets wrong, and
    :class:`QueueFull` and :class:`KeyTaken`; then there is no row.
    """
    values, overridden = effective(request)
    lora, nls_warnings = lora_spec(request.General.lora_config)
    warnings = request_warnings(request) + overridden + nls_warnings
    job_id = new_id("ft-job")
    directory = settings.jobs_dir / job_id

    with database.reading() as session:
        name = request.model or request.General.base_model or ""
        base_model = find_base_model(session, settings, name, owner)
        training_file = find_data_file(session, request.training_file, owner, "training_file")
        validation_file = _validation_file(session, request, owner)
        resume_from = _checkpoint(session, request, base_model, lora, owner)
    # Files are read outside any transaction, so that a slow disk holds nobody up.
    if base_model.local:
        catalog.check_trainable(Path(base_model.path), base_model.trust_remote_code)
        if config := request.General.lora_config:
            check_modules(config, lora, catalog.module_names(Path(base_model.path)))

    spec = TrainSpec(
        job_id=job_id,
        directory=directory,
        task=request.General.task,
        base_model=base_model,
        lora=lora,
        data=_data(settings, request, training_file, validation_file),
        training=_optimization(request, values),
        resources=_resources(request, warnings),
        resume_from=resume_from,
    )
    if request.General.output_dir is not None:
        warnings.append("General.output_dir is ignored; the answer's output_dir says where the output goes.")
    if request.integrations and spec.training.report_to != "wandb":
        warnings.append(f"integrations is not used: General.report_to is {spec.training.report_to}.")
    token = request.General.config.token
    job = JobRow(
        id=job_id, kind="fine_tuning", status="validating_files", owner=owner.id, model=base_model.name,
        training_file=training_file.id, validation_file=validation_file.id if validation_file else None,
        suffix=request.suffix, seed=spec.training.seed, request=_without_secrets(request),
        spec=spec.model_dump(mode="json"), hyperparameters=values.answer(),
        job_metadata=request.metadata or {}, warnings=warnings, priority=request.priority,
        time_limit=request.time_limit, retry_limit=request.retry_limit,
        secret=secrets.seal(token) if token else None,
    )  # fmt: skip
    with database.session() as session:
        claim(session, repeat)
        # All of this could have been deleted since; from here on the row protects it.
        find_base_model(session, settings, name, owner)
        find_data_file(session, training_file.id, owner, "training_file")
        _validation_file(session, request, owner)
        _checkpoint(session, request, base_model, lora, owner)
        check_queue(session, settings)
        session.add(job)
        session.flush()
        add_event(session, job, f"Created fine-tuning job: {job_id}")
        for warning in warnings:
            add_event(session, job, warning, level="warn")
        keep(session, repeat, FineTuningJob.of(job, settings))
    return job


def check_queue(session: Session, settings: Settings) -> None:
    """Raises :class:`QueueFull`."""
    count = select(func.count()).where(JobRow.status.in_(ACTIVE))
    if (session.scalar(count) or 0) >= settings.max_queued_jobs:
        raise QueueFull(
            f"{settings.max_queued_jobs} jobs have not ended, which is the limit "
            "(FINETUNING_MAX_QUEUED_JOBS); try again when one has, or cancel one."
        )


def _validation_file(session: Session, request: JobRequest, owner: Owner) -> FileRow | None:
    outer, inner = request.validation_file, request.Dataset.validation_file
    if outer and inner and outer != inner:
        raise InvalidRequest(
            f"validation_file is {outer[:80]!r}, but Dataset.validation_file is {inner[:80]!r}; give one.",
            param="validation_file",
        )
    if name := outer or inner:
        param = "validation_file" if outer else "Dataset.validation_file"
        return find_data_file(session, name, owner, param)
    return None


def _checkpoint(
    session: Session, request: JobRequest, base_model: ModelSpec, lora: LoraSpec, owner: Owner
) -> Path | None:
    """The directory of the checkpoint to start from, which must be of the same adapter on the same base."""
    name = request.General.resume_from_checkpoint
    if not name:
        return None
    row, job = find_checkpoint(session, name, owner)
    source = TrainSpec.model_validate(job.spec)
    if source.base_model.path != base_model.path or source.lora != lora:
        what = "lora_config" if source.base_model.path == base_model.path else "base model"
        raise InvalidRequest(
            f"General.resume_from_checkpoint: the checkpoint {row.id} of the job {job.id} was trained with "
            f"another {what}.",
            param="General.resume_from_checkpoint",
        )
    return Path(row.path)


def _data(
    settings: Settings, request: JobRequest, training_file: FileRow, validation_file: FileRow | None
) -> DataSpec:
    fields = request.Dataset.model_dump(
        include=set(DataSpec.model_fields) - {"validation_file", "train_file"}
    )
    if "mask_response" not in request.Dataset.model_fields_set:
        # Whoever merely turns mask_input off wants a loss on every token, not on the prompt alone.
        fields["mask_response"] = request.Dataset.mask_input
    return DataSpec(
        train_file=settings.files_dir / training_file.id,
        train_name=training_file.filename,
        validation_file=settings.files_dir / validation_file.id if validation_file else None,
        validation_name=validation_file.filename if validation_file else "",
        max_record_bytes=settings.max_record_bytes,
        max_records=settings.max_records,
        **fields,
    )


def _optimization(request: JobRequest, values: Effective) -> OptimizationSpec:
    training, general = request.Training, request.General
    if training.mixed_precision == "fp16" and training.device == "cpu":
        raise InvalidRequest(
            "Training.mixed_precision is fp16, which needs the device cuda; on cpu there are no and bf16.",
            param="Training.mixed_precision",
        )
    chosen = {"epochs", "batch_size", "learning_rate", "seed"}
    fields = training.model_dump(include=set(OptimizationSpec.model_fields) - chosen)
    fields |= general.model_dump(include={"save_strategy", "save_steps", "save_total_limit", "report_to"})
    if request.integrations and "report_to" not in general.model_fields_set:
        fields["report_to"] = "wandb"
    seed = next((seed for seed in (request.seed, training.seed) if seed is not None), DEFAULT_SEED)
    return OptimizationSpec(
        gradient_checkpointing=general.enable_gradient_checkpointing,
        seed=seed,
        **values.spec_fields(),
        **fields,
    )


def _resources(request: JobRequest, warnings: list[str]) -> ResourcesSpec:
    training, worker = request.Training, request.Training.resources_per_worker
    gpus = 0.0
    if training.device == "cuda":
        gpus = 1.0 if worker.GPU is None else worker.GPU
    elif worker.GPU:
        warnings.append("Training.resources_per_worker.GPU is not used: Training.device is cpu.")
    return ResourcesSpec(
        num_workers=training.num_training_workers, cpus=worker.CPU, gpus=gpus, device=training.device
    )


def _without_secrets(request: JobRequest) -> dict[str, Any]:
    return request.model_dump(mode="json", exclude_unset=True, exclude={"General": {"config": {"token"}}})
