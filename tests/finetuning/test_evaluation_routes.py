"""Evaluations over HTTP, before anything runs: what is refused and how, what is listed, who sees what."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures_elastic import lora as lora_spec
from fixtures_elastic import super_adapter
from fixtures_jobs import await_verdict, succeeded_job
from fixtures_models import save_tiny_model, tiny_model
from fixtures_service import upload

from comps.finetuning.store.database import Database

QUESTIONS = [{"question": "Which?", "choices": ["a", "b"], "answer": 1}] * 3
MODEL = "tiny/evaluated"


@pytest.fixture(scope="module")
def file_id(server) -> str:
    save_tiny_model(server.models_dir / MODEL)
    return upload(server, QUESTIONS, "questions.json")


@pytest.fixture
def database(server) -> Iterator[Database]:
    database = Database(f"sqlite:///{server.data_dir}/finetuning.db")
    yield database
    database.dispose()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("super")
    super_adapter(tiny_model(), lora_spec(), directory)
    return directory


# name -> (fields of the body, status, the error's param, a part of its sentence)
REFUSED: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "no model": ({"model": None}, 422, "model", "model is missing"),
    "an unknown model": ({"model": "no/such"}, 404, "model", "no/such"),
    "a path as a model": ({"model": "../../etc"}, 422, "model", "model"),
    "no questions": ({"file": None}, 422, "file", "file is missing"),
    "two kinds of questions": ({"task": "boolq"}, 422, "task", "both"),
    "an unknown file": ({"file": "none.json"}, 404, "file", "no stored file"),
    "an unknown task": ({"file": None, "task": "bolq"}, 422, "task", "did you mean boolq?"),
    "an unknown metric": ({"metrics": ["accuracy"]}, 422, "metrics.0", "'acc'"),
    "no metrics": ({"metrics": []}, 422, "metrics", "at least 1"),
    "a metric twice": ({"metrics": ["acc", "acc"]}, 422, "", "twice"),
    "two different metrics": ({"metrics": ["acc"], "metric": "loss"}, 422, "", "differ"),
    "no questions at all": ({"limit": 0}, 422, "limit", "greater than or equal to 1"),
    "a boolean for a number": ({"limit": True}, 422, "limit", "a number was expected"),
    "a version of a base model": ({"adapter_version": "heuristic"}, 422, "adapter_version", "super-adapter"),
    "ranks of a base model": ({"custom_config": [1]}, 422, "custom_config", "super-adapter"),
    "an unknown job": (
        {"fine_tuning_job_id": "ft-job-none"},
        404,
        "fine_tuning_job_id",
        "no fine-tuning job",
    ),
    "a reserved version": ({"adapter_version": "checkpoint-1"}, 422, "adapter_version", "reserved"),
    "other choices": ({"choices": "all"}, 422, "choices", "'labels' or 'texts'"),
    "a text as resources": ({"resources_per_worker": "all"}, 422, "resources_per_worker", "a JSON object"),
}


@pytest.mark.parametrize(("changes", "status", "param", "part"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_evaluated_is_refused_in_a_sentence(
    server, file_id: str, changes: dict[str, Any], status: int, param: str, part: str
) -> None:
    body = {"model": MODEL, "file": file_id, **changes}
    answer = server.http.post("/v1/evaluations", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"] or "") == (status, param), error
    assert part in error["message"]


@pytest.mark.parametrize(
    ("rows", "metric", "part"),
    [
        ([{"text": "No question."}], None, "record 1: is no question"),
        (
            [*QUESTIONS, {"instruction": "Add 1 and 2.", "output": "3"}],
            "acc",
            "record 4: has nothing to choose",
        ),
    ],
)
def test_what_is_wrong_with_questions_is_said_before_the_evaluation_waits_for_cores(
    server, file_id: str, database: Database, rows: list[Any], metric: str | None, part: str
) -> None:
    body = {"model": MODEL, "file": upload(server, rows, "wrong.json"), "metric": metric}
    made = server.http.post("/v1/evaluations", json=body).json()
    await_verdict(database, made["id"])
    error = server.http.get(f"/v1/evaluations/{made['id']}").json()["error"]
    assert (error["code"], error["param"]) == ("invalid_evaluation_file", "file")
    assert part in error["message"]


def test_an_evaluation_is_answered_at_once_listed_cancelled_and_deleted(
    server, file_id: str, database: Database
) -> None:
    body = {"model": MODEL, "file": file_id, "metric": "acc", "limt": 3, "seed": 5}
    answer = server.http.post("/v1/evaluations", json=body)
    assert answer.status_code == 200, answer.text
    made = answer.json()
    status = made.pop("status")
    assert (made["object"], status, made["file"], made["seed"]) == (
        "evaluation",
        "validating_files",
        file_id,
        5,
    )
    assert (made["model"], made["metrics"], made["task"]) == (MODEL, None, None)
    assert made["warnings"] == ["limt is not a known key and was ignored; did you mean limit?"]
    path = f"/v1/evaluations/{made['id']}"
    await_verdict(database, made["id"])
    looked_up = server.http.get(path).json()
    assert looked_up == made | {"status": "queued"}
    assert server.http.get("/v1/evaluations?limit=1").json()["data"] == [looked_up]
    assert made["id"] not in server.http.get("/v1/fine_tuning/jobs").text
    events = server.http.get(f"/v1/fine_tuning/jobs/{made['id']}/events").json()["data"]
    assert any("limt" in event["message"] for event in events)
    assert server.http.get(f"/v1/fine_tuning/jobs/{made['id']}/logs").text == ""

    missing = server.http.get(f"{path}/items")
    assert (missing.status_code, "is queued and has no items" in missing.text) == (404, True)
    assert server.http.delete(f"/v1/files/{file_id}").status_code == 409  # it is needed
    assert server.http.delete(path).status_code == 409
    assert server.http.post(f"{path}/cancel").json()["status"] == "cancelled"
    assert server.http.post(f"{path}/cancel").json()["status"] == "cancelled"
    assert server.http.delete(path).json() == {"id": made["id"], "object": "evaluation", "deleted": True}
    for verb, where in (
        ("GET", path),
        ("GET", f"{path}/items"),
        ("POST", f"{path}/cancel"),
        ("DELETE", path),
    ):
        gone = server.http.request(verb, where)
        assert (gone.status_code, gone.json()["error"]["param"]) == (404, "evaluation_id")


def test_the_same_request_with_the_same_key_is_one_evaluation(server, file_id: str) -> None:
    headers = {"Idempotency-Key": "evaluate-once"}
    body = {"model": MODEL, "file": "questions.json"}
    first, again = (server.http.post("/v1/evaluations", json=body, headers=headers).json() for _ in range(2))
    assert first == again
    other = server.http.post("/v1/evaluations", json={**body, "limit": 1}, headers=headers)
    assert other.status_code == 422
    server.http.post(f"/v1/evaluations/{first['id']}/cancel")


def test_versions_of_a_super_adapter(server, file_id: str, database: Database, adapter: Path) -> None:
    job_id = succeeded_job(database, server.data_dir / "jobs", server.models_dir / MODEL, adapter)

    def ask(**fields: Any) -> tuple[int, dict[str, Any]]:
        body = {"fine_tuning_job_id": job_id, "model": "ignored", "file": file_id, **fields}
        answer = server.http.post("/v1/evaluations", json=body)
        if answer.status_code == 200:
            server.http.post(f"/v1/evaluations/{answer.json()['id']}/cancel")
        return answer.status_code, answer.json()

    for fields, version in (
        ({}, "maximal"),
        ({"adapter_version": "minimal"}, "minimal"),
        ({"sub_adapter_version": "heuristic"}, "heuristic"),
        ({"custom_config": [8, 5, 2, 8, 5, 2]}, "custom"),
        ({"fine_tuning_job_id": None, "model": f"ft:org/tiny::{job_id}"}, "maximal"),
    ):
        status, answer = ask(**fields)
        assert (status, answer.get("adapter_version")) == (200, version), answer
    for fields, status, param, part in (
        ({"custom_config": [8, 5]}, 422, "custom_config", "needs 6 ranks (3 groups x 2 layers)"),
        ({"custom_config": [9] * 6}, 422, "custom_config", "must be one of 8, 5, 2"),
        ({"adapter_version": "minimal", "custom_config": [8] * 6}, 422, "custom_config", "minimal"),
        ({"adapter_version": "maximal", "search_id": "search-1"}, 422, "search_id", "no other version"),
        ({"adapter_version": "best"}, 422, "adapter_version", "POST /v1/finetune/search begins one"),
        ({"adapter_version": "learned"}, 422, "adapter_version", "learned"),
        ({"adapter_version": "mine"}, 404, "adapter_version", "has not been extracted"),
        ({"adapter_version": "a", "sub_adapter_version": "b"}, 422, "adapter_version", "give one of them"),
    ):
        code, answer = ask(**fields)
        assert (code, answer["error"]["param"]) == (status, param), answer
        assert part in answer["error"]["message"]


def test_evaluations_are_their_owners(make_server) -> None:
    service = make_server(FINETUNING_API_KEYS="one,other")
    save_tiny_model(service.models_dir / MODEL)
    key = {"Authorization": "Bearer one"}
    content = {"file": ("q.jsonl", b'{"question": "Which?", "choices": ["a", "b"], "answer": 1}')}
    file = service.http.post("/v1/files", files=content, data={"purpose": "fine-tune"}, headers=key).json()
    body = {"model": MODEL, "file": file["id"]}
    made = service.http.post("/v1/evaluations", json=body, headers=key).json()
    other = {"Authorization": "Bearer other"}
    assert service.http.post("/v1/evaluations", json=body, headers=other).status_code == 404
    assert service.http.get("/v1/evaluations", headers=other).json()["data"] == []
    for path in ("", "/items"):
        answer = service.http.get(f"/v1/evaluations/{made['id']}{path}", headers=other)
        assert answer.status_code == 404
    assert service.http.post(f"/v1/evaluations/{made['id']}/cancel", headers=other).status_code == 404
