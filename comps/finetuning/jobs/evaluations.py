"""Evaluations as jobs: a row of the kind ``evaluate``, which is validated and waits for cores like a
training."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from comps.cores.errors import Conflict, InvalidRequest, NotFound
from comps.finetuning import catalog
from comps.finetuning.jobs.adapters import (
    Source,
    asked_version,
    check_there,
    configuration,
    extraction,
    searched_for,
    source_of,
    source_of_job,
)
from comps.finetuning.jobs.create import check_queue
from comps.finetuning.jobs.find import (
    QUESTIONS_PURPOSES,
    find_base_model,
    find_data_file,
    find_job,
    find_model,
    visible,
)
from comps.finetuning.jobs.found import BEST, is_searched
from comps.finetuning.jobs.repeats import Repeat, claim, keep
from comps.finetuning.jobs.states import add_event
from comps.finetuning.owner import Owner
from comps.finetuning.schemas.evaluations import Evaluation, EvaluationRequest
from comps.finetuning.schemas.tolerant import closest, request_warnings
from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import FileRow, JobRow, new_id
from comps.tuning.elastic.space import NAMED
from comps.tuning.evaluation.tasks import NAMES, known_name
from comps.tuning.search import learned
from comps.tuning.spec import EvaluateSpec, ModelSpec, ResourcesSpec

KIND = "evaluate"


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
        base_model, source = _subject(session, settings, request, owner)
        file = _file(session, request, owner)
        version, config = _version(session, source, request, owner)
    if base_model.local:
        catalog.check_trainable(Path(base_model.path), base_model.trust_remote_code)
    warnings = request_warnings(request)
    if request.resources_per_worker.GPU:
        warnings.append("resources_per_worker.GPU is not used: evaluations run on CPUs.")
    job_id = new_id("eval")
    spec = EvaluateSpec(
        job_id=job_id, directory=settings.jobs_dir / job_id, base_model=base_model,
        adapter=source.directory if source else None, version=version, config=config,
        file=settings.files_dir / file.id if file else None,
        file_name=file.filename if file else "", task=task, tasks_dir=settings.tasks_dir,
        metrics=tuple(request.metrics or ([request.metric] if request.metric else ())),
        texts=request.choices == "texts", limit=request.limit, seed=request.seed,
        max_length=request.max_length, max_new_tokens=request.max_new_tokens, batch_size=request.batch_size,
        max_record_bytes=settings.max_record_bytes,
        resources=ResourcesSpec(cpus=request.resources_per_worker.CPU),
    )  # fmt: skip
    job = JobRow(
        id=job_id, kind=KIND, status="validating_files", owner=owner.id, model=base_model.name,
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
    return find_data_file(session, request.file, owner, "file", QUESTIONS_PURPOSES) if request.file else None


def _subject(
    session: Session, settings: Settings, request: EvaluationRequest, owner: Owner
) -> tuple[ModelSpec, Source | None]:
    """The base model, and the adapter on it if there is one."""
    if request.fine_tuning_job_id:
        source = source_of_job(settings, find_job(session, request.fine_tuning_job_id, owner))
    elif not request.model:
        raise InvalidRequest("model is missing (or fine_tuning_job_id, for what it trained).", param="model")
    elif row := find_model(session, request.model, owner, "super_adapter", "adapter"):
        source = source_of(session, settings, row, owner)
    else:
        return find_base_model(session, settings, request.model, owner), None
    check_there(source, "fine_tuning_job_id" if request.fine_tuning_job_id else "model")
    return source.base_model, source


def _version(
    session: Session, source: Source | None, request: EvaluationRequest, owner: Owner
) -> tuple[str | None, tuple[int, ...] | None]:
    """The version's name and its ranks, if an adapter is to be set to any."""
    version, custom = asked_version(request), request.custom_config
    if request.search_id and (custom is not None or (version and not is_searched(version))):
        raise InvalidRequest(
            "search_id goes with best and pareto-<k>, and with no other version.", param="search_id"
        )
    if source is None or not source.elastic:
        if version or custom is not None or request.search_id:
            param = "adapter_version" if version else "search_id" if request.search_id else "custom_config"
            raise InvalidRequest(
                f"{param}: only a super-adapter has versions, and this model is none.", param=param
            )
        return None, None
    named = BEST if request.search_id else "maximal"
    version = version or ("custom" if custom is not None else named)
    made = extraction(session, source, version)
    searched = searched_for(session, source, version, request.search_id, owner)
    if searched and made and not request.search_id and searched[1] != made.config:
        raise Conflict(
            f"The version {version!r} of {source} was extracted with another configuration"
            + (f" (of the search {made.search})" if made.search else "")
            + f" than the newest search has found ({searched[0]}); say which with search_id.",
            param="adapter_version",
        )
    by_rule = version in NAMED or version == learned.VERSION or is_searched(version)
    if made is None and custom is None and not by_rule:
        raise NotFound(
            f"The version {version!r} has not been extracted; do that first with "
            "POST /v1/finetune/extract_adapter, or give a custom_config, or one of "
            f"{', '.join((*NAMED, learned.VERSION))}, or what a search has found.",
            param="adapter_version",
            code="version_not_found",
        )
    return version, configuration(source, version, custom, searched, made)
