"""The search space of one model: which modules share an active rank, and which ranks it may take.

A :class:`~comps.tuning.spec.RankGroup` names modules ("q_proj"); for each layer of the model that has
them it becomes one :class:`ElasticGroup`. The order is group-major, then layer, so a configuration
(one rank for each elastic group) has at index ``group * layers + layer`` the rank of that group in
that layer, whenever every layer has the modules of every group. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from comps.tuning.errors import AdapterError
from comps.tuning.spec import RankGroup

NAMED = ("maximal", "heuristic", "minimal")
_LAYER_DIGITS = 9  # no layer has a longer number, and Python refuses to read very long ones


def layer_prefix(module: str) -> str | None:
    """The layer a module lies in: its path up to the first number (``model.layers.0``), if it has one."""
    parts = module.split(".")
    for position, part in enumerate(parts):
        if part.isdecimal() and len(part) <= _LAYER_DIGITS:
            return ".".join(parts[: position + 1])
    return None


def layer_order(modules: Iterable[str]) -> dict[str, int]:
    """The position of each layer by its prefix: stacks as they come, layers by number (2 before 10)."""
    prefixes = dict.fromkeys(filter(None, map(layer_prefix, modules)))
    split = [prefix.rpartition(".") for prefix in prefixes]
    stacks = {stack: i for i, stack in enumerate(dict.fromkeys(stack for stack, _, _ in split))}
    ordered = sorted(split, key=lambda parts: (stacks[parts[0]], int(parts[2])))
    return {"".join(parts): i for i, parts in enumerate(ordered)}


def is_named(module: str, name: str) -> bool:
    """Whether ``name`` (one or more last components) names the module path, by whole components."""
    return module == name or module.endswith(f".{name}")


@dataclass(frozen=True)
class ElasticGroup:
    """The modules of one layer that share an active rank.

    ``modules``: their paths in the base model. ``ranks``: descending. ``group``: the index of the rank
    group it belongs to. ``parameters_per_rank``: weights that one rank costs, the sum of in + out over
    the modules (0 where the sizes are not known).
    """

    modules: tuple[str, ...]
    ranks: tuple[int, ...]
    group: int
    parameters_per_rank: int = 0

    @property
    def prefix(self) -> str:
        """The path of its layer, ``model.layers.0``."""
        return layer_prefix(self.modules[0]) or ""

    @property
    def layer(self) -> int:
        """The number of its layer in the model."""
        return int(self.prefix.rpartition(".")[2])

    @property
    def names(self) -> tuple[str, ...]:
        """Its modules within the layer, ``self_attn.q_proj``."""
        return tuple(module[len(self.prefix) + 1 :] for module in self.modules)

    def __str__(self) -> str:
        return f"{', '.join(self.names)} of layer {self.layer}"


@dataclass(frozen=True)
class SearchSpace:
    """All elastic groups of a model, in the order of a configuration. Immutable; holds no active ranks."""

    groups: tuple[ElasticGroup, ...]

    @classmethod
    def from_modules(
        cls,
        groups: Sequence[RankGroup],
        module_names: Iterable[str],
        sizes: Mapping[str, int] | None = None,
    ) -> SearchSpace:
        """The space that ``groups`` spans over a model with the linear modules ``module_names``.

        A name in a group is a last component (``"q_proj"``) or a dotted tail
        (``"attention.self.query"``), matched on whole components. A layer that has none of a group's
        modules is skipped for that group; one that has some of them shares the rank among those.
        ``sizes``: in + out of each module, for :meth:`parameters`.

        Raises:
            AdapterError: a name matches nothing, matches a module outside the numbered layers, or a
                module is named twice.
        """
        names = list(module_names)
        order = layer_order(names)
        sizes = sizes or {}
        owner: dict[str, str] = {}
        elastic = []
        for index, group in enumerate(groups):
            members: dict[str, list[str]] = {}
            for name in group.modules:
                for module in _matching(name, names):
                    if (prefix := layer_prefix(module)) is None:
                        raise AdapterError(
                            f"{name!r} names {module!r}, which is in none of the model's numbered layers and "
                            "cannot be elastic; name it more fully, or list it in target_modules",
                            param="target_module_groups",
                        )
                    if module in owner:
                        raise AdapterError(
                            f"{module!r} is in two rank groups ({owner[module]!r} and {name!r} both name it)",
                            param="target_module_groups",
                        )
                    owner[module] = name
                    members.setdefault(prefix, []).append(module)
            for prefix in sorted(members, key=order.__getitem__):
                modules = tuple(members[prefix])
                weights = sum(sizes.get(module, 0) for module in modules)
                elastic.append(ElasticGroup(modules, group.ranks, index, weights))
        return cls(tuple(elastic))

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def maximal(self) -> tuple[int, ...]:
        return tuple(group.ranks[0] for group in self.groups)

    @property
    def heuristic(self) -> tuple[int, ...]:
        """The middle of each group's ranks; of two middle ones, the larger."""
        return tuple(group.ranks[(len(group.ranks) - 1) // 2] for group in self.groups)

    @property
    def minimal(self) -> tuple[int, ...]:
        return tuple(group.ranks[-1] for group in self.groups)

    @property
    def ranks(self) -> dict[str, tuple[int, ...]]:
        """The ranks each module may take, by module path."""
        return {module: group.ranks for group in self.groups for module in group.modules}

    def describe(self) -> str:
        """What a configuration is made of: ``66 ranks (3 groups x 22 layers)``."""
        groups = len({group.group for group in self.groups})
        layers = len({group.prefix for group in self.groups})
        shape = f" ({groups} groups x {layers} layers)" if groups * layers == len(self) else ""
        return f"{len(self)} ranks{shape}"

    def check(self, config: Sequence[int]) -> tuple[int, ...]:
        """``config`` as a tuple, if it is one rank of each group's space.

        Raises:
            AdapterError: the length or a value is wrong; the sentence says what was expected.
        """
        if len(config) != len(self):
            raise AdapterError(
                f"custom_config has {len(config)} values, but this adapter needs {self.describe()}",
                param="custom_config",
            )
        for index, (rank, group) in enumerate(zip(config, self.groups, strict=True)):
            if isinstance(rank, bool) or rank not in group.ranks:
                raise AdapterError(
                    f"custom_config[{index}] is {rank}, but the rank of {group} must be one of "
                    f"{', '.join(map(str, group.ranks))}",
                    param="custom_config",
                )
        return tuple(config)

    def resolve(self, version: str, custom_config: Sequence[int] | None = None) -> tuple[int, ...]:
        """The configuration of a sub-adapter: by rule for the names in ``NAMED``, else ``custom_config``.

        Raises:
            AdapterError: the configuration is missing or wrong, or contradicts the rule of its name.
        """
        if version not in NAMED:
            if custom_config is None:
                raise AdapterError(
                    f"the version {version!r} needs a custom_config of {self.describe()}; "
                    f"without one there are {', '.join(NAMED)}, learned, and what a search has found",
                    param="custom_config",
                )
            return self.check(custom_config)
        config: tuple[int, ...] = getattr(self, version)
        if custom_config is not None and self.check(custom_config) != config:
            raise AdapterError(
                f"custom_config is not the {version} configuration; give it a version name of its own",
                param="custom_config",
            )
        return config

    def parameters(self, config: Sequence[int]) -> int:
        """The adapter weights of the elastic modules at ``config`` (plain LoRA modules not counted)."""
        pairs = zip(config, self.groups, strict=True)
        return sum(rank * group.parameters_per_rank for rank, group in pairs)


def _matching(name: str, modules: Sequence[str]) -> list[str]:
    found = [module for module in modules if is_named(module, name)]
    if not found:
        known = ", ".join(dict.fromkeys(module.rpartition(".")[2] for module in modules))
        raise AdapterError(
            f"the model has no linear module named {name!r}; it has {known or 'none at all'}",
            param="target_module_groups",
        )
    return found
