"""The model types that transformers can load as causal language models, without importing it.

What:     reads the table of these types out of transformers' source.
Why:      the service refuses an unsupported base model when the job is asked for; to import transformers, and
          torch with it, for that would take it seconds and hundreds of megabytes.
Seam:     ``MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`` in ``models/auto/modeling_auto.py``: an ``OrderedDict`` of
          literal pairs (model type, class).
Checked:  transformers 5.23.0.
Goes:     when transformers keeps this table where it can be had without torch.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from importlib.metadata import version
from pathlib import Path

from patches.errors import PatchError

_FILE = "models/auto/modeling_auto.py"
_TABLE = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"


@cache
def causal_lm_types() -> frozenset[str]:
    """The values of ``model_type`` in a config.json that ``AutoModelForCausalLM`` takes.

    Raises:
        PatchError: the table is not where it was.
    """
    found = importlib.util.find_spec("transformers")
    for location in (found.submodule_search_locations or ()) if found else ():
        file = Path(location) / _FILE
        if not file.is_file():
            continue
        for node in ast.parse(file.read_bytes()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == _TABLE:
                return frozenset(_first_of_pairs(node.value))
    raise PatchError(_missing())


def _first_of_pairs(value: ast.expr) -> list[str]:
    match value:
        case ast.Call(args=[ast.List(elts=pairs)]):
            first = [pair.elts[0] for pair in pairs if isinstance(pair, ast.Tuple) and pair.elts]
            names = [
                key.value for key in first if isinstance(key, ast.Constant) and isinstance(key.value, str)
            ]
            if names and len(names) == len(pairs):
                return names
    raise PatchError(_missing())


def _missing() -> str:
    return (
        f"transformers {version('transformers')} has no list of pairs called {_TABLE} in {_FILE}, from "
        "which the supported model types are read (checked with 5.23.0)"
    )
