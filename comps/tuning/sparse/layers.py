"""A model's decoder layers, run one after another, outside the model's own forward pass.

A layer is fed as its model would feed it: what else it takes beside the hidden states (masks, positions) is
what the model hands to it for a row of that length. Rows go through one at a time and unpadded, so no mask
has to be heeded and their results do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from comps.tuning.errors import ModelError, ResourceError
from comps.tuning.memory import available_memory

Linear: TypeAlias = nn.Linear | Conv1D
Rest = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer is given after its hidden states


class DecoderLayers:
    """The layers of ``model``. ``name`` is the model's, for messages.

    Raises :class:`ModelError` for a model that has none, or has weights in them that are not linear modules.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        lists = [(path, each) for path, each in model.named_modules() if isinstance(each, nn.ModuleList)]
        if not lists:
            raise ModelError(f"the base model {name} has no decoder layers that could be pruned")
        # The outermost list comes first, and none within it has more parameters.
        self.path, self.layers = max(lists, key=lambda each: sum(p.numel() for p in each[1].parameters()))
        self.model, self.name = model, name
        self._rest: list[dict[int, Rest]] = [{} for _ in self.layers]
        self._tuple = [False] * len(self.layers)
        for index in range(len(self)):
            self._check_weights(index)

    def __len__(self) -> int:
        return len(self.layers)

    def linears(self, index: int) -> dict[str, Linear]:
        """The linear modules of a layer by their path in the model."""
        return {
            f"{self.path}.{index}.{path}": module
            for path, module in self.layers[index].named_modules()
            if isinstance(module, Linear)
        }

    def _check_weights(self, index: int) -> None:
        layer = self.layers[index]
        known = {id(linear.weight) for linear in self.linears(index).values()}
        known |= {id(table.weight) for table in layer.modules() if isinstance(table, nn.Embedding)}
        for path, weight in layer.named_parameters():
            if weight.ndim > 1 and id(weight) not in known:
                raise ModelError(
                    f"the base model {self.name} cannot be pruned: in its layers are weights that are not "
                    f"those of linear modules ({self.path}.{index}.{path}), as in a mixture of experts"
                )

    @torch.no_grad()
    def begin(self, rows: list[list[int]]) -> list[Tensor]:
        """The hidden states [1, tokens, hidden] that enter the first layer, in float32, one for each row.

        Also notes what else the layers are given. Raises :class:`ModelError` for a model that does more
        between its layers than hand on the hidden states, and :class:`ResourceError` when there is no room
        for those of so many rows.
        """
        width = self.model.config.get_text_config().hidden_size
        needed, free = 4 * width * sum(map(len, rows)), available_memory()
        if needed > free:
            raise ResourceError(
                f"what the layers make of {len(rows)} calibration rows takes {needed / 1e9:.1f} GB of "
                f"memory, and {free / 1e9:.1f} GB are free; ask for fewer calibration_samples or a smaller "
                "max_length",
                param="calibration_samples",
            )
        for parameter in self._outside():
            parameter.data = parameter.data.float()
        self._probe(rows[0])
        entered: list[Tensor] = []

        def note(index: int, hidden: Tensor, rest: Rest) -> Any:
            if index == 0:
                entered.append(hidden)
            self._rest[index].setdefault(hidden.shape[1], rest)
            return (hidden,) if self._tuple[index] else hidden

        with self._instead(note):
            for row in rows:
                self._forward(row)
        return entered

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """What layer ``index`` makes of hidden states [1, tokens, hidden]."""
        args, kwargs = self._rest[index][hidden.shape[1]]
        out = self.layers[index](hidden, *args, **kwargs)
        result: Tensor = out[0] if self._tuple[index] else out
        return result

    def forget(self, index: int) -> None:
        """Free what is kept for a layer that is done."""
        self._rest[index] = {}

    def _outside(self) -> Iterator[nn.Parameter]:
        inside = {id(parameter) for parameter in self.layers.parameters()}
        yield from (p for p in self.model.base_model.parameters() if id(p) not in inside)

    def _probe(self, row: list[int]) -> None:
        """Run the whole model on one row, to see what its layers return and whether they form a chain."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def watch(index: int, hidden: Tensor, rest: Rest, forward: Callable[..., Any]) -> Any:
            with in_float32(self.layers[index]):
                out = forward(hidden, *rest[0], **rest[1])
            self._tuple[index] = isinstance(out, tuple)
            inputs.append(hidden)
            outputs.append(out[0] if isinstance(out, tuple) else out)
            return out

        with self._instead(watch, real=True):
            self._forward(row)
        chained = len(inputs) == len(self) and all(map(_same, outputs[:-1], inputs[1:]))
        if not chained:
            raise ModelError(
                f"the base model {self.name} cannot be pruned by wanda: its layers are not simply run one "
                "after another; the method magnitude needs no such thing"
            )

    def _forward(self, row: list[int]) -> None:
        ids = torch.tensor([row], device=self.model.device)
        self.model.base_model(input_ids=ids, use_cache=False)

    @contextmanager
    def _instead(self, do: Callable[..., Any], real: bool = False) -> Iterator[None]:
        """Have ``do(index, hidden, rest)`` take the place of the layers' own forward passes, which it is
        given too if ``real``."""

        def called(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            extra = {"forward": forward} if real else {}
            return do(index, hidden, (rest, kwargs), **extra)

        for index, layer in enumerate(self.layers):
            layer.__dict__["forward"] = partial(called, index, layer.forward)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.__dict__["forward"]


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or torch.equal(one, other)


@contextmanager
def in_float32(layer: nn.Module) -> Iterator[None]:
    """Compute with a layer in float32, whatever type it is kept in; its tensors come back as they were."""
    kept = {parameter: parameter.data for parameter in layer.parameters()}
    for parameter, data in kept.items():
        parameter.data = data.float()
    try:
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


@contextmanager
def input_norms(linears: dict[str, Linear], norms: dict[str, Tensor]) -> Iterator[None]:
    """Sum up, while it is entered, the squares of what comes into each linear module, in float64; when it is
    left, ``norms`` has the root of each sum, ``||X_j||_2`` over all tokens: [in]."""
    sums: dict[str, Tensor] = {}

    def add(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        squares = x.square().sum(0).double()
        sums[name] = sums[name] + squares if name in sums else squares

    hooks = [module.register_forward_pre_hook(partial(add, name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    norms.update({name: total.sqrt() for name, total in sums.items()})
