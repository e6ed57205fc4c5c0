"""Questions to choose answers to, and searches of a tiny super-adapter in this very process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from fixtures_elastic import lora, super_adapter
from fixtures_models import save_tiny_model, tiny_model

from comps.tuning.spec import DataSpec, ModelSpec, ResourcesSpec, SearchSpec

WORDS = (
    "table",
    "four",
    "friday",
    "monday",
    "Meyer",
    "Okafor",
    "seven",
    "cancel",
    "booking",
    "two",
    "people",
)


def questions(count: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of four choices each, with ``choices`` and ``answer``."""
    generator = random.Random(seed)
    return [
        {
            "instruction": f"Which of these is {generator.choice(WORDS)} {number}?",
            "choices": [f"{word} {generator.randrange(9)}" for word in generator.sample(WORDS, 4)],
            "answer": generator.randrange(4),
        }
        for number in range(count)
    ]


def write_questions(path: Path, count: int = 48) -> Path:
    path.write_text(json.dumps(questions(count)), encoding="utf-8")
    return path


def make_super_adapter(directory: Path) -> tuple[Path, Path]:
    """A tiny base model and a random super-adapter on it: their directories."""
    base = save_tiny_model(directory / "base")
    super_adapter(tiny_model(), lora(), directory / "adapter")
    return base, directory / "adapter"


def search_spec(
    directory: Path, base: Path, adapter: Path, validation: Path | None, **changes: Any
) -> SearchSpec:
    """A short search in ``directory``: 24 evaluations of 24 items by metric acc, 36 items in the end."""
    fields: dict[str, Any] = {
        "job_id": directory.name,
        "directory": directory,
        "super_adapter": adapter,
        "base_model": ModelSpec(name="org/tiny", path=str(base)),
        "data": DataSpec(train_file=validation or directory / "none"),
        "validation_file": validation,
        "algorithm": "random",
        "num_evals": 24,
        "population": 8,
        "metric": "acc",
        "items": 24,
        "all_items": 36,
        "resources": ResourcesSpec(cpus=1),
    }
    return SearchSpec(**(fields | changes))
