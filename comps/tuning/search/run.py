"""A search from its spec to its report: ``search(spec)``, in a service's job or in anybody's script."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any

from comps.tuning import rundir
from comps.tuning.errors import AdapterError
from comps.tuning.evaluation.scores import mean
from comps.tuning.search import learned, report
from comps.tuning.search.algorithms import algorithm
from comps.tuning.search.candidates import FEWEST_ITEMS, open_candidates, set_threads
from comps.tuning.search.ledger import FILE, Config, Ledger
from comps.tuning.search.problem import Choice, Problem, front
from comps.tuning.search.spending import Spending
from comps.tuning.spec import SearchSpec


class Stopped(Exception):
    """The run was asked to stop; what it has scored is on disk."""


def search(spec: SearchSpec) -> dict[str, Any] | None:
    """Carry out ``spec``; what was scored by an earlier attempt is not scored again.

    Returns the content of ``search_result.json`` with the ``path`` of the output, or ``None`` when it was
    asked to stop. Raises :class:`TuningError` for what a person can change.
    """
    spec.directory.mkdir(parents=True, exist_ok=True)
    with closing(rundir.EventWriter(spec.directory)) as events:
        try:
            return _Search(spec, events).run()
        except Stopped:
            events.write("Stopped on request")
            return None


class _Search:
    def __init__(self, spec: SearchSpec, events: rundir.EventWriter) -> None:
        began = time.monotonic()
        self._spec, self._events = spec, events
        set_threads(spec.resources.cpus)
        self._candidates = open_candidates(spec)
        space, items = self._candidates.space, self._candidates.items
        self._problem = Problem(space, spec.population, spec.seed, self._model())
        score = partial(self._candidates.score, progress=self._check)
        self._ledger = Ledger(spec.directory / FILE, self._candidates.key, score, spec.known)
        self._spending = Spending(
            self._problem, self._ledger, self._candidates.searched, self._candidates.sign, self._cost,
            halving=spec.halving,
        )  # fmt: skip
        events.write(
            f"Searching {space.describe()} by {spec.algorithm}: {self._candidates.metric} on "
            f"{self._candidates.searched} items, the best again on {len(items)}; set up in "
            f"{time.monotonic() - began:.1f} s",
            items=self._candidates.searched, all_items=len(items), metric=self._candidates.metric,
        )  # fmt: skip
        if items.truncated:
            events.write(
                f"{items.truncated} items are longer than the model takes and were cut", level="warn"
            )
        if spec.items and spec.items > self._candidates.searched:
            events.write(f"There are {self._candidates.searched} items, not {spec.items}", level="warn")
        if (left := len(items) - self._chosen_by) < FEWEST_ITEMS:
            events.write(
                f"Nothing is chosen by {left} items, which are too few to tell what the best is worth; give "
                "more questions",
                level="warn",
            )
        if self._ledger.found:
            events.write(f"Resuming: {self._ledger.found} batches were scored before")

    def _model(self) -> Any:
        """What the training has taught, where it is needed."""
        if self._spec.algorithm != "learned":
            return None
        return learned.load_model(self._spec.super_adapter, self._candidates.space)

    def _cost(self, config: Config) -> float:
        counted = self._candidates.macs if self._spec.cost == "macs" else self._candidates.parameters
        return float(counted(config))

    def _check(self, *_: object) -> None:
        if (self._spec.directory / rundir.STOP).exists():
            raise Stopped

    def run(self) -> dict[str, Any]:
        spec, spending = self._spec, self._spending
        began = time.monotonic()
        references = dict(self._problem.named)
        if (taught := self._taught()) is not None:
            references["learned"] = taught
        spending.free(list(references.values()))
        self._tell("Scored the named sub-adapters", 0)
        spending.explore(
            algorithm(spec.algorithm), spec.num_evals, lambda generation: self._tell("Searching", generation)
        )
        found = self._front()
        finalists = list(dict.fromkeys([*found[: spec.finalists], *references.values()]))
        total = len(self._candidates.items)
        self._ledger.extend([self._problem.config(choice) for choice in finalists], total)
        result = self._result(references, found, finalists) | {"seconds": round(time.monotonic() - began, 1)}
        report.write(spec.directory / rundir.OUTPUT, self._progression(), result)
        self._events.write(
            self._verdict(result), type="progress",
            step=spec.num_evals, total_steps=spec.num_evals, seconds_left=0,
        )  # fmt: skip
        return result | {"path": str(spec.directory / rundir.OUTPUT)}

    @property
    def _chosen_by(self) -> int:
        """So many of the first items say which finalist is best: those of the search, and half of the others.
        The rest say what it is worth; by items that it was chosen by, it would seem better than it is."""
        searched, total = self._candidates.searched, len(self._candidates.items)
        return searched + (total - searched) // 2

    def _taught(self) -> Choice | None:
        try:
            return self._problem.choice(learned.read(self._spec.super_adapter, self._problem.space))
        except AdapterError:
            return None

    def _tell(self, what: str, generation: int) -> None:
        spent, evals, ledger = float(self._spending.spent), self._spec.num_evals, self._ledger
        searched, total = self._candidates.searched, len(self._candidates.items)
        left = max(0.0, evals - spent) * searched + (self._spec.finalists + 4) * (total - searched)
        seconds = ledger.seconds / ledger.scored * left if ledger.scored else None
        named = self._spending.score(self._problem.named["heuristic"], 0, searched)
        top = self._spending.score(self._front()[0], 0, searched)
        sign = self._candidates.sign
        self._events.write(
            f"{what}: {spent:.4g} of {evals} evaluations in {generation} generations; best "
            f"{self._candidates.metric} {sign * top:.4f}, heuristic {sign * named:.4f}"
            + ("" if seconds is None else f"; {seconds:.0f} s left"),
            type="progress", step=int(spent), total_steps=evals, generation=generation, saved=True,
            best=sign * top, seconds_left=None if seconds is None else round(seconds, 1),
        )  # fmt: skip
        self._check()

    def _front(self) -> list[Choice]:
        """Of all that was scored on all of the search's items, best score first."""
        searched = self._candidates.searched
        whole = [choice for choice, seen in self._spending.seen.items() if seen >= searched]
        return [whole[place] for place in front([self._spending.measured(choice) for choice in whole])]

    # -- the report ---------------------------------------------------------------------------------------

    def _result(
        self, references: dict[str, Choice], found: Sequence[Choice], finalists: Sequence[Choice]
    ) -> dict[str, Any]:
        spec, searched, total = self._spec, self._candidates.searched, len(self._candidates.items)
        final = [self._final(choice) for choice in finalists]
        winner = max(
            range(len(final)), key=lambda i: (final[i]["deciding"]["score"], -final[i][spec.cost], -i)
        )
        return {
            "algorithm": spec.algorithm,
            "metric": self._candidates.metric,
            "cost": spec.cost,
            "seed": spec.seed,
            "population": spec.population,
            "num_evals": spec.num_evals,
            "halving": spec.halving,
            "items": searched,
            "all_items": total,
            "chosen_by_items": self._chosen_by,
            "validation": spec.validation_name or "held out of the training's data",
            "configurations": len(self._spending.seen),
            "evaluations": {
                "search": round(float(self._spending.spent), 3),
                "references": len(set(references.values())),
                "rescoring": round(len(finalists) * (total - searched) / searched, 3),
            },
            "references": {name: self._entry(choice) for name, choice in references.items()},
            "front": [{"version": f"pareto-{k}"} | self._entry(choice) for k, choice in enumerate(found)],
            "finalists": final,
            "best": {"version": "best"} | final[winner],
            "key": self._candidates.key,
        }

    def _entry(self, choice: Choice) -> dict[str, Any]:
        """A sub-adapter on the search's items."""
        config = self._problem.config(choice)
        return {
            "config": list(config),
            **self._mean(config, 0, self._candidates.searched),
            "parameters": self._candidates.parameters(config),
            "macs": self._candidates.macs(config),
        }

    def _final(self, choice: Choice) -> dict[str, Any]:
        """The same on those items that decide which finalist is best, on all, and on those alone by which
        nothing was chosen, beside the heuristic."""
        config, heuristic = self._problem.config(choice), self._problem.space.heuristic
        searched, total = self._candidates.searched, len(self._candidates.items)
        names = [name for name, named in self._problem.named.items() if named == choice]
        entry = self._entry(choice) | {
            "names": names,
            "deciding": self._mean(config, 0, self._chosen_by),
            "rescored": self._mean(config, 0, total),
        }
        if total > searched:
            pairs = zip(self._ledger.values[config], self._ledger.values[heuristic], strict=True)
            gains = [self._candidates.sign * (ours - theirs) for ours, theirs in pairs][
                self._chosen_by : total
            ]
            gain = mean(gains)
            entry["fresh"] = self._mean(config, self._chosen_by, total) | {
                "gain": gain.value,
                "gain_stderr": _finite(gain.stderr),
            }
        return entry

    def _mean(self, config: Config, first: int, last: int) -> dict[str, Any]:
        found = mean(self._ledger.values[config][first:last])
        return {
            "score": self._candidates.sign * found.value,
            "stderr": _finite(found.stderr),
            "scored_items": last - first,
        }

    def _progression(self) -> list[dict[str, Any]]:
        rows = []
        for choice, generation in sorted(self._spending.order.items(), key=lambda pair: pair[1]):
            config = self._problem.config(choice)
            scored = self._mean(config, 0, self._spending.seen[choice])
            rows.append(
                {
                    "config": list(config),
                    "macs": self._candidates.macs(config),
                    "top1_acc": scored["score"],
                    "generation": generation,
                    "parameters": self._candidates.parameters(config),
                    "items": scored["scored_items"],
                    "stderr": scored["stderr"],
                }
            )
        return rows

    def _verdict(self, result: dict[str, Any]) -> str:
        found, heuristic = result["best"], result["references"]["heuristic"]
        sign = self._candidates.sign
        text = (
            f"Best of {result['configurations']} configurations: {result['metric']} "
            f"{sign * found['rescored']['score']:.4f} +- {_shown(found['rescored']['stderr'])} on "
            f"{result['all_items']} items with {found['parameters']:,} parameters (heuristic: "
            f"{heuristic['parameters']:,})"
        )
        if (fresh := found.get("fresh")) is None:
            return f"{text}; all items were searched on, so the score is too good by an unknown amount"
        error = fresh["gain_stderr"]
        text += f"; on the {fresh['scored_items']} items that it was not chosen by {fresh['gain']:+.4f}"
        if error is None:
            return f"{text} over the heuristic"
        beyond = "" if abs(fresh["gain"]) > 2 * error else ", which is within the noise"
        return f"{text} +- {error:.4f} over the heuristic{beyond}"


def _shown(error: float | None) -> str:
    return "?" if error is None else f"{error:.4f}"


def _finite(value: float) -> float | None:
    """A standard error as JSON can hold it: there is none of a single item."""
    return value if math.isfinite(value) else None
