"""The events of a run become rows, each line once, whatever state the file is in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from comps.finetuning.jobs.follow import CHUNK, follow, read_result
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import CheckpointRow, EventRow, JobRow
from comps.tuning.rundir import EVENTS, RESULT, EventWriter

JOB = "ft-job-0"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/finetuning.db")
    database.migrate()
    with database.session() as session:
        session.add(JobRow(id=JOB, kind="fine_tuning", status="running", model="m", failures=2))
    yield database
    database.dispose()


def read_on(database: Database, directory: Path) -> int:
    """Follow to the end of the file; returns the number of transactions that it took."""
    rounds = 0
    while True:
        with database.session() as session:
            job = session.scalars(select(JobRow)).one()
            if not follow(session, job, directory):
                return rounds
        rounds += 1


def rows(database: Database) -> list[EventRow]:
    with database.reading() as session:
        return list(session.scalars(select(EventRow).order_by(EventRow.sequence)))


def checkpoint(step: int, removed: list[int]) -> dict[str, Any]:
    return {
        "type": "checkpoint",
        "step": step,
        "path": f"/checkpoint-{step}",
        "metrics": {},
        "removed": removed,
    }


def test_nothing_is_read_before_there_is_a_file(database: Database, tmp_path: Path) -> None:
    assert read_on(database, tmp_path) == 0
    assert read_result(tmp_path) is None


def test_a_line_that_is_still_being_written_waits(database: Database, tmp_path: Path) -> None:
    writer = EventWriter(tmp_path)
    writer.write("first")
    with open(tmp_path / EVENTS, "a") as stream:
        stream.write('{"created_at": 1, "message": "sec')
        stream.flush()
        read_on(database, tmp_path)
        assert [row.message for row in rows(database)] == ["first"]
        stream.write('ond"}\n')
    read_on(database, tmp_path)
    assert [row.message for row in rows(database)] == ["first", "second"]
    assert read_on(database, tmp_path) == 0
    writer.close()


def test_a_line_torn_by_a_crash_is_left_out_and_the_next_ones_are_not(
    database: Database, tmp_path: Path
) -> None:
    (tmp_path / EVENTS).write_text('{"created_at": 1, "message": "befo')
    writer = EventWriter(tmp_path)  # of the next attempt
    writer.write("after")
    writer.close()
    read_on(database, tmp_path)
    assert [row.message for row in rows(database)] == ["after"]


def test_a_long_file_becomes_rows_in_pieces_and_long_lines_are_whole(
    database: Database, tmp_path: Path
) -> None:
    writer = EventWriter(tmp_path)
    for index in range(3000):
        writer.write(f"event {index}", filler="x" * 100)
    writer.write("the longest", filler="x" * CHUNK)
    writer.close()
    assert read_on(database, tmp_path) > 2
    found = rows(database)
    assert [row.message for row in found] == [*(f"event {index}" for index in range(3000)), "the longest"]
    assert len({row.id for row in found}) == 3001


def test_progress_and_checkpoints_are_known_from_events(database: Database, tmp_path: Path) -> None:
    writer = EventWriter(tmp_path)
    writer.write(
        "m", type="metrics", step=5, total_steps=9, train_loss=2.0, seconds_left=4, trained_tokens=77
    )
    for step, removed in ((2, []), (4, []), (4, []), (6, [2])):
        writer.write("c", **checkpoint(step, removed))
    writer.close()
    read_on(database, tmp_path)
    with database.reading() as session:
        job = session.scalars(select(JobRow)).one()
        steps = list(session.scalars(select(CheckpointRow.step).order_by(CheckpointRow.sequence)))
    assert job.progress["step"] == 5
    assert job.trained_tokens == 77
    assert job.estimated_finish is not None
    assert job.failures == 0, "a run that moves has not died in vain"
    assert steps == [4, 6], "the one that was removed is gone, the one written twice is there once"


def test_the_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / RESULT).write_text(json.dumps({"outcome": "succeeded", "path": "/here"}))
    assert read_result(tmp_path) == {"outcome": "succeeded", "path": "/here"}
