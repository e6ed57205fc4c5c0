"""Merging an adapter into its base model: ``W' = W + s * B A``, for a sparse adapter where W is not 0.

Works shard by shard on the safetensors files; no model is built, and the most that is in memory is one
shard. Each product is computed in float32 and cast back once to the type the weight is stored in; all
other tensors, and the zeros of a sparse adapter's base, are copied bit for bit.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from comps.tuning import rundir
from comps.tuning.errors import AdapterError, ModelError
from comps.tuning.export.adapter import Adapter, LoraModule, read_adapter
from comps.tuning.export.base_files import CONFIG, GENERATION_CONFIG, INDEX, BaseFiles, find_base, find_tensor
from comps.tuning.export.files import TOKENIZER, copy_files, has_tokenizer
from comps.tuning.spec import MergeSpec

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass
class _Change:
    """What happens to one tensor: it is replaced, then s * B A (or s * bias) is added."""

    replacement: str | None = None  # a key in the adapter's file
    module: LoraModule | None = None
    name: str = ""  # the module's path, for messages


@dataclass
class _Plan:
    changes: dict[str, _Change]
    # Tensors the checkpoint lacks because the output head is tied to the embeddings -> what they start from.
    untied: dict[str, str]


@dataclass
class _Tally:
    """Counted over the adapted linear weights: ``layers`` has weights, zeros before and after of each."""

    layers: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    dtypes: Counter[str] = field(default_factory=Counter)

    def sparsity(self) -> dict[str, Any]:
        """Fractions of zeros, in all and of each layer."""
        weights, before, after = (sum(counts) for counts in zip(*self.layers.values(), strict=True))
        return {
            "before": before / weights,
            "after": after / weights,
            "counted": "weights of the adapted modules",
            "layers": {
                name: {"before": before / weights, "after": after / weights}
                for name, (weights, before, after) in self.layers.items()
            },
        }


def merge(spec: MergeSpec) -> dict[str, Any]:
    """Merge ``spec.adapter`` (any rank form, or a super-adapter at its maximal rank) into its base model.

    The output is a model directory like the base's (same shards, types and tokenizer); it appears whole
    or not at all, and replaces what was there. An adapted output head that was tied to the embeddings is
    untied, since the adapter does not act on the embeddings.

    Returns ``{"path", "sparsity": {"before", "after", "counted", "layers": {module: {"before", "after"}}},
    "tensors", "merged_modules", "dtype"}``; sparsity is the fraction of exact zeros among the adapted
    weights.

    Raises:
        AdapterError: the adapter is neither plain LoRA nor sparse, or belongs to another base model.
        ModelError: the base model cannot be read, or is quantised.
    """
    adapter = read_adapter(spec.adapter)
    if adapter.grid:
        from comps.tuning.quantised.merge import merge_rounded

        return merge_rounded(spec, adapter, adapter.grid)
    base = find_base(spec.base_model)
    plan = _plan(adapter, base)
    tally = _Tally()
    with rundir.new_directory(spec.output) as directory:
        for shard in base.shards:
            _merge_shard(shard, directory, base, adapter, plan, tally)
        _write_config(directory, base, plan)
        copy_files(base.directory, directory, [GENERATION_CONFIG])
        if spec.base_model.trust_remote_code:
            copy_files(base.directory, directory, [path.name for path in base.directory.glob("*.py")])
        # One whole tokenizer: the base's, or else the one the adapter was trained with.
        tokenizer = base.directory if has_tokenizer(base.directory) else adapter.directory
        copy_files(tokenizer, directory, TOKENIZER)
    return {
        "path": str(spec.output),
        "sparsity": tally.sparsity(),
        "tensors": len(base.shard_of) + len(plan.untied),
        "merged_modules": len(adapter.modules),
        "dtype": ", ".join(name for name, _ in tally.dtypes.most_common()),
    }


def _plan(adapter: Adapter, base: BaseFiles) -> _Plan:
    plan = _Plan({}, {})
    for name, key in adapter.replaced.items():
        plan.changes[_target(name, base, plan)] = _Change(replacement=key)
    for name, module in adapter.modules.items():
        kinds = ("weight", "bias") if module.bias else ("weight",)
        for kind in kinds:
            change = plan.changes.setdefault(_target(f"{name}.{kind}", base, plan), _Change())
            change.module, change.name = module, name
    tied = _tied_embeddings(base)
    if tied in plan.changes and not plan.untied:
        raise AdapterError(
            "the adapter retrains the embeddings of a model whose output head is tied to them; "
            "save the head with it (modules_to_save) to merge it"
        )
    return plan


def _target(name: str, base: BaseFiles, plan: _Plan) -> str:
    """The checkpoint's name for a tensor of the live model."""
    if found := find_tensor(name, base.shard_of):
        return found
    embeddings = _tied_embeddings(base)
    if embeddings and name.endswith(".weight") and name.split(".")[-2] == "lm_head":
        plan.untied[name] = embeddings
        return name
    raise AdapterError(
        f"the adapter does not fit the base model {base.name}: it has no tensor {name!r} (for example, "
        f"it has {min(base.shard_of)!r})"
    )


def _tied_embeddings(base: BaseFiles) -> str | None:
    """The input embeddings, if the checkpoint has no output head of its own."""
    if base.config.get("tie_word_embeddings") is False or find_tensor("lm_head.weight", base.shard_of):
        return None
    names = (name for name in base.shard_of if name.endswith(_EMBEDDINGS))
    return next(names, None)


def _merge_shard(
    shard: str, directory: Path, base: BaseFiles, adapter: Adapter, plan: _Plan, tally: _Tally
) -> None:
    present = {name for name, file in base.shard_of.items() if file == shard}
    untied = {name: source for name, source in plan.untied.items() if source in present}
    if not untied and not present & plan.changes.keys():
        shutil.copyfile(base.directory / shard, directory / shard)
        return
    try:
        with (
            safe_open(base.directory / shard, framework="pt") as weights,
            safe_open(adapter.weights, framework="pt") as deltas,
        ):
            # Also tensors that the index does not mention stay where they are.
            sources = {name: name for name in weights.keys()} | untied  # noqa: SIM118
            if missing := present - sources.keys():
                raise ModelError(f"{shard} of the base model {base.name} lacks the tensor {min(missing)!r}")
            tensors = {}
            for name, source in sources.items():
                tensor = weights.get_tensor(source)
                if change := plan.changes.get(name):
                    tensor = _changed(tensor, change, deltas, base, adapter, tally)
                tensors[name] = tensor
            metadata = weights.metadata() or {"format": "pt"}
    except (SafetensorError, FileNotFoundError) as error:
        raise ModelError(f"{shard} of the base model {base.name} cannot be read: {error}") from error
    save_file(tensors, directory / shard, metadata=metadata)


def _changed(
    tensor: Tensor, change: _Change, deltas: Any, base: BaseFiles, adapter: Adapter, tally: _Tally
) -> Tensor:
    if change.replacement is not None:
        replacement: Tensor = deltas.get_tensor(change.replacement)
        if replacement.shape != tensor.shape:
            raise AdapterError(
                f"the adapter's {change.replacement!r} is {list(replacement.shape)}, but the base model "
                f"{base.name} has {list(tensor.shape)} there"
            )
        tensor = replacement.to(tensor.dtype)
    module = change.module
    if module is None:
        return tensor
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ModelError(
            f"the base model {base.name} stores {change.name!r} as {tensor.dtype}; only floating-point "
            "weights can be merged into"
        )
    kind = torch.promote_types(tensor.dtype, torch.float32)
    if tensor.dim() == 1:
        bias: Tensor = deltas.get_tensor(module.bias)
        return (tensor.to(kind) + module.scale * bias.to(kind)).to(tensor.dtype)
    up, down = (deltas.get_tensor(key).to(kind) for key in (module.up, module.down))
    delta: Tensor = module.scale * (up @ down)
    if _is_transposed(tensor, change.name, module, base, adapter):
        delta = delta.T
    merged = (tensor.to(kind) + delta).to(tensor.dtype)
    if adapter.sparse:
        merged = torch.where(tensor == 0, tensor, merged)
    before, after = (tensor.numel() - int(torch.count_nonzero(each)) for each in (tensor, merged))
    tally.layers[change.name] = (tensor.numel(), before, after)
    tally.dtypes[str(tensor.dtype).removeprefix("torch.")] += 1
    return merged


def _is_transposed(weight: Tensor, name: str, module: LoraModule, base: BaseFiles, adapter: Adapter) -> bool:
    """Whether the weight is [in, out], as GPT-2 keeps it; square ones are told apart by the config."""
    straight = (module.out_features, module.in_features)
    if tuple(weight.shape) not in (straight, straight[::-1]):
        raise AdapterError(
            f"the adapter does not fit the base model {base.name}: its {name!r} takes {module.in_features} "
            f"features to {module.out_features}, but the base model's weight is {list(weight.shape)}"
        )
    if straight[0] == straight[1]:
        return bool(adapter.config.get("fan_in_fan_out"))
    return tuple(weight.shape) != straight


def _write_config(directory: Path, base: BaseFiles, plan: _Plan) -> None:
    config = base.config
    if plan.untied:
        config = config | {"tie_word_embeddings": False}
    rundir.write_json(directory / CONFIG, config)
    if base.index is not None:
        added = {name: base.shard_of[source] for name, source in plan.untied.items()}
        rundir.write_json(directory / INDEX, base.index | {"weight_map": dict(base.shard_of) | added})
