"""Turn ARC (the AI2 Reasoning Challenge) into instruction records: a question, and its right answer.

    python -m examples.prepare_arc arc_easy_train.json                        # from the hub
    python -m examples.prepare_arc arc_easy_train.json --file ARC-Easy.json   # from a local file

A local file is a JSON array, JSON Lines or Parquet, either as on the hub (``question``, ``choices``,
``answerKey``) or as multiple-choice instructions ("Please choose the correct answer to the question:
... Answer1: ... Answer2: ...", with ``answer`` naming one). The result has Alpaca's fields; ``input``
is empty.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from comps.tuning.data.records import iter_records

HUB_NAME = "allenai/ai2_arc"
_CHOICE = re.compile(r"\s*Answer(\d+): ")


def to_instruction(record: dict[str, Any]) -> dict[str, str]:
    """One question with its right answer. Raises ``ValueError`` for a record of neither kind."""
    if "question" in record:
        question = record["question"]
        answers = dict(zip(record["choices"]["label"], record["choices"]["text"], strict=True))
        right = record["answerKey"]
    elif "answer" in record:
        # The parts alternate: the question, "1", the first answer, "2", the second one, ...
        task, _, _ = record["instruction"].partition("\n\nAnswer format:")
        _, _, listed = task.partition("Please choose the correct answer to the question: ")
        question, *parts = _CHOICE.split(listed)
        answers = dict(zip(parts[::2], parts[1::2], strict=True))
        right = record["answer"].removeprefix("answer")
    else:
        raise ValueError(f"neither 'question' nor 'answer' among the fields {sorted(record)}")
    return {"instruction": question.strip(), "input": "", "output": answers[right].strip()}


def hub_records(subset: str, split: str) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    rows: Iterable[dict[str, Any]] = load_dataset(HUB_NAME, subset, split=split)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn ARC into instruction records.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--file", type=Path, help="a local file in place of the hub")
    parser.add_argument("--subset", default="ARC-Easy", choices=("ARC-Easy", "ARC-Challenge"))
    parser.add_argument("--split", default="train", choices=("train", "validation", "test"))
    options = parser.parse_args()
    rows: Iterable[dict[str, Any]]
    if options.file:
        rows = (record for _, record in iter_records(options.file))
    else:
        rows = hub_records(options.subset, options.split)
    records = [to_instruction(row) for row in rows]
    options.output.write_text(json.dumps(records, indent=4, ensure_ascii=False), encoding="utf-8")
    print(f"{options.output}: {len(records)} records")


if __name__ == "__main__":
    main()
