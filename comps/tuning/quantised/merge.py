"""Merging a quantisation-aware adapter: one model with integer weights, ``q(W + s (B A) * M)``.

The steps are those that the adapter was trained with: fitted to W, or the quantised base model's own. Weights
without an adapter are rounded to their nearest, as they were in the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from safetensors import safe_open
from torch import Tensor

from comps.tuning import rundir
from comps.tuning.errors import AdapterError
from comps.tuning.export.adapter import Adapter
from comps.tuning.export.base_files import BaseFiles, find_base, find_tensor
from comps.tuning.export.files import TOKENIZER, copy_files, has_tokenizer
from comps.tuning.quantised.aware import merged_integers
from comps.tuning.quantised.files import METHOD, Reader
from comps.tuning.quantised.grid import Steps
from comps.tuning.quantised.load import check_grid
from comps.tuning.quantised.modules import Target, empty_model, targets
from comps.tuning.quantised.write import openvino_facts, stored_tensors, write_model
from comps.tuning.sparse.report import is_quantised
from comps.tuning.spec import GridSpec, MergeSpec


def merge_rounded(spec: MergeSpec, adapter: Adapter, grid: GridSpec) -> dict[str, Any]:
    """Merge ``adapter``, trained within the rounding to ``grid``, to ``spec.output``.

    Returns what :func:`~comps.tuning.quantised.quantize.quantize` does, and ``"merged_modules"``.

    Raises:
        AdapterError: the adapter belongs to another base model.
        ModelError: the base model cannot be read, or is quantised to another grid.
    """
    base = find_base(spec.base_model, quantised=METHOD)
    check_grid(spec.base_model, grid)
    plan, tensors_of, steps = _source(spec, base, grid)
    places = {}
    for name in adapter.modules:
        tensor = find_tensor(f"{name}.weight", plan)
        if tensor is None:
            raise AdapterError(f"the adapter does not fit the base model {base.name}: it has no {name!r}")
        places[tensor] = name
    if adapter.replaced:
        raise AdapterError("a quantisation-aware adapter with retrained modules cannot be merged")

    with safe_open(adapter.weights, framework="pt") as deltas:

        def choose(name: str, target: Target, weight: Tensor) -> tuple[Steps, Tensor]:
            found = steps(name) or target.grid.fit(weight)
            if (place := places.get(name)) is None:
                return found, found.integers(weight)
            module = adapter.modules[place]
            if (module.out_features, module.in_features) != tuple(weight.shape):
                raise AdapterError(
                    f"the adapter does not fit the base model {base.name}: its {place!r} takes "
                    f"{module.in_features} features to {module.out_features}, the base model's weight is "
                    f"{list(weight.shape)}"
                )
            down, up = deltas.get_tensor(module.down), deltas.get_tensor(module.up)
            return found, merged_integers(found, down, up, weight, module.scale)

        with rundir.new_directory(spec.output) as directory:
            facts = write_model(directory, base, spec.base_model, grid, plan, choose, tensors_of)
            if not has_tokenizer(base.directory):
                copy_files(adapter.directory, directory, TOKENIZER)
            if spec.openvino:
                facts["openvino"] = openvino_facts(directory, spec.output)
    return {"path": str(spec.output), "merged_modules": len(adapter.modules)} | facts


def _source(
    spec: MergeSpec, base: BaseFiles, grid: GridSpec
) -> tuple[dict[str, Target], Callable[[str], Iterable[tuple[str, Tensor]]], Callable[[str], Steps | None]]:
    """What goes on which grid, the tensors of a file, and the steps that a weight comes with."""
    if not is_quantised(base.directory):
        empty = empty_model(spec.base_model, base.directory)
        return targets(base, empty, grid), stored_tensors(base), lambda name: None
    reader = Reader(base)
    plan = {
        f"{module}.weight": Target(module, on, reader.transposed(module))
        for module, on in reader.modules.items()
    }
    return plan, reader.tensors, lambda name: reader.read(name.removesuffix(".weight"))[0]
