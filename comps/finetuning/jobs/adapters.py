"""Extraction and merge as jobs: found when the same was asked before, made otherwise.

Outputs of a fine-tuning job lie in its output directory, ``<version>/`` and ``<version>/merged_model/``;
those of a registered super-adapter in the same form under ``<data dir>/adapters/<model id>/``, since the
models root is the operator's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from comps.cores.errors import Conflict, InvalidRequest, NotFound
from comps.finetuning import catalog
from comps.finetuning.jobs.create import check_queue
from comps.finetuning.jobs.find import find_base_model, find_job, find_model
from comps.finetuning.jobs.found import BEST, found_by_search, is_searched
from comps.finetuning.jobs.repeats import Repeat, claim, keep
from comps.finetuning.jobs.states import ACTIVE, add_event
from comps.finetuning.owner import Owner
from comps.finetuning.schemas.adapters import (
    AdapterAnswer,
    AdapterRequest,
    ExtractRequest,
    MergeRequest,
    SourceRequest,
)
from comps.finetuning.schemas.evaluations import EvaluationRequest
from comps.finetuning.schemas.tolerant import request_warnings
from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import JobRow, ModelRow, new_id
from comps.tuning.elastic.read_space import load_space
from comps.tuning.errors import NO_OPENVINO, AdapterError
from comps.tuning.export.adapter import CONFIG, read_json
from comps.tuning.rundir import OUTPUT
from comps.tuning.search import learned
from comps.tuning.sparse.report import is_quantised
from comps.tuning.spec import ExtractSpec, MergeSpec, ModelSpec, TrainSpec

MERGED = "merged_model"


@dataclass(frozen=True)
class Source:
    """An adapter to work on. ``id`` is a job's or a model's; ``output`` is where versions go, which belong to
    whom the source belongs to, whoever asks for them."""

    id: str
    owner: str | None
    directory: Path
    output: Path
    base_model: ModelSpec
    elastic: bool

    def __str__(self) -> str:
        return f"the job {self.id}" if self.id.startswith("ft-job-") else f"the model {self.id!r}"


def versions_directory(settings: Settings, model_id: str) -> Path:
    """Where the versions of a registered super-adapter go."""
    # Ids may have a slash and no @, so that no model's versions are in another's way.
    return settings.data_dir / "adapters" / model_id.replace("/", "@")


def create_extract(
    database: Database,
    settings: Settings,
    request: ExtractRequest,
    owner: Owner,
    repeat: Repeat | None = None,
) -> JobRow:
    """The row of an extraction: one that runs or has succeeded with the same result, or a new one.

    Raises :class:`InvalidRequest`, :class:`NotFound`, or :class:`Conflict` when the version exists with
    another configuration, or its source has not succeeded; and :class:`KeyTaken`.
    """
    version = asked_version(request)
    if version is None and request.custom_config is not None:
        raise InvalidRequest(
            "adapter_version is missing: a custom_config needs a name of its own.", param="adapter_version"
        )
    version = version or (BEST if request.search_id else "heuristic")
    with database.reading() as session:
        source = find_source(session, settings, request, owner)
        if not source.elastic:
            raise InvalidRequest(
                f"{capital(source)} has no elastic ranks (neural_lora_search was off), so there is nothing "
                "to extract; its adapter can be merged as it is.",
                param="fine_tuning_job_id",
            )
        made = extraction(session, source, version)
        searched = searched_for(session, source, version, request.search_id, owner)
    config = configuration(source, version, request.custom_config, searched, made)
    # Whoever asks again for a version need not say again what it is.
    form = made.form if made and "form" not in request.model_fields_set else request.form
    output = source.output / version
    if output.exists() and not (output / "adapter_config.json").is_file():
        raise InvalidRequest(f"adapter_version: {version!r} is reserved.", param="adapter_version")
    job_id = new_id("extract")
    spec = ExtractSpec(
        job_id=job_id, directory=settings.jobs_dir / job_id, super_adapter=source.directory, version=version,
        config=config, form=form, output=output, search=searched and searched[0],
    )  # fmt: skip

    with database.session() as session:
        claim(session, repeat)
        find_source(session, settings, request, owner)  # could have been deleted since
        job = _known(session, "extract", source.id, version)
        if job is None:
            check_queue(session, settings)
            job = _new_row(session, spec, source, version, request)
        same = ExtractSpec.model_validate(job.spec)
        if (same.config, same.form) != (config, form):
            raise Conflict(
                f"The version {version!r} of {source} exists with another configuration"
                + (f" (of the search {same.search})" if same.search else "")
                + "; choose another, or delete its model first.",
                param="adapter_version",
            )
        keep(session, repeat, AdapterAnswer.of(job, request))
        return job


Searched = tuple[str, tuple[int, ...]]  # a search, and the ranks that it has found


def extraction(session: Session, source: Source, version: str) -> ExtractSpec | None:
    """How a version was extracted, or is being."""
    known = _known(session, "extract", source.id, version)
    return None if known is None else ExtractSpec.model_validate(known.spec)


def searched_for(
    session: Session, source: Source, version: str, search_id: str | None, owner: Owner
) -> Searched | None:
    """What a version is that is kept for what a search finds. Raises :class:`InvalidRequest`."""
    return found_by_search(session, source.id, version, search_id, owner) if is_searched(version) else None


def configuration(
    source: Source,
    version: str,
    custom: Sequence[int] | None,
    searched: Searched | None,
    made: ExtractSpec | None,
) -> tuple[int, ...]:
    """The ranks of a version: by its rule, as asked, as a search has found them, or as they were before.

    Raises :class:`InvalidRequest`.
    """
    if is_searched(version) and made is None and (searched is None or custom is not None):
        none = "" if searched else f", and none of {source} has finished; POST /v1/finetune/search begins one"
        raise InvalidRequest(
            f"adapter_version: {version!r} is kept for what a search finds{none}; give a custom_config a "
            "name of its own.",
            param="adapter_version",
        )
    try:
        space = load_space(source.directory)
        if searched is not None:
            custom = searched[1]
        elif made is not None and custom is None:
            custom = made.config
        elif version == learned.VERSION and made is None:
            taught = learned.read(source.directory, space)
            if custom is not None and tuple(custom) != taught:
                raise AdapterError(
                    f"custom_config is not the {version} configuration; give it a version name of its own",
                    param="custom_config",
                )
            custom = taught
        return space.resolve(version, custom)
    except AdapterError as error:
        raise InvalidRequest(capital(error).rstrip(".") + ".", param=error.param) from error


def create_merge(
    database: Database,
    settings: Settings,
    request: MergeRequest,
    owner: Owner,
    repeat: Repeat | None = None,
) -> JobRow:
    """As :func:`create_extract`, for a merge. The version must have been extracted before."""
    version = asked_version(request)
    with database.reading() as session:
        source = find_source(session, settings, request, owner)
        extracting = _known(session, "extract", source.id, version) if version else None
    adapter = source.output / version if version else source.directory
    if version and not source.elastic:
        raise InvalidRequest(
            f"{capital(source)} has no elastic ranks, so no version {version!r}; leave adapter_version out.",
            param="adapter_version",
        )
    if extracting and extracting.status in ACTIVE:
        raise Conflict(
            f"The version {version!r} of {source} is still being extracted.", param="adapter_version"
        )
    if not (adapter / "adapter_config.json").is_file():
        raise NotFound(
            f"The version {version!r} of {source} has not been extracted; "
            "do that first with POST /v1/finetune/extract_adapter.",
            param="adapter_version",
            code="version_not_found",
        )
    if request.openvino:
        check_openvino()
        if not quantisation_aware(adapter):
            raise InvalidRequest(
                f"openvino is for INT4 models, and {source} was not trained with quantization_aware.",
                param="openvino",
            )
    if source.base_model.local:
        if is_quantised(Path(source.base_model.path)) and not quantisation_aware(adapter):
            raise InvalidRequest(
                f"The base model of {source} has integer weights, into which an adapter can be merged only "
                "if it was trained with quantization_aware. Use it beside its base model.",
                param="fine_tuning_job_id" if request.fine_tuning_job_id else "model",
            )
        catalog.check_mergeable(Path(source.base_model.path))
    job_id = new_id("merge")
    output = (source.output / version if version else source.output) / MERGED
    spec = MergeSpec(
        job_id=job_id, directory=settings.jobs_dir / job_id, adapter=adapter, base_model=source.base_model,
        output=output, openvino=request.openvino,
    )  # fmt: skip

    with database.session() as session:
        claim(session, repeat)
        find_source(session, settings, request, owner)  # could have been deleted since
        known = _known(session, "merge", source.id, version)
        if known and request.openvino and not known.spec.get("openvino"):
            if known.status in ACTIVE:
                raise Conflict(
                    f"The merge {known.id} of the same without openvino has not ended.", param="openvino"
                )
            known = None
        if known is None:
            check_queue(session, settings)
        job = known or _new_row(session, spec, source, version, request)
        keep(session, repeat, AdapterAnswer.of(job, request))
        return job


def check_openvino() -> None:
    """Raises :class:`InvalidRequest` where OpenVINO is not installed."""
    if importlib.util.find_spec("openvino") is None:
        raise InvalidRequest(f"openvino: {NO_OPENVINO}.", param="openvino")


def quantisation_aware(adapter: Path) -> bool:
    """Whether the adapter in this directory was trained within the rounding to a grid."""
    try:
        return bool(read_json(adapter / CONFIG).get("grid"))
    except (AdapterError, AttributeError):  # the merge itself will say what is wrong with it
        return False


def asked_version(request: AdapterRequest | EvaluationRequest) -> str | None:
    """By either of its names. Raises :class:`InvalidRequest` when they differ."""
    first, second = request.adapter_version, request.sub_adapter_version
    if first and second and first != second:
        raise InvalidRequest(
            f"adapter_version is {first!r}, but sub_adapter_version is {second!r}; give one of them.",
            param="adapter_version",
        )
    return first or second


def find_source(session: Session, settings: Settings, request: SourceRequest, owner: Owner) -> Source:
    """The adapter that a request names.

    Raises :class:`InvalidRequest`, :class:`NotFound`, or :class:`Conflict` when its job has not succeeded.
    """
    source = _named(session, settings, request, owner)
    check_there(source, "fine_tuning_job_id" if request.fine_tuning_job_id else "model")
    return source


def check_there(source: Source, param: str) -> None:
    """Raises :class:`NotFound` when the adapter's files were deleted."""
    if not (source.directory / "adapter_config.json").is_file():
        raise NotFound(
            f"The adapter of {source} is no longer there; its files were deleted.",
            param=param,
            code="adapter_not_found",
        )


def _named(session: Session, settings: Settings, request: SourceRequest, owner: Owner) -> Source:
    if request.fine_tuning_job_id:
        return source_of_job(settings, find_job(session, request.fine_tuning_job_id, owner))
    if not request.model:
        raise InvalidRequest(
            "fine_tuning_job_id is missing (or model, for a registered super-adapter).",
            param="fine_tuning_job_id",
        )
    row = find_model(session, request.model, owner, "super_adapter", "adapter")
    if row is None:
        raise NotFound(f"There is no adapter {request.model[:80]!r}.", param="model", code="model_not_found")
    source = source_of(session, settings, row, owner)
    if row.job_id and source.directory != source.output:
        raise InvalidRequest(
            f"{row.id!r} is a version that was extracted from the job {row.job_id}; give that "
            "fine_tuning_job_id, and the version as adapter_version.",
            param="model",
        )
    return source


def source_of(session: Session, settings: Settings, row: ModelRow, owner: Owner) -> Source:
    """The adapter that a model is. A version that was extracted is not elastic any more.

    Raises as :func:`find_source`.
    """
    if row.job_id is None:
        base_model = find_base_model(session, settings, row.base_model or "", owner)
        output = versions_directory(settings, row.id)
        elastic = row.kind == "super_adapter"
        return Source(row.id, row.owner, Path(row.path), output, base_model, elastic)
    source = source_of_job(settings, find_job(session, row.job_id, owner))
    directory = Path(row.path)
    return source if directory == source.directory else replace(source, directory=directory, elastic=False)


def source_of_job(settings: Settings, job: JobRow) -> Source:
    """Raises :class:`Conflict` for a job that has not succeeded."""
    if job.status != "succeeded":
        raise Conflict(
            f"The job {job.id} is {job.status}; only a job that succeeded has an adapter.",
            param="fine_tuning_job_id",
            code="job_not_succeeded",
        )
    spec = TrainSpec.model_validate(job.spec)
    output = settings.jobs_dir / job.id / OUTPUT
    return Source(job.id, job.owner, output, output, spec.base_model, elastic=bool(spec.lora.groups))


def _known(session: Session, kind: str, source: str, version: str | None) -> JobRow | None:
    """The newest run of the same that is under way, or has succeeded and whose output is still there."""
    query = select(JobRow).where(
        JobRow.kind == kind,
        JobRow.source == source,
        JobRow.version == version if version else JobRow.version.is_(None),
        JobRow.status.in_((*ACTIVE, "succeeded")),
    )
    job = session.scalar(query.order_by(JobRow.sequence.desc()).limit(1))
    if job is None or job.status in ACTIVE or Path(job.spec["output"]).is_dir():
        return job
    return None


def _new_row(
    session: Session,
    spec: ExtractSpec | MergeSpec,
    source: Source,
    version: str | None,
    request: AdapterRequest,
) -> JobRow:
    job = JobRow(
        id=spec.job_id, kind=spec.kind, status="queued", owner=source.owner, model=source.base_model.name,
        source=source.id, version=version, request=request.model_dump(mode="json", exclude_unset=True),
        spec=spec.model_dump(mode="json"), warnings=request_warnings(request),
    )  # fmt: skip
    session.add(job)
    session.flush()
    add_event(session, job, f"Created: {spec.kind} of {source}")
    return job


def capital(text: object) -> str:
    """As a sentence begins."""
    sentence = str(text)
    return sentence[:1].upper() + sentence[1:]
