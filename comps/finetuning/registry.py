"""What a directory under the models root is, before a client may register it as a model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from comps.cores.errors import InvalidRequest
from comps.finetuning.catalog import check_mergeable
from comps.tuning.elastic.read_space import load_space
from comps.tuning.errors import AdapterError
from comps.tuning.export.adapter import read_adapter


@dataclass(frozen=True)
class Found:
    """A directory that can be registered. ``base_model`` is what an adapter's own config says."""

    kind: Literal["base", "super_adapter"]
    directory: Path
    base_model: str | None = None


def inspect_directory(models_dir: Path, path: str) -> Found:
    """What lies at ``path`` (relative to the models root).

    Raises :class:`InvalidRequest` for a path that leads out of the root, also through a link in the
    directory, and for a directory that is neither a base model nor a super-adapter; it says what is missing.
    """
    directory = _inside(models_dir, path)
    if (directory / "adapter_config.json").is_file():
        return Found("super_adapter", directory, _check_super_adapter(directory, path))
    if (directory / "config.json").is_file():
        try:
            check_mergeable(directory)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param="path", code=error.code) from error
        return Found("base", directory)
    raise _unusable(
        path, "has neither a config.json (a base model) nor an adapter_config.json (a super-adapter) in it"
    )


def _inside(models_dir: Path, path: str) -> Path:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or not path.isprintable():
        raise _unusable(path, "is not a path relative to the models root")
    root = models_dir.resolve()
    try:
        # realpath and not Path.resolve, which raises RuntimeError for links in a circle.
        directory = Path(os.path.realpath(root / path))
        if not directory.is_relative_to(root) or directory == root:
            raise _unusable(path, "leads out of the models root")
        if not directory.is_dir():
            raise _unusable(path, "is not a directory under the models root")
        for entry in directory.iterdir():
            if not Path(os.path.realpath(entry)).is_relative_to(root):
                raise _unusable(path, f"has a link {entry.name!r} that leads out of the models root")
    except OSError as error:  # too long a name, no permission
        raise _unusable(path, f"cannot be read: {error.strerror}") from error
    return directory


def _check_super_adapter(directory: Path, path: str) -> str | None:
    try:
        adapter = read_adapter(directory)
        load_space(directory, adapter)
    except AdapterError as error:
        raise _unusable(path, f"has no super-adapter that can be used: {error.message}") from error
    base = adapter.config.get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def _unusable(path: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"The path {path[:200]!r} {what}.", param="path", code="invalid_model")
