"""Reads JSON bodies: forgiving about one slip that published examples make, strict about what comes after.

Python's own reader lets ``NaN``, ``1e999`` and lone surrogates through, which no database can store and
no answer can repeat; here they are refused at the door, for all routes alike.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from comps.cores.errors import InvalidRequest

# A string, which is kept as it is, or a comma with nothing but the closing bracket after it. A string that
# never ends counts as one too: to look for its end again from each quote in it would take minutes.
_STRING_OR_TRAILING_COMMA = re.compile(rb'("(?:[^"\\]|\\.)*+"?)|,(?=\s*+[}\]])', re.DOTALL)


def read_json(body: bytes) -> tuple[dict[str, Any], bytes]:
    """The object in a JSON body, and the body without commas after last elements.

    Raises :class:`InvalidRequest` (code ``invalid_json``) for what is not a JSON object, too deep, not
    Unicode text, or has numbers that are not finite.
    """
    try:
        try:
            value = _load(body)
        except json.JSONDecodeError:
            body = _STRING_OR_TRAILING_COMMA.sub(rb"\1", body)
            value = _load(body)
        if b"\\ud" in body.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _refused(f"is not valid JSON: {error.msg} ({where})") from error
    except RecursionError as error:
        raise _refused("is nested too deeply") from error
    except UnicodeError as error:
        raise _refused("is not Unicode text: send UTF-8 without lone surrogates") from error
    except ValueError as error:  # Python's limit on the digits of an integer
        raise _refused("has a number with too many digits") from error
    if not isinstance(value, dict):
        raise _refused("must be a JSON object")
    return value, body


def _load(body: bytes) -> Any:
    return json.loads(body, parse_constant=_refuse_number, parse_float=_finite)


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    raise _refused(f"has the number {text[:40]}, which is not finite")


def _refused(what: str) -> InvalidRequest:
    return InvalidRequest(f"The request body {what}.", code="invalid_json")
