"""Evaluation tasks that have a name: eight of commonsense and four of arithmetic, those of LLM-Adapters.

A task's questions come from a local file, ``<directory>/<name>/test.json`` (the layout of LLM-Adapters'
``dataset`` folder; also ``.jsonl`` or ``.parquet``), or else from the Hugging Face hub through ``datasets``.
Needs no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comps.tuning.errors import DataError
from comps.tuning.evaluation.questions import Question, read_questions, to_question

Record = dict[str, Any]
COMMONSENSE = (
    "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa",
)  # fmt: skip
MATH = ("gsm8k", "SVAMP", "mawps", "AQuA")
NAMES = COMMONSENSE + MATH
_SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Hub:
    """Where a task is on the hub, and how its rows become records of :func:`~.questions.to_question`."""

    path: str
    split: str
    convert: Callable[[Record], Record]
    subset: str | None = None


def _boolq(row: Record) -> Record:
    question = f"{row['passage']}\n\n{row['question']}?" if row.get("passage") else f"{row['question']}?"
    return {"question": question, "choices": ["false", "true"], "answer": int(bool(row["answer"]))}


def _piqa(row: Record) -> Record:
    return {"question": row["goal"], "choices": [row["sol1"], row["sol2"]], "answer": int(row["label"])}


def _social(row: Record) -> Record:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    question = f"{row['context']} {row['question']}"
    return {"question": question, "choices": choices, "answer": int(row["label"]) - 1}


def _hellaswag(row: Record) -> Record:
    return {"question": row["ctx"], "choices": list(row["endings"]), "answer": int(row["label"])}


def _winogrande(row: Record) -> Record:
    choices = [row["option1"], row["option2"]]
    return {"question": row["sentence"], "choices": choices, "answer": int(row["answer"]) - 1}


def _arc(row: Record) -> Record:
    return {"question": row["question"], "choices": row["choices"], "answerKey": row["answerKey"]}


def _openbook(row: Record) -> Record:
    return _arc({**row, "question": row["question_stem"]})


def _solved(question: str, solution: str, answer: str) -> Record:
    return {"instruction": question, "input": "", "output": solution, "answer": answer}


def _gsm8k(row: Record) -> Record:
    return _solved(row["question"], row["answer"], str(row["answer"]).rpartition("####")[2].strip())


def _svamp(row: Record) -> Record:
    return _solved(f"{row['Body']} {row['Question']}", str(row["Answer"]), str(row["Answer"]))


def _mawps(row: Record) -> Record:
    question = str(row["Question"])
    for place, number in enumerate(str(row.get("Numbers", "")).split()):
        question = re.sub(rf"\bN_0*{place}\b", number, question)
    return _solved(question, str(row["Answer"]), str(row["Answer"]))


def _aqua(row: Record) -> Record:
    listed = ", ".join(row["options"])
    return _solved(f"{row['question']} Answer Choices: {listed}", row["rationale"], row["correct"])


_HUB = {
    "boolq": Hub("google/boolq", "validation", _boolq),
    "piqa": Hub("baber/piqa", "validation", _piqa),
    "social_i_qa": Hub("lighteval/siqa", "validation", _social),
    "hellaswag": Hub("Rowan/hellaswag", "validation", _hellaswag),
    "winogrande": Hub("allenai/winogrande", "validation", _winogrande, "winogrande_xl"),
    "ARC-Easy": Hub("allenai/ai2_arc", "test", _arc, "ARC-Easy"),
    "ARC-Challenge": Hub("allenai/ai2_arc", "test", _arc, "ARC-Challenge"),
    "openbookqa": Hub("allenai/openbookqa", "test", _openbook, "main"),
    "gsm8k": Hub("openai/gsm8k", "test", _gsm8k, "main"),
    "SVAMP": Hub("ChilleD/SVAMP", "test", _svamp),
    "mawps": Hub("mwpt5/MAWPS", "train", _mawps),  # it has no other split
    "AQuA": Hub("deepmind/aqua_rat", "test", _aqua, "raw"),
}


def known_name(name: str) -> str | None:
    """The task that ``name`` means, whatever its case, hyphens and underscores."""
    return {_plain(each): each for each in NAMES}.get(_plain(name))


def metrics_of(name: str) -> tuple[str, ...]:
    """What a task is scored by, unless something else is asked for."""
    return ("acc", "acc_norm") if name in COMMONSENSE else ("numeric_match",)


def local_file(name: str, directory: Path) -> Path | None:
    """The task's file under ``directory``, if there is one."""
    if not directory.is_dir():
        return None
    for folder in sorted(directory.iterdir()):
        if _plain(folder.name) == _plain(name):
            for suffix in _SUFFIXES:
                if (file := folder / f"test{suffix}").is_file():
                    return file
    return None


def load_task(name: str, directory: Path, *, texts: bool = False, choices: bool = False) -> list[Question]:
    """The questions of the task ``name``, which is one of :data:`NAMES`.

    Raises :class:`DataError` when they are neither in ``directory`` nor to be had from the hub.
    """
    if file := local_file(name, directory):
        return read_questions(file, f"{name}/{file.name}", texts=texts, choices=choices)
    hub = _HUB[name]
    return [
        to_question(hub.convert(row), f"{name}, row {number}", texts=texts, choices=choices)
        for number, row in enumerate(_rows(name, hub, directory), start=1)
    ]


def check_on_hub(name: str, directory: Path) -> None:
    """Raises :class:`DataError` when the hub does not say that it has files of the task ``name``, which
    ``directory`` has not. (Data sets that are a program, as some were, are not loaded any more.)"""
    from huggingface_hub import HfApi

    with _of_hub(name, directory):
        found = HfApi().dataset_info(_HUB[name].path, timeout=30, token=False)
    files = [sibling.rfilename for sibling in found.siblings or ()]
    if not any(file.endswith((".parquet", ".json", ".jsonl", ".csv", ".arrow")) for file in files):
        raise DataError(
            f"the data set {_HUB[name].path!r} on the Hugging Face hub has no files of data", param="task"
        )


def _rows(name: str, hub: Hub, directory: Path) -> Iterable[Record]:
    from datasets import load_dataset

    with _of_hub(name, directory):
        rows: Iterable[Record] = load_dataset(hub.path, hub.subset, split=hub.split)
    return rows


@contextmanager
def _of_hub(name: str, directory: Path) -> Iterator[None]:
    """Whatever a library does with what a network gives becomes a :class:`DataError`."""
    missing = f"the task {name!r} is not in {directory.name}/{name}/test.json (FINETUNING_TASKS_DIR)"
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        raise DataError(f"{missing}, and the Hugging Face hub is not asked (HF_HUB_OFFLINE)", param="task")
    try:
        yield
    except Exception as error:
        raise DataError(
            f"{missing}, and the data set {_HUB[name].path!r} cannot be had from the Hugging Face hub: "
            f"{type(error).__name__}",
            param="task",
        ) from error


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()
