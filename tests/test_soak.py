"""The soak's own checks: they pass a sound service's remains, and fail each fault that is planted in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from service_process import ROOT

from comps.finetuning.cluster.local_head import MARK as RAY_MARK
from comps.finetuning.jobs.states import add_event, transition
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import CheckpointRow, EventRow, FileRow, JobRow, ModelRow
from tests.soak import history, leftovers, numbers, plans
from tests.soak.record import Record, read_record
from tests.soak.report import logged_errors
from tests.soak.watch import Sample

JOB, FILE = "ft-job-1", "file-1"
EMPTY_DIGEST = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


class Remains:
    """The data directory of a service that ran one job to its end."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.directory = data_dir / "jobs" / JOB
        self.checkpoint = self.directory / "output" / "checkpoint-1"
        self.checkpoint.mkdir(parents=True)
        (data_dir / "files").mkdir()
        (data_dir / "files" / FILE).touch()
        line = {"created_at": 1, "message": "Step 1", "data": {}}
        (self.directory / "events.jsonl").write_text(json.dumps(line) + "\n{torn\n")
        self.database = Database(f"sqlite:///{data_dir}/finetuning.db")
        self.database.migrate()
        with self.database.session() as session:
            job = JobRow(id=JOB, kind="fine_tuning", status="validating_files", model="m", training_file=FILE)
            output = str(self.directory / "output")
            session.add(job)
            session.add(FileRow(id=FILE, filename="x", purpose="fine-tune", bytes=0, sha256=EMPTY_DIGEST))
            session.add(ModelRow(id="ft:m::1", kind="adapter", path=output, job_id=JOB))
            session.flush()
            session.add(CheckpointRow(id="c", job_id=JOB, step=1, path=str(self.checkpoint)))
            session.add(EventRow(id="e", job_id=JOB, message="Step 1", source_offset=0))
            add_event(session, job, "Created")
            for status in ("queued", "running", "succeeded"):
                transition(session, job, status, status)

    def job(self, **changes: object) -> None:
        """Change the job's row behind the service's back."""
        with self.database.session() as session:
            for name, value in changes.items():
                setattr(session.get_one(JobRow, 1), name, value)

    def read(self) -> Record:
        self.database.dispose()
        return read_record(self.data_dir)


@pytest.fixture
def remains(tmp_path: Path) -> Remains:
    return Remains(tmp_path / "data")


def violations(record: Record, kind: str = "plain") -> list[str]:
    return [
        *history.unfinished(record),
        *history.illegal_histories(record),
        *history.unexpected_ends(record, {JOB: kind}),
        *history.forgotten(record, {JOB: kind}, {FILE}),
        *history.lost_lines(record),
        *leftovers.unknown_bytes(record, orphans_allowed=0),
        *leftovers.missing_bytes(record),
        *record.damage,
    ]


def test_a_sound_services_remains_have_no_violations(remains: Remains) -> None:
    assert violations(remains.read()) == []


def an_illegal_move(remains: Remains) -> None:
    with remains.database.session() as session:
        add_event(session, session.get_one(JobRow, 1), "back", status="queued")
        add_event(session, session.get_one(JobRow, 1), "again", status="succeeded")


def a_lost_row(remains: Remains) -> None:
    with remains.database.session() as session:
        session.delete(session.get_one(JobRow, 1))


def a_half_written(name: str) -> Callable[[Remains], None]:
    return lambda remains: (remains.directory / "output" / name).mkdir()


def two_identical_lines(remains: Remains) -> None:
    with open(remains.directory / "events.jsonl", "a") as events:
        events.write(json.dumps({"message": "Step 2"}) + "\n")


def a_row_without_its_job(remains: Remains) -> None:
    with remains.database.engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        connection.exec_driver_sql(
            "INSERT INTO checkpoints SELECT 9, 'd', 'nobody', 2, 0, path, '{}' FROM checkpoints"
        )


PLANTED: dict[str, tuple[Callable[[Remains], object], str]] = {
    "a job that runs for ever": (lambda r: r.job(status="running"), "is running at the end"),
    "an end without a time": (lambda r: r.job(finished_at=None), "without a time of its end"),
    "an end that no event tells": (lambda r: r.job(status="cancelled"), "its events end with succeeded"),
    "an illegal move": (an_illegal_move, "went from succeeded to queued"),
    "a job that failed for no reason": (
        lambda r: r.job(status="failed", error={"code": "server_error", "message": "unexpected KeyError"}),
        "the plain job ft-job-1 has failed",
    ),
    "a forgotten job": (a_lost_row, "the plain job ft-job-1 was forgotten"),
    "a lost event": (two_identical_lines, "has 1 of its run's 2 events"),
    "an unknown directory": (
        lambda r: (r.data_dir / "jobs" / "ft-job-9").mkdir(), "jobs/ft-job-9 belongs to no row",
    ),
    "an unknown file": (
        lambda r: (r.data_dir / "files" / "file-9").touch(), "files/file-9 belongs to no row",
    ),
    "half an upload": (
        lambda r: (r.data_dir / "files" / ".incoming-file-9").touch(), "files/.incoming-file-9 was left half",
    ),
    "versions of nobody": (
        lambda r: (r.data_dir / "adapters" / "x").mkdir(parents=True), "adapters/x belongs to no row",
    ),
    "a deleted model": (
        lambda r: (r.data_dir / "jobs" / ".deleted-1").mkdir(), "jobs/.deleted-1 was left half-written",
    ),
    "half a version": (a_half_written(".heuristic.tmp"), "output/.heuristic.tmp was left half-written"),
    "half a result": (a_half_written(".result.json.tmp"), "output/.result.json.tmp was left half-written"),
    "an old version": (a_half_written(".heuristic.old"), "output/.heuristic.old was left half-written"),
    "scratch": (lambda r: (r.directory / "scratch").mkdir(), "jobs/ft-job-1/scratch was left half-written"),
    "an orphan": (
        lambda r: (r.data_dir / "files" / "orphaned" / "x").mkdir(parents=True), "1 files were put aside",
    ),
    "a file without bytes": (lambda r: (r.data_dir / "files" / FILE).unlink(), "file-1 has no bytes"),
    "a file with other bytes": (
        lambda r: (r.data_dir / "files" / FILE).write_text("x"), "file-1 has other bytes",
    ),
    "a checkpoint without bytes": (lambda r: r.checkpoint.rmdir(), "the checkpoint c of ft-job-1"),
    "a model without bytes": (
        lambda r: (r.directory / "output").rename(r.directory / "reports"), "ft:m::1 has no directory",
    ),
    "a row without its job": (a_row_without_its_job, "a row of checkpoints has lost its parent"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_each_planted_fault_is_found(fault: str, remains: Remains) -> None:
    plant, sentence = PLANTED[fault]
    plant(remains)
    found = violations(remains.read())
    assert any(sentence in each for each in found), found


@pytest.mark.parametrize(
    ("kind", "status", "error", "expected"),
    [
        ("bad_data", "failed", {"code": "invalid_training_file", "message": "record 2"}, True),
        ("bad_data", "succeeded", None, False),
        ("bad_data", "failed", {"code": "server_error", "message": "unexpected"}, False),
        ("too_big", "failed", {"code": "insufficient_resources", "message": "4096"}, True),
        ("nls", "failed", {"code": "server_error", "message": f"3 time(s) {history.KILLED_TOO_OFTEN}"}, True),
        ("nls", "cancelled", None, True),
        ("extract", "cancelled", None, False),
        ("extract", "failed", {"code": "invalid_adapter", "message": "damaged"}, False),
    ],
)  # fmt: skip
def test_each_kind_of_job_may_end_as_it_should_and_no_otherwise(
    kind: str, status: str, error: dict[str, str] | None, expected: bool, remains: Remains
) -> None:
    remains.job(status=status, error=error)
    assert (history.unexpected_ends(remains.read(), {JOB: kind}) == []) is expected


def test_a_process_with_the_mark_is_found(tmp_path: Path) -> None:
    mark = {RAY_MARK: str((tmp_path / "ray").resolve())}
    with subprocess.Popen(["sleep", "60"], env=os.environ | mark, start_new_session=True) as process:
        found = leftovers.left_processes(tmp_path)
        process.kill()
    assert [f"process {process.pid} is left: sleep 60"] == [each for each in found if "sleep 60" in each]
    assert not [each for each in leftovers.left_processes(tmp_path) if str(process.pid) in each]


def test_memory_that_grows_and_health_that_is_late_are_found() -> None:
    def life(growth: float) -> list[Sample]:
        return [Sample(1, float(second), 100_000_000 + int(growth * second), 20) for second in range(1000)]

    assert numbers.memory(life(0))[1] == []
    assert numbers.memory(life(100_000))[1] == ["life 1 of the service grew by 52.5 MB"]
    assert numbers.health([0.01] * 1000 + [2.0])[1] == []
    assert "took 9.0 s" in numbers.health([0.01] * 1000 + [9.0])[1][0]
    assert "one in 100" in numbers.health([0.01] * 90 + [2.0] * 10)[1][0]
    assert numbers.health([])[1] == ["health was never answered"]


def test_errors_in_the_log_are_found_once_each() -> None:
    error = {"level": "error", "message": "a round failed", "traceback": "Traceback ...\nKeyError: 'x'"}
    log = "\n".join(
        [json.dumps({"level": "info", "message": "fine"}), *[json.dumps(error)] * 2, "Segmentation fault"]
    )
    assert logged_errors(log) == [
        "the service logged 2 time(s): a round failed KeyError: 'x'",
        "the service logged 1 time(s): Segmentation fault",
    ]


def test_the_seed_decides_what_is_done() -> None:
    def first(seed: int) -> list[str]:
        return [str(plans.plan(seed, "client-0", number, plans.CLIENT, 1)) for number in range(1000)]

    assert first(7) == first(7)
    assert first(7) != first(8)
    assert {line.split()[0] for line in first(7)} == {*plans.CLIENT}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_minute_of_it_finds_nothing(tmp_path: Path) -> None:
    summary = tmp_path / "soak.json"
    command = [sys.executable, "-m", "tests.soak", "--minutes", "1", "--seed", str(int(time.time()))]
    command += ["--summary", str(summary)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    facts = json.loads(summary.read_text())
    assert facts["health seconds"]["answers"] > 0
    assert sum(facts["jobs by kind and end"].values()) > 0
