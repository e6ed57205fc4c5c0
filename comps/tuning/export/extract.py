"""Cutting a sub-adapter out of a super-adapter, exactly, as a stock PEFT adapter.

Every A keeps its first rho rows and every B its first rho columns. The scale of a super-adapter does
not depend on rho, so the config must make PEFT compute the same one from the smaller rank:
``alpha' = alpha * rho / r`` (rslora: ``alpha * sqrt(rho / r)``), given for each module in PEFT's
``rank_pattern`` and ``alpha_pattern``. Works on files alone; no base model is loaded.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from comps.tuning import rundir
from comps.tuning.elastic.read_space import load_space
from comps.tuning.elastic.space import SearchSpace
from comps.tuning.export.adapter import CONFIG, WEIGHTS, Adapter, LoraModule, read_adapter, read_json
from comps.tuning.export.files import GRID_NOTE, README, SPARSE_NOTE, TOKENIZER, copy_files
from comps.tuning.search import learned
from comps.tuning.spec import ExtractSpec

if TYPE_CHECKING:
    from torch import Tensor

REPORT = "sub_adapter.json"


def extract(spec: ExtractSpec) -> dict[str, Any]:
    """Write the sub-adapter ``spec.version`` of ``spec.super_adapter`` to ``spec.output``.

    The directory appears whole or not at all. Asked again for what is already there, it is left as it
    is, with whatever was derived from it (a merged model inside it, for example).

    Returns ``{"version", "path", "ranks", "groups": [{"modules", "layer", "rank"}], "parameters"}``:
    ``ranks`` in the order of a configuration, ``parameters`` the number of adapter weights (padding not
    counted), ``search`` if one has found it, and ``"sparse_adapter": True`` for a sparse one, which its
    config says, too.

    Raises:
        AdapterError: it is no super-adapter, it is damaged, or the configuration does not fit it.
    """
    adapter = read_adapter(spec.super_adapter)
    space = load_space(spec.super_adapter, adapter)
    given = spec.config
    if given is None and spec.version == learned.VERSION:
        given = learned.read(spec.super_adapter, space)
    ranks = space.resolve(spec.version, given)
    report = _report(spec, adapter, space, ranks)
    if (spec.output / REPORT).is_file() and read_json(spec.output / REPORT) == report:
        return _answer(spec.output, report)

    by_module = {m: rank for group, rank in zip(space.groups, ranks, strict=True) for m in group.modules}
    with rundir.new_directory(spec.output) as directory:
        _write_weights(directory / WEIGHTS, adapter, by_module, pad=spec.form == "uniform")
        config = adapter.config if spec.form == "uniform" else _pattern_config(adapter, by_module)
        # Some initialisations refuse some ranks, and the weights are read from the file anyway.
        rundir.write_json(directory / CONFIG, config | {"init_lora_weights": True, "inference_mode": True})
        rundir.write_json(directory / REPORT, report)
        copy_files(spec.super_adapter, directory, TOKENIZER)
        if adapter.sparse or adapter.config.get("grid"):
            note = GRID_NOTE if adapter.config.get("grid") else SPARSE_NOTE
            (directory / README).write_text(note, encoding="utf-8")
    return _answer(spec.output, report)


def _report(
    spec: ExtractSpec, adapter: Adapter, space: SearchSpace, ranks: tuple[int, ...]
) -> dict[str, Any]:
    with open(adapter.weights, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    elastic = space.ranks
    plain = sum(m.rank * m.parameters_per_rank for name, m in adapter.modules.items() if name not in elastic)
    report = {
        "version": spec.version,
        "form": spec.form,
        "ranks": list(ranks),
        "groups": [
            {"modules": list(group.modules), "layer": group.layer, "rank": rank}
            for group, rank in zip(space.groups, ranks, strict=True)
        ],
        "parameters": space.parameters(ranks) + plain,
        "super_adapter_sha256": digest,
        **({"search": spec.search} if spec.search else {}),
    }
    return report | ({"sparse_adapter": True} if adapter.sparse else {})


def _answer(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    kept = ("version", "ranks", "groups", "parameters", "search", "sparse_adapter")
    return {"path": str(path)} | {key: report[key] for key in kept if key in report}


def _write_weights(path: Path, adapter: Adapter, ranks: dict[str, int], *, pad: bool) -> None:
    import torch
    from safetensors.torch import save_file

    lora = {module.down: name for name, module in adapter.modules.items()}
    lora |= {module.up: name for name, module in adapter.modules.items()}
    tensors: dict[str, Tensor] = {}
    with safe_open(adapter.weights, framework="pt") as source:
        for key in source.keys():  # noqa: SIM118  # not a mapping
            name = lora.get(key)
            if name is None or name not in ranks:
                tensors[key] = source.get_tensor(key)
                continue
            module, rank = adapter.modules[name], ranks[name]
            part = source.get_slice(key)
            cut = part[:rank] if key == module.down else part[:, :rank]
            if pad:
                whole = torch.zeros(part.get_shape(), dtype=cut.dtype)
                (whole[:rank] if key == module.down else whole[:, :rank]).copy_(cut)
                cut = whole
            tensors[key] = cut.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def _pattern_config(adapter: Adapter, ranks: dict[str, int]) -> dict[str, Any]:
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for name, rank in ranks.items():
        module = adapter.modules[name]
        if rank < module.declared_rank:
            key = _pattern(name, adapter)
            rank_pattern[key] = rank
            alpha_pattern[key] = _alpha(module, rank, rslora=bool(adapter.config.get("use_rslora")))
    # PEFT takes the first pattern that matches, so ours come before what was there.
    return adapter.config | {
        "rank_pattern": rank_pattern | _others(adapter, "rank_pattern", rank_pattern),
        "alpha_pattern": alpha_pattern | _others(adapter, "alpha_pattern", alpha_pattern),
    }


def _others(adapter: Adapter, field: str, ours: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (adapter.config.get(field) or {}).items() if key not in ours}


def _pattern(name: str, adapter: Adapter) -> str:
    """A regular expression for one module. PEFT lets any prefix stand before it, so it is anchored where
    another module's path ends in the same way."""
    alike = any(other.endswith(f".{name}") for other in adapter.modules)
    return ("^" if alike else "") + re.escape(name)


def _alpha(module: LoraModule, rank: int, *, rslora: bool) -> float:
    share = rank / module.declared_rank
    alpha = module.alpha * (math.sqrt(share) if rslora else share)
    return int(alpha) if alpha == int(alpha) else alpha
