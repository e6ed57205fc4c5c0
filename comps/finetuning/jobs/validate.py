"""What is checked between a job's acceptance and its place in the queue: its data, and a hub model.

Faults of the request itself were refused when it was made; these checks read whole files or ask the hub,
which takes longer than a client should wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from comps.cores.errors import ServiceError
from comps.finetuning.catalog import check_on_hub
from comps.finetuning.jobs.secrets import Secrets
from comps.finetuning.store.tables import JobRow
from comps.tuning.data.apart import validate_safely
from comps.tuning.errors import DataError, RecordTooLarge, TooManyRecords, TuningError
from comps.tuning.spec import CalibrationSpec, DataSpec, PruneSpec, QuantizeSpec, TrainSpec, read_spec

# What the operator changes to allow more.
_SETTINGS: dict[type[DataError], str] = {
    RecordTooLarge: "FINETUNING_MAX_RECORD_BYTES",
    TooManyRecords: "FINETUNING_MAX_RECORDS",
}


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
    assert isinstance(spec, TrainSpec | PruneSpec | QuantizeSpec)
    warnings: list[str] = []
    for path, name, param, task, data in _files(spec):
        code = f"invalid_{param}"
        try:
            summary = validate_safely(
                path, name, task, limit=data.max_record_bytes, max_records=data.max_records
            )
            warnings += summary.warnings
        except DataError as error:
            setting = _SETTINGS.get(type(error))
            message = f"{error.message} (the limit {setting})" if setting else error.message
            return Verdict((message, code, param))
        except FileNotFoundError:
            return Verdict((f"The file {name} was deleted before the job began.", code, param))
    if not spec.base_model.local:
        try:
            token = secrets.token(job)
            check_on_hub(spec.base_model.path, token, spec.base_model.trust_remote_code)
        except TuningError as error:  # the token cannot be opened
            return Verdict((error.message, error.code, error.param))
        except ServiceError as error:
            return Verdict((error.message, error.code or "invalid_model", error.param))
    return Verdict(warnings=warnings)


_File = tuple[Path, str, str, str, DataSpec | CalibrationSpec]


def _files(spec: TrainSpec | PruneSpec | QuantizeSpec) -> Iterator[_File]:
    """Path, client's name, request field and task of each data file, and the limits it must keep."""
    if not isinstance(spec, TrainSpec):
        if found := spec.calibration:
            yield found.file, found.name, "calibration_file", "calibration", found
        return
    data = spec.data
    yield data.train_file, data.train_name, "training_file", spec.task, data
    if data.validation_file:
        yield data.validation_file, data.validation_name, "validation_file", spec.task, data
