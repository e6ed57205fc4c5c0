"""Errors of the library. Each is one sentence for the person who asked for the run.

::

    TuningError            anything a person can act on; ``code`` is stable, for programs
    +-- DataError          a record, a field, a file          (invalid_training_file)
    |   +-- RecordTooLarge, TooManyRecords                    limits, which the operator may change
    +-- ModelError         a base model cannot be used        (invalid_model)
    +-- AdapterError       an adapter or configuration        (invalid_adapter)
    +-- ResourceError      memory, disk, cores                (insufficient_resources)
"""

from __future__ import annotations

# What is said where a package of an extra is missing, as the rest of a sentence.
NO_OPENVINO = (
    "writing an OpenVINO model needs the openvino package, which is not installed; "
    "pip install 'finetuning-service[int4]' installs it"
)


class TuningError(Exception):
    """Base class. ``message`` is a sentence, ``param`` the request field it is about, if any."""

    code = "tuning_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process boundaries in Ray; keyword arguments need help to survive pickling.
        return (_rebuild, (type(self), self.message, self.param))


def _rebuild(cls: type[TuningError], message: str, param: str | None) -> TuningError:
    return cls(message, param=param)


class DataError(TuningError):
    code = "invalid_training_file"


class RecordTooLarge(DataError):
    """A record beyond the limit on its bytes."""


class TooManyRecords(DataError):
    """A file beyond the limit on its records."""


class ModelError(TuningError):
    code = "invalid_model"


class AdapterError(TuningError):
    code = "invalid_adapter"


class ResourceError(TuningError):
    code = "insufficient_resources"
