r"""Is a search worth it? Base, LoRA, the named sub-adapters and what each search finds, on a test split.

    python -m tests.benchmarks.search --model DIR --train ARC-Easy/train.json --test ARC-Easy/test.json \
        --directory out --seeds 1 2 3 --evals 50 200

For each seed a plain LoRA of rank 16 and an NLS super-adapter (three groups, ranks 16, 12, 8) are trained on
the training questions but for the last ``--held-out`` ones, which are all that any search sees: ``--items``
of them while it searches, all of them for its finalists. Then everything is scored once on the test split,
which no choice has seen (``acc_norm``, the choices' texts, the prompts of training). ``learned`` is what the
training itself speaks for; its additive model is also compared with the real scores of random configurations
(Spearman's rank correlation). All that is done is kept in ``--directory``, and is not done again by the next
call.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comps.tuning import rundir
from comps.tuning.spec import (
    DataSpec,
    LoraSpec,
    ModelSpec,
    OptimizationSpec,
    RankGroup,
    ResourcesSpec,
    SearchSpec,
    TrainSpec,
)
from examples.prepare_arc import to_instruction

GROUPS = (("q_proj", "k_proj", "v_proj"), ("up_proj",), ("down_proj",))
METRIC = "acc_norm"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, help="questions, as in ARC-Easy/train.json")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--evals", type=int, nargs="*", default=[50, 200])
    parser.add_argument("--algorithms", nargs="*", default=["nsga2", "hill_climbing", "random", "learned"])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--test-items", type=int, help="the first ones of the test split; absent: all")
    parser.add_argument("--correlate", type=int, default=100, help="random configurations; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> tuple[Path, Path]:
    """The records to train on, and the questions held out: two files."""
    rows = json.loads(options.train.read_text(encoding="utf-8"))
    kept, held_out = rows[: -options.held_out], rows[-options.held_out :]
    train, validation = options.directory / "train.json", options.directory / "held_out.json"
    rundir.write_json(train, [to_instruction(row) for row in kept])
    rundir.write_json(validation, held_out)
    return train, validation


def base_model(options: argparse.Namespace) -> ModelSpec:
    return ModelSpec(name=options.model.name, path=str(options.model.resolve()))


def trained(options: argparse.Namespace, data: Path, seed: int, elastic: bool) -> Path:
    """The output of a training, which is done if it was not."""
    directory = options.directory / f"seed-{seed}" / ("nls" if elastic else "lora")
    if (directory / rundir.OUTPUT / "training_manifest.json").is_file():
        return directory / rundir.OUTPUT
    from comps.tuning.training.loop import train

    groups = tuple(RankGroup(modules=names, ranks=(16, 12, 8)) for names in GROUPS) if elastic else ()
    spec = TrainSpec(
        job_id=directory.name,
        directory=directory,
        base_model=base_model(options),
        lora=LoraSpec(
            r=16, alpha=32, dropout=0.05, groups=groups,
            target_modules=tuple(name for names in GROUPS for name in names),
        ),
        data=DataSpec(train_file=data, max_length=256, validation_split_percentage=0),
        training=OptimizationSpec(
            epochs=options.epochs, max_train_steps=options.max_steps, batch_size=16, learning_rate=5e-4,
            seed=seed,
        ),
        resources=ResourcesSpec(cpus=options.threads),
    )  # fmt: skip
    train(spec)
    return directory / rundir.OUTPUT


def searched(
    options: argparse.Namespace, super_adapter: Path, validation: Path, seed: int, algorithm: str, evals: int
) -> dict[str, Any]:
    """A search's result; what other searches of the same adapter have scored is not scored again."""
    from comps.tuning.search.run import search

    directory = options.directory / f"seed-{seed}" / f"{algorithm}-{evals}"
    result = directory / rundir.OUTPUT / "search_result.json"
    if not result.is_file():
        spec = SearchSpec(
            job_id=directory.name, directory=directory, super_adapter=super_adapter,
            base_model=base_model(options), data=DataSpec(train_file=validation), validation_file=validation,
            texts=True, algorithm=algorithm, num_evals=evals, seed=seed, metric=METRIC,
            items=options.items, all_items=options.held_out,
            known=tuple(sorted(directory.parent.glob("*/evaluations.jsonl"))),
            resources=ResourcesSpec(cpus=options.threads),
        )  # fmt: skip
        search(spec)
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


class Judge:
    """Scores on the test split, kept in a file. A score is a list of 0 and 1, one for each question."""

    def __init__(self, options: argparse.Namespace) -> None:
        from comps.tuning.evaluation.items import Items
        from comps.tuning.evaluation.questions import read_questions
        from comps.tuning.models.load import load_tokenizer

        self._options = options
        questions = read_questions(options.test, texts=True, choices=True, limit=options.test_items)
        self._items = Items.choices(questions, load_tokenizer(base_model(options)), 2048)
        self._path = options.directory / f"test-{len(self._items)}.json"
        self._known: dict[str, list[float]] = (
            json.loads(self._path.read_text()) if self._path.exists() else {}
        )

    def scores(self, adapter: Path | None, configs: Sequence[tuple[int, ...] | None]) -> list[list[float]]:
        """Of the base model, an adapter, or configurations of a super-adapter."""
        names = [f"{adapter}/{config}" for config in configs]
        missing = [config for name, config in zip(names, configs, strict=True) if name not in self._known]
        if missing:
            from comps.tuning.elastic.model import load_adapter
            from comps.tuning.elastic.read_space import load_space
            from comps.tuning.evaluation.scorer import Scorer
            from comps.tuning.models.load import load_base_model
            from comps.tuning.search.candidates import load_elastic

            model: Any = load_base_model(base_model(self._options))
            controller = None
            if adapter is not None and missing != [None]:
                model, controller = load_elastic(model, adapter, load_space(adapter))
            elif adapter is not None:
                model = load_adapter(model, adapter)
            scored = Scorer(model, controller).score(self._items, missing)
            for config, found in zip(missing, scored, strict=True):
                self._known[f"{adapter}/{config}"] = found.per_item(METRIC)
            rundir.write_json(self._path, self._known)
        return [self._known[name] for name in names]


def correlation(
    options: argparse.Namespace, super_adapter: Path, validation: Path, seed: int
) -> dict[str, float]:
    """Spearman's of what the model predicts with real losses and acc_norm, of random configurations."""
    path = options.directory / f"seed-{seed}" / f"correlation-{options.correlate}.json"
    if path.is_file():
        known: dict[str, float] = json.loads(path.read_text())
        return known
    from scipy.stats import spearmanr

    from comps.tuning.elastic.sampler import sample
    from comps.tuning.search import additive, learned
    from comps.tuning.search.candidates import open_candidates

    candidates = open_candidates(
        SearchSpec(
            job_id="correlation", directory=path.parent, super_adapter=super_adapter,
            base_model=base_model(options), data=DataSpec(train_file=validation), validation_file=validation,
            texts=True, metric=METRIC, items=options.items, all_items=options.items,
        )
    )  # fmt: skip
    space = candidates.space
    configs = [sample(space, 1000 + seed, step) for step in range(options.correlate)]
    model = learned.load_model(super_adapter, space)
    choices = [[g.ranks.index(r) for g, r in zip(space.groups, config, strict=True)] for config in configs]
    predicted = [additive.predict(model.effects, choice) for choice in choices]
    scores = candidates.scorer.score(candidates.items, configs)
    loss = [float(np.mean(each.per_item("loss"))) for each in scores]
    accuracy = [float(np.mean(each.per_item(METRIC))) for each in scores]
    parameters = [space.parameters(config) for config in configs]
    found = {
        "loss": float(spearmanr(predicted, loss).statistic),
        METRIC: float(spearmanr(predicted, [-each for each in accuracy]).statistic),
        "parameters with loss": float(spearmanr(parameters, [-each for each in loss]).statistic),
        "loss with acc_norm": float(spearmanr(loss, [-each for each in accuracy]).statistic),
        "spread of loss": float(np.std(loss)),
        f"spread of {METRIC}": float(np.std(accuracy)),
        "explained": model.explained,
        "steps": model.steps,
    }
    rundir.write_json(path, found)
    return found


def row(name: str, scores: list[float], parameters: int | None, heuristic: list[float] | None) -> str:
    """A line of the table: the score, and the paired difference to the heuristic, with standard errors."""
    count = len(scores)
    value, error = float(np.mean(scores)), float(np.std(scores, ddof=1)) / math.sqrt(count)
    shown = "" if parameters is None else f"{parameters:,}"
    gain = ""
    if heuristic is not None:
        gains = np.array(scores) - np.array(heuristic)
        gain = f"{gains.mean():+.4f} ± {gains.std(ddof=1) / math.sqrt(count):.4f}"
    return f"| {name} | {shown} | {value:.4f} ± {error:.4f} | {gain} |"


def one_seed(options: argparse.Namespace, judge: Judge, data: Path, validation: Path, seed: int) -> None:
    began = time.monotonic()
    nls = trained(options, data, seed, elastic=True)
    found = {
        f"{algorithm}, {evals}": searched(options, nls, validation, seed, algorithm, evals)
        for algorithm in options.algorithms
        for evals in options.evals
    }
    named = next(iter(found.values()))["references"] if found else _named(nls)
    entries = {**named, **{f"best of {name}": result["best"] for name, result in found.items()}}
    configs = {name: tuple(entry["config"]) for name, entry in entries.items()}
    judge.scores(nls, list(dict.fromkeys(configs.values())))  # all at once
    heuristic = judge.scores(nls, [configs["heuristic"]])[0]
    print(f"\n### seed {seed}, {len(heuristic)} test questions\n")
    print(
        f"| | adapter's parameters | {METRIC} ± stderr | against the heuristic, paired |\n|---|---|---|---|"
    )
    print(row("base", judge.scores(None, [None])[0], None, heuristic))
    lora = trained(options, data, seed, elastic=False)
    print(row("LoRA r16", judge.scores(lora, [None])[0], entries["maximal"].get("parameters"), heuristic))
    for name, config in configs.items():
        print(row(name, judge.scores(nls, [config])[0], entries[name].get("parameters"), heuristic))
    for name, result in found.items():
        fresh = result["best"].get("fresh", {})
        print(
            f"- {name}: {result['configurations']} configurations in {result['seconds']} s; on its own items "
            f"{result['best']['score']:.4f}, on {fresh.get('scored_items')} others "
            f"{fresh.get('gain', math.nan):+.4f} ± {fresh.get('gain_stderr') or math.nan:.4f} beside it"
        )
    if options.correlate:
        print(f"- learned against real scores: {correlation(options, nls, validation, seed)}")
    print(f"- {time.monotonic() - began:.0f} s", flush=True)


def _named(super_adapter: Path) -> dict[str, dict[str, Any]]:
    from comps.tuning.elastic.read_space import load_space

    space = load_space(super_adapter)
    configs = {name: getattr(space, name) for name in ("heuristic", "minimal", "maximal")}
    return {
        name: {"config": config, "parameters": space.parameters(config)} for name, config in configs.items()
    }


def main() -> None:
    options = parse()
    options.directory = options.directory.resolve()
    options.directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    data, validation = prepare(options)
    judge = Judge(options)
    for seed in options.seeds:
        one_seed(options, judge, data, validation, seed)


if __name__ == "__main__":
    main()
