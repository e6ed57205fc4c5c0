"""Deleting a job takes along all that came of it, at once or not at all, and never what others still need."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from fixtures_jobs import start_and_finish, succeeded_job
from service_process import ServiceProcess
from sqlalchemy import func, select, update

from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import CheckpointRow, EventRow, JobRow, ModelRow, new_id
from comps.tuning.rundir import LOCK, LOG

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def database(server: ServiceProcess) -> Iterator[Database]:
    """The service's own database, for the parts that its missing Ray would play."""
    database = Database(f"sqlite:///{server.data_dir}/finetuning.db")
    yield database
    database.dispose()


def finished_job(service: ServiceProcess, database: Database) -> str:
    """A job with a log, a checkpoint, a sub-adapter and a merged model; returns its id."""
    job_id = succeeded_job(database, service.data_dir / "jobs", service.models_dir / "org" / "tiny", None)
    directory = service.data_dir / "jobs" / job_id
    (directory / LOG).write_text("trained\n")
    (directory / "output" / "checkpoint-5").mkdir()
    with database.session() as session:
        path = str(directory / "output" / "checkpoint-5")
        session.add(CheckpointRow(id=new_id("ftckpt"), job_id=job_id, step=5, path=path))
    for kind, path in (("extract", "heuristic"), ("merge", "heuristic/merged_model")):
        run = JobRow(id=new_id(kind), kind=kind, status="queued", model="org/tiny", source=job_id)
        run.version = "heuristic"
        with database.session() as session:
            session.add(run)
        (directory / "output" / path).mkdir()
        (service.data_dir / "jobs" / run.id).mkdir()
        start_and_finish(database, run.id, {"outcome": "succeeded", "path": str(directory / "output" / path)})
    return job_id


def add_job(database: Database, status: str = "paused", **columns: Any) -> str:
    job = JobRow(id=new_id("ft-job"), kind="fine_tuning", status=status, model="org/tiny", **columns)
    with database.session() as session:
        session.add(job)
    return job.id


def change(database: Database, job_id: str, **values: Any) -> None:
    with database.session() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(**values))


def delete(client: openai.OpenAI, job_id: str) -> Any:
    return client.delete(f"/fine_tuning/jobs/{job_id}", cast_to=object)


def left_of(service: ServiceProcess, database: Database, job_id: str) -> list[str]:
    """Everything that still speaks of a job, in the database and on the disk."""
    with database.reading() as session:
        counts = {
            "rows": select(func.count()).where((JobRow.id == job_id) | (JobRow.source == job_id)),
            "models": select(func.count()).where(ModelRow.job_id == job_id),
            "checkpoints": select(func.count()).where(CheckpointRow.job_id == job_id),
            "events": select(func.count()).where(EventRow.job_id == job_id),
        }
        found = [name for name, query in counts.items() if session.scalar(query)]
    directories = (service.data_dir / "jobs").iterdir()
    return found + [path.name for path in directories if path.name.startswith((job_id, ".deleted-"))]


def test_a_deleted_job_takes_along_all_that_came_of_it(
    server: ServiceProcess, client: openai.OpenAI, database: Database
) -> None:
    job_id, other = finished_job(server, database), finished_job(server, database)
    with database.reading() as session:
        runs = list(session.scalars(select(JobRow.id).where(JobRow.source == job_id)))
    models = [model.id for model in client.models.list() if job_id in model.id]
    assert len(runs) == 2
    assert len(models) == 3
    assert delete(client, job_id) == {"id": job_id, "object": "fine_tuning.job.deleted", "deleted": True}
    assert left_of(server, database, job_id) == []
    for run in (job_id, *runs):
        assert not (server.data_dir / "jobs" / run).exists()
        for part in ("", "/events", "/logs", "/checkpoints"):
            assert server.http.get(f"{JOBS}/{run}{part}").status_code == 404
    assert not {*models} & {model.id for model in client.models.list()}
    with pytest.raises(openai.NotFoundError, match="There is no job"):
        delete(client, job_id)
    # Its neighbour is as it was.
    assert client.fine_tuning.jobs.retrieve(other).status == "succeeded"
    assert len([model for model in client.models.list() if other in model.id]) == 3
    assert (server.data_dir / "jobs" / other / "output" / "heuristic" / "merged_model").is_dir()
    assert server.http.get(f"{JOBS}/{other}/logs").text == "trained\n"


@pytest.mark.parametrize("status", ["queued", "running", "paused"])
def test_a_job_that_has_not_ended_must_be_cancelled_first(
    server: ServiceProcess, client: openai.OpenAI, database: Database, status: str
) -> None:
    job_id = add_job(database, status)
    with pytest.raises(openai.ConflictError, match=f"is {status}: cancel it first") as refusal:
        delete(client, job_id)
    assert refusal.value.code == "job_not_ended"
    assert refusal.value.response.headers["x-should-retry"] == "false"
    client.fine_tuning.jobs.cancel(job_id)
    assert delete(client, job_id)["deleted"]
    assert left_of(server, database, job_id) == []


@pytest.mark.parametrize(
    "spec",
    [
        {"resume_from": "output/checkpoint-5"},
        {"super_adapter": "output"},
        {"adapter": "output/heuristic"},
        {"base_model": {"path": "output/heuristic/merged_model"}},
    ],
    ids=["resumes", "extracts", "merges", "trains on a merged model"],
)
def test_a_job_that_another_one_needs_stays(
    server: ServiceProcess, client: openai.OpenAI, database: Database, spec: dict[str, Any]
) -> None:
    job_id = finished_job(server, database)

    def at(directory: Path) -> dict[str, Any]:
        (name, value) = next(iter(spec.items()))
        return {
            name: {"path": str(directory / value["path"])} if name == "base_model" else str(directory / value)
        }

    directory = server.data_dir / "jobs" / job_id
    neighbour = add_job(database, spec=at(directory.with_name(f"{job_id}2")))
    user = add_job(database, spec=at(directory))
    with pytest.raises(openai.ConflictError, match=f"is used by the job {user}, which has not ended"):
        delete(client, job_id)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "succeeded"
    client.fine_tuning.jobs.cancel(user)
    assert delete(client, job_id)["deleted"]
    client.fine_tuning.jobs.cancel(neighbour)


def test_a_base_model_stays_as_long_as_an_adapter_needs_it(
    server: ServiceProcess, client: openai.OpenAI, database: Database
) -> None:
    """One that was registered knows it by its name, one that was trained here by its directory."""
    job_id = finished_job(server, database)
    (merged,) = (
        model.id for model in client.models.list() if model.id.endswith(f"{job_id}:heuristic:merged")
    )
    path = client.models.retrieve(merged).model_extra["path"]
    trained = add_job(database, "succeeded", spec={"base_model": {"path": path}})
    users = {
        f"registered-{job_id}": {"base_model": merged, "path": "/elsewhere/adapter"},
        f"trained-{job_id}": {"base_model": "another-name", "path": "/elsewhere", "job_id": trained},
    }
    for name, columns in users.items():
        with database.session() as session:
            session.add(ModelRow(id=name, kind="super_adapter", details={}, **columns))
        for refused in (f"/models/{merged}", f"/fine_tuning/jobs/{job_id}"):
            with pytest.raises(openai.ConflictError, match=f"is the base model of the model '{name}'"):
                client.delete(refused, cast_to=object)
        assert client.models.delete(name).deleted
    assert delete(client, job_id)["deleted"]


def test_a_registered_base_model_that_a_registered_adapter_names_stays(
    client: openai.OpenAI, database: Database
) -> None:
    with database.session() as session:
        session.add(ModelRow(id="named-base", kind="base", path="/elsewhere/base", details={}))
        adapter = {"kind": "super_adapter", "path": "/elsewhere/super", "base_model": "named-base"}
        session.add(ModelRow(id="names-a-base", details={}, **adapter))
    with pytest.raises(
        openai.ConflictError, match="'named-base' is the base model of the model 'names-a-base'"
    ):
        client.models.delete("named-base")
    assert client.models.delete("names-a-base").deleted
    assert client.models.delete("named-base").deleted


def test_what_a_job_wrote_and_somebody_registered_stays(
    server: ServiceProcess, client: openai.OpenAI, database: Database
) -> None:
    job_id = finished_job(server, database)
    path = str(server.data_dir / "jobs" / job_id / "output")
    with database.session() as session:
        session.add(ModelRow(id=f"of-{job_id}", kind="super_adapter", path=path, details={}))
    with pytest.raises(openai.ConflictError, match=f"has the files of the model 'of-{job_id}'"):
        delete(client, job_id)
    with database.session() as session:
        session.delete(session.get_one(ModelRow, f"of-{job_id}"))
    assert delete(client, job_id)["deleted"]


def test_a_job_whose_processes_still_end_is_deleted_when_they_are_gone(
    server: ServiceProcess, client: openai.OpenAI, database: Database
) -> None:
    job_id = finished_job(server, database)
    change(database, job_id, submission_id=job_id, stopped=False)
    with pytest.raises(openai.ConflictError, match="not known to have ended") as refusal:
        delete(client, job_id)
    assert refusal.value.code == "job_still_ending"
    ended = threading.Timer(0.3, change, (database, job_id), {"stopped": True})
    ended.start()
    patient = client.with_options(max_retries=3)  # the official client asks again by itself
    assert delete(patient, job_id)["deleted"]
    ended.join()


def test_a_process_that_ray_has_lost_sight_of_keeps_its_directory(
    server: ServiceProcess, client: openai.OpenAI, database: Database
) -> None:
    job_id = finished_job(server, database)
    change(database, job_id, submission_id=job_id, stopped=True)
    with open(server.data_dir / "jobs" / job_id / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(openai.ConflictError, match="not known to have ended"):
            delete(client, job_id)
    assert delete(client, job_id)["deleted"]


def test_an_extraction_whose_processes_still_end_holds_its_job(
    server: ServiceProcess, client: openai.OpenAI, database: Database
) -> None:
    job_id = finished_job(server, database)
    with database.reading() as session:
        run = session.scalars(
            select(JobRow.id).where(JobRow.source == job_id, JobRow.kind == "extract")
        ).one()
    change(database, run, submission_id=run, stopped=False)
    with pytest.raises(openai.ConflictError, match=f"The processes of the job {run} are not known"):
        delete(client, job_id)
    change(database, run, stopped=True)
    assert delete(client, job_id)["deleted"]


KILLED = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import event
from sqlalchemy.orm import Session
from comps.finetuning.jobs.delete import delete_job
from comps.finetuning.owner import EVERYBODY
from comps.finetuning.routes.models import delete_model
from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database

moment, data_dir, thing = sys.argv[1:]
settings = Settings(data_dir=Path(data_dir))
database = Database(settings.database_url)
event.listen(Session, moment, lambda session: os.kill(os.getpid(), signal.SIGKILL))
if thing.startswith("ft:"):
    delete_model(thing, EVERYBODY, settings, database)
else:
    delete_job(database, settings, thing, EVERYBODY)
"""


def test_a_deletion_that_is_killed_has_happened_or_has_not(make_server) -> None:
    """Killed right before its commit it has not, right after it has, whatever was done on the disk before."""
    service = make_server()
    database = Database(f"sqlite:///{service.data_dir}/finetuning.db")
    undecided, decided, with_model = (finished_job(service, database) for _ in range(3))
    files = {
        job: sorted(
            path.relative_to(service.data_dir) for path in (service.data_dir / "jobs" / job).rglob("*")
        )
        for job in (undecided, with_model)
    }
    model = f"ft:org/tiny::{with_model}:heuristic:merged"
    rows = {path: service.http.get(path).text for path in (f"{JOBS}/{undecided}", f"/v1/models/{model}")}
    service.kill()
    for moment, thing in (("before_commit", undecided), ("after_commit", decided), ("before_commit", model)):
        command = [sys.executable, "-c", KILLED, moment, str(service.data_dir), thing]
        assert subprocess.run(command, check=False).returncode == -9
    aside = list((service.data_dir / "jobs").glob(".deleted-*"))
    assert len(aside) == 3 + 3 + 1, "each with a job, its extraction and its merge; one with a model"
    service.start()
    assert list((service.data_dir / "jobs").glob(".deleted-*")) == []
    for path, text in rows.items():
        assert service.http.get(path).text == text
    for job, names in files.items():
        found = (service.data_dir / "jobs" / job).rglob("*")
        assert sorted(path.relative_to(service.data_dir) for path in found) == names
    assert left_of(service, database, decided) == []
    # What was undone can be done.
    assert service.openai.models.delete(model).deleted
    assert delete(service.openai, undecided)["deleted"]
    database.dispose()


def test_a_service_that_is_killed_while_it_removes_files_goes_on_at_its_next_start(make_server) -> None:
    service = make_server()
    database = Database(f"sqlite:///{service.data_dir}/finetuning.db")
    job_id = finished_job(service, database)
    many = service.data_dir / "jobs" / job_id / "output" / "checkpoint-5"
    for number in range(8_000):
        (many / str(number)).touch()

    def ask() -> None:
        with suppress(openai.APIConnectionError):
            delete(service.openai, job_id)

    asking = threading.Thread(target=ask)
    asking.start()
    deadline = time.monotonic() + 10
    while (service.data_dir / "jobs" / job_id).exists():
        assert time.monotonic() < deadline
    service.kill()
    asking.join()
    assert list((service.data_dir / "jobs").glob(".deleted-*")), "it was killed too late to show anything"
    service.start()
    if service.http.get(f"{JOBS}/{job_id}").status_code == 200:  # it had not come to its commit
        assert len(list(many.iterdir())) == 8_000
        assert delete(service.openai, job_id)["deleted"]
    assert left_of(service, database, job_id) == []
    database.dispose()
