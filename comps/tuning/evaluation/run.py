"""One evaluation, from its spec to its result: a model, questions, metrics with standard errors."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import astuple
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from comps.tuning import rundir
from comps.tuning.data.prompts import expected_response, render
from comps.tuning.elastic.model import ElasticController, load_adapter, make_elastic
from comps.tuning.elastic.read_space import load_space
from comps.tuning.errors import DataError, ModelError
from comps.tuning.evaluation.generate import answers, is_exact, is_number, is_numeric
from comps.tuning.evaluation.items import Items
from comps.tuning.evaluation.notes import FILE as NOTES
from comps.tuning.evaluation.notes import Notes
from comps.tuning.evaluation.questions import Question, read_questions, spread
from comps.tuning.evaluation.scorer import Scorer
from comps.tuning.evaluation.scores import CHOICE_METRICS, TOKEN_METRICS, Metric, RowScore, mean
from comps.tuning.evaluation.tasks import load_task, metrics_of
from comps.tuning.models.load import load_base_model, load_tokenizer
from comps.tuning.spec import DataSpec, EvaluateSpec

ITEMS = "items.jsonl"
_ANSWERS, _SCORES = "answer/", "score/"  # kinds of notes
GENERATED = ("exact_match", "numeric_match")


class EvaluationDataError(DataError):
    code = "invalid_evaluation_file"


class _Stopped(Exception):
    """The service asks the run to leave."""


def evaluate(spec: EvaluateSpec) -> dict[str, Any] | None:
    """Returns ``{"path", "metrics": {name: {"value", "stderr"}}, "items", ...}`` and writes a record for each
    item to ``output/items.jsonl``; ``None`` when it was asked to stop and did.

    Raises :class:`TuningError`.
    """
    if spec.resources.cpus:
        torch.set_num_threads(spec.resources.cpus)
    events = rundir.EventWriter(spec.directory)
    try:
        return _Run(spec, events).result()
    except _Stopped:
        return None
    finally:
        events.close()


class _Run:
    def __init__(self, spec: EvaluateSpec, events: rundir.EventWriter) -> None:
        self.spec, self._events = spec, events
        self._began = self._told = time.monotonic()
        self._notes = Notes(spec.directory / NOTES)
        self._phases, self._done = 1, 0  # in all, and those that are over
        self._count = self._unscored = 0  # questions

    def result(self) -> dict[str, Any]:
        questions, metrics = self._questions()
        tokenizer = load_tokenizer(self.spec.base_model)
        model, controller = load_model(self.spec)
        how = self._how(model)
        self._events.write(f"Evaluating {len(questions)} questions by {', '.join(metrics)}{how}")
        self._count = len(questions)
        if self._notes.found:
            self._events.write(f"Resuming: {len(self._notes.found)} answers or scores were there before")
        kinds = (GENERATED, CHOICE_METRICS, TOKEN_METRICS)
        self._phases = sum(any(name in kind for name in metrics) for kind in kinds)
        self._began = time.monotonic()
        found: dict[str, Metric] = {}
        records: list[list[dict[str, Any]]] = []
        at = nullcontext() if controller is None else controller.at(self.spec.config or controller.active)
        with at:
            if chosen := [name for name in metrics if name in GENERATED]:
                records.append(list(self._generated(model, tokenizer, questions, chosen, found)))
            if any(name in CHOICE_METRICS or name in TOKEN_METRICS for name in metrics):
                records += self._scored(model, controller, tokenizer, questions, metrics, found)
        values = {name: found[name] for name in metrics}
        for name, metric in values.items():
            if not math.isfinite(metric.value):
                raise ModelError(f"{name} is no finite number; has the training of this model diverged?")
        path = self._write(questions, tokenizer, records)
        said = ", ".join(f"{name} {_shown(metric)}" for name, metric in values.items())
        steps = self._phases * len(questions)
        self._events.write(
            f"Evaluated {len(questions)} questions: {said}",
            type="progress", step=steps, total_steps=steps, seconds_left=0,
        )  # fmt: skip
        return {
            "path": str(path),
            "metrics": {name: _plain(metric) for name, metric in values.items()},
            "items": len(questions),
            "unscored": self._unscored,
            "seconds": round(time.monotonic() - self._began, 3),
        }

    def _questions(self) -> tuple[list[Question], tuple[str, ...]]:
        spec = self.spec
        needs_choices = any(name in CHOICE_METRICS for name in spec.metrics)
        try:
            if spec.task:
                metrics = spec.metrics or metrics_of(spec.task)
                needs_choices |= "acc" in metrics
                found = load_task(spec.task, spec.tasks_dir, texts=spec.texts, choices=needs_choices)
            else:
                assert spec.file is not None
                found = read_questions(
                    spec.file, spec.file_name, texts=spec.texts, choices=needs_choices,
                    max_bytes=spec.max_record_bytes,
                )  # fmt: skip
                bare = sum(not each.choices for each in found)
                metrics = spec.metrics or (TOKEN_METRICS if bare else ("acc", "acc_norm"))
                if 0 < bare < len(found) and not spec.metrics:
                    sentence = (
                        f"{bare} of {len(found)} questions have no choices, so the responses are scored"
                    )
                    self._events.write(sentence, level="warn")
        except DataError as error:
            param = error.param or ("task" if spec.task else "file")
            raise EvaluationDataError(error.message, param=param) from error
        return spread(found, spec.limit, spec.seed), metrics

    def _how(self, model: Any) -> str:
        if self.spec.config is None:
            return ""
        ranks = self.spec.config
        return f", at {self.spec.version or 'custom'} ranks (mean {sum(ranks) / len(ranks):.3g})"

    def _generated(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        questions: list[Question],
        metrics: list[str],
        found: dict[str, Metric],
    ) -> Iterator[dict[str, Any]]:
        expects = [
            each.value if each.value is not None else expected_response(each.record) for each in questions
        ]
        if "numeric_match" in metrics and not any(map(is_number, expects)):
            sentence = "numeric_match: no question expects a number, or the letter of an option"
            raise EvaluationDataError(sentence, param="metrics")
        known: dict[str, str] = self._notes.of(_ANSWERS)

        def progress(done: int, total: int) -> None:
            self._notes.add(_ANSWERS, known, lambda key, output: (key, output))
            self._progress(done, total)

        outputs = answers(
            model, tokenizer, [each.record for each in questions], max_new_tokens=self.spec.max_new_tokens,
            batch_size=self.spec.batch_size, progress=progress, known=known, cut=self._cut,
        )  # fmt: skip
        self._done += 1
        right: dict[str, list[bool]] = {name: [] for name in metrics}
        for question, output, number in zip(questions, outputs, expects, strict=True):
            exact = is_exact(output, expected_response(question.record))
            for name in metrics:
                right[name].append(exact if name == "exact_match" else is_numeric(output, number))
        for name in metrics:
            found[name] = mean([float(each) for each in right[name]])
        for place, output in enumerate(outputs):
            where = questions[place].where
            expected = expected_response(questions[place].record)
            yield {
                "item": where,
                "output": output,
                "expected": expected,
                **{name: int(right[name][place]) for name in metrics},
            }

    def _scored(
        self,
        model: Any,
        controller: ElasticController | None,
        tokenizer: PreTrainedTokenizerBase,
        questions: list[Question],
        metrics: tuple[str, ...],
        found: dict[str, Metric],
    ) -> list[list[dict[str, Any]]]:
        scorer = Scorer(model, controller)
        config = None if controller is None else controller.active
        for key, rows in self._notes.of(_SCORES).items():
            scorer.known[config, key] = tuple(RowScore(*row) for row in rows)

        def progress(done: int, total: int) -> None:
            self._notes.add(_SCORES, scorer.known, lambda key, rows: (key[1], [astuple(row) for row in rows]))
            self._progress(done, total)

        records = []
        longest = getattr(model.config, "max_position_embeddings", None)
        for names in (CHOICE_METRICS, TOKEN_METRICS):
            wanted = [name for name in metrics if name in names]
            if not wanted:
                continue
            if names is CHOICE_METRICS:
                items = Items.choices(questions, tokenizer, longest)
            else:
                length = min(self.spec.max_length, longest or self.spec.max_length)
                data = DataSpec(train_file=Path(), max_length=length, max_source_length=length)
                items = Items.responses(questions, tokenizer, data)
                if not len(items):
                    sentence = "no question has a response within max_length"
                    raise EvaluationDataError(sentence, param="max_length")
            self._unscored = max(self._unscored, len(questions) - len(items))
            if len(items) < len(questions):
                sentence = (
                    f"{len(questions) - len(items)} of {len(questions)} questions have no response to score"
                )
                self._events.write(sentence, level="warn")
            if items.truncated and names is CHOICE_METRICS:
                self._cut(items.truncated)
            elif items.truncated:
                sentence = (
                    f"{items.truncated} questions with their responses exceed {length} tokens and were cut"
                )
                self._events.write(sentence, level="warn")
            (scores,) = scorer.score(items, progress=progress)
            self._done += 1
            for name in wanted:
                found[name] = scores.metric(name)
            records.append(list(scores.records()))
        return records

    def _cut(self, count: int) -> None:
        sentence = f"{count} questions are longer than the model takes, and lost their beginning"
        self._events.write(sentence, level="warn")

    def _progress(self, done: int, total: int) -> None:
        """``done`` of ``total`` of the present phase, whose others are known."""
        if (self.spec.directory / rundir.STOP).exists():
            raise _Stopped
        now = time.monotonic()
        if now - self._told > 2:
            self._told = now
            before = self._count - total  # known from an earlier attempt, or not to be scored
            step, steps = self._done * self._count + before + done, self._phases * self._count
            left = (now - self._began) / (step - before) * (steps - step)
            part = f" (part {self._done + 1} of {self._phases})" if self._phases > 1 else ""
            self._events.write(
                f"{before + done} of {self._count} questions{part}",
                type="progress", step=step, total_steps=steps, seconds_left=round(left, 1), saved=True,
            )  # fmt: skip

    def _write(
        self,
        questions: list[Question],
        tokenizer: PreTrainedTokenizerBase,
        records: list[list[dict[str, Any]]],
    ) -> Path:
        """One line for each question: its prompt before any cut, and what all of the metrics found out."""
        lines: dict[str, dict[str, Any]] = {}
        for each in questions:
            prompt = render(each.record, tokenizer, each.where).prompt
            lines[each.where] = {"item": each.where, "prompt": prompt}
            if each.choices:
                lines[each.where]["choices"] = list(each.choices)
        for record in (record for part in records for record in part):
            lines[record["item"]] |= record
        output = self.spec.directory / rundir.OUTPUT
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values())
        with rundir.new_directory(output) as directory:
            (directory / ITEMS).write_text(text, encoding="utf-8")
        return output / ITEMS


def load_model(spec: EvaluateSpec) -> tuple[PreTrainedModel | peft.PeftModel, ElasticController | None]:
    """The model to evaluate, in evaluation mode, and the ranks of a super-adapter."""
    base = load_base_model(spec.base_model)
    if spec.adapter is None:
        return base, None
    model = load_adapter(base, spec.adapter)
    if spec.config is None:
        return model, None
    return model, make_elastic(model, load_space(spec.adapter))


def _plain(metric: Metric) -> dict[str, float | None]:
    return {"value": metric.value, "stderr": None if math.isnan(metric.stderr) else metric.stderr}


def _shown(metric: Metric) -> str:
    return f"{metric.value:.4g}" + ("" if math.isnan(metric.stderr) else f" ± {metric.stderr:.2g}")
