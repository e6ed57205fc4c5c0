"""What ended runs left half-written goes; what others are still writing stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from comps.finetuning.jobs.half_written import remove_half_written
from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import JobRow

JOB = "ft-job-1"
HALF = (
    "scratch/checkpoint-3/x",
    ".spec.json.tmp",
    "output/.heuristic.tmp/x",
    "output/half/.merged_model.old/x",
)
WHOLE = ("events.jsonl", "output/half/adapter_config.json", "output/checkpoint-3/x")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path)


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    database = Database(settings.database_url)
    database.migrate()
    yield database
    database.dispose()


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def fill(directory: Path) -> Path:
    for name in (*HALF, *WHOLE):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    return directory


def add(database: Database, job_id: str, status: str, **fields: object) -> None:
    with database.session() as session:
        kind = job_id.partition("-")[0]
        session.add(JobRow(id=job_id, kind=kind, status=status, model="m", **fields))


@pytest.mark.parametrize("status", ["cancelled", "failed", "succeeded"])
def test_half_of_an_ended_job_is_removed(status: str, settings: Settings, database: Database) -> None:
    directory = fill(settings.jobs_dir / JOB)
    add(database, JOB, status, submission_id=JOB, stopped=True)
    remove_half_written(database, settings)
    assert files(directory) == {*WHOLE}
    assert not (directory / "scratch").exists()


def test_nothing_is_taken_from_a_run_that_may_still_write(settings: Settings, database: Database) -> None:
    rows = {
        "ft-job-1": ("running", {"submission_id": "a"}),
        "ft-job-2": ("paused", {"submission_id": "a", "stopped": True}),
        "ft-job-3": ("cancelled", {"submission_id": "a"}),  # its processes may still be there
    }
    for job_id, (status, fields) in rows.items():
        add(database, job_id, status, **fields)
        fill(settings.jobs_dir / job_id)
    remove_half_written(database, settings)
    for job_id in rows:
        assert files(settings.jobs_dir / job_id) == {*HALF, *WHOLE}


@pytest.mark.parametrize(
    ("source", "where"), [(JOB, f"jobs/{JOB}"), ("org/elsewhere", "adapters/org@elsewhere")]
)
def test_an_extraction_is_left_alone_until_it_has_ended(
    source: str, where: str, settings: Settings, database: Database
) -> None:
    directory = fill(settings.data_dir / where)
    add(database, JOB, "succeeded", submission_id=JOB, stopped=True)
    add(database, "extract-1", "queued", source=source)
    remove_half_written(database, settings)
    assert files(directory) == {*HALF, *WHOLE}
    with database.session() as session:
        session.get_one(JobRow, 2).status = "failed"
    remove_half_written(database, settings)
    assert files(directory) == {*WHOLE}
