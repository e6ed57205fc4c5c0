"""Tiny super-adapters of every architecture family, with random A and B, and their directories."""

from __future__ import annotations

from pathlib import Path

import torch
from fixtures_models import VOCABULARY
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from comps.tuning.elastic.elastic_config import write_elastic_config
from comps.tuning.elastic.model import ElasticController, build_adapter
from comps.tuning.elastic.nncf_config import write_nncf_config
from comps.tuning.elastic.space import SearchSpace
from comps.tuning.spec import LoraSpec, RankGroup

RANKS = (8, 5, 2)

# The rank groups that suit each family's module names; three groups where there is enough to group.
GROUPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "llama": (("q_proj", "k_proj", "v_proj"), ("up_proj",), ("down_proj",)),
    "qwen2": (("q_proj", "k_proj", "v_proj"), ("up_proj", "gate_proj"), ("down_proj",)),
    "mistral": (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("down_proj",)),
    "gemma2": (("q_proj", "v_proj"), ("up_proj",), ("down_proj",)),
    "phi": (("q_proj", "k_proj", "v_proj"), ("fc1",), ("fc2",)),
    "opt": (("q_proj", "k_proj", "v_proj"), ("fc1",), ("fc2",)),
    "bloom": (("query_key_value",), ("dense_h_to_4h",), ("dense_4h_to_h",)),
    "gpt2": (("c_attn",), ("attn.c_proj",), ("mlp.c_fc", "mlp.c_proj")),
    "bert": (("query", "key", "value"), ("attention.output.dense",), ("intermediate.dense",)),
}


def lora(family: str = "llama", **overrides: object) -> LoraSpec:
    """A super-adapter of rank 8 without dropout, with the groups of ``family``."""
    groups = tuple(RankGroup(modules=modules, ranks=RANKS) for modules in GROUPS[family])
    return LoraSpec.model_validate({"r": 8, "alpha": 16, "dropout": 0, "groups": groups} | overrides)


def randomise(model: torch.nn.Module, seed: int = 1) -> None:
    """Give every A and B random values: with B zero, as LoRA starts, nothing would be shown."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def super_adapter(
    base: PreTrainedModel, spec: LoraSpec, directory: Path | None = None
) -> tuple[PeftModel, SearchSpace, ElasticController]:
    """A random super-adapter on ``base``; saved as a finished job leaves it, if a directory is given."""
    model, space, controller = build_adapter(base, spec, "CAUSAL_LM" if base.can_generate() else None)
    assert space is not None
    assert controller is not None
    randomise(model)
    if directory is not None:
        model.save_pretrained(directory)
        write_nncf_config(directory, model, space, epochs=1, learning_rate=1e-4)
        write_elastic_config(directory, space)
    return model.eval(), space, controller


def tokens(rows: int = 2, length: int = 12, seed: int = 3) -> Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: torch.nn.Module, ids: Tensor | None = None) -> Tensor:
    """The model's logits, without gradients."""
    with torch.no_grad():
        output: Tensor = model(input_ids=tokens() if ids is None else ids).logits
    return output
