"""Files of JSON Lines that are only appended to. What a kill has torn at their end counts for nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read(path: Path) -> tuple[list[Any], int]:
    """What is in the whole lines of ``path``, and the bytes up to their end. Nothing without a file."""
    found: list[Any] = []
    end = 0
    if not path.is_file():
        return found, end
    with open(path, "rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                break
            try:
                found.append(json.loads(line))
            except ValueError:
                break
            end += len(line)
    return found, end


def append(path: Path, values: Iterable[Any]) -> None:
    """A line for each of ``values``, on the disk when this returns. A torn line must have been cut off."""
    text = "".join(f"{json.dumps(value, separators=(',', ':'))}\n" for value in values)
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
