"""Every refusal is one envelope with one sentence, whatever was sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from service_process import NO_RAY

from comps.cores.app import create_component
from comps.cores.errors import Conflict, ServiceError


def check_envelope(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of an answer that must be a well-formed refusal."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert list(body)[:2] == ["error", "detail"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["detail"] == body["error"]["message"]
    assert body["detail"][-1] in ".)"
    assert answer.headers["x-request-id"]
    return body["error"]


def test_an_unknown_route_is_404(server) -> None:
    error = check_envelope(server.http.get("/v2/files"), 404)
    assert error["message"] == "There is no route GET /v2/files."


def test_a_wrong_method_is_405(server) -> None:
    answer = server.http.put("/v1/files", json={})
    assert check_envelope(answer, 405)["message"] == "/v1/files does not allow PUT."


def test_a_missing_field_is_named(server) -> None:
    error = check_envelope(server.http.post("/v1/models", json={"id": "a"}), 422)
    assert (error["param"], error["message"]) == ("path", "path is missing.")


def test_a_wrong_type_names_field_and_value(server) -> None:
    error = check_envelope(server.http.post("/v1/models", json={"id": 7, "path": "x"}), 422)
    assert error["param"] == "id"
    assert "(got 7)" in error["message"]


def test_a_wrong_secret_is_not_repeated(server) -> None:
    body = {"model": "m", "training_file": "f", "General": {"config": {"token": "hf_canary" * 100}}}
    error = check_envelope(server.http.post("/v1/fine_tuning/jobs", json=body), 422)
    assert error["param"] == "General.config.token"
    assert "canary" not in error["message"]


def test_a_wrong_query_parameter_is_named(server) -> None:
    error = check_envelope(server.http.get("/v1/files", params={"limit": 0}), 422)
    assert error["message"] == 'query.limit: input should be greater than or equal to 1 (got "0").'


BODIES = {
    b"": "The request body is empty, JSON was expected.",
    b"{": "not valid JSON: Expecting property name enclosed in double quotes (line 1, column 2).",
    b"[]": "The request body must be a JSON object.",
    b'"text"': "The request body must be a JSON object.",
    b"null": "The request body must be a JSON object.",
    b"\xc3\x28": "not Unicode text",
    b"[" * 100_000: "The request body is nested too deeply.",
    # A string without an end, which must not take minutes to find out.
    b'"' + b'\\"' * 400_000: "Unterminated string",
    b'{"id": 1e999, "path": "x"}': "the number 1e999, which is not finite.",
    b'{"id": "a", "path": NaN}': "the number NaN, which is not finite.",
    b'{"id": ' + b"9" * 5000 + b"}": "too many digits",
    b'{"id": "\\uD800", "path": "\\udfff"}': "without lone surrogates",
}


@pytest.mark.parametrize(("body", "message"), BODIES.items(), ids=[str(body[:20]) for body in BODIES])
def test_a_body_that_is_no_good_json_is_refused(server, body: bytes, message: str) -> None:
    error = check_envelope(server.http.post("/v1/models", content=body), 422)
    assert message in error["message"]


@pytest.mark.parametrize("content_type", [None, "", "application/json", "application/x-www-form-urlencoded"])
def test_a_body_is_json_whatever_its_content_type(server, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    body = b'{"id": "a", "path": "no/such/directory"}'
    answer = server.http.post("/v1/models", content=body, headers=headers)
    assert check_envelope(answer, 422)["message"].startswith("The path 'no/such/directory'")


def test_a_comma_after_the_last_element_is_forgiven(server) -> None:
    body = b'{"id": "a", "list": [1, 2 , ],\n "path": "no/such,}/directory", }'
    answer = server.http.post("/v1/models", content=body)
    assert check_envelope(answer, 422)["message"].startswith("The path 'no/such,}/directory'")


def test_an_error_repeats_the_ids_of_the_request(server) -> None:
    sent = {"id": "my-model", "fine_tuning_job_id": "ft-job-1", "path": "no/such/directory"}
    body = server.http.post("/v1/models", json=sent).json()
    assert (body["id"], body["fine_tuning_job_id"]) == ("my-model", "ft-job-1")


def test_a_large_body_is_413(server) -> None:
    answer = server.http.post("/v1/models", json={"id": "x" * 2**20})
    assert "1048576 bytes" in check_envelope(answer, 413)["message"]


def test_the_official_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve("file-nothing")
    assert caught.value.code == "not_found"
    assert caught.value.param == "file_id"
    assert caught.value.request_id


def test_a_given_request_id_is_kept_and_a_hostile_one_is_not(server) -> None:
    assert server.http.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert server.http.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_a_foreign_host_is_400(server) -> None:
    error = check_envelope(server.http.get("/health", headers={"host": "evil.example"}), 400)
    assert "'evil.example'" in error["message"]
    for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert server.http.get("/health", headers={"host": host}).is_success


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "x"])
def test_a_page_of_another_site_cannot_post(server, origin: str) -> None:
    check_envelope(server.http.post("/v1/models", json={}, headers={"origin": origin}), 403)


def test_the_service_s_own_pages_can_post(server) -> None:
    answer = server.http.post("/v1/models", json={}, headers={"origin": server.url})
    assert answer.status_code == 422


def test_no_answer_opens_the_service_to_other_sites(server) -> None:
    answer = server.http.get("/health", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_requests_are_logged_as_json(server) -> None:
    server.http.get("/health", headers={"x-request-id": "find-me"})
    lines = [json.loads(line) for line in server.log.splitlines()]
    line = next(line for line in lines if line.get("request_id") == "find-me")
    assert (line["method"], line["path"], line["status"], line["level"]) == ("GET", "/health", 200, "info")


def test_metrics_and_statistics_count_requests(server) -> None:
    server.http.get("/v1/files")
    metrics = server.http.get("/metrics").text
    assert 'http_requests_total{handler="/v1/files",method="GET",status="2xx"}' in metrics
    assert 'finetuning_jobs{status="running"} 0.0' in metrics
    statistics = server.http.get("/v1/statistics").json()["opea_service@finetuning"]
    assert 0 < statistics["p50_latency"] <= statistics["p99_latency"]
    assert statistics["p50_latency_first_token"] is None


def test_health_has_opea_s_keys_and_says_how_ray_is(server) -> None:
    body = server.http.get("/v1/health_check").json()
    assert list(body) == ["Service Title", "Version", "Service Description", "Ray"]
    assert body["Ray"]["state"] in ("starting", "unreachable")
    assert body["Ray"]["address"] == NO_RAY
    assert server.http.get("/health").json().keys() == body.keys()


def test_where_there_are_keys_strangers_learn_no_addresses_from_health(make_server) -> None:
    service = make_server(FINETUNING_API_KEYS="key")
    body = httpx.get(f"{service.url}/health").json()
    assert set(body["Ray"]) == {"state", "local"}


@asynccontextmanager
async def _nothing(_: FastAPI) -> AsyncIterator[None]:
    yield


def ask(path: str) -> httpx.Response:
    """One request to a component whose routes fail in ways that no real route should."""
    app = create_component(
        name="test",
        title="Test",
        description="",
        version="0",
        lifespan=_nothing,
        health=dict,
        max_body_bytes=99,
        max_body_setting="TEST_MAX_BODY_BYTES",
    )

    @app.post("/bug/{id}")
    def bug(id: str, request: Request) -> None:
        raise KeyError("a secret of the inside")

    @app.post("/conflict")
    def conflict() -> None:
        raise Conflict("It is not so.", param="it")

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json={"id": "from-body", "fine_tuning_job_id": "ft-job-1"})

    return asyncio.run(post())


def test_a_bug_is_500_without_its_insides_but_with_the_ids(caplog: pytest.LogCaptureFixture) -> None:
    answer = ask("/bug/from-path")
    assert check_envelope(answer, 500)["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.json()["fine_tuning_job_id"] == "ft-job-1"
    assert answer.json()["id"] == "from-path"
    assert "a secret of the inside" in caplog.text


def test_a_conflict_tells_the_client_not_to_retry() -> None:
    answer = ask("/conflict")
    assert check_envelope(answer, 409)["param"] == "it"
    assert answer.headers["x-should-retry"] == "false"


def test_every_error_class_knows_its_status_type_and_code() -> None:
    # Other packages have errors of their own; which of them are loaded depends on the other tests.
    for error in (
        each for each in ServiceError.__subclasses__() if each.__module__ == ServiceError.__module__
    ):
        assert error.status >= 400
        assert error.code != ServiceError.code
        assert error.type == "server_error" if error.status >= 500 else error.type != "server_error"
