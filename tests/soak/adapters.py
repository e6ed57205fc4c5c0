"""What jobs have made, loaded with stock PEFT and transformers: nothing of this project is imported here."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path


def fault(kind: str, path: Path, base: Path) -> str | None:
    """Why the adapter or merged model in ``path`` cannot be used; ``None`` when it computes something."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    try:
        if kind == "merged":
            model = AutoModelForCausalLM.from_pretrained(path)
        else:
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
        tokens = torch.arange(16).unsqueeze(0)
        with torch.no_grad():
            loss = float(model(input_ids=tokens, labels=tokens).loss)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if math.isfinite(loss) else f"its loss is {loss}"


def main() -> None:
    """``python -m tests.soak.adapters BASE``: reads ``[[id, kind, path], ...]``, writes ``{id: fault}``."""
    base = Path(sys.argv[1])
    found = {name: fault(kind, Path(path), base) for name, kind, path in json.load(sys.stdin)}
    json.dump({name: reason for name, reason in found.items() if reason}, sys.stdout)


if __name__ == "__main__":
    main()
