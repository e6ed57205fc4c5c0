"""What is checked between a job's acceptance and its place in the queue: its data, and a hub model.

Faults of the request itself were refused when it was made; these checks read whole files or ask the hub,
which takes longer than a client should wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comps.cores.errors import ServiceError
from comps.finetuning.catalog import check_on_hub
from comps.finetuning.jobs.secrets import Secrets
from comps.finetuning.store.tables import JobRow
from comps.tuning.data.apart import QUESTIONS, validate_safely
from comps.tuning.errors import DataError, ModelError, RecordTooLarge, TooManyRecords, TuningError
from comps.tuning.evaluation.scores import CHOICE_METRICS
from comps.tuning.evaluation.tasks import check_on_hub as check_task_on_hub
from comps.tuning.evaluation.tasks import local_file, metrics_of
from comps.tuning.models.weights import WeightsError
from comps.tuning.sparse.report import LEAST, is_dense, sparsity_of_directory
from comps.tuning.spec import (
    EvaluateSpec,
    ExtractSpec,
    MergeSpec,
    PruneSpec,
    QuantizeSpec,
    SearchSpec,
    TrainSpec,
    read_spec,
)

# What the operator changes to allow more.
_SETTINGS: dict[type[DataError], str] = {
    RecordTooLarge: "FINETUNING_MAX_RECORD_BYTES",
    TooManyRecords: "FINETUNING_MAX_RECORDS",
}
_EVALUATION = "invalid_evaluation_file"


@dataclass(frozen=True)
class Verdict:
    """``error`` is ``(message, code, param)`` of the first fault; ``warnings`` are sentences for events."""

    error: tuple[str, str, str | None] | None = None
    warnings: list[str] = field(default_factory=list)


def validate(job: JobRow, secrets: Secrets) -> Verdict:
    """Read the job's data files from end to end, and ask the hub for a model that is not here.

    Blocking; memory stays bounded at any file size.
    """
    spec = read_spec(job.spec)
    assert not isinstance(spec, ExtractSpec | MergeSpec), "these are queued at once"
    warnings: list[str] = []
    for file in _files(spec):
        try:
            summary = validate_safely(file.path, file.name, file.task, **file.limits)
            warnings += summary.warnings
        except DataError as error:
            setting = _SETTINGS.get(type(error))
            message = f"{error.message} (the limit {setting})" if setting else error.message
            return Verdict((message, file.code, file.param))
        except FileNotFoundError:
            return Verdict((f"The file {file.name} was deleted before the job began.", file.code, file.param))
    try:
        if isinstance(spec, TrainSpec) and (reason := _dense(spec)):
            return Verdict((reason, ModelError.code, "General.lora_config.sparse_adapter"))
    except WeightsError as error:
        return Verdict((f"The model {spec.base_model.name!r} {error}.", ModelError.code, "model"))
    if isinstance(spec, EvaluateSpec) and spec.task and not local_file(spec.task, spec.tasks_dir):
        try:
            check_task_on_hub(spec.task, spec.tasks_dir)
        except DataError as error:
            return Verdict((error.message, _EVALUATION, "task"))
    if not spec.base_model.local:
        try:
            token = secrets.token(job)
            check_on_hub(spec.base_model.path, token, spec.base_model.trust_remote_code)
        except TuningError as error:  # the token cannot be opened
            return Verdict((error.message, error.code, error.param))
        except ServiceError as error:
            return Verdict((error.message, error.code or "invalid_model", error.param))
    return Verdict(warnings=warnings)


def _dense(spec: TrainSpec) -> str | None:
    """Why a sparse adapter makes no sense on a base model that is here; the run looks again, at the weights
    that it has loaded."""
    if not (spec.lora.sparse and spec.base_model.local):
        return None
    groups = [name for group in spec.lora.groups for name in group.modules]
    found = sparsity_of_directory(Path(spec.base_model.path)).of(groups or spec.lora.target_modules or ())
    if not found.weights or found.fraction >= LEAST:
        return None
    return is_dense(spec.base_model.name, found.fraction)


@dataclass(frozen=True)
class _File:
    """A data file: its path, the client's name for it, the request's field and its code, what it must hold,
    and the limits it must keep."""

    path: Path
    name: str
    param: str
    code: str
    task: str
    limits: dict[str, Any]


def _files(spec: TrainSpec | PruneSpec | QuantizeSpec | EvaluateSpec | SearchSpec) -> Iterator[_File]:
    if isinstance(spec, TrainSpec):
        data, files = spec.data, [(spec.data.train_file, spec.data.train_name, "training_file")]
        if data.validation_file:
            files.append((data.validation_file, data.validation_name, "validation_file"))
        limits = {"limit": data.max_record_bytes, "max_records": data.max_records}
        for path, name, param in files:
            yield _File(path, name, param, f"invalid_{param}", spec.task, limits)
    elif isinstance(spec, PruneSpec | QuantizeSpec):
        if found := spec.calibration:
            limits = {"limit": found.max_record_bytes, "max_records": found.max_records}
            param = "calibration_file"
            yield _File(found.file, found.name, param, f"invalid_{param}", "calibration", limits)
    elif isinstance(spec, SearchSpec):
        if spec.validation_file:
            limits = {"limit": spec.data.max_record_bytes, **_asked(spec.texts, [spec.metric])}
            param = "validation_file"
            yield _File(
                spec.validation_file, spec.validation_name, param, f"invalid_{param}", QUESTIONS, limits
            )
    elif questions := spec.file or local_file(spec.task or "", spec.tasks_dir):
        metrics = spec.metrics or (metrics_of(spec.task) if spec.task else ())
        limits = {"limit": spec.max_record_bytes, **_asked(spec.texts, metrics)}
        name, param = (f"{spec.task}/{questions.name}", "task") if spec.task else (spec.file_name, "file")
        yield _File(questions, name, param, _EVALUATION, QUESTIONS, limits)


def _asked(texts: bool, metrics: Iterable[str | None]) -> dict[str, bool]:
    """What questions must have so that they can be scored."""
    return {"texts": texts, "choices": any(metric in CHOICE_METRICS for metric in metrics)}
