"""The search space of a super-adapter on disk, from whichever file describes it. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from comps.tuning.elastic import elastic_config, nncf_config
from comps.tuning.elastic.nncf_config import ALL_LAYERS, Entry
from comps.tuning.elastic.space import ElasticGroup, SearchSpace, layer_order, layer_prefix
from comps.tuning.errors import AdapterError
from comps.tuning.export.adapter import Adapter, read_adapter


def load_space(directory: Path, adapter: Adapter | None = None) -> SearchSpace:
    """The space of the super-adapter in ``directory``, checked against its tensors.

    With ``nncf_config.json`` the order of a configuration is that file's; ours, and every file the
    original tools generate, is group-major. With ``elastic_adapter_config.json`` alone, which is
    layer-major, the groups are put into group-major order. ``adapter`` spares reading it again.

    Raises:
        AdapterError: no file, a damaged one, two that disagree, or one that does not fit the tensors.
    """
    adapter = adapter or read_adapter(directory)
    nncf_path, elastic_path = directory / nncf_config.FILE, directory / elastic_config.FILE
    space = None
    if nncf_path.is_file():
        space = _space(list(_expanded(nncf_config.read_nncf_config(nncf_path), adapter)), adapter)
    if elastic_path.is_file():
        other = _group_major(_space(elastic_config.read_elastic_config(elastic_path), adapter))
        if space is not None and _as_sets(space) != _as_sets(other):
            raise AdapterError(
                f"{nncf_config.FILE} and {elastic_config.FILE} in {directory.name} describe different spaces"
            )
        space = space or other
    if space is None:
        raise AdapterError(
            f"{directory.name} has neither {nncf_config.FILE} nor {elastic_config.FILE}: "
            "it is no super-adapter, and nothing can be extracted from it"
        )
    return space


def _expanded(entries: Sequence[Entry], adapter: Adapter) -> Iterator[Entry]:
    """Entries written once for all layers, repeated for each layer that the adapter has."""
    numbers = sorted({int(p.rpartition(".")[2]) for m in adapter.modules if (p := layer_prefix(m))})
    for modules, ranks in entries:
        if not any(ALL_LAYERS in module for module in modules):
            yield modules, ranks
            continue
        for number in numbers:
            names = tuple(module.replace(ALL_LAYERS, str(number)) for module in modules)
            if any(name in adapter.modules for name in names):
                yield names, ranks


def _space(entries: Sequence[Entry], adapter: Adapter) -> SearchSpace:
    seen: set[str] = set()
    kinds: dict[tuple[str, ...], int] = {}  # the names within the layer -> the group's index
    groups = []
    for modules, ranks in entries:
        for module in modules:
            lora = adapter.modules.get(module)
            if lora is None:
                raise AdapterError(f"the search space names {module!r}, for which the adapter has no tensors")
            if lora.rank < ranks[0]:
                raise AdapterError(
                    f"the search space gives {module!r} the rank {ranks[0]}, but its tensors have {lora.rank}"
                )
            if module in seen:
                raise AdapterError(f"the search space has {module!r} in two groups")
            if layer_prefix(module) is None or layer_prefix(module) != layer_prefix(modules[0]):
                raise AdapterError(f"the search space has a group that is not within one layer: {modules}")
            seen.add(module)
        weights = sum(adapter.modules[module].parameters_per_rank for module in modules)
        group = ElasticGroup(modules, ranks, 0, weights)
        index = kinds.setdefault(group.names, len(kinds))
        groups.append(ElasticGroup(modules, ranks, index, weights))
    if not groups:
        raise AdapterError(f"the search space of {adapter.directory.name} has no groups")
    return SearchSpace(tuple(groups))


def _group_major(space: SearchSpace) -> SearchSpace:
    order = layer_order(group.modules[0] for group in space.groups)
    return SearchSpace(tuple(sorted(space.groups, key=lambda group: (group.group, order[group.prefix]))))


def _as_sets(space: SearchSpace) -> dict[frozenset[str], tuple[int, ...]]:
    return {frozenset(group.modules): group.ranks for group in space.groups}
