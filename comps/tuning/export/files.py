"""The small files that travel with adapters and models."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
TOKENIZER = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
README = "README.md"
# What lies beside a sparse adapter for whoever takes it elsewhere.
SPARSE_NOTE = """\
# A sparse adapter: merge it with the service that trained it

This adapter was trained with `sparse_adapter` (SparsePEFT): the product of its matrices counts only where
the base model's weight is not zero. It looks like an ordinary LoRA adapter, but PEFT and other tools know no
such mask: they compute something else with it, and a merge by them fills the base model's zeros. The merged
model is an ordinary one, as sparse as the base model; `POST /v1/finetune/merge_adapter` makes it.
"""
# The same beside a quantisation-aware one.
GRID_NOTE = """\
# A quantisation-aware adapter: merge it with the service that trained it

This adapter was trained with `quantization_aware`: the base model's weights with the product of its matrices
are rounded to a grid of sixteen values, and where a weight is zero the product does not count. It looks like
an ordinary LoRA adapter, but PEFT and other tools know nothing of that: they compute something else with it.
`POST /v1/finetune/merge_adapter` makes one INT4 model of base and adapter.
"""


def has_tokenizer(directory: Path) -> bool:
    """Whether there is a tokenizer in ``directory``."""
    return any((directory / name).is_file() for name in VOCABULARIES)


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of ``names`` that exist in ``source``."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
