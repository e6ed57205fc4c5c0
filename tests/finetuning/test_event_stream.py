"""Events as server-sent events: each once, in order, over broken connections and restarts."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from fixtures_jobs import succeeded_job
from openai.types.fine_tuning import FineTuningJobEvent
from service_process import ServiceProcess

from comps.finetuning.jobs.news import News
from comps.finetuning.routes.event_stream import stream_events
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import EventRow, JobRow, new_id

JOBS = "/v1/fine_tuning/jobs"
STREAM = {"Accept": "text/event-stream"}


@pytest.fixture
def database(server: ServiceProcess) -> Iterator[Database]:
    """The service's own database, for the parts that its missing Ray would play."""
    with database_of(server) as database:
        yield database


@contextmanager
def database_of(service: ServiceProcess) -> Iterator[Database]:
    database = Database(f"sqlite:///{service.data_dir}/finetuning.db")
    yield database
    database.dispose()


def open_job(database: Database, status: str = "paused") -> str:
    """A job that waits, with one event."""
    job = JobRow(id=new_id("ft-job"), kind="fine_tuning", status=status, model="org/tiny")
    with database.session() as session:
        session.add(job)
    happen(database, job.id, "created")
    return job.id


def happen(database: Database, job_id: str, *messages: str, **columns: Any) -> list[str]:
    """Add events, a transaction each; returns their ids."""
    rows = [EventRow(id=new_id("ftevent"), job_id=job_id, message=text, **columns) for text in messages]
    for row in rows:
        with database.session() as session:
            session.add(row)
    return [row.id for row in rows]


def blocks(response: httpx.Response) -> Iterator[dict[str, str]]:
    """The fields of each message, as the standard has them read; a comment is a field without a name."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        elif fields:
            yield fields
            fields = {}


def message(block: dict[str, str]) -> str:
    found: str = json.loads(block["data"])["message"]
    return found


def read_all(service: ServiceProcess, job_id: str, **headers: str) -> list[str]:
    """The messages of a stream that has an end."""
    with service.http.stream("GET", f"{JOBS}/{job_id}/events", headers=STREAM | headers) as response:
        assert response.status_code == 200
        *found, end = blocks(response)
    assert end == {"data": "[DONE]"}
    return [message(block) for block in found]


def test_the_official_client_reads_the_stream_of_an_ended_job(
    client: openai.OpenAI, database: Database
) -> None:
    job_id = open_job(database, "cancelled")
    happen(database, job_id, "zwei\u2028Zeilen", "loss", type="metrics", data={"train_loss": 0.5})
    happen(database, job_id, "saved", type="checkpoint", level="warn", data={"step": 5})
    listed = list(client.fine_tuning.jobs.list_events(job_id, limit=2))
    assert [event.message for event in listed] == ["saved", "loss", "zwei\u2028Zeilen", "created"]
    with client.get(
        f"/fine_tuning/jobs/{job_id}/events", cast_to=FineTuningJobEvent,
        options={"params": {"stream": True}}, stream=True, stream_cls=openai.Stream[FineTuningJobEvent],
    ) as stream:  # fmt: skip
        assert list(stream) == listed[::-1]


def test_each_event_has_its_id_its_type_and_its_object_and_the_end_is_said(
    server: ServiceProcess, database: Database
) -> None:
    job_id = open_job(database, "failed")
    (event_id,) = happen(database, job_id, "a\nb", type="metrics", data={"train_loss": 0.5})
    url = f"{JOBS}/{job_id}/events"
    with server.http.stream("GET", url, headers=STREAM) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-store"
        _, block, end = blocks(response)
    listed = server.http.get(url).json()["data"][0]
    assert json.loads(block.pop("data")) == listed
    assert block == {"id": event_id, "event": "metrics"}
    assert end == {"data": "[DONE]"}


def test_a_stream_comes_only_to_those_who_ask_for_it(server: ServiceProcess, database: Database) -> None:
    url = f"{JOBS}/{open_job(database, 'failed')}/events"
    page = server.http.get(url).json()
    assert page["object"] == "list"
    for headers, query in (
        ({}, "?stream=true"),
        (STREAM, ""),
        ({"Accept": "Text/Event-Stream;q=0.9, */*"}, ""),
        ({"Accept": "application/json"}, "?stream=true"),
    ):
        assert server.http.get(url + query, headers=headers).text.endswith("\n\ndata: [DONE]\n\n"), headers
    for headers, query in (
        ({"Accept": "application/json"}, ""),
        (STREAM, "?stream=false"),
        ({}, "?stream=false"),
        ({"Last-Event-ID": "ftevent-none"}, ""),
    ):
        assert server.http.get(url + query, headers=headers).json() == page
    assert server.http.get(f"{url}?stream=perhaps").status_code == 422


def test_events_come_as_they_happen_until_the_job_has_ended(
    server: ServiceProcess, client: openai.OpenAI, database: Database
) -> None:
    job_id = open_job(database)
    with server.http.stream("GET", f"{JOBS}/{job_id}/events", headers=STREAM) as response:
        stream = blocks(response)
        assert message(next(stream)) == "created"
        for text in ("first", "second"):
            began = time.monotonic()
            happen(database, job_id, text)
            assert message(next(stream)) == text
            assert time.monotonic() - began < 10, "a stream looks by itself every 15 seconds only"
        client.fine_tuning.jobs.cancel(job_id)
        assert message(next(stream)) == "The job was cancelled"
        assert list(stream) == [{"data": "[DONE]"}]


def test_a_stream_goes_on_right_after_the_last_event_that_was_read(
    server: ServiceProcess, database: Database
) -> None:
    job_id = open_job(database, "succeeded")
    ids = happen(
        database, job_id, *(f"event {number}" for number in range(450))
    )  # more than are read at once
    expected = [f"event {number}" for number in range(450)]
    assert read_all(server, job_id) == ["created", *expected]
    assert read_all(server, job_id, **{"Last-Event-ID": ids[199]}) == expected[200:]
    assert read_all(server, job_id, **{"Last-Event-ID": ids[-1]}) == []
    assert read_all(server, job_id, **{"Last-Event-ID": ""}) == ["created", *expected]
    url = f"{JOBS}/{job_id}/events?after={ids[447]}"
    for headers, left in (({}, 2), ({"Last-Event-ID": ids[448]}, 1)):  # a browser repeats the URL as it was
        text = server.http.get(url, headers=STREAM | headers).text
        assert text.count("\nevent: message\n") == left


def test_an_unknown_last_event_is_refused(server: ServiceProcess, database: Database) -> None:
    job_id, other = open_job(database), open_job(database)
    (foreign,) = happen(database, other, "of another job")
    url = f"{JOBS}/{job_id}/events"
    for unknown in ("ftevent-none", foreign):
        for path, headers, param in (
            (url, {"Last-Event-ID": unknown}, "Last-Event-ID"),
            (f"{url}?after={unknown}", {}, "after"),
        ):
            answer = server.http.get(path, headers=STREAM | headers)
            assert answer.status_code == 422
            assert answer.json()["error"]["param"] == param
            assert f"has no event {unknown!r}" in answer.json()["detail"]
    assert server.http.get(f"{JOBS}/ft-job-none/events", headers=STREAM).status_code == 404


def test_a_deleted_job_has_no_stream(server: ServiceProcess, tmp_path: Path, database: Database) -> None:
    job_id = succeeded_job(database, server.data_dir / "jobs", tmp_path, None)
    assert read_all(server, job_id) == ["The job has successfully completed"]
    assert server.http.delete(f"{JOBS}/{job_id}").status_code == 200
    assert server.http.get(f"{JOBS}/{job_id}/events", headers=STREAM).status_code == 404


def test_a_reader_finds_its_place_again_after_the_service_was_killed(make_server) -> None:
    service = make_server()
    with database_of(service) as database:
        job_id = open_job(database)
        happen(database, job_id, "read", "missed")
        read = []
        with service.http.stream("GET", f"{JOBS}/{job_id}/events", headers=STREAM) as response:
            stream = blocks(response)
            read += [next(stream), next(stream)]
            service.kill()
        happen(database, job_id, "while it was away")
        service.start()
        headers = STREAM | {"Last-Event-ID": read[-1]["id"]}
        with service.http.stream("GET", f"{JOBS}/{job_id}/events", headers=headers) as response:
            stream = blocks(response)
            read += [next(stream), next(stream)]
            service.openai.fine_tuning.jobs.cancel(job_id)
            read += stream
    assert read.pop() == {"data": "[DONE]"}
    assert [message(block) for block in read] == [
        "created",
        "read",
        "missed",
        "while it was away",
        "The job was cancelled",
    ]


def test_many_idle_streams_hold_neither_threads_nor_connections_and_end_with_the_service(make_server) -> None:
    service = make_server()
    process = psutil.Process(service.process.pid)
    many = 150  # three times as many as there are threads or connections for requests
    with database_of(service) as database, ExitStack() as stack:
        job_id = open_job(database)
        limits = httpx.Limits(max_connections=many)
        http = stack.enter_context(httpx.Client(base_url=service.url, limits=limits, timeout=30))
        streams = []
        for _ in range(many):
            request = http.stream("GET", f"{JOBS}/{job_id}/events", headers=STREAM)
            streams.append(blocks(stack.enter_context(request)))
            assert next(streams[-1])["event"] == "message"
        assert process.num_threads() < 30
        files = [file.path for file in process.open_files()]
        assert sum(path.endswith("finetuning.db") for path in files) < 20
        for _ in range(20):
            assert service.http.get(JOBS).status_code == 200
        happen(database, job_id, "news for all")
        for stream in streams:
            assert message(next(stream)) == "news for all"

        stopping = threading.Thread(target=service.stop)
        stopping.start()
        assert [list(stream) for stream in streams] == [[]] * many, "they end, and don't say that the job has"
        stopping.join()
    assert service.process.returncode == 0
    assert "timeout graceful shutdown exceeded" not in service.log
    assert "Traceback" not in service.log


def test_a_stream_without_news_is_kept_alive_until_the_service_stops(database: Database) -> None:
    job_id = open_job(database)

    async def read() -> None:
        news = News(database)
        await news.start()
        stream = stream_events(database, news, job_id, 0, keep_alive=0.01)
        assert "created" in await anext(stream)
        assert [await anext(stream) for _ in range(3)] == [": keep-alive\n\n"] * 3
        await stream.aclose()
        with news.bell(job_id) as bell:
            news.close()
            await asyncio.wait_for(bell.wait(), 5)
        assert [part async for part in stream_events(database, news, job_id, 0)] == []
        await news.stop()
        news.close()  # a second signal, after everything

    asyncio.run(read())


def test_a_client_that_hangs_up_costs_nothing(server: ServiceProcess, database: Database) -> None:
    job_id, logged = open_job(database), len(server.log)
    for _ in range(5):
        with server.http.stream("GET", f"{JOBS}/{job_id}/events", headers=STREAM) as response:
            assert next(blocks(response))["event"] == "message"
    happen(database, job_id, "to nobody")
    assert server.http.get("/health").is_success
    assert "Traceback" not in server.log[logged:]
