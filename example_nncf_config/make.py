"""Makes the two files of this folder with the service's own writer: ``python example_nncf_config/make.py``.

They show how the values of a ``custom_config`` map to modules. Only the shapes of the models matter, so
these are built without weights, from their published sizes.

- ``nncf_config_llama3.2_1b.json``: Llama-3.2-1B, 16 layers, one group (q, k, v), so 16 values.
- ``nncf_config_tinyllama_1.1b.json``: TinyLlama-1.1B, 22 layers, three groups (q, k, v; up; down), so 66.

Each group may take the ranks 16, 12 and 8.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

# Run as a script, it finds the packages beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from comps.tuning.elastic.model import build_adapter
from comps.tuning.elastic.nncf_config import nncf_config
from comps.tuning.rundir import write_json
from comps.tuning.spec import LoraSpec, RankGroup

RANKS = (16, 12, 8)
ATTENTION = ("q_proj", "k_proj", "v_proj")

LLAMA_3_2_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINYLLAMA_1_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}

FILES = {
    "nncf_config_llama3.2_1b.json": (LLAMA_3_2_1B, [ATTENTION]),
    "nncf_config_tinyllama_1.1b.json": (TINYLLAMA_1_1B, [ATTENTION, ("up_proj",), ("down_proj",)]),
}


def content(name: str) -> dict[str, Any]:
    """What the file ``name`` holds."""
    sizes, groups = FILES[name]
    lora = LoraSpec(
        r=max(RANKS), alpha=32, groups=tuple(RankGroup(modules=group, ranks=RANKS) for group in groups)
    )
    with torch.device("meta"):
        model, space, _ = build_adapter(AutoModelForCausalLM.from_config(LlamaConfig(**sizes)), lora)
    assert space is not None
    return nncf_config(model, space, epochs=5, learning_rate=1e-4)


if __name__ == "__main__":
    for name in FILES:
        write_json(Path(__file__).with_name(name), content(name))
