r"""Search a super-adapter's ranks without any service, as the original's documents do.

    python examples/search.py --base_model_path data/models/HuggingFaceTB/SmolLM2-135M-Instruct \
        --adapter_model_path data/jobs/ft-job-.../output --output_dir search --num_evals 50 --population 20 \
        --validation_file questions.json

The file has questions to choose answers to (``acc_norm`` is the metric then) or instruction records
(``loss``). What is scored is kept in the output directory: a search that was interrupted goes on when the
same command is given again. The best sub-adapter is cut out into ``best/``, a stock PEFT adapter.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own directory only

from comps.tuning.errors import TuningError
from comps.tuning.rundir import EVENTS, OUTPUT
from comps.tuning.spec import DataSpec, ExtractSpec, ModelSpec, ResourcesSpec, SearchSpec


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Search a super-adapter's ranks.")
    parser.add_argument("--base_model_path", type=Path, required=True)
    parser.add_argument("--adapter_model_path", type=Path, required=True, help="the super-adapter")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--validation_file", type=Path, required=True, help="questions or records; no test split"
    )
    parser.add_argument("--texts", action="store_true", help="choose among listed texts, not their labels")
    parser.add_argument(
        "--algorithm", default="nsga2", choices=("nsga2", "hill_climbing", "random", "learned")
    )
    parser.add_argument("--num_evals", type=int, default=50)
    parser.add_argument("--population", type=int, default=20)
    parser.add_argument("--metric", choices=("acc", "acc_norm", "loss"))
    parser.add_argument("--cost", default="parameters", choices=("parameters", "macs"))
    parser.add_argument(
        "--items", type=int, help="to search on; the best are scored again on all, at most four times as many"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, help="cores to compute on")
    return parser.parse_args(arguments)


_AS_ASKED = ("texts", "algorithm", "num_evals", "population", "metric", "cost", "items", "seed")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    directory, base = options.output_dir.resolve(), options.base_model_path.resolve()
    try:
        spec = SearchSpec(
            job_id="search",
            directory=directory,
            super_adapter=options.adapter_model_path.resolve(),
            base_model=ModelSpec(name=base.name, path=str(base)),
            data=DataSpec(train_file=options.validation_file),
            validation_file=options.validation_file,
            validation_name=options.validation_file.name,
            resources=ResourcesSpec(cpus=options.threads),
            **{name: getattr(options, name) for name in _AS_ASKED},
        )
    except ValidationError as error:
        for fault in error.errors():
            print(f"--{fault['loc'][-1]}: {fault['msg']}", file=sys.stderr)
        return 2
    from comps.tuning.export.extract import extract
    from comps.tuning.search.run import search

    try:
        result = search(spec)
        if result is None:  # somebody has put a file "stop" into the directory
            print(f"Stopped; the same command goes on. See {directory / EVENTS}")
            return 0
        best = extract(
            ExtractSpec(
                job_id="extract", directory=directory, super_adapter=spec.super_adapter, version="best",
                config=tuple(result["best"]["config"]), output=directory / "best",
            )
        )  # fmt: skip
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on.", file=sys.stderr)
        return 130
    except TuningError as error:
        print(error, file=sys.stderr)
        return 1
    _show(result)
    last = (directory / EVENTS).read_text(encoding="utf-8").splitlines()[-1]
    print(f"\n{json.loads(last)['message']}.")
    print(f"The report is in {directory / OUTPUT}, the adapter in {best['path']}")
    return 0


def _show(result: dict[str, Any]) -> None:
    print(f"\n{'':12}{result['metric']:>10}{'stderr':>9}{'parameters':>13}")
    named = {**result["references"], **{entry["version"]: entry for entry in result["front"]}}
    for name, entry in named.items():
        error = "" if entry["stderr"] is None else f"{entry['stderr']:.4f}"
        print(f"{name:12}{entry['score']:>10.4f}{error:>9}{entry['parameters']:>13,}")


if __name__ == "__main__":
    raise SystemExit(main())
