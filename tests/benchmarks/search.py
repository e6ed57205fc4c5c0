r"""Is a search worth it? Base, LoRA, the named sub-adapters and what each search finds, on a test split.

    python -m tests.benchmarks.search --model DIR --train ARC-Easy/train.json --test ARC-Easy/test.json \
        --directory out --seeds 1 2 3 --evals 50 200

For each seed a plain LoRA of rank 16 and an NLS super-adapter (three groups, ranks 16, 12, 8) are trained on
the training questions but for the last ``--held-out`` ones, which are all that any search sees: ``--items``
of them while it searches, ``--all-items`` for its finalists. Then everything is scored once on the test
split, which no choice has seen: ``acc_norm`` of the choices' texts, and the loss of the responses, which is
what training lowers and, unless ``--metric`` says otherwise, what searches go by (cheaper than all choices,
and far less noisy). ``learned`` is what the training itself speaks for; its additive model is also compared
with the real losses of random configurations (Spearman's rank correlation). All that is done is kept in
``--directory``, and is not done again by the next call.
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
METRICS = ("acc_norm", "loss")  # on the test split


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
    parser.add_argument("--metric", default="loss", choices=["acc", "acc_norm", "loss"], help="searched by")
    parser.add_argument("--algorithms", nargs="*", default=["nsga2", "hill_climbing", "random", "learned"])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--all-items", type=int, help="held-out ones for the finalists; absent: all")
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
            texts=True, algorithm=algorithm, num_evals=evals, seed=seed, metric=options.metric,
            items=options.items, all_items=options.all_items or options.held_out,
            known=tuple(sorted(directory.parent.glob("*/evaluations.jsonl"))),
            resources=ResourcesSpec(cpus=options.threads),
        )  # fmt: skip
        search(spec)
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


Values = dict[str, list[float]]  # of each metric, one for each test question


class Judge:
    """Scores on the test split, kept in a file."""

    def __init__(self, options: argparse.Namespace) -> None:
        from comps.tuning.evaluation.items import Items
        from comps.tuning.evaluation.questions import read_questions
        from comps.tuning.models.load import load_tokenizer

        self._options = options
        questions = read_questions(options.test, texts=True, choices=True, limit=options.test_items)
        tokenizer = load_tokenizer(base_model(options))
        self._items = (
            Items.choices(questions, tokenizer, 2048),
            Items.responses(questions, tokenizer, DataSpec(train_file=options.test)),
        )
        # A file for each set of seeds, so that several processes can score some each at a time.
        name = f"test-{len(questions)}-responses-"
        self._path = options.directory / f"{name}{'-'.join(map(str, options.seeds))}.json"
        self._known: dict[str, Values] = {}
        for known in sorted(options.directory.glob(f"{name}*.json")):
            self._known |= json.loads(known.read_text())

    def scores(self, adapter: Path | None, configs: Sequence[tuple[int, ...] | None]) -> list[Values]:
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
            scorer = Scorer(model, controller)
            scored = [scorer.score(items, missing) for items in self._items]
            for config, *found in zip(missing, *scored, strict=True):
                pairs = zip(METRICS, found, strict=True)
                self._known[f"{adapter}/{config}"] = {name: each.per_item(name) for name, each in pairs}
            rundir.write_json(self._path, self._known)
        return [self._known[name] for name in names]


def correlation(
    options: argparse.Namespace, super_adapter: Path, validation: Path, seed: int
) -> dict[str, float]:
    """Spearman's of what the model predicts with the real losses of random configurations."""
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
            texts=True, metric="loss", items=options.items, all_items=options.items,
        )
    )  # fmt: skip
    space = candidates.space
    configs = [sample(space, 1000 + seed, step) for step in range(options.correlate)]
    model = learned.load_model(super_adapter, space)
    choices = [[g.ranks.index(r) for g, r in zip(space.groups, config, strict=True)] for config in configs]
    predicted = [additive.predict(model.effects, choice) for choice in choices]
    scores = candidates.scorer.score(candidates.items, configs)
    loss = [float(np.mean(each.per_item("loss"))) for each in scores]
    parameters = [space.parameters(config) for config in configs]
    found = {
        "loss": float(spearmanr(predicted, loss).statistic),
        "parameters with loss": float(spearmanr(parameters, [-each for each in loss]).statistic),
        "spread of loss": float(np.std(loss)),
        "explained": model.explained,
        "steps": model.steps,
    }
    rundir.write_json(path, found)
    return found


def mean_and_error(values: list[float] | np.ndarray) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))


def row(name: str, parameters: list[int], seeds: list[Values], heuristics: list[Values]) -> str:
    """A line of the table: values, and the differences to the heuristic's on the same questions.

    Standard errors are those over questions, of each question's mean over the seeds; the range is that of the
    seeds.
    """
    cells = [name, f"{round(float(np.mean(parameters))):,}" if parameters else ""]
    for metric in METRICS:
        values = np.array([seed[metric] for seed in seeds])
        own, error = mean_and_error(values.mean(axis=0))
        apart = values - np.array([seed[metric] for seed in heuristics])
        gain, gain_error = mean_and_error(apart.mean(axis=0))
        each = apart.mean(axis=1)
        cells += [
            f"{own:.4f} ± {error:.4f}",
            f"{gain:+.4f} ± {gain_error:.4f} ({each.min():+.4f} to {each.max():+.4f})",
        ]
    return f"| {' | '.join(cells)} |"


def work(options: argparse.Namespace, data: Path, validation: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """Each seed's searches by name. The shorter ones of all seeds come before the longer ones."""
    found: dict[int, dict[str, dict[str, Any]]] = {seed: {} for seed in options.seeds}
    for evals in options.evals:
        for seed in options.seeds:
            nls = trained(options, data, seed, elastic=True)
            for algorithm in options.algorithms:
                began = time.monotonic()
                result = searched(options, nls, validation, seed, algorithm, evals)
                found[seed][f"{algorithm}, {evals}"] = result
                fresh = result["best"].get("fresh", {})
                print(
                    f"- seed {seed}, {algorithm}, {evals}: {result['configurations']} configurations in "
                    f"{result['seconds']} s; on its own items {result['best']['score']:.4f}, on "
                    f"{fresh.get('scored_items')} others {fresh.get('gain', math.nan):+.4f} ± "
                    f"{fresh.get('gain_stderr') or math.nan:.4f} beside the heuristic "
                    f"({time.monotonic() - began:.0f} s)",
                    flush=True,
                )
    return found


def table(
    options: argparse.Namespace, judge: Judge, data: Path, found: dict[int, dict[str, dict[str, Any]]]
) -> None:
    names: dict[str, list[int]] = {}
    values: dict[str, list[Values]] = {}

    def add(name: str, parameters: int | None, scores: Values) -> None:
        names.setdefault(name, []).extend([] if parameters is None else [parameters])
        values.setdefault(name, []).append(scores)

    for seed, searches in found.items():
        nls = trained(options, data, seed, elastic=True)
        lora = trained(options, data, seed, elastic=False)
        named = next(iter(searches.values()))["references"] if searches else _named(nls)
        entries = {**named, **{f"best of {name}": result["best"] for name, result in searches.items()}}
        configs = {name: tuple(entry["config"]) for name, entry in entries.items()}
        judge.scores(nls, list(dict.fromkeys(configs.values())))  # all at once
        add("base", None, judge.scores(None, [None])[0])
        add("LoRA r16", entries["maximal"].get("parameters"), judge.scores(lora, [None])[0])
        for name, config in configs.items():
            add(name, entries[name].get("parameters"), judge.scores(nls, [config])[0])
    count = len(values["base"][0][METRICS[0]])
    print(f"\n{count} test questions, seeds {options.seeds}, searched by {options.metric}\n")
    columns = [f"{metric} ± stderr | beside the heuristic (seeds)" for metric in METRICS]
    print(f"| | adapter's parameters | {' | '.join(columns)} |\n{'|---' * (2 + 2 * len(METRICS))}|")
    for name, seeds in values.items():
        print(row(name, names[name], seeds, values["heuristic"]), flush=True)


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
    # What is in the directory was made with these; with others it would be mixed up.
    names = ("model", "train", "test", "metric", "epochs", "max_steps", "held_out", "items", "all_items")
    asked = {name: str(getattr(options, name)) for name in names}
    noted = options.directory / "options.json"
    if noted.is_file() and (found := json.loads(noted.read_text())) != asked:
        raise SystemExit(f"{options.directory} is of other options: {found}")
    rundir.write_json(noted, asked)
    data, validation = prepare(options)
    judge = Judge(options)
    found = work(options, data, validation)
    table(options, judge, data, found)
    for seed in options.seeds if options.correlate else []:
        nls = trained(options, data, seed, elastic=True)
        print(
            f"- seed {seed}, learned against real scores: {correlation(options, nls, validation, seed)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
