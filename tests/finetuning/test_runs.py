"""What becomes of a job by what Ray says of its run. Here Ray's words are made up, elsewhere Ray is real."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from comps.finetuning.jobs.follow import follow
from comps.finetuning.jobs.runs import Runs
from comps.finetuning.jobs.secrets import Secrets
from comps.finetuning.jobs.states import transition
from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import EventRow, JobRow
from comps.tuning.rundir import EVENTS

JOB = "ft-job-0"


class Words:
    """A cluster that says of every run what it is told to say."""

    ready = True
    local = False
    status: str | None = "RUNNING"

    async def job_status(self, _: str) -> str | None:
        return self.status


class Story:
    """One job, and what the service makes of it."""

    def __init__(self, directory: Path, **fields: Any) -> None:
        self.settings = Settings(data_dir=directory, max_attempts=2)
        self.settings.jobs_dir.mkdir()
        self.database = Database(self.settings.database_url)
        self.database.migrate()
        self.ray = Words()
        secrets = Secrets(directory / "key")
        self.runs = Runs(self.database, self.settings, self.ray, secrets)  # type: ignore[arg-type]
        self.runs.ask_interval = 0
        with self.database.session() as session:
            session.add(JobRow(id=JOB, kind="fine_tuning", status="queued", model="m", **fields))

    @property
    def job(self) -> JobRow:
        with self.database.reading() as session:
            return session.scalars(select(JobRow)).one()

    @property
    def messages(self) -> list[str]:
        with self.database.reading() as session:
            return list(session.scalars(select(EventRow.message).order_by(EventRow.sequence)))

    def begin(self) -> None:
        with self.database.session() as session:
            transition(session, session.scalars(select(JobRow)).one(), "running", "The job is starting")

    def attend(self, status: str | None) -> str:
        """Look at the job once while Ray says ``status``; returns the job's own then."""
        self.ray.status = status
        asyncio.run(self.runs.attend(self.job))
        return self.job.status

    def lose(self, times: int, status: str | None = None) -> list[str]:
        """Let the run begin and be gone ``times`` times; returns the job's states after each."""
        states = []
        for _ in range(times):
            self.begin()
            states.append(self.attend(status))
        return states

    def checkpoint(self) -> None:
        line = {
            "type": "checkpoint",
            "message": "",
            "created_at": 1,
            "data": {"step": 1, "path": "", "metrics": {}},
        }
        directory = self.settings.jobs_dir / JOB
        directory.mkdir()
        (directory / EVENTS).write_text(json.dumps(line) + "\n")
        with self.database.session() as session:
            follow(session, session.scalars(select(JobRow)).one(), directory)


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    story = Story(tmp_path)
    yield story
    story.database.dispose()


def test_a_run_that_always_takes_its_ray_with_it_fails_in_the_end(story: Story) -> None:
    assert story.lose(4) == ["queued"] * 3 + ["failed"]  # two attempts, and two more
    assert story.job.error is not None
    assert story.job.error["message"].startswith(
        "Ray no longer knows the run without a result, 4 time(s) in a row without a new checkpoint"
    )


def test_losses_and_deaths_are_counted_apart_and_a_checkpoint_forgives_both(story: Story) -> None:
    assert story.lose(3) == ["queued"] * 3
    assert story.lose(1, "FAILED") == ["queued"]
    assert (story.job.losses, story.job.failures) == (3, 1)
    story.checkpoint()
    assert (story.job.losses, story.job.failures) == (0, 0)
    assert story.lose(3) == ["queued"] * 3
    assert story.lose(2, "FAILED") == ["queued", "failed"]


def test_a_job_of_its_own_retry_limit_may_be_lost_twice_more(tmp_path: Path) -> None:
    story = Story(tmp_path, retry_limit=0)
    assert story.lose(3) == ["queued", "queued", "failed"]
    story.database.dispose()


def test_a_stop_of_the_service_is_no_loss(story: Story) -> None:
    for _ in range(6):
        story.begin()
        story.ray.status = "STOPPED"
        asyncio.run(story.runs.stop([story.job]))
        assert story.job.status == "queued"
    assert (story.job.losses, story.job.failures) == (0, 0)


def test_the_runs_of_a_key_load_from_the_hub_into_a_cache_of_its_own(story: Story) -> None:
    own = {"HF_HUB_CACHE": str(story.settings.data_dir / "hub" / "0123")}
    assert story.runs.environment(JobRow(owner="0123", request={})).items() >= own.items()
    assert "HF_HUB_CACHE" not in story.runs.environment(JobRow(owner=None, request={}))


def test_a_run_that_waits_in_ray_is_no_running_one_and_its_time_limit_waits_too(tmp_path: Path) -> None:
    story = Story(tmp_path, time_limit=0.3)
    story.begin()
    assert story.attend("PENDING") == "running"
    time.sleep(0.5)
    assert [story.attend("PENDING") for _ in range(2)] == ["running"] * 2
    assert story.attend("RUNNING") == "running"
    assert story.messages[-2:] == ["The run waits in Ray until there is room for it", "Ray has begun the run"]
    time.sleep(0.5)
    assert story.attend("RUNNING") == "failed"
    assert story.job.error is not None
    assert story.job.error["code"] == "time_limit_exceeded"
    story.database.dispose()


def test_a_run_that_never_found_room_has_not_died(story: Story) -> None:
    for _ in range(5):
        story.begin()
        story.attend("PENDING")
        assert story.attend("NO ROOM") == "queued"
    assert (story.job.losses, story.job.failures, story.job.run_seconds) == (0, 0, pytest.approx(0, abs=0.5))
    assert story.messages[-1] == "Ray had no room for the run; it is submitted again"
