"""``General.lora_config``: the adapter, with the NLS block in all its spellings.

The spellings are brought to one form by :mod:`comps.finetuning.schemas.nls`; here each field by itself is
brought to lists.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from comps.cores.errors import InvalidRequest
from comps.finetuning.schemas.tolerant import Count, Number, Tolerant, unused

BLOCK = "General.lora_config"

_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_MODULE_CHARACTERS = 200
_RANKS = re.compile(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*")


def _module_names(value: object) -> object:
    """``"q_proj,k_proj"`` or a list of names, each a path of identifiers."""
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError('a list of module names was expected, such as ["q_proj", "v_proj"]')
    if not names:
        raise ValueError("the list of module names is empty")
    for name in names:
        if not _MODULE.fullmatch(name) or len(name) > _MODULE_CHARACTERS:
            raise ValueError(f"{name[:80]!r} is not a module name")
    return list(dict.fromkeys(names))


def _groups(value: object) -> object:
    if not isinstance(value, list) or not value:
        raise ValueError('a list of groups was expected, such as [["q_proj", "v_proj"], ["up_proj"]]')
    groups = []
    for index, group in enumerate(value):
        if group in ([], ""):
            raise ValueError(f"group {index} is empty")
        try:
            groups.append(_module_names(group))
        except ValueError as error:
            raise ValueError(f"group {index}: {error}") from None
    return groups


def _rank(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{str(value)[:80]!r} is not a rank")
    return value


def _spaces(value: object) -> object:
    """Strings become lists of ranks; a bare number stays one, since what it means depends on the modules."""
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not entries:
        raise ValueError('a list of ranks was expected, such as ["16,12,8"] or [[16, 12, 8]]')
    spaces: list[int | list[int]] = []
    for entry in entries:
        if isinstance(entry, str):
            if not _RANKS.fullmatch(entry):
                raise ValueError(f'{entry[:80]!r} is not a list of ranks such as "16,12,8"')
            spaces.append([int(part) for part in entry.split(",")])
        elif isinstance(entry, list):
            if not entry:
                raise ValueError("a list of ranks is empty")
            spaces.append([_rank(rank) for rank in entry])
        else:
            spaces.append(_rank(entry))
    return spaces


ModuleNames = Annotated[list[str], BeforeValidator(_module_names)]


def _whole(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 4 else value


GroupSize = Annotated[Literal[32, 64, 128], BeforeValidator(_whole)]


class LoraConfig(Tolerant):
    """A LoRA adapter; with ``neural_lora_search`` an NLS super-adapter of maximal rank ``r``."""

    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    r: Count = 8
    lora_alpha: Annotated[Number, Field(gt=0)] = 32
    lora_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    target_modules: ModuleNames | None = Field(
        None, description="Modules with an adapter; absent: the usual ones of the architecture"
    )
    use_rslora: bool = False

    neural_lora_search: bool = False
    target_module_groups: Annotated[list[list[str]], BeforeValidator(_groups)] | None = Field(
        None, description="Modules that share one active rank within a layer, one list for each group"
    )
    nls_target_modules: ModuleNames | None = Field(
        None, description="Another spelling: the modules of the one group of each layer"
    )
    search_space: Annotated[list[Any], BeforeValidator(_spaces)] | None = Field(
        None, description='The ranks of each group: ["16,12,8"] or [[16, 12, 8]]'
    )
    nncf_config: dict[str, Any] | None = Field(
        None, description="A third spelling: the content of an nncf_config.json, which holds groups and ranks"
    )
    sample_per: Literal["step", "micro_batch"] = Field(
        "step", description="Draw new ranks for each optimizer step, or for each micro-batch of it"
    )

    sparse_adapter: bool = Field(
        False, description="Keep the zeros of a pruned base model: they mask the adapter (SparsePEFT)"
    )
    quantization_aware: bool = Field(
        False,
        description="Train within the rounding to INT4: a merge gives one INT4 model, as sparse as its base",
    )
    quantization_mode: Literal["int4_asym", "int4_sym"] = Field(
        "int4_asym", description="Of quantization_aware: with zero points for groups of inputs, or symmetric"
    )
    group_size: GroupSize = Field(
        64, description="Of quantization_aware: inputs that share a scale, 32, 64 or 128"
    )

    bias: Any = unused("none", because="biases are not trained")
    fan_in_fan_out: Any = unused(False, because="it is found out from the model")


def refusal(field: str, what: str) -> InvalidRequest:
    """The error that a field of the block deserves; ``what`` is the rest of its sentence."""
    return InvalidRequest(f"{BLOCK}.{field} {what}.", param=f"{BLOCK}.{field}")
