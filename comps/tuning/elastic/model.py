"""A base model with a LoRA adapter whose ranks can be set between forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import patches
from comps.tuning.elastic.space import SearchSpace, is_named
from comps.tuning.errors import AdapterError
from comps.tuning.export.adapter import grid_of_adapter, is_sparse
from comps.tuning.quantised.aware import make_rounded, roundings
from comps.tuning.spec import LoraSpec
from patches.peft import make_layer_elastic
from patches.peft_rounded import RoundedLoraConfig
from patches.peft_sparse import SparseLoraConfig, make_layer_sparse


@dataclass
class ActiveRank:
    """The state that the layers of one group share."""

    rank: int


class ElasticController:
    """Sets the active ranks of one model."""

    def __init__(self, space: SearchSpace, states: Sequence[ActiveRank]) -> None:
        self.space = space
        self._states = states

    @property
    def active(self) -> tuple[int, ...]:
        """The active configuration."""
        return tuple(state.rank for state in self._states)

    def set(self, config: Sequence[int]) -> None:
        """Activate ``config``. Raises :class:`AdapterError` if it is not in the space."""
        for state, rank in zip(self._states, self.space.check(config), strict=True):
            state.rank = rank

    def maximal(self) -> None:
        """Activate the largest rank of every group."""
        self.set(self.space.maximal)

    @contextmanager
    def at(self, config: Sequence[int]) -> Iterator[None]:
        """Activate ``config`` for a ``with`` block, then go back to what was active before."""
        before = self.active
        self.set(config)
        try:
            yield
        finally:
            self.set(before)


def make_elastic(
    model: peft.PeftModel, space: SearchSpace, adapter_name: str = "default"
) -> ElasticController:
    """Give the adapter of ``model`` the elastic groups of ``space``; the maximal ranks are active.

    Raises:
        AdapterError: a module of the space has no such adapter, or its rank is below the group's.
    """
    patches.apply()
    layers = dict(model.get_base_model().named_modules())
    states = []
    for group in space.groups:
        state = ActiveRank(group.ranks[0])
        for module in group.modules:
            layer = layers.get(module)
            if layer is None:
                raise AdapterError(f"the model has no module {module!r} to make elastic")
            try:
                make_layer_elastic(layer, adapter_name, state)
            except (TypeError, ValueError) as error:
                raise AdapterError(f"the module {module!r} cannot be elastic: {error}") from error
            if (rank := layer.r[adapter_name]) < group.ranks[0]:
                raise AdapterError(
                    f"the module {module!r} has rank {rank}, below the {group.ranks[0]} of its space"
                )
        states.append(state)
    return ElasticController(space, states)


def make_sparse(model: peft.PeftModel, adapter_name: str = "default") -> None:
    """Mask the adapter of ``model``, elastic or not, by the zeros of its base's weights.

    Raises:
        AdapterError: a module's adapter cannot be masked.
    """
    patches.apply()
    for module, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.r:
            try:
                make_layer_sparse(layer, adapter_name)
            except (TypeError, ValueError) as error:
                raise AdapterError(f"the module {module!r} cannot be sparse: {error}") from error


def load_adapter(model: PreTrainedModel, directory: Path) -> peft.PeftModel:
    """Put the adapter saved in ``directory`` on ``model``, to compute with it; masked, or within the rounding
    to a grid, where its config says so (stock PEFT would load it as a plain one).

    Raises:
        AdapterError: there is none, or it cannot be masked or rounded.
    """
    if grid := grid_of_adapter(directory):
        rounding = roundings(model, grid)
        adapted = peft.PeftModel.from_pretrained(model, directory, config=RoundedLoraConfig.read(directory))
        make_rounded(adapted, rounding)
        return adapted.eval()
    if not is_sparse(directory):
        return peft.PeftModel.from_pretrained(model, directory).eval()
    adapted = peft.PeftModel.from_pretrained(model, directory, config=SparseLoraConfig.read(directory))
    make_sparse(adapted)
    return adapted.eval()


def build_adapter(
    model: PreTrainedModel, lora: LoraSpec, task_type: str | None = "CAUSAL_LM"
) -> tuple[peft.PeftModel, SearchSpace | None, ElasticController | None]:
    """Put the adapter ``lora`` on ``model``: stock PEFT, elastic where ``lora.groups`` says so, masked by the
    zeros of the model's weights if ``lora.sparse``; with a ``lora.grid`` the layers compute within the
    rounding to it, which keeps zeros in any case.

    Targets are ``lora.target_modules`` and the modules of the groups; with neither, PEFT's defaults
    for the architecture. The space and its controller are None for plain LoRA. ``task_type`` is PEFT's;
    None for models of no particular task.

    Raises:
        AdapterError: a named module does not exist, or there is nothing to adapt.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    grouped = [name for group in lora.groups for name in group.modules]
    plain = list(lora.target_modules or ())
    if not grouped and not plain:
        plain = _default_targets(model)
    _check_targets(plain, model)
    sizes = {name: sum(module.weight.shape) for name, module in linear.items()}
    space = SearchSpace.from_modules(lora.groups, linear, sizes) if lora.groups else None

    targets = list(dict.fromkeys(plain + grouped))
    conv1d = any(
        isinstance(m, Conv1D) and any(is_named(name, target) for target in targets)
        for name, m in linear.items()
    )
    rounding = roundings(model, lora.grid) if lora.grid else None
    kind: Callable[..., peft.LoraConfig] = SparseLoraConfig if lora.sparse else peft.LoraConfig
    if lora.grid:
        kind = partial(RoundedLoraConfig, grid=lora.grid.model_dump())
    config = kind(
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        fan_in_fan_out=conv1d,  # GPT-2's layers keep their weights as [in, out]
        task_type=task_type,
    )
    adapted = peft.get_peft_model(model, config)
    if rounding is not None:
        make_rounded(adapted, rounding)
    elif lora.sparse:
        make_sparse(adapted)
    return adapted, space, None if space is None else make_elastic(adapted, space)


def _default_targets(model: PreTrainedModel) -> list[str]:
    kind = model.config.model_type
    defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if defaults is None:
        raise AdapterError(
            f"PEFT knows no default modules for models of type {kind!r}; name them in target_modules",
            param="target_modules",
        )
    return list(defaults)


def _check_targets(targets: Sequence[str], model: nn.Module) -> None:
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    embeddings = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    for target in targets:
        if any(is_named(name, target) for name in embeddings):
            raise AdapterError(
                f"{target!r} is an embedding; only linear modules can have an adapter", param="target_modules"
            )
        if not any(is_named(name, target) for name in names):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise AdapterError(
                f"the model has no module named {target!r}; it has {known}", param="target_modules"
            )
