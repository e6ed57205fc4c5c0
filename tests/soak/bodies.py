"""Training data and requests, good ones and bad ones."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

MODEL = "tiny/llama"
LAYERS, GROUPS = 2, 3

LORA: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0,
    "neural_lora_search": True,
    "target_module_groups": [["q_proj", "k_proj", "v_proj"], ["up_proj"], ["down_proj"]],
    "search_space": ["8,6,4", "8,4", [8, 4, 2]],
}
PLAIN = {"r": 4, "lora_alpha": 8, "lora_dropout": 0, "target_modules": ["q_proj", "v_proj"]}
# One rank for each group and layer, group after group.
CUSTOM = {"one": [8, 4, 8, 4, 2, 8], "two": [6, 6, 4, 4, 4, 4]}


def records(form: str, count: int) -> bytes:
    """A good file of ``count`` records, as ``json``, ``jsonl`` or ``csv``."""
    rows = [
        {"instruction": "Say the number.", "input": str(number), "output": f"number {number}"}
        for number in range(count)
    ]
    if form == "json":
        return json.dumps(rows).encode()
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def bad_records(fault: str) -> bytes:
    """A file that is stored, and fails every job that trains on it."""
    good = {"instruction": "a", "output": "b"}
    return {
        "broken": b'[{"instruction": "a", "output": "b"},',
        "not UTF-8": b'{"instruction": "\xff\xfe", "output": "b"}\n',
        "wrong type": json.dumps([good, {"instruction": 3, "output": "b"}]).encode(),
        "empty output": json.dumps([good, {"instruction": "a", "output": ""}]).encode(),
        "nested": b"[" * 100_000,
    }[fault]


def job(kind: str, file_id: str, steps: int, checkpoint: str | None = None) -> dict[str, Any]:
    """The body of a job of one of :data:`tests.soak.plans.JOB_KINDS`."""
    general: dict[str, Any] = {"lora_config": PLAIN if kind == "plain" else LORA}
    # One thread for each worker: tiny tensors gain nothing from more.
    training: dict[str, Any] = {
        "max_train_steps": steps,
        "epochs": 1000,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "resources_per_worker": {"CPU": 1},
    }
    if kind == "long":
        general |= {"save_steps": 20, "save_total_limit": 2}
        training |= {"max_train_steps": 30 * steps, "batch_size": 8}
    elif kind == "two_workers":
        training["num_training_workers"] = 2
    elif kind == "too_big":
        training["resources_per_worker"] = {"CPU": 4096}
    elif kind == "resumed":
        general["resume_from_checkpoint"] = checkpoint
        training["max_train_steps"] = steps + 30
    dataset = {"max_length": 256, "validation_split_percentage": 10}
    return {
        "model": MODEL,
        "training_file": file_id,
        "General": general,
        "Dataset": dataset,
        "Training": training,
        "metadata": {"kind": kind},
    }


def refused_job(fault: str, file_id: str) -> tuple[bytes, int]:
    """A body that must be refused, and the status of the refusal."""
    body = job("nls", file_id, 4)
    lora = dict(LORA)
    if fault == "not JSON":
        return b'{"model": ', 422
    if fault == "no file":
        del body["training_file"]
    elif fault == "unknown file":
        return json.dumps(body | {"training_file": "file-of-nobody"}).encode(), 404
    elif fault == "rank above r":
        lora["search_space"] = ["16,8", "8,4", "8,4"]
    else:
        lora["target_module_groups"] = [["no_proj"], ["up_proj"], ["down_proj"]]
    return json.dumps(body | {"General": {"lora_config": lora}}).encode(), 422
