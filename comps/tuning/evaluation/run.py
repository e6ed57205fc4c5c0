"""One evaluation, from its spec to its result: a model, questions, metrics with standard errors."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from comps.tuning import rundir
from comps.tuning.data.prompts import expected_response
from comps.tuning.elastic.model import ElasticController, load_adapter, make_elastic
from comps.tuning.elastic.read_space import load_space
from comps.tuning.errors import DataError
from comps.tuning.evaluation.generate import answers, is_exact, is_numeric
from comps.tuning.evaluation.items import Items
from comps.tuning.evaluation.questions import Question, read_questions, spread
from comps.tuning.evaluation.scorer import Scorer
from comps.tuning.evaluation.scores import CHOICE_METRICS, TOKEN_METRICS, Metric, mean
from comps.tuning.evaluation.tasks import load_task, metrics_of
from comps.tuning.models.load import load_base_model, load_tokenizer
from comps.tuning.spec import DataSpec, EvaluateSpec

ITEMS = "items.jsonl"
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

    def result(self) -> dict[str, Any]:
        questions, metrics = self._questions()
        tokenizer = load_tokenizer(self.spec.base_model)
        model, controller = load_model(self.spec)
        how = self._how(model)
        self._events.write(f"Evaluating {len(questions)} questions by {', '.join(metrics)}{how}")
        found: dict[str, Metric] = {}
        records: list[list[dict[str, Any]]] = []
        at = nullcontext() if controller is None else controller.at(self.spec.config or controller.active)
        with at:
            if chosen := [name for name in metrics if name in GENERATED]:
                records.append(list(self._generated(model, tokenizer, questions, chosen, found)))
            if any(name in CHOICE_METRICS or name in TOKEN_METRICS for name in metrics):
                records += self._scored(model, controller, tokenizer, questions, metrics, found)
        values = {name: found[name] for name in metrics}
        path = self._write(questions, records)
        said = ", ".join(f"{name} {_shown(metric)}" for name, metric in values.items())
        self._events.write(f"Evaluated {len(questions)} questions: {said}")
        return {
            "path": str(path),
            "metrics": {name: _plain(metric) for name, metric in values.items()},
            "items": len(questions),
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
                chosen = ("acc", "acc_norm") if all(each.choices for each in found) else TOKEN_METRICS
                metrics = spec.metrics or chosen
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
        outputs = answers(
            model, tokenizer, [each.record for each in questions],
            max_new_tokens=self.spec.max_new_tokens, batch_size=self.spec.batch_size, progress=self._progress,
        )  # fmt: skip
        right: dict[str, list[bool]] = {name: [] for name in metrics}
        for question, output in zip(questions, outputs, strict=True):
            expected = expected_response(question.record)
            for name in metrics:
                right[name].append(
                    is_exact(output, expected)
                    if name == "exact_match"
                    else is_numeric(output, question.value if question.value is not None else expected)
                )
        for name in metrics:
            found[name] = mean([float(each) for each in right[name]])
        for place, output in enumerate(outputs):
            where = questions[place].where
            yield {"item": where, "output": output, **{name: int(right[name][place]) for name in metrics}}

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
            if cut := items.truncated:
                sentence = f"{cut} of {len(items)} questions were longer than the model takes and were cut"
                self._events.write(sentence, level="warn")
            (scores,) = scorer.score(items, progress=self._progress)
            for name in wanted:
                found[name] = scores.metric(name)
            records.append(list(scores.records()))
        return records

    def _progress(self, done: int, total: int) -> None:
        if (self.spec.directory / rundir.STOP).exists():
            raise _Stopped
        now = time.monotonic()
        if now - self._told > 2:
            self._told = now
            left = (now - self._began) / done * (total - done)
            self._events.write(
                f"{done} of {total} questions", type="progress", step=done, total_steps=total,
                seconds_left=round(left, 1),
            )  # fmt: skip

    def _write(self, questions: list[Question], records: list[list[dict[str, Any]]]) -> Path:
        """One line for each question, with what all of the metrics found out about it."""
        lines: dict[str, dict[str, Any]] = {each.where: {"item": each.where} for each in questions}
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
