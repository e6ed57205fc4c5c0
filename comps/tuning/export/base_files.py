"""The files of a base model, without loading it: shards, tensor names, config."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from comps.tuning.errors import AdapterError, ModelError
from comps.tuning.export.files import TOKENIZER
from comps.tuning.spec import ModelSpec

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[^/\\\0]+\.safetensors")


@dataclass(frozen=True)
class BaseFiles:
    """``shard_of``: the file of each tensor. ``index``: the content of the index file, if there is one."""

    name: str
    directory: Path
    config: dict[str, Any]
    shard_of: Mapping[str, str]
    index: dict[str, Any] | None

    @property
    def shards(self) -> list[str]:
        return sorted(set(self.shard_of.values()))


def find_base(model: ModelSpec, quantised: str | None = None) -> BaseFiles:
    """The files of a local model, or of one in the Hugging Face cache or hub.

    Raises:
        ModelError: there is no such model, or its weights are not safetensors, or are quantised otherwise
            than by ``quantised``.
    """
    directory = Path(model.path) if model.local else _snapshot(model)
    config = _read_json(directory / CONFIG, model)
    if about := config.get("quantization_config"):
        method = about.get("quant_method", "some method") if isinstance(about, dict) else about
        if method != quantised:
            raise ModelError(
                f"the base model {model.name} is quantised ({method}); weights in floating point are needed"
            )
    index = None
    if (directory / INDEX).is_file():
        index = _read_json(directory / INDEX, model)
        shard_of = index.get("weight_map")
        if not isinstance(shard_of, dict) or not all(map(_is_shard, shard_of.values())):
            raise ModelError(f"the base model {model.name} has an {INDEX} without a proper weight_map")
    elif (directory / SINGLE).is_file():
        shard_of = dict.fromkeys(_keys(directory / SINGLE, model), SINGLE)
    else:
        kinds = {path.suffix for path in directory.iterdir()} & {".gguf", ".bin", ".pt", ".pth"}
        found = f", only {' and '.join(sorted(kinds))} files" if kinds else ""
        raise ModelError(f"the base model {model.name} has no safetensors weights{found}")
    return BaseFiles(model.name, directory, config, shard_of, index)


def _is_shard(name: object) -> bool:
    """Whether an index may name this file: one of its own directory."""
    return isinstance(name, str) and _SHARD.fullmatch(name) is not None


def find_tensor(name: str, tensors: Collection[str]) -> str | None:
    """The tensor of a checkpoint that a live model calls ``name``, or None.

    A checkpoint may have been written by the bare model (``h.0.attn...`` for ``transformer.h.0.attn...``)
    or by one with another head, so one name may be the tail of the other, by whole components.

    Raises:
        AdapterError: several tensors fit.
    """
    if name in tensors:
        return name
    found = [tensor for tensor in tensors if tensor.endswith(f".{name}") or name.endswith(f".{tensor}")]
    if len(found) > 1:
        raise AdapterError(f"{name!r} could be any of {', '.join(sorted(found))} in the base model")
    return found[0] if found else None


def _snapshot(model: ModelSpec) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", INDEX, CONFIG, GENERATION_CONFIG, *TOKENIZER]
    if model.trust_remote_code:
        wanted.append("*.py")
    try:
        return Path(snapshot_download(model.path, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"the base model {model.name} cannot be fetched from the hub: {reason}") from error


def _read_json(path: Path, model: ModelSpec) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"the base model {model.name} has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"the base model {model.name} has a damaged {path.name}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"the {path.name} of the base model {model.name} is not a JSON object")
    return content


def _keys(path: Path, model: ModelSpec) -> list[str]:
    try:
        with safe_open(path, framework="numpy") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise ModelError(f"{path.name} of the base model {model.name} is damaged: {error}") from error
