"""Evaluations as jobs: a row of the kind ``evaluate``, which is validated and waits for cores like a
training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from comps.cores.errors import Conflict, InvalidRequest, NotFound
from comps.finetuning import catalog
from comps.finetuning.jobs.create import check_queue
from comps.finetuning.jobs.find import find_base_model, find_data_file, find_job, find_model, visible
from comps.finetuning.jobs.repeats import Repeat, claim, keep
from comps.finetuning.jobs.states import add_event
from comps.finetuning.owner import Owner
from comps.finetuning.schemas.evaluations import Evaluation, EvaluationRequest
from comps.finetuning.schemas.tolerant import closest, request_warnings
from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import FileRow, JobRow, new_id
from comps.tuning.elastic.read_space import load_space
from comps.tuning.elastic.space import NAMED
from comps.tuning.errors import AdapterError
from comps.tuning.evaluation.tasks import NAMES, known_name
from comps.tuning.rundir import OUTPUT
from comps.tuning.spec import EvaluateSpec, ModelSpec, ResourcesSpec, TrainSpec

KIND = "evaluate"


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a base model, with an adapter's directory if any; ``versions``: where its extracted
    versions lie."""

    base_model: ModelSpec
    adapter: Path | None = None
    elastic: bool = False
    versions: Path | None = None


def create_evaluation(
    database: Database,
    settings: Settings,
    request: EvaluationRequest,
    owner: Owner,
    repeat: Repeat | None = None,
) -> JobRow:
    """Write the row of a new evaluation.

    Raises :class:`InvalidRequest`, :class:`NotFound`, :class:`Conflict` for a job without an adapter yet,
    :class:`QueueFull` and :class:`KeyTaken`; then there is no row.
    """
    task = _task(request)
    with database.reading() as session:
        subject = _subject(session, settings, request, owner)
        file = _file(session, request, owner)
    if subject.base_model.local:
        catalog.check_trainable(Path(subject.base_model.path), subject.base_model.trust_remote_code)
    adapter, version, config = _version(subject, request)
    warnings = request_warnings(request)
    if request.resources_per_worker.GPU:
        warnings.append("resources_per_worker.GPU is not used: evaluations run on CPUs.")
    job_id = new_id("eval")
    spec = EvaluateSpec(
        job_id=job_id, directory=settings.jobs_dir / job_id, base_model=subject.base_model, adapter=adapter,
        version=version, config=config, file=settings.files_dir / file.id if file else None,
        file_name=file.filename if file else "", task=task, tasks_dir=settings.tasks_dir,
        metrics=tuple(request.metrics or ([request.metric] if request.metric else ())),
        texts=request.choices == "texts", limit=request.limit, seed=request.seed,
        max_length=request.max_length, max_new_tokens=request.max_new_tokens, batch_size=request.batch_size,
        max_record_bytes=settings.max_record_bytes,
        resources=ResourcesSpec(cpus=request.resources_per_worker.CPU),
    )  # fmt: skip
    job = JobRow(
        id=job_id, kind=KIND, status="validating_files", owner=owner.id, model=subject.base_model.name,
        training_file=file.id if file else None,  # so that it is not deleted while it is needed
        version=version, seed=request.seed, request=request.model_dump(mode="json", exclude_unset=True),
        spec=spec.model_dump(mode="json"), warnings=warnings, priority=request.priority,
    )  # fmt: skip
    with database.session() as session:
        claim(session, repeat)
        # All of this could have been deleted since; from here on the row protects it.
        _subject(session, settings, request, owner)
        _file(session, request, owner)
        check_queue(session, settings)
        session.add(job)
        session.flush()
        add_event(session, job, f"Created evaluation: {job_id}")
        for warning in warnings:
            add_event(session, job, warning, level="warn")
        keep(session, repeat, Evaluation.of(job))
    return job


def visible_evaluations(owner: Owner) -> Select[JobRow]:
    """The evaluations that a caller may see."""
    return select(JobRow).where(JobRow.kind == KIND, visible(JobRow, owner))


def find_evaluation(session: Session, evaluation_id: str, owner: Owner) -> JobRow:
    """Raises :class:`NotFound`."""
    job = session.scalar(visible_evaluations(owner).where(JobRow.id == evaluation_id))
    if job is None:
        raise NotFound(f"There is no evaluation {evaluation_id[:80]!r}.", param="evaluation_id")
    return job


def _task(request: EvaluationRequest) -> str | None:
    if request.file and request.task:
        raise InvalidRequest("file and task are both given; give one of them.", param="task")
    if request.file is None and request.task is None:
        raise InvalidRequest(
            "file is missing (an uploaded file of questions), or task (a built-in one).", param="file"
        )
    if request.task is None:
        return None
    name = known_name(request.task)
    if name is None:
        meant = closest(request.task, list(NAMES))
        hint = f"; did you mean {meant}?" if meant else f"; there are {', '.join(NAMES)}."
        raise InvalidRequest(f"task: there is no task {request.task[:80]!r}{hint}", param="task")
    return name


def _file(session: Session, request: EvaluationRequest, owner: Owner) -> FileRow | None:
    return find_data_file(session, request.file, owner, "file") if request.file else None


def _subject(session: Session, settings: Settings, request: EvaluationRequest, owner: Owner) -> Subject:
    if request.fine_tuning_job_id:
        return _of_job(settings, find_job(session, request.fine_tuning_job_id, owner))
    if not request.model:
        raise InvalidRequest("model is missing (or fine_tuning_job_id, for what it trained).", param="model")
    row = find_model(session, request.model, owner, "super_adapter", "adapter")
    if row is None:
        return Subject(find_base_model(session, settings, request.model, owner))
    if row.job_id is None:
        base = find_base_model(session, settings, row.base_model or "", owner)
        return _with_adapter(base, Path(row.path), row.kind == "super_adapter", None)
    trained = _of_job(settings, find_job(session, row.job_id, owner))
    return _with_adapter(
        trained.base_model, Path(row.path), row.kind == "super_adapter",
        trained.versions if row.kind == "super_adapter" else None,
    )  # fmt: skip


def _of_job(settings: Settings, job: JobRow) -> Subject:
    if job.status != "succeeded":
        raise Conflict(
            f"The job {job.id} is {job.status}; only a job that succeeded has an adapter.",
            param="fine_tuning_job_id",
            code="job_not_succeeded",
        )
    spec = TrainSpec.model_validate(job.spec)
    output = settings.jobs_dir / job.id / OUTPUT
    return _with_adapter(spec.base_model, output, bool(spec.lora.groups), output)


def _with_adapter(base: ModelSpec, adapter: Path, elastic: bool, versions: Path | None) -> Subject:
    if not (adapter / "adapter_config.json").is_file():
        raise NotFound(
            "The adapter is no longer there; its files were deleted.", param="model", code="adapter_not_found"
        )
    return Subject(base, adapter, elastic, versions)


def _version(
    subject: Subject, request: EvaluationRequest
) -> tuple[Path | None, str | None, tuple[int, ...] | None]:
    """The adapter's directory, the version's name and its ranks, if the adapter is to be set to any."""
    first, second = request.adapter_version, request.sub_adapter_version
    if first and second and first != second:
        raise InvalidRequest(
            f"adapter_version is {first!r}, but sub_adapter_version is {second!r}; give one of them.",
            param="adapter_version",
        )
    version, custom = first or second, request.custom_config
    if subject.adapter is None or not subject.elastic:
        if version or custom is not None:
            param = "adapter_version" if version else "custom_config"
            raise InvalidRequest(
                f"{param}: only a super-adapter has versions, and this model is none.", param=param
            )
        return subject.adapter, None, None
    if version and version not in NAMED and custom is None:
        extracted = subject.versions / version if subject.versions else None
        if extracted is None or not (extracted / "adapter_config.json").is_file():
            raise NotFound(
                f"The version {version!r} has not been extracted; do that first with "
                f"POST /v1/finetune/extract_adapter, or give a custom_config, or one of {', '.join(NAMED)}.",
                param="adapter_version",
                code="version_not_found",
            )
        return extracted, version, None
    version = version or ("custom" if custom is not None else "maximal")
    try:
        config = load_space(subject.adapter).resolve(version, custom)
    except AdapterError as error:
        sentence = str(error).rstrip(".")
        raise InvalidRequest(f"{sentence[:1].upper()}{sentence[1:]}.", param=error.param) from error
    return subject.adapter, version, config
