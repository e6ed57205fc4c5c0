"""The shapes a record may have, and the checks each record passes. Needs no torch."""

from __future__ import annotations

from typing import Any, Literal

from comps.tuning.errors import DataError

Shape = Literal["alpaca", "prompt_completion", "messages", "text"]

# Shape -> the fields that tell it, all of which a record must have.
_REQUIRED: dict[Shape, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
# What makes a question of a record, to be evaluated on (see comps.tuning.evaluation.questions).
_QUESTION = {"question", "choices", "answer", "answerKey"}
FIELDS = frozenset(field for fields in _REQUIRED.values() for field in fields) | {"input"} | _QUESTION

_DESCRIPTIONS: dict[Shape, str] = {
    "alpaca": "Alpaca (instruction, input, output)",
    "prompt_completion": "prompt and completion",
    "messages": "chat messages",
    "text": "plain text",
}
TASK_SHAPES: dict[str, tuple[Shape, ...]] = {
    "instruction_tuning": ("alpaca", "prompt_completion", "messages"),
    "pretraining": ("text",),
    "calibration": ("alpaca", "prompt_completion", "messages", "text"),
}
# The better and the worse answer, by the names of Hugging Face's data sets and of OpenAI.
_PREFERENCES = ({"chosen", "rejected"}, {"preferred_output", "non_preferred_output"})
ROLES = ("system", "user", "assistant", "tool")
_JSON_NAMES = {str: "a string", dict: "an object", list: "a list", bool: "a boolean", type(None): "null"}


def shape_of(record: dict[str, Any]) -> Shape | None:
    """The first shape whose fields ``record`` all has."""
    return next((shape for shape, fields in _REQUIRED.items() if all(f in record for f in fields)), None)


def expect_shape(record: dict[str, Any], task: str, where: str) -> Shape:
    """The shape of a file's first record, if ``task`` takes it; otherwise a :class:`DataError`."""
    accepted = TASK_SHAPES[task]
    shape = shape_of(record)
    if shape in accepted:
        return shape
    wanted = ", ".join(_DESCRIPTIONS[each] for each in accepted)
    if shape:
        raise DataError(f"{where}: is of the shape {_DESCRIPTIONS[shape]}, but {task} takes {wanted}")
    if any(pair <= record.keys() for pair in _PREFERENCES):
        raise DataError(
            f"{where}: is a preference pair, and training on preferences (DPO) is not offered; {task} takes "
            f"{wanted}, so keep the preferred answers as that"
        )
    found = ", ".join(repr(str(field)[:40]) for field in list(record)[:10]) or "no fields"
    raise DataError(f"{where}: has {found}, which is no shape that {task} takes: {wanted}")


def check_record(record: dict[str, Any], shape: Shape, where: str) -> str | None:
    """Check the fields of one record against its file's ``shape``.

    Returns the name of the first field that must hold text and is empty, if there is one: the caller
    decides what to make of it. Raises :class:`DataError`, naming place and field, for all other faults.
    """
    if any(field not in record for field in _REQUIRED[shape]):
        other = shape_of(record)
        if other:
            found = f"is of the shape {_DESCRIPTIONS[other]}"
        else:
            missing = next(field for field in _REQUIRED[shape] if field not in record)
            found = f"has no field {missing!r}"
        raise DataError(f"{where}: {found}, but the file began with {_DESCRIPTIONS[shape]}")
    if shape == "messages":
        return _check_messages(record["messages"], where)
    for field in _REQUIRED[shape]:
        _check_string(record[field], field, where)
    if shape == "alpaca" and record.get("input") is not None:
        _check_string(record["input"], "input", where)
    return next((field for field in _REQUIRED[shape] if not record[field].strip()), None)


def _check_string(value: Any, field: str, where: str) -> None:
    if not isinstance(value, str):
        found = _JSON_NAMES.get(type(value), "a number")
        raise DataError(f"{where}: {field!r} must be a string, not {found}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {field!r} has a lone surrogate at character {error.start + 1}, which is not text"
        ) from error


def _check_messages(messages: Any, where: str) -> str | None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' must be a list of at least one message")
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, dict):
            raise DataError(f"{where}: {field!r} must be an object with 'role' and 'content'")
        if message.get("role") not in ROLES:
            raise DataError(f"{where}: '{field}.role' must be one of {', '.join(ROLES)}")
        _check_string(message.get("content"), f"{field}.content", where)
        if message.get("weight") not in (None, 0, 1):
            raise DataError(f"{where}: '{field}.weight' must be 0 or 1")
    last = messages[-1]["role"]
    if last != "assistant":
        raise DataError(f"{where}: the last message must be the assistant's, not the {last}'s")
    if all(message["role"] != "user" for message in messages):
        raise DataError(f"{where}: 'messages' has no message of the user")
    said = (i for i, m in enumerate(messages) if m["role"] == "assistant" and not m["content"].strip())
    return next((f"messages[{index}].content" for index in said), None)
