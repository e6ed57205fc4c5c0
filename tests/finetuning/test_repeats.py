"""One ``Idempotency-Key``, one thing made: after lost answers, at once, and through ``kill -9``."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fixtures_elastic import lora, super_adapter
from fixtures_jobs import start_and_finish, succeeded_job
from fixtures_models import save_tiny_model, tiny_model
from service_process import ServiceProcess
from sqlalchemy import select, update

from comps.finetuning.jobs.repeats import LIFETIME
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import IdempotencyRow, JobRow, new_id

BASE = "org/repeats"
JOBS, FILES = "/v1/fine_tuning/jobs", "/v1/files"
ROWS = b'{"instruction": "Say yes.", "output": "yes"}\n' * 20


@pytest.fixture(scope="module")
def adapter(server: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A super-adapter of the tiny base model :data:`BASE`, which the service knows from here on."""
    save_tiny_model(server.models_dir / BASE)
    directory = tmp_path_factory.mktemp("adapter")
    super_adapter(tiny_model(), lora(), directory)
    return directory


@pytest.fixture(scope="module")
def training_file(server: ServiceProcess) -> str:
    return server.openai.files.create(file=("repeats.jsonl", ROWS), purpose="fine-tune").id


@pytest.fixture
def database(server: ServiceProcess) -> Iterator[Database]:
    """The service's own database, for the parts that its missing Ray would play."""
    database = Database(f"sqlite:///{server.data_dir}/finetuning.db")
    yield database
    database.dispose()


@pytest.fixture
def key() -> str:
    return new_id("key")


def keyed(key: str) -> dict[str, str]:
    return {"Idempotency-Key": key}


def jobs_of(service: ServiceProcess, key: str) -> list[str]:
    """The ids of the jobs that requests with this metadata made."""
    listed = service.http.get(JOBS, params={"metadata[key]": key, "limit": 1000}).json()
    return [job["id"] for job in listed["data"]]


def at_once(ask: Callable[[], httpx.Response], times: int = 6) -> list[httpx.Response]:
    """The answers to requests that are sent at the same moment."""
    barrier, answers = threading.Barrier(times), []

    def run() -> None:
        barrier.wait()
        answers.append(ask())

    threads = [threading.Thread(target=run) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_the_same_request_with_the_same_key_makes_one_job(
    server: ServiceProcess, client: openai.OpenAI, adapter: Path, training_file: str, key: str
) -> None:
    request: Any = {"model": BASE, "training_file": training_file, "metadata": {"key": key}}
    jobs = [client.fine_tuning.jobs.create(**request, extra_headers=keyed(key)) for _ in range(3)]
    assert jobs[0] == jobs[1] == jobs[2]
    assert jobs_of(server, key) == [jobs[0].id]
    for changed in ({"seed": 5}, {"training_file": "another.jsonl"}):
        with pytest.raises(openai.UnprocessableEntityError, match="was used for another request") as refusal:
            client.fine_tuning.jobs.create(**request | changed, extra_headers=keyed(key))
        assert (refusal.value.code, refusal.value.param) == ("idempotency_key_reused", "Idempotency-Key")
    assert server.http.post("/v1/sqft/jobs", json=request, headers=keyed(key)).status_code == 422
    # Without the key, and with another one, it is another request.
    client.fine_tuning.jobs.create(**request)
    client.fine_tuning.jobs.create(**request, extra_headers=keyed(key + "2"))
    assert len(jobs_of(server, key)) == 3


def test_the_answer_is_that_of_then_whatever_became_of_the_job(
    server: ServiceProcess, client: openai.OpenAI, adapter: Path, key: str
) -> None:
    file = client.files.create(file=("f.jsonl", ROWS), purpose="fine-tune", extra_headers=keyed(key))
    request: Any = {"model": BASE, "training_file": file.id}
    job = client.fine_tuning.jobs.create(**request, extra_headers=keyed(key + "2"))
    client.fine_tuning.jobs.cancel(job.id)
    client.delete(f"/fine_tuning/jobs/{job.id}", cast_to=object)
    client.files.delete(file.id)
    again = client.fine_tuning.jobs.create(**request, extra_headers=keyed(key + "2"))
    assert again == job
    assert again.status == "validating_files"
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve(job.id)
    assert client.files.create(file=("f.jsonl", ROWS), purpose="fine-tune", extra_headers=keyed(key)) == file


def send(service: ServiceProcess, body: dict[str, Any], key: str) -> socket.socket:
    """A connection on which a job was asked for, and whose answer nobody has read yet."""
    host, port = service.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST {JOBS} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"{head}Idempotency-Key: {key}\r\n\r\n".encode() + content)
    return connection


def wait_for_key(database: Database, key: str) -> dict[str, Any]:
    """The answer that was kept for a key, as soon as it is."""
    deadline = time.monotonic() + 20
    while True:
        with database.reading() as session:
            answer = session.scalar(select(IdempotencyRow.answer).where(IdempotencyRow.key == key))
        if answer is not None:
            return answer
        assert time.monotonic() < deadline


def test_a_request_whose_answer_is_lost_three_times_makes_one_job(
    server: ServiceProcess, adapter: Path, training_file: str, database: Database, key: str
) -> None:
    body = {"model": BASE, "training_file": training_file, "metadata": {"key": key}}
    for _ in range(3):
        connection = send(server, body, key)
        kept = wait_for_key(database, key)
        connection.close()
    content = json.dumps(body).encode()
    assert server.http.post(JOBS, content=content, headers=keyed(key)).json() == kept
    assert jobs_of(server, key) == [kept["id"]]


def test_a_request_that_is_sent_several_times_at_once_makes_one_job(
    server: ServiceProcess, adapter: Path, training_file: str, key: str
) -> None:
    body = {"model": BASE, "training_file": training_file, "metadata": {"key": key}}
    answers = at_once(lambda: httpx.post(server.url + JOBS, json=body, headers=keyed(key), timeout=60))
    assert [answer.status_code for answer in answers] == [200] * 6
    assert len({answer.text for answer in answers}) == 1
    assert jobs_of(server, key) == [answers[0].json()["id"]]


def test_a_job_that_was_committed_before_a_kill_is_the_one_that_is_answered(make_server, key: str) -> None:
    service = make_server()
    save_tiny_model(service.models_dir / BASE)
    training_file = service.openai.files.create(file=("f.jsonl", ROWS), purpose="fine-tune").id
    database = Database(f"sqlite:///{service.data_dir}/finetuning.db")
    body = {"model": BASE, "training_file": training_file, "metadata": {"key": key}}
    with send(service, body, key):
        made = wait_for_key(database, key)["id"]
        service.kill()
    service.start()
    answer = service.http.post(JOBS, content=json.dumps(body).encode(), headers=keyed(key))
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"] == made
    assert jobs_of(service, key) == [made]

    # After a day the sweep forgets the key; also the one at a start.
    with database.session() as session:
        session.execute(update(IdempotencyRow).values(created_at=time.time() - LIFETIME - 1))
    service.kill()
    service.start()
    again = service.http.post(JOBS, content=json.dumps(body).encode(), headers=keyed(key)).json()
    assert jobs_of(service, key) == [again["id"], made]
    database.dispose()


def test_a_refused_request_keeps_nothing(server: ServiceProcess, adapter: Path, key: str) -> None:
    body = {"model": BASE, "training_file": f"{key}.jsonl"}
    assert server.http.post(JOBS, json=body, headers=keyed(key)).status_code == 404
    server.openai.files.create(file=(f"{key}.jsonl", ROWS), purpose="fine-tune")
    assert server.http.post(JOBS, json=body, headers=keyed(key)).status_code == 200


def stored(service: ServiceProcess) -> set[str]:
    """The names of everything in the service's directory of files."""
    return {path.name for path in (service.data_dir / "files").iterdir()}


def test_an_upload_that_comes_again_is_one_file(
    server: ServiceProcess, client: openai.OpenAI, key: str
) -> None:
    """Each time with another boundary; the bytes of the later ones are dropped."""
    before = stored(server)
    files = [
        client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune", extra_headers=keyed(key))
        for _ in range(3)
    ]
    assert files[0] == files[1] == files[2]
    assert stored(server) - before == {files[0].id}
    changed: list[tuple[tuple[str, bytes], str]] = [
        (("a.jsonl", ROWS + b"\n"), "fine-tune"),
        (("b.jsonl", ROWS), "fine-tune"),
        (("a.jsonl", ROWS), "evals"),
    ]
    for file, purpose in changed:
        with pytest.raises(openai.UnprocessableEntityError) as refusal:
            client.files.create(file=file, purpose=purpose, extra_headers=keyed(key))  # type: ignore[arg-type]
        assert refusal.value.code == "idempotency_key_reused"
    assert stored(server) - before == {files[0].id}


def test_uploads_at_once_are_one_file(server: ServiceProcess, key: str) -> None:
    before = stored(server)
    content = ROWS * 20_000

    def ask() -> httpx.Response:
        file = {"file": ("a.jsonl", content)}
        data = {"purpose": "fine-tune"}
        return httpx.post(server.url + FILES, files=file, data=data, headers=keyed(key), timeout=60)

    answers = at_once(ask, 3)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.text for answer in answers}) == 1
    assert stored(server) - before == {answers[0].json()["id"]}
    assert server.http.delete(f"{FILES}/{answers[0].json()['id']}").status_code == 200


def test_a_model_is_registered_once(server: ServiceProcess, adapter: Path, key: str) -> None:
    body = {"id": key, "path": BASE}
    answers = at_once(
        lambda: httpx.post(f"{server.url}/v1/models", json=body, headers=keyed(key), timeout=60)
    )
    assert [answer.status_code for answer in answers] == [200] * 6
    assert len({answer.text for answer in answers}) == 1
    assert server.http.post("/v1/models", json=body).status_code == 409
    reused = server.http.post("/v1/models", json=body | {"path": "org/other"}, headers=keyed(key))
    assert reused.json()["error"]["code"] == "idempotency_key_reused"


EXTRACT, MERGE = "/v1/finetune/extract_adapter", "/v1/finetune/merge_adapter"


def end_run(database: Database, source: str, result: dict[str, Any]) -> None:
    """Play Ray's part: end the run that was queued for ``source`` with a result."""
    with database.reading() as session:
        waiting = select(JobRow).where(JobRow.source == source, JobRow.status == "queued")
        run = session.scalars(waiting).one()
    if result["outcome"] == "succeeded":
        result = result | {"path": run.spec["output"]}
        Path(run.spec["output"]).mkdir(parents=True)
    start_and_finish(database, run.id, result)


@pytest.mark.parametrize(("route", "version"), [(EXTRACT, "heuristic"), (MERGE, None)])
def test_an_extraction_or_a_merge_with_a_key_is_one_run(
    server: ServiceProcess, database: Database, adapter: Path, key: str, route: str, version: str | None
) -> None:
    source = succeeded_job(database, server.data_dir / "jobs", server.models_dir / BASE, adapter)
    body = {"fine_tuning_job_id": source, "wait": False} | ({"adapter_version": version} if version else {})
    answers = at_once(lambda: httpx.post(server.url + route, json=body, headers=keyed(key), timeout=60))
    assert {answer.json()["status"] for answer in answers} == {"queued"}
    (run,) = {answer.json()["id"] for answer in answers}
    other = server.http.post(route, json=body | {"wait": True}, headers=keyed(key))
    assert other.json()["error"]["code"] == "idempotency_key_reused"

    # What is told of the run is what it has come to; an error is not kept.
    failure = {"code": "invalid_model", "message": "The base model is damaged.", "param": None}
    end_run(database, source, {"outcome": "failed", "error": failure})
    again = server.http.post(route, json=body, headers=keyed(key)).json()
    assert again["status"] == "queued"
    assert again["id"] != run
    end_run(database, source, {"outcome": "succeeded", "parameters": 12})
    done = server.http.post(route, json=body, headers=keyed(key)).json()
    assert (done["id"], done["status"], done["parameters"]) == (again["id"], "succeeded", 12)

    # And what it came to is told, too, when it was deleted since.
    assert server.http.delete(f"{JOBS}/{source}").status_code == 200
    assert server.http.post(route, json=body, headers=keyed(key)).json() == done
    assert server.http.post(route, json=body).status_code == 404


@pytest.mark.parametrize("wrong", [b"", b"k" * 256, b"\xc3\xa9", b"a\tb"])
@pytest.mark.parametrize("route", [JOBS, FILES])
def test_what_cannot_be_a_key_is_refused(server: ServiceProcess, route: str, wrong: bytes) -> None:
    headers = [(b"Idempotency-Key", wrong)]
    answer = (
        server.http.post(route, files={"file": b"x"}, headers=headers)
        if route == FILES
        else (server.http.post(route, json={"model": BASE, "training_file": "x"}, headers=headers))
    )
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["param"] == "Idempotency-Key"
    assert "1 to 255 printable ASCII characters" in answer.json()["detail"]


def test_the_longest_key_will_do(server: ServiceProcess, key: str) -> None:
    for filler in ("~", " x"):
        longest = (key + filler * 255)[:255].strip()
        file = server.openai.files.create(file=("a", b"x"), purpose="evals", extra_headers=keyed(longest))
        again = server.openai.files.create(file=("a", b"x"), purpose="evals", extra_headers=keyed(longest))
        assert file.id == again.id


def test_what_moves_a_job_is_done_once_for_a_key_too(
    server: ServiceProcess, client: openai.OpenAI, adapter: Path, training_file: str, key: str
) -> None:
    job = client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
    moves = client.fine_tuning.jobs
    paused = moves.pause(job.id, extra_headers=keyed(key))
    moves.resume(job.id, extra_headers=keyed(key + "2"))
    assert moves.pause(job.id, extra_headers=keyed(key)) == paused, "the answer of then"
    assert moves.retrieve(job.id).status != "paused", "and the job goes on"
    body = {"fine_tuning_job_id": job.id}
    for path, content in ((f"{JOBS}/{job.id}/cancel", None), (f"{JOBS}/cancel", body)):
        answer = server.http.post(path, json=content, headers=keyed(key))
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "idempotency_key_reused")
    cancelled = moves.cancel(job.id, extra_headers=keyed(key + "3"))
    assert moves.cancel(job.id, extra_headers=keyed(key + "3")) == cancelled
    # A refusal keeps nothing.
    assert server.http.post(f"{JOBS}/{job.id}/resume", headers=keyed(key + "4")).status_code == 409
    assert moves.cancel(job.id, extra_headers=keyed(key + "4")).status == "cancelled"


def test_the_end_of_an_upload_in_parts_takes_a_key(client: openai.OpenAI, key: str) -> None:
    def begin() -> str:
        return client.uploads.create(
            bytes=len(ROWS), filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune"
        ).id

    first, second = begin(), begin()
    part = client.uploads.parts.create(first, data=ROWS).id
    done = client.uploads.complete(first, part_ids=[part], extra_headers=keyed(key))
    assert client.uploads.complete(first, part_ids=[part], extra_headers=keyed(key)) == done
    with pytest.raises(openai.UnprocessableEntityError, match="was used for another request"):
        client.uploads.complete(first, part_ids=[part, part], extra_headers=keyed(key))
    with pytest.raises(openai.UnprocessableEntityError, match="was used for another request"):
        client.uploads.cancel(second, extra_headers=keyed(key))
    gone = client.uploads.cancel(second, extra_headers=keyed(key + "2"))
    assert client.uploads.cancel(second, extra_headers=keyed(key + "2")) == gone
