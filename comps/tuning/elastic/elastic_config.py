"""``elastic_adapter_config.json``: the search space as newer NLS tools write it.

A list in layer-major order: for each layer, each group with the keys of its A tensors (without
``.weight``) and its ranks. Our own order is group-major; :mod:`comps.tuning.elastic.read_space` turns
one into the other. Needs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comps.tuning.elastic.nncf_config import Entry, check_ranks, check_strings
from comps.tuning.elastic.space import SearchSpace, layer_order
from comps.tuning.errors import AdapterError
from comps.tuning.export.adapter import PREFIX, read_json
from comps.tuning.rundir import write_json

FILE = "elastic_adapter_config.json"
_SUFFIX = ".lora_A"


def elastic_adapter_config(space: SearchSpace) -> list[dict[str, Any]]:
    """The content of the file for ``space``."""
    order = layer_order(group.modules[0] for group in space.groups)
    groups = sorted(space.groups, key=lambda group: (order[group.prefix], group.group))
    return [
        {"target": [f"{PREFIX}{m}{_SUFFIX}" for m in group.modules], "search_space": list(group.ranks)}
        for group in groups
    ]


def write_elastic_config(directory: Path, space: SearchSpace) -> Path:
    """Write the file into ``directory``; returns its path."""
    path = directory / FILE
    write_json(path, elastic_adapter_config(space))
    return path


def read_elastic_config(path: Path) -> list[Entry]:
    """The groups of a file, in its order, with ranks sorted descending.

    Raises:
        AdapterError: the file is damaged.
    """
    content = read_json(path)
    where = f"{path.parent.name}/{path.name}"
    if not isinstance(content, list) or not content:
        raise AdapterError(f"{where} is not a list of groups")
    entries = []
    for index, item in enumerate(content):
        if not isinstance(item, dict) or not {"target", "search_space"} <= item.keys():
            raise AdapterError(f"{where}: group {index} does not have target and search_space")
        modules = tuple(_module(target, where) for target in check_strings(item["target"], index, where))
        entries.append((modules, check_ranks(item["search_space"], index, where)))
    return entries


def _module(target: str, where: str) -> str:
    if not target.startswith(PREFIX) or not target.endswith(_SUFFIX):
        raise AdapterError(f"{where} has the target {target!r}, which is not the A of a LoRA adapter")
    return target.removeprefix(PREFIX).removesuffix(_SUFFIX)
