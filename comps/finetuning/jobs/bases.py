"""Jobs that make a new base model of another one.

Such a job is a row like a training's: its calibration file is validated, it waits for its cores, its run is
followed, and started again from the beginning when it died. What it makes lies in its own directory,
``<jobs>/<id>/output``, and is a base model like any other: it does not need its parent any more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from comps.cores.errors import InvalidRequest
from comps.finetuning import catalog
from comps.finetuning.jobs.adapters import check_openvino
from comps.finetuning.jobs.create import check_queue
from comps.finetuning.jobs.find import find_base_model, find_data_file
from comps.finetuning.jobs.names import check_free
from comps.finetuning.jobs.repeats import Repeat, claim, keep
from comps.finetuning.jobs.states import add_event
from comps.finetuning.owner import Owner
from comps.finetuning.schemas.bases import NewBaseAnswer, NewBaseRequest, PruneRequest, QuantizeRequest
from comps.finetuning.schemas.tolerant import request_warnings
from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import FileRow, JobRow, new_id
from comps.tuning.rundir import OUTPUT
from comps.tuning.sparse.report import is_quantised
from comps.tuning.spec import CalibrationSpec, GridSpec, ModelSpec, PruneSpec, QuantizeSpec, ResourcesSpec


def create_prune(
    database: Database,
    settings: Settings,
    request: PruneRequest,
    owner: Owner,
    repeat: Repeat | None = None,
) -> JobRow:
    """Write the row of a new pruning.

    Raises :class:`InvalidRequest`, :class:`NotFound`, :class:`Conflict` for a name that is taken,
    :class:`QueueFull` and :class:`KeyTaken`; then there is no row.
    """
    if request.sparsity is None and request.pattern is None:
        message = "sparsity is missing, or pattern: how many of the weights shall become zero?"
        raise InvalidRequest(message, param="sparsity")
    if request.sparsity is not None and request.pattern is not None:
        message = f"sparsity and pattern are both given; a pattern of {request.pattern} says it all."
        raise InvalidRequest(message, param="pattern")
    needs_data = request.method == "wanda"
    if needs_data and request.calibration_file is None:
        raise InvalidRequest(
            "calibration_file is missing: wanda looks at what the weights are multiplied with. Name an "
            "uploaded file, or use the method magnitude, which needs none.",
            param="calibration_file",
        )
    base_model, file = look_up(database, settings, request, owner, needs_data)
    warnings = request_warnings(request)
    if request.calibration_file and not needs_data:
        warnings.append(f"calibration_file is not used: {request.method} needs no data.")
    job_id = new_id("prune")
    target = request.pattern or f"{request.sparsity:g}"
    spec = PruneSpec(
        name=request.name or f"{base_model.name}:{request.method}-{target}:{job_id}",
        base_model=base_model, method=request.method, sparsity=request.sparsity, pattern=request.pattern,
        calibration=calibration(settings, request, file) if file else None,
        **placed(settings, request, job_id),
    )  # fmt: skip
    return write_row(database, settings, request, spec, file, warnings, owner, repeat)


def create_quantize(
    database: Database,
    settings: Settings,
    request: QuantizeRequest,
    owner: Owner,
    repeat: Repeat | None = None,
) -> JobRow:
    """Write the row of a new quantisation. Raises as :func:`create_prune`."""
    if request.openvino:
        check_openvino()
    needs_data = request.method == "gptq"
    if needs_data and request.calibration_file is None:
        raise InvalidRequest(
            "calibration_file is missing: gptq looks at what the weights are multiplied with. Name an "
            "uploaded file, or use the method nearest, which needs none.",
            param="calibration_file",
        )
    base_model, file = look_up(database, settings, request, owner, needs_data)
    warnings = request_warnings(request)
    if request.calibration_file and not needs_data:
        warnings.append(f"calibration_file is not used: {request.method} needs no data.")
    job_id = new_id("quantize")
    spec = QuantizeSpec(
        name=request.name or f"{base_model.name}:{request.mode}-{request.group_size}:{job_id}",
        base_model=base_model, method=request.method,
        grid=GridSpec(mode=request.mode, group_size=request.group_size, embeddings=request.embeddings),
        calibration=calibration(settings, request, file) if file else None, openvino=request.openvino,
        **placed(settings, request, job_id),
    )  # fmt: skip
    return write_row(database, settings, request, spec, file, warnings, owner, repeat)


def look_up(
    database: Database, settings: Settings, request: NewBaseRequest, owner: Owner, needs_data: bool
) -> tuple[ModelSpec, FileRow | None]:
    """The parent, and the calibration file if the work needs one. Raises as :func:`create_prune`."""
    file = None
    with database.reading() as session:
        base_model = find_base_model(session, settings, request.model, owner)
        if needs_data and request.calibration_file:
            file = find_data_file(session, request.calibration_file, owner, "calibration_file")
    # Files are read outside any transaction, so that a slow disk holds nobody up.
    if base_model.local:
        if is_quantised(Path(base_model.path)):
            raise InvalidRequest(
                f"The model {request.model!r} has integer weights; take the model that it was made of.",
                param="model",
            )
        check = catalog.check_trainable if needs_data else catalog.check_causal
        check(Path(base_model.path), base_model.trust_remote_code)
    return base_model, file


def calibration(settings: Settings, request: NewBaseRequest, file: FileRow) -> CalibrationSpec:
    return CalibrationSpec(
        file=settings.files_dir / file.id,
        name=file.filename,
        samples=request.calibration_samples,
        max_length=request.max_length,
        seed=request.seed,
        max_record_bytes=settings.max_record_bytes,
        max_records=settings.max_records,
    )


def placed(settings: Settings, request: NewBaseRequest, job_id: str) -> dict[str, Any]:
    """The fields of a spec that say where the run is, and what of the cluster it gets."""
    directory = settings.jobs_dir / job_id
    resources = ResourcesSpec(cpus=request.resources_per_worker.CPU)
    return {"job_id": job_id, "directory": directory, "output": directory / OUTPUT, "resources": resources}


def write_row(
    database: Database,
    settings: Settings,
    request: NewBaseRequest,
    spec: PruneSpec | QuantizeSpec,
    file: FileRow | None,
    warnings: list[str],
    owner: Owner,
    repeat: Repeat | None,
) -> JobRow:
    """The row of a new job with its warnings as events. Raises as :func:`create_prune`."""
    if request.resources_per_worker.GPU:
        warnings.append("resources_per_worker.GPU is not used: this work is done on CPUs.")
    job = JobRow(
        id=spec.job_id, kind=spec.kind, status="validating_files", owner=owner.id, model=spec.base_model.name,
        # So the file is not deleted while it is needed.
        training_file=file.id if file else None,
        seed=request.seed, request=request.model_dump(mode="json", exclude_unset=True),
        spec=spec.model_dump(mode="json"), warnings=warnings, priority=request.priority,
    )  # fmt: skip
    with database.session() as session:
        claim(session, repeat)
        # All of this could have been deleted since; from here on the row protects it.
        find_base_model(session, settings, request.model, owner)
        if file:
            find_data_file(session, file.id, owner, "calibration_file")
        if request.name:
            check_free(session, settings, request.name, "name", owner)
        check_queue(session, settings)
        session.add(job)
        session.flush()
        _tell(session, job, spec)
        keep(session, repeat, NewBaseAnswer.of(job))
    return job


def _tell(session: Session, job: JobRow, spec: PruneSpec | QuantizeSpec) -> None:
    add_event(session, job, f"Created: {spec.kind} of the model {spec.base_model.name!r}")
    for warning in job.warnings:
        add_event(session, job, warning, level="warn")
