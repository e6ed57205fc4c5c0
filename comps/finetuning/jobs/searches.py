"""Searches as jobs: from a request to a row."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from comps.cores.errors import InvalidRequest, NotFound
from comps.finetuning.jobs.adapters import Source, capital, find_source
from comps.finetuning.jobs.create import check_queue
from comps.finetuning.jobs.find import QUESTIONS_PURPOSES, find_data_file, visible
from comps.finetuning.jobs.found import ended_searches
from comps.finetuning.jobs.repeats import Repeat, claim, keep
from comps.finetuning.jobs.states import add_event
from comps.finetuning.owner import Owner
from comps.finetuning.schemas.searches import SearchJob, SearchRequest
from comps.finetuning.schemas.tolerant import request_warnings
from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import FileRow, JobRow, new_id
from comps.tuning.elastic.read_space import load_space
from comps.tuning.errors import AdapterError
from comps.tuning.search import learned
from comps.tuning.search.ledger import FILE as EVALUATIONS
from comps.tuning.spec import DataSpec, ResourcesSpec, SearchSpec, TrainSpec

_EARLIER = 20  # searches whose evaluations are looked at
_FOR_TESTS = re.compile(r"(^|[^a-z])test([^a-z]|$)", re.IGNORECASE)


def create_search(
    database: Database,
    settings: Settings,
    request: SearchRequest,
    owner: Owner,
    repeat: Repeat | None = None,
) -> JobRow:
    """Write the row of a new search, in ``validating_files``.

    Raises :class:`InvalidRequest`, :class:`NotFound`, or :class:`Conflict` when its source has not succeeded;
    and :class:`QueueFull` and :class:`KeyTaken`.
    """
    with database.reading() as session:
        source = find_source(session, settings, request, owner)
        training = _training(session, source)
        file = _validation_file(session, request, owner, training)
        earlier = session.scalars(ended_searches(source.id, owner).limit(_EARLIER)).all()
    _check(source, request)
    job_id = new_id("search")
    fields = request.model_dump(
        include={"algorithm", "num_evals", "population", "seed", "metric", "cost", "items", "all_items",
                 "finalists", "halving", "texts"}
    )  # fmt: skip
    spec = SearchSpec(
        job_id=job_id,
        directory=settings.jobs_dir / job_id,
        super_adapter=source.directory,
        base_model=source.base_model,
        **_data(settings, training, file),
        known=tuple(settings.jobs_dir / search.id / EVALUATIONS for search in earlier),
        resources=ResourcesSpec(cpus=request.resources_per_worker.CPU),
        texts=request.choices == "texts",
        **fields,
    )
    warnings = request_warnings(request)
    if file is not None and _FOR_TESTS.search(file.filename):
        warnings.append(
            f"{file.filename!r} looks like a test split: what a search has chosen by it cannot be measured "
            "on it any more."
        )
    job = JobRow(
        id=job_id, kind=spec.kind, status="validating_files", owner=owner.id,
        model=source.base_model.name, source=source.id, seed=spec.seed,
        # Those that the run reads, so that they are not deleted while it does.
        validation_file=file.id if file else training[0].validation_file if training else None,
        training_file=training[0].training_file if training and file is None else None,
        request=request.model_dump(mode="json", exclude_unset=True), spec=spec.model_dump(mode="json"),
        warnings=warnings,
    )  # fmt: skip
    with database.session() as session:
        claim(session, repeat)
        find_source(session, settings, request, owner)  # all of this could have been deleted since
        _validation_file(session, request, owner, training)
        check_queue(session, settings)
        session.add(job)
        session.flush()
        add_event(session, job, f"Created: {spec.algorithm} search of {source}")
        for warning in warnings:
            add_event(session, job, warning, level="warn")
        keep(session, repeat, SearchJob.of(job, settings))
    return job


def visible_searches(owner: Owner) -> Select[JobRow]:
    """The searches that a caller may see."""
    return select(JobRow).where(JobRow.kind == "search", visible(JobRow, owner))


def find_search(session: Session, search_id: str, owner: Owner) -> JobRow:
    """Raises :class:`NotFound`."""
    job = session.scalar(visible_searches(owner).where(JobRow.id == search_id))
    if job is None:
        raise NotFound(f"There is no search {search_id[:80]!r}.", param="search_id")
    return job


Training = tuple[JobRow, TrainSpec]


def _training(session: Session, source: Source) -> Training | None:
    """The job that trained the source, if one did."""
    job = session.scalar(select(JobRow).where(JobRow.id == source.id, JobRow.kind == "fine_tuning"))
    return None if job is None else (job, TrainSpec.model_validate(job.spec))


def _validation_file(
    session: Session, request: SearchRequest, owner: Owner, training: Training | None
) -> FileRow | None:
    """The file to score on: the request's, or the job's own; ``None`` for what the job has split off."""
    if request.validation_file:
        file = find_data_file(session, request.validation_file, owner, "validation_file", QUESTIONS_PURPOSES)
        seen = session.get(FileRow, training[0].training_file) if training else None
        if seen and file.sha256 == seen.sha256:
            raise InvalidRequest(
                "validation_file: the job was trained on this file; leave validation_file out to use what "
                "was held out of it, or give another.",
                param="validation_file",
            )
        return file
    if training is None:
        raise InvalidRequest(
            "validation_file is missing: of a registered super-adapter it is not known what it was validated "
            "on.",
            param="validation_file",
        )
    job, spec = training
    if job.validation_file:
        file = find_data_file(session, job.validation_file, owner, "validation_file")
        return None if spec.task == "pretraining" else file
    if not spec.data.validation_split_percentage:
        raise InvalidRequest(
            "validation_file is missing: the job held nothing out of its training data.",
            param="validation_file",
        )
    find_data_file(session, job.training_file or "", owner, "validation_file")
    return None


def _data(settings: Settings, training: Training | None, file: FileRow | None) -> dict[str, Any]:
    """The fields of the spec that say what is scored, and how records become rows."""
    fields: dict[str, Any] = {}
    if file is not None:
        path = settings.files_dir / file.id
        data = DataSpec(train_file=path, max_record_bytes=settings.max_record_bytes)
        fields = {"validation_file": path, "validation_name": file.filename, "data": data}
    if training is not None:
        spec = training[1]
        fields |= {"data": spec.data, "task": spec.task, "data_seed": spec.training.seed}
    return fields


def _check(source: Source, request: SearchRequest) -> None:
    if not source.elastic:
        raise InvalidRequest(
            f"{capital(source)} has no elastic ranks (neural_lora_search was off), so there is nothing to "
            "search.",
            param="fine_tuning_job_id",
        )
    try:
        space = load_space(source.directory)
        if request.algorithm == "learned":
            learned.read(source.directory, space)
    except AdapterError as error:
        param = "algorithm" if error.param == "adapter_version" else error.param
        raise InvalidRequest(capital(error).rstrip(".") + ".", param=param) from error
