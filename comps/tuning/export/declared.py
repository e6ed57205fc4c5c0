"""The rank and alpha that an adapter's config declares for each module: a default, and PEFT's patterns.

PEFT takes the keys of ``rank_pattern`` and ``alpha_pattern`` for regular expressions. Names, escaped or not,
are all that PEFT itself and our extraction write; others are refused, since an expression out of a foreign
file can run for ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comps.tuning.errors import AdapterError

_KEY = re.compile(r"(\^?)((?:[\w.-]|\\\W)+)\$?")
_ESCAPED = re.compile(r"\\(\W)")
_MAX_RANK = 2**20
_MAX_ALPHA = 2.0**40
_SHOWN = 80


@dataclass(frozen=True)
class Declared:
    """What modules have: ``default``, or the value of the first of ``named`` that names them.

    An entry of ``named`` is a name, whether it is a whole path and not the end of one, and a value.
    """

    default: float
    named: tuple[tuple[str, bool, float], ...]

    def of(self, module: str) -> float:
        """The value for a module's path."""
        for name, whole, value in self.named:
            if module == name or (not whole and module.endswith(f".{name}")):
                return value
        return self.default


def read_ranks(config: Mapping[str, Any], where: str) -> Declared:
    """``r`` and ``rank_pattern``: whole numbers. ``where`` is the file, for messages.

    Raises :class:`AdapterError`.
    """
    declared = _read(config, "r", "rank_pattern", where)
    for value in (declared.default, *(value for _, _, value in declared.named)):
        if type(value) is not int or not 1 <= value <= _MAX_RANK:
            raise AdapterError(f"{where} has the rank {_short(value)}; ranks are from 1 to {_MAX_RANK}")
    return declared


def read_alphas(config: Mapping[str, Any], where: str) -> Declared:
    """``lora_alpha`` and ``alpha_pattern``: finite numbers. Otherwise as :func:`read_ranks`."""
    declared = _read(config, "lora_alpha", "alpha_pattern", where)
    for value in (declared.default, *(value for _, _, value in declared.named)):
        if type(value) not in (int, float) or not -_MAX_ALPHA <= value <= _MAX_ALPHA:
            raise AdapterError(f"{where} has the alpha {_short(value)}, which is not a number within reason")
    return declared


def _read(config: Mapping[str, Any], field: str, pattern_field: str, where: str) -> Declared:
    pattern = config.get(pattern_field) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{where}: {pattern_field} is not an object")
    named = []
    for key, value in pattern.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{where}: {pattern_field} has the key {_short(key)}; only names of modules are read there, "
                "not other regular expressions"
            )
        named.append((_ESCAPED.sub(r"\1", match[2]), bool(match[1]), value))
    return Declared(config.get(field), tuple(named))  # type: ignore[arg-type]  # checked by the callers


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
