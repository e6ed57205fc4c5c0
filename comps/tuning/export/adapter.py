"""Reading LoRA adapters from their files: the config, and the modules found in the tensors' shapes.

Needs no torch: shapes come from the safetensors header. The ranks of an adapter are those of its
tensors. The scale of a module is what its config declares, ``alpha / r`` (rslora: ``alpha / sqrt(r)``)
with PEFT's ``rank_pattern`` and ``alpha_pattern``; where tensors are smaller than declared (sub-adapters
cut out by the original NLS code, whose config is left as it was) that scale is the right one, since the
scale of a super-adapter does not depend on the active rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from comps.tuning.errors import AdapterError
from comps.tuning.export.declared import read_alphas, read_ranks
from comps.tuning.spec import GridSpec

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

_LORA_KEY = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_(A|B)\.(weight|bias)")
# Variants whose effect is not s * B A, or which change the base weights; the named field is set in them.
_VARIANTS = (
    "use_dora",
    "use_bdlora",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear module: A is [rank, in_features], B [out_features, rank]."""

    rank: int
    in_features: int
    out_features: int
    declared_rank: int
    alpha: float
    scale: float
    down: str  # the keys of A, B and B's bias
    up: str
    bias: str | None

    @property
    def parameters_per_rank(self) -> int:
        return self.in_features + self.out_features


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk. ``replaced`` maps tensors that replace the base model's (modules_to_save,
    trained biases) from their name in the base model to their key in the file."""

    directory: Path
    config: dict[str, Any]
    modules: dict[str, LoraModule]
    replaced: dict[str, str]

    @property
    def weights(self) -> Path:
        return self.directory / WEIGHTS

    @property
    def sparse(self) -> bool:
        """Whether ``s * B A`` counts only where the base's weight is not 0."""
        return _is_sparse(self.config)

    @property
    def grid(self) -> GridSpec | None:
        """The grid within whose rounding it was trained, if any. Raises :class:`AdapterError`."""
        return _grid(self.config, self.directory)


def is_sparse(directory: Path) -> bool:
    """:attr:`Adapter.sparse` of the adapter in ``directory``, whose tensors are not looked at.

    Raises:
        AdapterError: there is no config, or it is damaged or of another kind than plain LoRA.
    """
    return _is_sparse(_read_config(directory))


def _is_sparse(config: Mapping[str, Any]) -> bool:
    return bool(config.get("sparse_adapter"))


def grid_of_adapter(directory: Path) -> GridSpec | None:
    """:attr:`Adapter.grid` of the adapter in ``directory``. Raises as :func:`is_sparse`."""
    return _grid(_read_config(directory), directory)


def _grid(config: Mapping[str, Any], directory: Path) -> GridSpec | None:
    if not config.get("grid"):
        return None
    try:
        return GridSpec.model_validate(config["grid"])
    except ValidationError as error:
        raise AdapterError(f"{directory.name}/{CONFIG} has a grid that is none") from error


def read_adapter(directory: Path) -> Adapter:
    """Read the config and the header of the adapter in ``directory``.

    Raises:
        AdapterError: files are missing, damaged or inconsistent, or the adapter is neither plain LoRA nor
            a sparse one.
    """
    config = _read_config(directory)
    shapes = _read_shapes(directory)
    keys: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for key in shapes:
        if match := _LORA_KEY.fullmatch(key):
            module, part, kind = match.groups()
            keys.setdefault(module, {})[f"{part}.{kind}"] = key
        elif key.startswith(PREFIX) and ".lora_" not in key:
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            replaced[name] = key
        else:
            raise AdapterError(f"{directory.name}/{WEIGHTS} has a tensor {key!r}, which plain LoRA has not")
    if not keys:
        raise AdapterError(f"{directory.name}/{WEIGHTS} has no LoRA tensors")
    where = f"{directory.name}/{CONFIG}"
    ranks, alphas = read_ranks(config, where), read_alphas(config, where)
    rslora = bool(config.get("use_rslora"))
    modules = {
        name: _module(name, parts, shapes, int(ranks.of(name)), float(alphas.of(name)), rslora)
        for name, parts in keys.items()
    }
    return Adapter(directory, config, modules, replaced)


def _read_config(directory: Path) -> dict[str, Any]:
    config = read_json(directory / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{directory.name}/{CONFIG} does not describe a LoRA adapter")
    for field in _VARIANTS:
        if config.get(field):
            raise AdapterError(f"the adapter {directory.name} uses {field}, which is not plain LoRA")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise AdapterError(
            f"the adapter {directory.name} was initialised with {config['init_lora_weights']}, which changes "
            "the base weights; convert it to plain LoRA first"
        )
    return config


def _read_shapes(directory: Path) -> dict[str, list[int]]:
    path = directory / WEIGHTS
    if not path.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin is a pickle, which is not read: save it as safetensors" if pickled else ""
        raise AdapterError(f"{directory.name} has no {WEIGHTS}{hint}")
    try:
        with safe_open(path, framework="numpy") as tensors:
            return {key: list(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(f"{directory.name}/{WEIGHTS} is damaged: {error}") from error


def _module(
    name: str,
    parts: Mapping[str, str],
    shapes: Mapping[str, list[int]],
    declared: int,
    alpha: float,
    rslora: bool,
) -> LoraModule:
    if "A.weight" not in parts or "B.weight" not in parts:
        raise AdapterError(f"the adapter's module {name!r} lacks its A or B")
    down, up = shapes[parts["A.weight"]], shapes[parts["B.weight"]]
    if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
        raise AdapterError(f"the adapter's module {name!r} has A {down} and B {up}, which do not fit")
    if down[0] > declared:
        raise AdapterError(f"the adapter's module {name!r} has rank {down[0]}, its config says {declared}")
    scale = alpha / (math.sqrt(declared) if rslora else declared)
    keys = (parts["A.weight"], parts["B.weight"], parts.get("B.bias"))
    return LoraModule(down[0], down[1], up[0], declared, alpha, scale, *keys)


def read_json(path: Path) -> Any:
    """The content of a JSON file of an adapter. Raises :class:`AdapterError` when it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise AdapterError(f"{path.parent.name}/{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or too deep
        raise AdapterError(f"{path.parent.name}/{path.name} is not JSON: {error}") from error
