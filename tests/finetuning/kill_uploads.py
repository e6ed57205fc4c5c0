"""Kills a process in every state of the disk that work on an upload goes through, and starts anew from there.

A program of its own, since it forks, which only a process with one thread may do::

    python -m tests.finetuning.kill_uploads DIRECTORY
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

from sqlalchemy import text

import comps.finetuning.store.blobs
import comps.finetuning.uploads
from comps.cores.errors import TooLarge
from comps.finetuning.owner import EVERYBODY
from comps.finetuning.settings import Settings
from comps.finetuning.store.blobs import Blobs
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import FileRow, PartRow, UploadRow
from comps.finetuning.sweep import tidy
from comps.finetuning.uploads import cancel, complete, keep_part

WATCHED = {comps.finetuning.uploads.__file__, comps.finetuning.store.blobs.__file__}

PARTS = {"part-1": b"one, ", "part-2": b"two"}
BODY = b"".join(PARTS.values())
Act = Callable[[Database, Blobs], Any]


class Place:
    """A data directory with one pending upload ``upload-1``, without a service."""

    def __init__(self, directory: Path) -> None:
        self.settings = Settings(data_dir=directory)
        self.blobs = Blobs(self.settings.files_dir)

    def prepare(self, parts: dict[str, bytes]) -> None:
        self.settings.files_dir.mkdir(parents=True)
        database = Database(self.settings.database_url)
        database.migrate()
        with database.session() as session:
            session.add(
                UploadRow(
                    id="upload-1",
                    filename="a",
                    purpose="evals",
                    bytes=len(BODY),
                    mime_type="x",
                    expires_at=4e9,
                    status="pending",
                )
            )
            session.flush()
            for part_id, content in parts.items():
                session.add(PartRow(id=part_id, upload_id="upload-1", bytes=len(content)))
                self.blobs.path(part_id).write_bytes(content)
        database.dispose()

    def start(self) -> Database:
        """What a service does before its first request."""
        database = Database(self.settings.database_url)
        tidy(self.settings, database, self.blobs)
        with database.reading() as session:
            assert session.scalar(text("PRAGMA integrity_check")) == "ok"
        return database

    def state(self) -> tuple[str, ...]:
        """All that the next start will find: the database in words, and the files."""
        with closing(sqlite3.connect(self.settings.data_dir / "finetuning.db")) as database:
            return (*database.iterdump(), str(self.files()))

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.settings.files_dir.iterdir()}


def in_a_child(place: Place, act: Act, before: Callable[[int], None]) -> int:
    """Do ``act`` in a process of its own, which calls ``before`` each watched statement.

    Returns that process's exit code, or the signal's number times -1.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            count += 1
            before(count)
        return trace

    code = 1
    try:
        database = Database(place.settings.database_url)
        sys.settrace(trace)
        act(database, place.blobs)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def steps(place: Place, act: Act, notes: Path) -> list[int]:
    """The statements before which the disk is not as it was before the statement before."""
    last: tuple[str, ...] = ()

    def look(statement: int) -> None:
        nonlocal last
        if (now := place.state()) != last:
            last = now
            with open(notes, "a") as stream:
                stream.write(f"{statement}\n")

    assert in_a_child(place, act, look) == 0
    return [int(line) for line in notes.read_text().splitlines()]


def everywhere(
    directory: Path, parts: dict[str, bytes], act: Act, check: Callable[[Place, Database], Any]
) -> None:
    """Kill ``act`` in each state in which it leaves the disk; ``check`` what the next start finds there."""
    name = act.__name__

    def fresh(suffix: str) -> Place:
        place = Place(directory / f"{name}-{suffix}")
        place.prepare(parts)
        return place

    found = []
    for step in steps(fresh("looked-at"), act, directory / f"{name}.txt"):
        place = fresh(str(step))

        def kill(statement: int, step: int = step) -> None:
            if statement == step:
                os.kill(os.getpid(), signal.SIGKILL)

        assert in_a_child(place, act, kill) == -signal.SIGKILL
        database = place.start()
        found.append(check(place, database))
        database.dispose()
    print(name, found)
    # One change at one moment, and half-done work before or after it.
    assert found == sorted(found, key=found.index)
    assert len(set(found)) == 2
    assert len(found) > 2


def status_of(database: Database) -> tuple[str, list[str]]:
    with database.reading() as session:
        upload = session.get_one(UploadRow, "upload-1")
        return upload.status, [part.id for part in session.query(PartRow).order_by(PartRow.id)]


def completing(database: Database, blobs: Blobs) -> str:
    _, file = complete(database, blobs, "upload-1", EVERYBODY, list(PARTS), None)
    return file.id


def is_whole_or_as_before(place: Place, database: Database) -> str:
    status, parts = status_of(database)
    if status == "pending":
        assert place.files() == PARTS
        assert parts == list(PARTS)
    else:
        assert (status, parts, list(place.files().values())) == ("completed", [], [BODY])
    file_id = completing(database, place.blobs)
    assert place.files() == {file_id: BODY}
    with database.reading() as session:
        assert [row.id for row in session.query(FileRow)] == [file_id]
    return status


def sending(database: Database, blobs: Blobs) -> None:
    content = PARTS["part-2"]
    writer = blobs.writer("part-2", 100, TooLarge("no"))
    try:
        writer.write(content)
        part = PartRow(id="part-2", upload_id="upload-1", bytes=len(content))
        keep_part(database, blobs, writer, part, EVERYBODY)
    finally:
        writer.discard()


def is_there_or_not(place: Place, database: Database) -> int:
    status, parts = status_of(database)
    assert status == "pending"
    assert place.files() == {part_id: PARTS[part_id] for part_id in parts}
    return len(parts)


def cancelling(database: Database, blobs: Blobs) -> None:
    cancel(database, blobs, "upload-1", EVERYBODY)


def is_gone_or_as_before(place: Place, database: Database) -> str:
    status, parts = status_of(database)
    assert (list(place.files()) == []) == (parts == []) == (status == "cancelled")
    cancelling(database, place.blobs)
    assert place.files() == {}
    return status


if __name__ == "__main__":
    root = Path(sys.argv[1])
    everywhere(root, PARTS, completing, is_whole_or_as_before)
    everywhere(root, {"part-1": PARTS["part-1"]}, sending, is_there_or_not)
    everywhere(root, PARTS, cancelling, is_gone_or_as_before)
