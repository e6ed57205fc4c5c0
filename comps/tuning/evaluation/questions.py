"""Records as questions: what is asked, what may be answered, which answer is right. Needs no torch.

A question is a training record (Alpaca, prompt and completion, or a chat) whose response is the right answer,
so that its prompt is the one of training, with the answers to choose from besides. They come as

- ``choices``, a list of texts, and ``answer``, the right one's place (from 0) or text; or as on the hub with
  ``choices`` ``{"label": [...], "text": [...]}`` and ``answerKey``;
- the records of LLM-Adapters (github.com/AGI-Edgerunners/LLM-Adapters): ``instruction`` ends with
  ``Answer format: answer1/answer2``, ``output`` names the right label in a sentence and ``answer`` is that
  label. The choices are then that sentence with each label in turn, as such data trains a model, or
  with ``texts`` the answers themselves, which the instruction lists (``Answer1: ... Answer2: ...``), and the
  prompt is the bare question.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from comps.tuning.data.formats import MAX_RECORD_BYTES, detect_format, unit
from comps.tuning.data.records import Summary, iter_records
from comps.tuning.data.shapes import check_record, shape_of
from comps.tuning.errors import DataError

_FORMAT = "Answer format:"
_MOST = 100  # choices of a question
_LONGEST = 10_000_000  # characters of all its choices together


@dataclass(frozen=True)
class Question:
    """``record``: a training record whose response is the right one. ``choices``: the texts to choose from,
    none where there is nothing to choose; ``answer``: the right one's place. ``value``: what the record
    gives as the final answer (a number, a label), if it does."""

    record: dict[str, Any]
    where: str
    choices: tuple[str, ...] = ()
    answer: int | None = None
    value: str | None = None


def read_questions(
    path: Path,
    name: str = "",
    *,
    texts: bool = False,
    choices: bool = False,
    limit: int | None = None,
    max_bytes: int = MAX_RECORD_BYTES,
) -> list[Question]:
    """The questions of a file of records, the first ``limit`` of them.

    ``choices``: each must have some. Raises :class:`DataError` for the first record that is no question.
    """
    name = name or path.name
    counts = unit(detect_format(path, name))
    found = [
        to_question(record, f"{name}, {counts} {number}", texts=texts, choices=choices)
        for number, record in islice(iter_records(path, name, limit=max_bytes), limit)
    ]
    if not found:
        raise DataError(f"{name}: holds no record")
    return found


def check_questions(
    path: Path, name: str = "", *, texts: bool = False, choices: bool = False, limit: int = MAX_RECORD_BYTES
) -> Summary:
    """Read the whole file once, in bounded memory: each record must be a question of at most ``limit`` bytes.

    Raises :class:`DataError` as :func:`read_questions`.
    """
    name = name or path.name
    format = detect_format(path, name)
    count, shape = 0, None
    for number, record in iter_records(path, name, limit=limit):
        question = to_question(record, f"{name}, {unit(format)} {number}", texts=texts, choices=choices)
        count, shape = count + 1, shape_of(question.record)
    if shape is None:
        raise DataError(f"{name}: holds no record")
    return Summary(count, shape, format)


def to_question(
    record: dict[str, Any], where: str = "record", *, texts: bool = False, choices: bool = False
) -> Question:
    """One record as a question. Raises :class:`DataError`, naming place and field."""
    if record.get("choices") is not None:
        question = _listed(record, where)
    elif (labels := _labels(record)) and record.get("answer") is not None:
        question = _adapters(record, labels, where, texts)
    else:
        asked = dict(record)
        alone = not {"context", "passage"} & record.keys()  # which would be left out
        if shape_of(record) is None and "question" in record and record.get("answer") is not None and alone:
            asked = {"instruction": record["question"], "input": record.get("input")}
            asked["output"] = str(record["answer"])
        question = Question(asked, where, value=_value(record.get("answer")))
    shape = shape_of(question.record)
    if shape is None or shape == "text":
        raise DataError(
            f"{where}: is no question; it needs 'question' and 'answer' (with 'choices' to choose from), "
            "'instruction' and 'output', 'prompt' and 'completion', or 'messages'"
        )
    empty = check_record(question.record, shape, where)
    if empty and not (empty in ("output", "completion") and question.value):
        raise DataError(f"{where}: {empty!r} is empty")
    if choices and not question.choices:
        raise DataError(
            f"{where}: has nothing to choose from; it needs 'choices' (a list of texts) and 'answer', or an "
            "'instruction' that ends with 'Answer format: answer1/answer2'"
        )
    return question


def _value(answer: Any) -> str | None:
    return None if answer is None or isinstance(answer, dict | list) else str(answer)


def _listed(record: dict[str, Any], where: str) -> Question:
    listed: Any = record["choices"]
    labels = None
    if isinstance(listed, dict):
        listed, labels = listed.get("text"), listed.get("label")
    texts = isinstance(listed, list) and all(isinstance(choice, str) for choice in listed)
    if not texts or not 2 <= len(listed) <= _MOST:
        raise DataError(f"{where}: 'choices' must be a list of 2 to {_MOST} texts")
    for place, choice in enumerate(listed):
        if not choice.strip():
            raise DataError(f"{where}: 'choices[{place}]' is empty")
    answer = record.get("answer", record.get("answerKey"))
    right_place = _place(answer, listed, labels)
    if right_place is None:
        given = f"the text {answer[:60]!r}" if isinstance(answer, str) else repr(str(answer)[:60])
        raise DataError(
            f"{where}: 'answer' must be the place (from 0 to {len(listed) - 1}) or the text of one of its "
            f"{len(listed)} choices, not {given}"
        )
    right = listed[right_place]
    if "messages" in record:
        messages = record["messages"]
        if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
            said = messages[:-1] if messages[-1].get("role") == "assistant" else messages
            asked: dict[str, Any] = {"messages": [*said, {"role": "assistant", "content": right}]}
        else:
            asked = {"messages": messages}
    elif "prompt" in record:
        asked = {"prompt": record["prompt"], "completion": right}
    elif "instruction" in record or "question" in record:
        instruction = record.get("instruction", record.get("question"))
        asked = {"instruction": instruction, "input": record.get("input"), "output": right}
    else:
        raise DataError(f"{where}: has 'choices', but no 'question', 'instruction', 'prompt' or 'messages'")
    return Question(asked, where, tuple(listed), right_place)


def _place(answer: Any, choices: list[str], labels: Any) -> int | None:
    if isinstance(answer, str):
        # Labels come first: of ARC's some are numbers, as are texts of other choices.
        if isinstance(labels, list) and answer in labels and len(labels) == len(choices):
            return labels.index(answer)
        return choices.index(answer) if answer in choices else None
    if isinstance(answer, bool) or not isinstance(answer, int):
        return None
    return answer if 0 <= answer < len(choices) else None


def _labels(record: dict[str, Any]) -> list[str]:
    """``["answer1", "answer2"]`` from the end of the instruction; empty when it has no such end."""
    instruction = record.get("instruction")
    if not isinstance(instruction, str):
        return []
    _, mark, end = instruction.rpartition(_FORMAT)
    words = end.split(maxsplit=1) if mark else []
    labels = words[0].split("/") if len(words) == 1 else []
    return labels if len(labels) > 1 and all(labels) else []


def _without_format(instruction: str) -> str:
    return instruction.rpartition(_FORMAT)[0].rstrip()


def _adapters(record: dict[str, Any], labels: list[str], where: str, texts: bool) -> Question:
    answer, output = record["answer"], record.get("output")
    if answer not in labels:
        raise DataError(
            f"{where}: 'answer' must be one of {', '.join(labels)[:80]}, not {str(answer)[:60]!r}"
        )
    if len(labels) > _MOST:
        raise DataError(f"{where}: its 'Answer format' has {len(labels)} labels; {_MOST} are the most")
    place = labels.index(answer)
    if texts:
        question, listed = _from_text(record["instruction"], labels)
        if len(listed) != len(labels):
            raise DataError(
                f"{where}: its instruction does not list the text of each of {', '.join(labels)[:80]}, so "
                "only the labels can be chosen from"
            )
        asked = {"instruction": question, "input": record.get("input"), "output": listed[place]}
        return Question(asked, where, tuple(listed), place, answer)
    if not isinstance(output, str) or output.count(answer) != 1:
        raise DataError(f"{where}: 'output' must be a sentence that names {answer!r} once")
    if len(output) * len(labels) > _LONGEST:
        raise DataError(f"{where}: 'output' is too long to be made a choice with each of its labels")
    choices = tuple(output.replace(answer, label) for label in labels)
    return Question(dict(record), where, choices, place, answer)


def _from_text(instruction: str, labels: list[str]) -> tuple[str, list[str]]:
    """The bare question, and the texts of the labels as far as they are listed in order. Labels without
    a number, as true and false, are texts themselves."""
    listed = _without_format(instruction)
    lead, colon, question = listed.partition(": ")
    if not any(label[-1].isdigit() for label in labels):
        return (question if lead.startswith("Please") and colon else listed).strip(), labels
    found = []
    for label in reversed(labels):
        before, mark, text = listed.rpartition(f"{label[0].upper()}{label[1:]}: ")
        if not mark or not text.strip():
            return instruction, []
        found.append(text.strip())
        listed = before
    lead, colon, question = listed.partition(": ")
    if not (lead.startswith("Please") and colon):
        question = listed
    return question.strip(), found[::-1]


def spread(questions: list[Question], limit: int | None, seed: int) -> list[Question]:
    """``limit`` of the questions, drawn without looking at them and in their order; all without a limit."""
    if limit is None or limit >= len(questions):
        return questions
    places = sorted(random.Random(seed).sample(range(len(questions)), limit))
    return [questions[place] for place in places]
