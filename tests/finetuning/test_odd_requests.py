"""What clients send that they should not: each answer is an object with a sentence, and never a 5xx."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from service_process import ServiceProcess

LONG = "x" * 300
IDS = [
    "none", LONG, "ft-job-", "..", "%2e%2e%2fetc", "%00", "%ff%fe", "%e2%80%ae", "%F0%9F%90%8D", "%0d%0aX: y",
    "a b", "'; DROP TABLE jobs; --", "$(touch canary)", "{fine_tuning_job_id}", "null",
]  # fmt: skip
BY_PATH = [
    "/v1/fine_tuning/jobs/{}", "/v1/fine_tuning/jobs/{}/events", "/v1/fine_tuning/jobs/{}/checkpoints",
    "/v1/fine_tuning/jobs/{}/logs", "/v1/models/{}", "/v1/files/{}", "/v1/files/{}/content",
    "/v1/uploads/{}",
]  # fmt: skip
BY_BODY = [
    "/v1/fine_tuning/jobs", "/v1/sqft/jobs", "/v1/fine_tuning/jobs/retrieve", "/v1/fine_tuning/jobs/cancel",
    "/v1/finetune/list_checkpoints", "/v1/finetune/extract_adapter", "/v1/finetune/extract_sub_adapter",
    "/v1/sqft/extract_sub_adapter", "/v1/finetune/merge_adapter", "/v1/ffinetune/merge_adapter",
    "/v1/sqft/merge_adapter", "/v1/models", "/v1/uploads", "/v1/uploads/none/complete",
]  # fmt: skip
NULLS = {"fine_tuning_job_id": None, "model": None, "training_file": None, "id": None, "path": None}


def check_refusal(answer: httpx.Response) -> str:
    """The sentence of a refusal."""
    assert 400 <= answer.status_code < 500, answer.text
    body = answer.json()
    assert body["detail"] == body["error"]["message"]
    assert body["detail"][0].isalnum() or body["detail"][0] in "/'\""
    assert body["detail"][-1] in ".)"
    return str(body["detail"])


@pytest.mark.parametrize("name", IDS)
def test_odd_ids_are_not_there(server: ServiceProcess, name: str) -> None:
    for path in BY_PATH:
        check_refusal(server.http.get(path.format(name)))
    check_refusal(server.http.post(f"/v1/fine_tuning/jobs/{name}/cancel"))
    check_refusal(server.http.delete(f"/v1/models/{name}"))
    check_refusal(server.http.delete(f"/v1/files/{name}"))


@pytest.mark.parametrize("route", BY_BODY)
def test_odd_bodies_are_refused(server: ServiceProcess, route: str) -> None:
    for content in (b"", b"[]", b"null", b"{}", b"5", b'"x"', b"a=b", b"{'a': 1}", b"\x1f\x8b\x08", b"<a/>"):
        check_refusal(server.http.post(route, content=content))
    for body in (NULLS, [NULLS], {"": {}}, dict.fromkeys(NULLS, 5), {key: [] for key in NULLS}):
        check_refusal(server.http.post(route, json=body))
    for name in (*IDS, "\0", "\u202e", "e\u0301", "\ud83d\ude00"):
        sent = json.dumps(dict.fromkeys(NULLS, name))
        check_refusal(server.http.post(route, content=sent))


@pytest.mark.parametrize("route", [*BY_BODY, "/v1/files"])
def test_large_bodies_are_413_on_every_route_and_read_no_further(server: ServiceProcess, route: str) -> None:
    content = b'{"model": "' + b"x" * 5_000_000 + b'"}'
    assert "1048576 bytes" in check_refusal(server.http.post(route, content=content))
    if route != "/v1/files":
        # Whatever it calls itself: only the upload's route streams.
        headers = {"content-type": "multipart/form-data; boundary=x"}
        answer = server.http.post(route, content=content, headers=headers)
        assert answer.status_code == 413


@pytest.mark.parametrize("path", ["/v1/fine_tuning/jobs", "/v1/files", "/v1/models", "/health", "/metrics"])
def test_wrong_methods_are_405_and_head_is_get_without_a_body(server: ServiceProcess, path: str) -> None:
    for method in ("PUT", "PATCH", "TRACE", "OPTIONS", "FOO"):
        answer = server.http.request(method, path)
        assert check_refusal(answer) == f"{path} does not allow {method}."
        assert answer.status_code == 405
        assert answer.headers["allow"]
    head, get = server.http.head(path), server.http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert server.http.head("/v1/fine_tuning/jobs/none").status_code == 404


@pytest.mark.parametrize("path", ["/v1", "/v1/files/", "/v1/fine_tuning/jobs/", "//v1/files", "/v1/chat"])
def test_a_path_that_is_no_route_is_404_and_no_redirect(server: ServiceProcess, path: str) -> None:
    answer = httpx.get(f"{server.url}{path}")
    assert answer.status_code == 404
    assert check_refusal(answer).startswith("There is no route GET /")


@pytest.mark.parametrize("header", ["Bearer None", "Bearer", "", "None", "Basic eDp5", "Bearer \xff"])
def test_without_keys_any_credentials_do(server: ServiceProcess, header: str) -> None:
    headers = {"authorization": header.encode("latin-1")}
    assert httpx.get(f"{server.url}/v1/fine_tuning/jobs", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            {"suffix": "été"},
            "suffix: a name of at most 64 letters, digits, '.', '_' and '-' was expected, the",
        ),
        ({"General": []}, "General: a JSON object was expected."),
        ({"metadata": {"": "x"}}, "metadata: a key of it is wrong: string should have at least 1 character"),
        ({"metadata": []}, "metadata: a JSON object was expected."),
        (
            {"General": {"config": {"trust_remote_code": True}}},
            "General.config.trust_remote_code: only the operator can allow the code that comes with a model",
        ),
        (
            {"General": {"task": "dpo"}},
            "General.task: input should be 'instruction_tuning' or 'pretraining' (got \"dpo\").",
        ),
    ],
)
def test_sentences_are_for_people(server: ServiceProcess, body: dict[str, Any], sentence: str) -> None:
    body = {"training_file": "a", "model": "b"} | body
    answer = server.http.post("/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 422
    assert check_refusal(answer).startswith(sentence)


def test_versions_are_names_that_are_not_taken_by_something_else(server: ServiceProcess) -> None:
    for version in (
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "a\n",
        "-rf",
        "x" * 65,
        "é",
        "checkpoint-5",
        "Events",
    ):
        body = {"fine_tuning_job_id": "ft-job-1", "sub_adapter_version": version}
        answer = server.http.post("/v1/finetune/extract_adapter", json=body)
        assert answer.json()["error"]["param"] == "sub_adapter_version", version
        assert check_refusal(answer).startswith("sub_adapter_version: ")


def test_both_names_given_and_different_are_refused(server: ServiceProcess) -> None:
    body = {"fine_tuning_job_id": "ft-job-1", "adapter_version": "a", "sub_adapter_version": "b"}
    for route in BY_BODY[5:11]:
        answer = server.http.post(route, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "adapter_version")
        assert answer.json()["fine_tuning_job_id"] == "ft-job-1"
