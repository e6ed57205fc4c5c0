"""Request blocks that accept unknown keys and say so.

Old clients send misspelt and extra keys, and pipelines pass whole objects on, so an unknown key never
fails a request; it becomes a warning that names its dotted path and, where one is close, the key that was
probably meant. A null stands for the default where the field itself cannot be null. Fields that other
components act on and this one does not are declared with :func:`unused`: a value other than their default
becomes a warning too. Other wrong values of known fields are pydantic's validation errors.

The values of unknown keys are dropped at once, so that a secret under a misspelt name is stored nowhere.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    TypeAdapter,
    model_validator,
)

MAX_WARNINGS = 50
# Why a field of a task that is not there yet is not used.
OTHER_TASK = "it belongs to a task that is not available in this version"
_SHOWN = 80
_PLAIN_KEY = re.compile(rf"[A-Za-z0-9_.\-]{{1,{_SHOWN}}}")


def no_boolean(value: object) -> object:
    """Python counts true as 1; a request that says true where a number belongs is wrong."""
    if isinstance(value, bool):
        raise ValueError("a number was expected, not true or false")
    return value


# Numbers as clients write them (16, "16", 1e-4); the upper bound keeps them inside every integer column.
Integer = Annotated[int, BeforeValidator(no_boolean), Field(le=2**31 - 1)]
Count = Annotated[Integer, Field(ge=1)]
Number = Annotated[float, BeforeValidator(no_boolean), Field(allow_inf_nan=False)]
Auto = Literal["auto"]


def or_auto(numbers: Any) -> BeforeValidator:
    """``"auto"`` as it is, anything else through ``numbers``: one fault with the field's own path, where a
    plain union would name each of its members."""
    adapter: TypeAdapter[Any] = TypeAdapter(numbers)
    return BeforeValidator(lambda value: value if value == "auto" else adapter.validate_python(value))


def unused(default: Any = None, *, because: str = "it has no effect here") -> Any:
    """A field that is accepted for the sake of other components' clients and not acted on."""
    return Field(default, json_schema_extra={"x-unused": because})


class Tolerant(BaseModel):
    """Base of all request blocks: unknown keys are remembered by name and otherwise ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, json_schema_extra={"additionalProperties": True})

    _unknown: tuple[str, ...] = ()

    @model_validator(mode="wrap")
    @classmethod
    def _tolerate(cls, data: Any, handler: ModelWrapValidatorHandler[Tolerant]) -> Tolerant:
        if not isinstance(data, dict):
            return handler(data)
        model = handler(
            {key: value for key, value in data.items() if value is not None or cls._may_be_null(key)}
        )
        model._unknown = tuple(str(key) for key in data if key not in cls.model_fields)
        return model

    @classmethod
    def _may_be_null(cls, key: str) -> bool:
        field = cls.model_fields.get(key)
        return field is not None and type(None) in get_args(field.annotation)

    def unknown_keys(self) -> tuple[str, ...]:
        """The keys that this block does not know, in the order in which they came."""
        return self._unknown


def closest(key: str, known: list[str]) -> str | None:
    """The known key that ``key`` is most likely a misspelling of."""
    found = difflib.get_close_matches(key[:_SHOWN], known, n=1, cutoff=0.75)
    return found[0] if found else None


def request_warnings(block: Tolerant, prefix: str = "") -> list[str]:
    """A sentence for each key of ``block`` and of the blocks in it that was ignored.

    At most :data:`MAX_WARNINGS`, the last of which then says how many more there were.
    """
    found = list(_ignored(block, prefix))
    if len(found) > MAX_WARNINGS:
        found[MAX_WARNINGS - 1 :] = [f"{len(found) - MAX_WARNINGS + 1} more keys were ignored."]
    return found


def _ignored(block: Tolerant, prefix: str) -> list[str]:
    found = []
    known = list(type(block).model_fields)
    for count, key in enumerate(block.unknown_keys()):
        shown = key if _PLAIN_KEY.fullmatch(key) else json.dumps(key[:_SHOWN])
        # Looking for a close key costs time; a body full of unknown keys is not worth it.
        meant = closest(key, known) if count < MAX_WARNINGS else None
        hint = f"; did you mean {prefix}{meant}?" if meant else "."
        found.append(f"{prefix}{shown} is not a known key and was ignored{hint}")
    for name, field in type(block).model_fields.items():
        value = getattr(block, name)
        extra = cast(dict[str, Any], field.json_schema_extra or {})
        if isinstance(value, Tolerant):
            found += _ignored(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Tolerant):
            for index, item in enumerate(value):
                found += _ignored(item, f"{prefix}{name}.{index}.")
        elif "x-unused" in extra and name in block.model_fields_set and value != field.default:
            found.append(f"{prefix}{name} is not used: {extra['x-unused']}.")
    return found
