"""Lists come in pages, newest first, and the official client walks through all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from fixtures_models import save_tiny_model
from service_process import ServiceProcess

from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import CheckpointRow, EventRow

ROW = b'{"instruction": "Say yes.", "input": "", "output": "yes"}\n'
JOBS = 5


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with closing(ServiceProcess(tmp_path_factory.mktemp("service"))) as service:
        save_tiny_model(service.models_dir / "org" / "pages")
        yield service


@pytest.fixture(scope="module")
def jobs(service: ServiceProcess) -> list[str]:
    """All the jobs that there are, newest first; the first has the events and checkpoints 0 to 6 besides."""
    client = service.openai
    file = client.files.create(file=("rows.jsonl", ROW * 20), purpose="fine-tune")
    made = [
        client.fine_tuning.jobs.create(model="org/pages", training_file=file.id, suffix=f"n{n}").id
        for n in range(JOBS)
    ]
    for job_id in made:
        client.fine_tuning.jobs.cancel(job_id)
    database = Database(Settings(data_dir=service.data_dir).database_url)
    with database.session() as session:
        for n in range(7):
            session.add(EventRow(id=f"ftevent-{n}", job_id=made[-1], message=f"event {n}"))
            session.add(CheckpointRow(id=f"ftckpt-{n}", job_id=made[-1], step=n, path=f"checkpoint-{n}"))
    database.dispose()
    return made[::-1]


@pytest.mark.parametrize("limit", [1, 2, JOBS, 100])
def test_the_client_walks_through_all_jobs(service: ServiceProcess, jobs: list[str], limit: int) -> None:
    assert [job.id for job in service.openai.fine_tuning.jobs.list(limit=limit)] == jobs


def test_has_more_tells_of_the_last_page(service: ServiceProcess, jobs: list[str]) -> None:
    list_jobs = service.openai.fine_tuning.jobs.list
    assert list_jobs(limit=JOBS - 1).has_more is True
    assert list_jobs(limit=JOBS).has_more is False
    page = list_jobs(limit=2, after=jobs[2])
    assert ([job.id for job in page.data], page.has_more) == (jobs[3:], False)
    last = list_jobs(after=jobs[-1])
    assert (last.data, last.has_more) == ([], False)


def test_events_and_checkpoints_are_walked_through_newest_first(
    service: ServiceProcess, jobs: list[str]
) -> None:
    client = service.openai.fine_tuning.jobs
    events = list(client.list_events(jobs[0], limit=3))
    assert [event.message for event in events[:7]] == [f"event {n}" for n in reversed(range(7))]
    assert events[-1].message == f"Created fine-tuning job: {jobs[0]}"
    assert len({event.id for event in events}) == len(events)
    page = client.list_events(jobs[0], limit=len(events))
    assert (page.data, page.has_more) == (events, False)
    checkpoints = list(client.checkpoints.list(jobs[0], limit=3))
    assert [checkpoint.step_number for checkpoint in checkpoints] == list(reversed(range(7)))


def test_a_cursor_of_another_list_is_refused(service: ServiceProcess, jobs: list[str]) -> None:
    for path, after in (
        ("/v1/fine_tuning/jobs", "ftevent-0"),
        (f"/v1/fine_tuning/jobs/{jobs[1]}/events", "ftevent-0"),
        (f"/v1/fine_tuning/jobs/{jobs[1]}/checkpoints", "ftckpt-0"),
        ("/v1/files", jobs[0]),
    ):
        answer = service.http.get(path, params={"after": after})
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "after")
        assert after in answer.json()["detail"]


@pytest.mark.parametrize("limit", ["0", "-1", "abc", "", "1.5", "1e3", "99999999999999999999"])
def test_a_limit_is_a_whole_number_within_bounds(
    service: ServiceProcess, jobs: list[str], limit: str
) -> None:
    lists = ("", f"/{jobs[0]}/events", f"/{jobs[0]}/checkpoints")
    for path in ("/v1/files", *(f"/v1/fine_tuning/jobs{path}" for path in lists)):
        answer = service.http.get(path, params={"limit": limit})
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "limit")
