"""Names and shapes of tensors, read from the headers of safetensors files without loading them.

The format: eight bytes with the length of the header, little-endian; the header, a JSON object from each
tensor's name to ``dtype``, ``shape`` and ``data_offsets``; the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # the format's own limit, in bytes


class WeightsError(Exception):
    """No whole, readable safetensors file; what is wrong with it, as the rest of a sentence."""


def weights_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, sorted. Raises :class:`WeightsError` when its index names others."""
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
    return files


def read_headers(files: Iterable[Path]) -> Iterator[tuple[str, list[int]]]:
    """Each tensor's name and shape. Raises :class:`WeightsError` for a file that cannot be used."""
    for path in files:
        try:
            yield from _read_header(path)
        except OSError as error:
            raise WeightsError(f"has an unreadable weights file, {path.name}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(f"has a damaged weights file, {path.name}") from error


def _read_header(path: Path) -> list[tuple[str, list[int]]]:
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError("the header is too long")
        header = json.loads(stream.read(length))
        size = stream.seek(0, 2)
    header.pop("__metadata__", None)
    tensors = [(name, list(entry["shape"])) for name, entry in header.items()]
    if any(8 + length + entry["data_offsets"][1] > size for entry in header.values()):
        raise WeightsError(f"has a truncated weights file, {path.name}")
    return tensors
