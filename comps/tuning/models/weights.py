"""What tensors a model has, read from the headers of its safetensors files without loading them.

The format: eight bytes with the length of the header, little-endian; the header, a JSON object from each
tensor's name to ``dtype``, ``shape`` and ``data_offsets``; the tensors' bytes. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # the format's own limit, in bytes


class WeightsError(Exception):
    """No whole, readable safetensors file; what is wrong with it, as the rest of a sentence."""


def weights_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, sorted: those that its index names, or the one of the usual name, or
    else all. (A repository may keep another form of the same weights beside them.)

    Raises :class:`WeightsError` when the index is damaged or names files that are not there.
    """
    files = sorted(directory.glob("*.safetensors"))
    index = directory / INDEX
    if index.is_file():
        try:
            named = set(json.loads(index.read_bytes())["weight_map"].values())
            missing = sorted(named - {path.name for path in files})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(f"has a damaged {INDEX}") from error
        if missing:
            raise WeightsError(f"lacks the weights file {missing[0]}, which {INDEX} names")
        return [path for path in files if path.name in named]
    single = directory / SINGLE
    return [single] if single in files else files


@dataclass(frozen=True)
class Header:
    """One tensor: ``dtype`` as the format calls it (``"BF16"``); ``bytes`` of ``file`` from ``offset`` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    bytes: int


def read_headers(files: Iterable[Path]) -> Iterator[Header]:
    """All tensors of these files. Raises :class:`WeightsError` for a file that cannot be used."""
    for path in files:
        try:
            yield from _read_header(path)
        except OSError as error:
            raise WeightsError(f"has an unreadable weights file, {path.name}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(f"has a damaged weights file, {path.name}") from error


def _read_header(path: Path) -> list[Header]:
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError("the header is too long")
        header = json.loads(stream.read(length))
        size = stream.seek(0, 2)
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise WeightsError(f"has a truncated weights file, {path.name}")
        shape = tuple(entry["shape"])
        tensors.append(Header(name, entry["dtype"], shape, path, 8 + length + start, end - start))
    return tensors
