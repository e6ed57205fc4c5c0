"""``load_hostile_models.py DIRECTORY URL``: load models whose files point to URL in every way there is.

For ``test_outgoing``: in a process of its own, since libraries read the hub's address when they are imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fixtures_models import save_tiny_model

from comps.tuning.data.prompts import render
from comps.tuning.errors import TuningError
from comps.tuning.models.load import load_base_model, load_tokenizer
from comps.tuning.spec import ModelSpec

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def configs(url: str) -> list[tuple[str, dict[str, Any]]]:
    """The file of each model that is changed, and how."""
    elsewhere = {"AutoConfig": f"{url}--own.C", "AutoModelForCausalLM": "org/other--own.M"}
    model: list[dict[str, Any]] = [
        {"_name_or_path": url, "name_or_path": url, "base_model_name_or_path": url, "tokenizer_class": url},
        {"auto_map": elsewhere},
        {"auto_map": elsewhere, "model_type": "own"},
        {"attn_implementation": "org/kernel", "experts_implementation": "org/kernel"},
        {"attn_implementation": url},
        {"quantization_config": {"quant_method": "gptq", "dataset": url}},
        {"model_type": url},
        {"architectures": [url]},
        {"generation_config": url, "custom_generate": url},
    ]
    tokenizer: list[dict[str, Any]] = [
        {"name_or_path": url, "tokenizer_file": f"{url}/t.json", "vocab_file": url, "merges_file": url},
        {"auto_map": {"AutoTokenizer": ["org/other--own.T", "org/other--own.T"]}},
        {"tokenizer_class": url},
        {"tokenizer_class": "org/other"},
        {"backend": url, "fix_mistral_regex": True},
        {"chat_template": f"{{% include '{url}' %}}"},
        {"chat_template": f"{{% import '{url}' as x %}}"},
        {"chat_template": "{{ messages.__class__.__mro__[1].__subclasses__() }}"},
    ]
    found = [("config.json", each) for each in model]
    found += [("tokenizer_config.json", each) for each in tokenizer]
    found.append(("generation_config.json", {"custom_generate": url, "_from_model_config": url}))
    return found


def load(spec: ModelSpec) -> None:
    """What a run does with its base model, up to the first record; a refusal is printed."""
    for work in (lambda: render(CHAT, load_tokenizer(spec)), lambda: load_base_model(spec)):
        try:
            work()
        except TuningError as error:
            print(f"{spec.path}: {error}")


def main() -> None:
    directory, url = Path(sys.argv[1]), sys.argv[2]
    for number, (name, changes) in enumerate(configs(url)):
        model = save_tiny_model(directory / str(number))
        if name == "tokenizer_config.json" and "chat_template" in changes:
            (model / "chat_template.jinja").unlink(missing_ok=True)
        content = json.loads((model / name).read_text()) | changes
        (model / name).write_text(json.dumps(content))
        load(ModelSpec(name="org/hostile", path=str(model)))
    load(ModelSpec(name="org/none", path="org/none", local=False))


if __name__ == "__main__":
    main()
