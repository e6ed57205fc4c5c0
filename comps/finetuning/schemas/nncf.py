"""Groups and ranks out of a request's ``nncf_config``, which names the modules of every layer."""

from __future__ import annotations

from comps.cores.errors import InvalidRequest
from comps.finetuning.schemas.lora import BLOCK, LoraConfig, refusal
from comps.tuning.elastic.nncf_config import ALL_LAYERS, Entry, parse_nncf_config
from comps.tuning.elastic.space import SearchSpace, layer_prefix
from comps.tuning.errors import AdapterError

FIELD = "nncf_config"


def groups_of_file(config: LoraConfig) -> tuple[list[list[str]], list[list[int]]]:
    """Groups by the modules that lie together in a layer, and their ranks, the same in each layer.

    Raises :class:`InvalidRequest`.
    """
    if config.search_space is not None:
        raise refusal("search_space", "was given beside nncf_config, which has the ranks already; give one")
    found: dict[tuple[str, ...], tuple[int, ...]] = {}
    for modules, ranks in _entries(config):
        names = tuple(_within_layer(module) for module in modules)
        if found.setdefault(names, ranks) != ranks:
            raise refusal(FIELD, f"gives {', '.join(names)} other ranks in some layers than in others")
    if not found:
        raise refusal(FIELD, "has no groups")
    return [list(names) for names in found], [list(ranks) for ranks in found.values()]


def check_layers(config: LoraConfig, space: SearchSpace) -> None:
    """Refuse a file that does not name the modules of ``space``, which its groups span over all layers.

    The file of another model, or of some layers only, would otherwise become one of this model and all.
    Raises :class:`InvalidRequest`.
    """
    named = {_from_stack(module): module for modules, _ in _entries(config) for module in modules}
    there = {module for group in space.groups for module in group.modules}
    # What the file may call each module that is there.
    called = {module: {_from_stack(module), _from_stack(_in_all_layers(module))} for module in there}
    if left_out := [module for module, names in called.items() if names.isdisjoint(named)]:
        raise refusal(
            FIELD,
            f"leaves out {_some(left_out)}, where the base model has modules of the same names; a group "
            "covers all layers, so name each, or all at once with {*}",
        )
    known = set().union(*called.values())
    if unknown := [module for name, module in named.items() if name not in known]:
        raise refusal(FIELD, f"names {_some(unknown)}, which the base model has not")


def _entries(config: LoraConfig) -> list[Entry]:
    field = f"{BLOCK}.{FIELD}"
    try:
        return parse_nncf_config(config.nncf_config, field)
    except AdapterError as error:
        raise InvalidRequest(f"{error.message}.", param=field) from error


def _within_layer(module: str) -> str:
    """``model.layers.0.self_attn.q_proj`` -> ``self_attn.q_proj``."""
    module = module.replace(ALL_LAYERS, "0")
    return module.removeprefix(f"{layer_prefix(module)}.")


def _in_all_layers(module: str) -> str:
    """``model.layers.0.mlp.up_proj`` -> ``model.layers.{*}.mlp.up_proj``."""
    prefix = layer_prefix(module) or ""
    return f"{prefix.rpartition('.')[0]}.{ALL_LAYERS}{module[len(prefix) :]}"


def _from_stack(module: str) -> str:
    """``model.layers.0.mlp.up_proj`` -> ``layers.0.mlp.up_proj``: a file of weights may lack the rest."""
    prefix = layer_prefix(module.replace(ALL_LAYERS, "0")) or ""
    outer = prefix.split(".")[:-2]
    return ".".join(module.split(".")[len(outer) :])


def _some(modules: list[str]) -> str:
    others = len(modules) - 1
    return repr(min(modules)) + (f" and {others} other module{'s' * (others > 1)}" if others else "")
