"""``python -m comps.tuning.evaluation --model DIR [--adapter DIR] --file FILE``: one line of JSON."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from comps.tuning.data.records import iter_checked
from comps.tuning.errors import AdapterError, TuningError
from comps.tuning.spec import ModelSpec

if TYPE_CHECKING:
    from comps.tuning.evaluation.generate import ExactMatch


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m comps.tuning.evaluation",
        description="Exact match of a model's greedy answers with the responses in a file of records.",
    )
    parser.add_argument("--model", type=Path, required=True, help="directory of a base or merged model")
    parser.add_argument("--adapter", type=Path, help="directory of a LoRA adapter or super-adapter")
    parser.add_argument("--file", type=Path, required=True, help="records to answer")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit", type=int, help="use the first records only")
    parser.add_argument("--json", action="store_true", help="compare as JSON values, not as text")
    parser.add_argument("--outputs", action="store_true", help="print the answers too")
    return parser.parse_args(arguments)


def evaluate(options: argparse.Namespace) -> ExactMatch:
    """What the command does. Raises :class:`TuningError`."""
    checked = iter_checked(options.file, options.file.name, "instruction_tuning")
    records = [each.record for each in islice(checked, options.limit)]
    from comps.tuning.evaluation.generate import exact_match  # torch, after the quick refusals
    from comps.tuning.models.load import load_base_model, load_tokenizer

    spec = ModelSpec(name=options.model.name, path=str(options.model.resolve()))
    tokenizer = load_tokenizer(spec)
    model = load_base_model(spec, use_cache=True)
    if options.adapter:
        from comps.tuning.elastic.model import load_adapter

        if not (options.adapter / "adapter_config.json").is_file():
            raise AdapterError(f"{options.adapter} is no adapter: it has no adapter_config.json")
        model = load_adapter(model, options.adapter)
    return exact_match(
        model,
        tokenizer,
        records,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        as_json=options.json,
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        result = evaluate(options)
    except TuningError as error:
        print(error, file=sys.stderr)
        return 1
    shown = {key: value for key, value in result.items() if key != "outputs" or options.outputs}
    print(json.dumps(shown, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
