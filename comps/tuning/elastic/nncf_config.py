"""``nncf_config.json``: the search space as the original NLS tools write and read it.

Each elastic group is a list of node names, paths through the model in which every step is written
``Class[name]``::

    PeftModelForCausalLM/LoraModel[base_model]/LlamaForCausalLM[model]/LlamaModel[model]/ModuleList[layers]/
    LlamaDecoderLayer[0]/LlamaAttention[self_attn]/Linear[q_proj]/ModuleDict[lora_A]/NNCFLinear[default]/linear_0

Class names differ between library versions, so only the names in brackets are read. Older files have
``bootstrapNAS`` in place of ``SQFT`` and ``progressive_shrinking`` in place of ``nls``, and may write one
node name for all layers: ``{re}...DecoderLayer[{*}]...``. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comps.tuning.elastic.space import SearchSpace
from comps.tuning.errors import AdapterError
from comps.tuning.export.adapter import PREFIX, read_json
from comps.tuning.rundir import write_json

if TYPE_CHECKING:
    from peft import PeftModel

FILE = "nncf_config.json"
ALL_LAYERS = "{*}"

# A group of module paths (``ALL_LAYERS`` for a layer's number stands for all layers) and its ranks.
Entry = tuple[tuple[str, ...], tuple[int, ...]]

_TOP_KEYS = ("SQFT", "bootstrapNAS")
_ALGORITHMS = ("nls", "neural_lora_search", "progressive_shrinking")
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")


def nncf_config(
    model: PeftModel,
    space: SearchSpace,
    *,
    epochs: float,
    learning_rate: float,
    sequence_length: int = 256,
    adapter_name: str = "default",
) -> dict[str, Any]:
    """The content of the file for the super-adapter ``adapter_name`` of ``model``."""
    widths = [list(group.ranks) for group in space.groups]
    stage = {
        "train_dims": ["width"],
        "width_indicator": max(map(len, widths)),
        "init_lr": learning_rate,
        "epochs": epochs,
        "epochs_lr": epochs,
    }
    return {
        "input_info": [
            {"sample_size": [1, sequence_length], "type": "long", "keyword": keyword}
            for keyword in ("input_ids", "attention_mask")
        ],
        "SQFT": {
            "training": {
                "algorithm": "nls",
                "elasticity": {
                    "available_elasticity_dims": ["width"],
                    "width": {
                        "overwrite_groups": [
                            [_node_name(model, module, adapter_name) for module in group.modules]
                            for group in space.groups
                        ],
                        "overwrite_groups_widths": widths,
                    },
                },
                "schedule": {"list_stage_descriptions": [stage]},
            }
        },
    }


def write_nncf_config(
    directory: Path, model: PeftModel, space: SearchSpace, *, epochs: float, learning_rate: float, **more: Any
) -> Path:
    """Write :func:`nncf_config` (which names the arguments) into ``directory``; returns the file."""
    path = directory / FILE
    write_json(path, nncf_config(model, space, epochs=epochs, learning_rate=learning_rate, **more))
    return path


def _node_name(model: PeftModel, module: str, adapter_name: str) -> str:
    steps = [type(model).__name__]
    here: Any = model
    for part in f"{PREFIX}{module}.lora_A".split("."):
        here = getattr(here, part)
        steps.append(f"{type(here).__name__}[{part}]")
    adapter = here[adapter_name]
    return "/".join([*steps, f"NNCF{type(adapter).__name__}[{adapter_name}]", "linear_0"])


def read_nncf_config(path: Path) -> list[Entry]:
    """The groups of a file, as :func:`parse_nncf_config` gives them."""
    return parse_nncf_config(read_json(path), f"{path.parent.name}/{path.name}")


def parse_nncf_config(content: Any, where: str) -> list[Entry]:
    """The groups of a file's ``content``, in its order, with ranks sorted descending.

    ``where`` is what messages call it.

    Raises:
        AdapterError: it is damaged, or describes another algorithm or other elastic dimensions.
    """
    try:
        top = next(content[key] for key in _TOP_KEYS if key in content)
        algorithm = top["training"].get("algorithm", "nls")
        width = top["training"]["elasticity"]["width"]
        groups, widths = width["overwrite_groups"], width["overwrite_groups_widths"]
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise AdapterError(
            f"{where} does not have overwrite_groups and overwrite_groups_widths under "
            "SQFT.training.elasticity.width"
        ) from error
    if algorithm not in _ALGORITHMS:
        raise AdapterError(f"{where} is for the algorithm {algorithm!r}, not for elastic ranks")
    if not isinstance(groups, list) or not isinstance(widths, list) or len(groups) != len(widths):
        raise AdapterError(f"{where} does not have one list of widths for each of its groups")
    return [
        (tuple(_module(node, where) for node in check_strings(nodes, i, where)), check_ranks(ranks, i, where))
        for i, (nodes, ranks) in enumerate(zip(groups, widths, strict=True))
    ]


def _module(node: str, where: str) -> str:
    path = ".".join(_BRACKETS.findall(node))
    module, elastic, _ = path.partition(".lora_A")
    if not elastic or not module.startswith(PREFIX):
        raise AdapterError(f"{where} has the node {node!r}, which is not the A of a LoRA adapter")
    return module.removeprefix(PREFIX)


def check_strings(values: Any, index: int, where: str) -> Sequence[str]:
    """``values`` if it is a non-empty list of strings; ``index`` is the group, for the message."""
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise AdapterError(f"{where}: group {index} is not a list of module names")
    return values


def check_ranks(values: Any, index: int, where: str) -> tuple[int, ...]:
    """``values`` as unique ranks in descending order, whatever their order in the file."""
    if not isinstance(values, list) or not values or any(type(v) is not int or v < 1 for v in values):
        raise AdapterError(f"{where}: the ranks of group {index} are {values!r}, not positive integers")
    return tuple(sorted(set(values), reverse=True))
