"""The database keeps what it was told, whoever else writes, and knows its own schema."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select, text

from comps.cores.errors import StartupError
from comps.finetuning.jobs.states import IllegalMove, transition
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import Base, EventRow, FileRow, JobRow


@pytest.fixture
def database(tmp_path: Path) -> Database:
    database = Database(f"sqlite:///{tmp_path}/test.db")
    database.migrate()
    yield database
    database.dispose()


def add_job(database: Database, status: str = "queued") -> str:
    with database.session() as session:
        session.add(JobRow(id="ft-job-1", kind="fine_tuning", status=status, model="m"))
    return "ft-job-1"


def get_job(session, job_id: str) -> JobRow:
    return session.scalars(select(JobRow).where(JobRow.id == job_id)).one()


def test_migrations_make_exactly_the_tables(database: Database) -> None:
    with database.engine.connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


def test_migrating_again_changes_nothing_and_is_fast(database: Database) -> None:
    add_job(database)
    started = time.process_time()
    database.migrate()
    assert time.process_time() - started < 0.3
    with database.reading() as session:
        assert get_job(session, "ft-job-1").model == "m"


def test_a_database_from_a_newer_version_is_refused(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StartupError, match=r"cannot be brought up to date: .*9999"):
        database.migrate()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(StartupError, match="file is not a database"):
        Database(f"sqlite:///{tmp_path}/test.db").migrate()


def test_sqlite_is_set_to_survive_a_power_cut(database: Database) -> None:
    with database.engine.connect() as connection:
        asked = ("journal_mode", "synchronous", "foreign_keys")
        assert [connection.scalar(text(f"PRAGMA {name}")) for name in asked] == ["wal", 2, 1]


def test_an_error_undoes_the_whole_transaction(database: Database) -> None:
    job_id = add_job(database)
    with pytest.raises(ZeroDivisionError), database.session() as session:  # noqa: PT012
        transition(session, get_job(session, job_id), "running", "started")
        _ = 1 / 0
    with database.reading() as session:
        assert get_job(session, job_id).status == "queued"
        assert session.scalars(select(EventRow)).all() == []


def test_rows_stay_readable_after_their_session(database: Database) -> None:
    job_id = add_job(database)
    with database.session() as session:
        job = get_job(session, job_id)
    assert job.id == job_id


def test_two_writers_cannot_both_move_a_job(database: Database) -> None:
    job_id = add_job(database)
    outcomes: list[str] = []
    barrier = threading.Barrier(8)

    def finish(wanted: str) -> None:
        barrier.wait()
        try:
            with database.session() as session:
                transition(session, get_job(session, job_id), wanted, wanted)
            outcomes.append("moved")
        except IllegalMove:
            outcomes.append("refused")

    wanted = ["cancelled", "failed"] * 4
    threads = [threading.Thread(target=finish, args=(status,)) for status in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["moved"] + ["refused"] * 7
    with database.reading() as session:
        assert len(session.scalars(select(EventRow)).all()) == 1


def test_readers_do_not_wait_for_a_writer(database: Database) -> None:
    job_id = add_job(database)
    with database.session() as writer:
        get_job(writer, job_id).status = "running"
        writer.flush()
        started = time.perf_counter()
        with database.reading() as session:
            assert get_job(session, job_id).status == "queued"
        assert time.perf_counter() - started < 4


def test_a_writer_waits_for_another_instead_of_failing(database: Database) -> None:
    job_id = add_job(database)
    with database.session() as first:
        get_job(first, job_id).attempt = 1
        first.flush()

        def write() -> None:
            with database.session() as second:
                get_job(second, job_id).attempt += 1

        thread = threading.Thread(target=write)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join()
    with database.reading() as session:
        assert get_job(session, job_id).attempt == 2


def test_events_leave_with_their_job(database: Database) -> None:
    job_id = add_job(database)
    with database.session() as session:
        transition(session, get_job(session, job_id), "cancelled", "cancelled")
    with database.session() as session:
        session.delete(get_job(session, job_id))
    with database.reading() as session:
        assert session.scalars(select(EventRow)).all() == []


def test_sizes_beyond_two_gigabytes_are_kept(database: Database) -> None:
    with database.session() as session:
        session.add(FileRow(id="file-1", filename="x", purpose="fine-tune", bytes=2**40, sha256=""))
    with database.reading() as session:
        assert session.get_one(FileRow, "file-1").bytes == 2**40
