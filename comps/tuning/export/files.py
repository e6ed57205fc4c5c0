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


def has_tokenizer(directory: Path) -> bool:
    """Whether there is a tokenizer in ``directory``."""
    return any((directory / name).is_file() for name in VOCABULARIES)


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of ``names`` that exist in ``source``."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
