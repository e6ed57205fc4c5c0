"""Evaluations from the request to the result, with a real Ray: the numbers are those of the library."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fixtures_elastic import lora, super_adapter
from fixtures_jobs import succeeded_job
from fixtures_models import save_tiny_model, tiny_model, tiny_tokenizer
from fixtures_service import upload
from service_process import ServiceProcess

from comps.finetuning.store.database import Database
from comps.tuning.evaluation.items import Items
from comps.tuning.evaluation.questions import to_question
from comps.tuning.evaluation.scorer import Scorer
from comps.tuning.evaluation.scores import Scores

MODEL = "tiny/evaluated"
EXAMPLE = Path(__file__).parents[2] / "examples" / "evaluate.py"
QUESTIONS = [
    {
        "question": f"Which is {number}?",
        "choices": ["one", "two more", f"{number}", "none"],
        "answer": number % 4,
    }
    for number in range(12)
]
ARITHMETIC = [
    {"instruction": "Add 2 and 2.", "input": "", "output": "2 + 2 = 4. The answer is 4.", "answer": "4.0"},
    {"instruction": "Add 1 and 2.", "input": "", "output": "1 + 2 = 3. The answer is 3.", "answer": "3.0"},
]
ONE_CORE = {"resources_per_worker": {"CPU": 1}}


def ended(service: ServiceProcess, made: dict[str, Any]) -> dict[str, Any]:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        answer: dict[str, Any] = service.http.get(f"/v1/evaluations/{made['id']}").json()
        if answer["status"] in ("succeeded", "failed", "cancelled"):
            return answer
        time.sleep(0.2)
    raise AssertionError(service.http.get(f"/v1/fine_tuning/jobs/{made['id']}/logs").text[-3000:])


def expected(tmp_path: Path) -> tuple[Scores, Scores]:
    """Of the base model, and of the super-adapter in ``tmp_path`` at its minimal ranks."""
    items = Items.choices([to_question(each) for each in QUESTIONS], tiny_tokenizer())
    (base,) = Scorer(tiny_model(), way="padded").score(items)
    model, space, controller = super_adapter(tiny_model(), lora(), tmp_path)
    (adapted,) = Scorer(model, controller, way="padded").score(items, [space.minimal])
    return base, adapted


def test_evaluations_of_all_kinds(make_server, tmp_path: Path) -> None:
    base, adapted = expected(tmp_path / "adapter")
    assert base.results != adapted.results
    service = make_server(ray=True)
    save_tiny_model(service.models_dir / MODEL)
    database = Database(f"sqlite:///{service.data_dir}/finetuning.db")
    job_id = succeeded_job(
        database, service.data_dir / "jobs", service.models_dir / MODEL, tmp_path / "adapter"
    )
    database.dispose()
    task = service.data_dir / "tasks" / "svamp"
    task.mkdir(parents=True)
    (task / "test.json").write_text(json.dumps(ARITHMETIC))
    file = upload(service, QUESTIONS, "questions.json")
    broken = upload(
        service, [*QUESTIONS, {"question": "?", "choices": ["a", "b"], "answer": 7}], "broken.json"
    )

    def begin(**fields: Any) -> dict[str, Any]:
        answer = service.http.post("/v1/evaluations", json={"model": MODEL, **ONE_CORE, **fields})
        assert answer.status_code == 200, answer.text
        made: dict[str, Any] = answer.json()
        return made

    plain = begin(file=file)
    minimal = begin(fine_tuning_job_id=job_id, adapter_version="minimal", file=file, metric="loss")
    both = begin(
        task="SVAMP",
        metrics=["numeric_match", "exact_match", "perplexity", "token_accuracy"],
        max_new_tokens=4,
    )
    faulty, absent = begin(file=broken), begin(task="gsm8k")

    found = ended(service, plain)
    assert found["status"] == "succeeded", found
    assert found["items"] == len(QUESTIONS)
    assert list(found["metrics"]) == ["acc", "acc_norm"]
    for name, metric in found["metrics"].items():
        assert metric == {
            "value": pytest.approx(base.metric(name).value), "stderr": pytest.approx(base.metric(name).stderr)
        }  # fmt: skip
    lines = service.http.get(f"/v1/evaluations/{plain['id']}/items")
    assert lines.headers["content-type"].startswith("application/jsonl")
    records = [json.loads(line) for line in lines.text.splitlines()]
    assert [each["item"] for each in records] == [f"questions.json, record {n + 1}" for n in range(12)]
    assert [each["choices"] for each in records] == [each["choices"] for each in QUESTIONS]
    for record, question in zip(records, QUESTIONS, strict=True):
        assert record["prompt"].endswith(f"{question['question']}\n\n### Response:\n")
    for record, result in zip(records, base.results, strict=True):
        assert record["log_likelihoods"] == pytest.approx([row.log_likelihood for row in result], abs=1e-4)
    said = [
        e["message"] for e in service.http.get(f"/v1/fine_tuning/jobs/{plain['id']}/events").json()["data"]
    ]
    assert "Evaluating 12 questions by acc, acc_norm" in said

    found = ended(service, minimal)
    assert (found["status"], found["adapter_version"]) == ("succeeded", "minimal")
    # The loss is of whole responses, EOS included, unlike a choice's.
    assert 0 < found["metrics"]["loss"]["value"] < 20

    found = ended(service, both)
    assert found["status"] == "succeeded", found
    assert list(found["metrics"]) == ["numeric_match", "exact_match", "perplexity", "token_accuracy"]
    assert (found["task"], found["items"]) == ("SVAMP", 2)
    record = json.loads(service.http.get(f"/v1/evaluations/{both['id']}/items").text.splitlines()[0])
    assert {"output", "numeric_match", "exact_match", "log_likelihood", "tokens"} <= record.keys()

    command = [
        sys.executable,
        EXAMPLE,
        "math",
        "--model",
        MODEL,
        "--tasks",
        "svamp,mawps",
        "--url",
        service.url,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    first, second = done.stdout.splitlines()
    assert first.startswith("SVAMP          numeric_match 0."), done.stderr
    assert second.startswith("mawps          the task 'mawps' is not in tasks/mawps/test.json")
    assert done.returncode == 1

    error = ended(service, faulty)["error"]
    assert (error["code"], error["param"]) == ("invalid_evaluation_file", "file")
    assert "broken.json, record 13: 'answer' must be the place (from 0 to 1)" in error["message"]
    error = ended(service, absent)["error"]
    assert (error["code"], error["param"]) == ("invalid_evaluation_file", "task")
    assert "hub is not asked" in error["message"]
    deadline = time.monotonic() + 30
    while (gone := service.http.delete(f"/v1/evaluations/{plain['id']}")).status_code == 409:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert gone.json()["deleted"]
    assert not (service.data_dir / "jobs" / plain["id"]).exists()
