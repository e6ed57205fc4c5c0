"""From ``General.lora_config``, in any of its spellings, to the one form that the library trains.

========================================  ==================================  =============================
given                                     ``search_space``                    groups in each layer
========================================  ==================================  =============================
``target_module_groups: [[a, b], [c]]``   one for each: ``["16,8", [16,8]]``  ``(a, b)`` and ``(c)``
``nls_target_modules: [a, b]``            one: ``[16, 8]`` or ``["16,8"]``    ``(a, b)``
``nncf_config: {...}``                    in the file itself                  as the file groups them
========================================  ==================================  =============================

``neural_lora_search`` decides. When it is false, what the other fields say of groups and ranks is not
used, and a warning says so; the modules they name still get a plain LoRA adapter, unless
``target_modules`` names others. Ranks may come in any order; the largest of each group must be ``r``: the
group's adapters have that rank, so a smaller one would only train parameters that nothing ever uses.
"""

from __future__ import annotations

from collections.abc import Iterable

from comps.cores.errors import InvalidRequest
from comps.finetuning.schemas.lora import BLOCK, LoraConfig, refusal
from comps.finetuning.schemas.nncf import check_layers, groups_of_file
from comps.finetuning.schemas.tolerant import closest
from comps.tuning.elastic.space import SearchSpace, is_named
from comps.tuning.errors import AdapterError
from comps.tuning.spec import GridSpec, LoraSpec, RankGroup

_SPELLINGS = ("target_module_groups", "nls_target_modules", "nncf_config")


def lora_spec(config: LoraConfig | None) -> tuple[LoraSpec, list[str]]:
    """The adapter that ``config`` asks for, and warnings about what was asked for and is not done.

    Raises :class:`InvalidRequest` naming the field for an NLS block that is not consistent.
    """
    warnings = []
    if config is None:
        config = LoraConfig()
        warnings.append(
            f"{BLOCK} is null, which elsewhere means training all weights; this service trains adapters, so "
            f"a LoRA adapter of rank {config.r} on the architecture's usual modules is trained."
        )
    groups: tuple[RankGroup, ...] = ()
    targets = config.target_modules
    if config.neural_lora_search:
        groups = _rank_groups(config)
        # The modules of the groups and, besides, those that get a plain adapter of full rank.
        named = [module for group in groups for module in group.modules]
        targets = list(dict.fromkeys(named + (config.target_modules or [])))
    elif given := [name for name in (*_SPELLINGS, "search_space") if getattr(config, name) is not None]:
        warnings.append(
            f"{BLOCK}.neural_lora_search is false, so a plain LoRA adapter of rank {config.r} is trained and "
            f"{' and '.join(given)} only say{'s' * (len(given) == 1)} which modules get one."
        )
        if targets is None:
            grouped = config.target_module_groups or [config.nls_target_modules or []]
            targets = list(dict.fromkeys(module for group in grouped for module in group)) or None
    dropout, grid = config.lora_dropout, None
    if config.quantization_aware:
        grid = GridSpec(mode=config.quantization_mode, group_size=config.group_size)
        if dropout and "lora_dropout" in config.model_fields_set:
            warnings.append(
                f"{BLOCK}.lora_dropout is not used: within the rounding there is no adapter apart."
            )
        dropout = 0
    spec = LoraSpec(
        r=config.r, alpha=config.lora_alpha, dropout=dropout, use_rslora=config.use_rslora,
        target_modules=tuple(targets) if targets else None, groups=groups, sparse=config.sparse_adapter,
        sample_per=config.sample_per, grid=grid,
    )  # fmt: skip
    if spec.sparse and spec.dropout:
        warnings.append(
            f"{BLOCK}.lora_dropout is {spec.dropout:g}, with which a step of a sparse adapter needs five "
            "products of each weight's size and not three; 0 is faster."
        )
    return spec, warnings


def check_modules(config: LoraConfig, spec: LoraSpec, modules: Iterable[str]) -> None:
    """Refuse names that are not modules of the base model, whose linear modules are ``modules``.

    ``spec`` is what :func:`lora_spec` made of ``config``. Raises :class:`InvalidRequest`.
    """
    paths = sorted(modules)
    given = next((name for name in _SPELLINGS if getattr(config, name) is not None), "target_modules")
    try:
        space = SearchSpace.from_modules(spec.groups, paths)
    except AdapterError as error:
        raise InvalidRequest(f"{BLOCK}.{given}: {error.message}.", param=f"{BLOCK}.{given}") from error
    if spec.groups and config.nncf_config is not None:
        check_layers(config, space)
    for name in spec.target_modules or ():
        if not any(is_named(path, name) for path in paths):
            known = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            field = "target_modules" if name in (config.target_modules or ()) else given
            raise refusal(
                field, f"names {name!r}, but the base model has no such linear module; it has {known}"
            )


def _rank_groups(config: LoraConfig) -> tuple[RankGroup, ...]:
    given = [name for name in _SPELLINGS if getattr(config, name) is not None]
    if not given:
        raise refusal(
            "target_module_groups",
            "is missing: neural_lora_search is true, and the modules that share a rank are not given"
            + _misspelt(config, _SPELLINGS),
        )
    if len(given) > 1:
        raise refusal(given[1], f"was given beside {given[0]}; they say the same, so give one of them")
    if given[0] == "nncf_config":
        groups, spaces, field = *groups_of_file(config), "nncf_config"
    else:
        groups, spaces, field = *_from_lists(config), "search_space"
    _check_ranks(config, spaces, field)
    return tuple(
        RankGroup(modules=tuple(group), ranks=tuple(sorted(set(space), reverse=True)))
        for group, space in zip(groups, spaces, strict=True)
    )


def _from_lists(config: LoraConfig) -> tuple[list[list[str]], list[list[int]]]:
    entries = config.search_space
    if entries is None:
        hint = _misspelt(config, ("search_space",))
        raise refusal("search_space", f"is missing: it gives the ranks of each group{hint}")
    if config.nls_target_modules is not None:
        return [config.nls_target_modules], [_one_space(entries)]
    groups = config.target_module_groups or []
    spaces = [entry for entry in entries if isinstance(entry, list)]
    if len(spaces) < len(entries):
        raise refusal(
            "search_space",
            "must have one list of ranks for each group of target_module_groups, such as "
            '["16,12,8"] or [[16, 12, 8]], not bare numbers',
        )
    if len(spaces) != len(groups):
        raise refusal(
            "search_space",
            f"has {len(spaces)} list(s) of ranks, but target_module_groups has {len(groups)} group(s); "
            "each group needs one",
        )
    seen: dict[str, int] = {}
    for index, group in enumerate(groups):
        for module in group:
            if module in seen:
                raise refusal(
                    "target_module_groups", f"names {module!r} in group {seen[module]} and in group {index}"
                )
            seen[module] = index
    return groups, spaces


def _one_space(entries: list[int | list[int]]) -> list[int]:
    """``[16, 8]``, ``["16", "8"]``, ``["16,8"]`` and ``[[16, 8]]`` are the same space."""
    if len(entries) == 1 and isinstance(entries[0], list):
        return entries[0]
    ranks = [entry if isinstance(entry, int) else entry[0] for entry in entries]
    if any(isinstance(entry, list) and len(entry) > 1 for entry in entries):
        raise refusal("search_space", "must be one list of ranks when nls_target_modules is given")
    return ranks


def _check_ranks(config: LoraConfig, spaces: list[list[int]], field: str) -> None:
    for index, space in enumerate(spaces):
        for rank in space:
            if not 1 <= rank <= config.r:
                raise refusal(
                    field, f"has the rank {rank} in group {index}; ranks are between 1 and r = {config.r}"
                )
        if max(space) != config.r:
            raise refusal(
                field,
                f"has {max(space)} as the largest rank of group {index}, but r is {config.r}; "
                "they must be equal",
            )


def _misspelt(config: LoraConfig, wanted: tuple[str, ...]) -> str:
    """A hint for when the wanted key came under a misspelt name."""
    for key in config.unknown_keys():
        if closest(key, list(wanted)):
            return f" (the unknown key {key[:80]!r} was ignored)"
    return ""
