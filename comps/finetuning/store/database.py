"""The database: transactions, and bringing it to the present schema.

SQLite, in WAL mode with full synchronisation: what was answered survives a power cut. Every write
transaction begins with ``BEGIN IMMEDIATE``, so it holds the one write lock before it reads anything, and
a state read in it cannot change under it; readers never wait. No other database is taken, since no promise
of this service was ever put to the test with one.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import Session

from comps.cores.errors import InsufficientStorage, StartupError, Unavailable

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_TIMEOUT_MS = 30_000
# FastAPI runs plain routes on up to 40 threads; each may hold a connection, beside the dispatcher.
_CONNECTIONS = 48
# With less than this free (bytes), an I/O error of the database is put down to a full disk.
_NEXT_TO_NOTHING = 256 * 1024
# What SQLite says when the file that its connections share cannot grow, or a file cannot be made.
_PERHAPS_FULL = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


class Database:
    """One database, shared by all threads of the service."""

    def __init__(self, url: str) -> None:
        """Connects to nothing yet. Raises :class:`StartupError` for a URL that cannot work."""
        try:
            if (kind := make_url(url).get_backend_name()) != "sqlite":
                raise StartupError(
                    f"FINETUNING_DATABASE_URL names a {kind} database; this service works with SQLite only, "
                    "as in sqlite:////path/to/finetuning.db."
                )
            self.engine = create_engine(url, pool_size=8, max_overflow=_CONNECTIONS - 8)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise StartupError(f"FINETUNING_DATABASE_URL cannot be used: {error}.") from error
        event.listen(self.engine, "connect", _configure_sqlite)
        event.listen(self.engine, "begin", _begin_sqlite)
        self._readers = self.engine.execution_options(begin="DEFERRED")

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A write transaction: committed at the end of the block, rolled back by an exception.

        Objects stay readable after the commit. An explicit ``session.commit()`` inside the block is
        allowed; what follows it is a new transaction. Raises :class:`InsufficientStorage` and
        :class:`Unavailable` besides SQLAlchemy's own errors.
        """
        with self._errors(), Session(self.engine, expire_on_commit=False) as session:
            yield session
            session.commit()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A consistent view for queries only; writers are neither awaited nor held up."""
        with self._errors(), Session(self._readers, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OperationalError as error:
            if self._disk_is_full(error):
                raise InsufficientStorage("The service's disk is full; nothing was changed.") from error
            if _sqlite_code(error) == sqlite3.SQLITE_BUSY:
                raise Unavailable("The database is busy; nothing was changed, try again.") from error
            raise

    def _disk_is_full(self, error: DatabaseError) -> bool:
        """Whether a full disk is behind ``error``, as SQLite says or, if that is unclear, the disk itself."""
        code = _sqlite_code(error)
        if code not in _PERHAPS_FULL:
            return code == sqlite3.SQLITE_FULL
        try:
            facts = os.statvfs(Path(self.engine.url.database or "").parent)
        except OSError:  # there is no such directory
            return False
        return facts.f_bavail * facts.f_frsize < _NEXT_TO_NOTHING or facts.f_files > facts.f_favail == 0

    def migrate(self) -> None:
        """Bring the schema to this version, in one transaction.

        Raises :class:`StartupError` when the database is not ours, damaged, or newer than this code.
        """
        if self._is_current():
            return
        # Imported here: most starts need no migration, and Alembic takes a fifth of a second to import.
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        try:
            with self.engine.begin() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except (CommandError, DatabaseError) as error:
            where = self.engine.url.render_as_string(hide_password=True)
            reason: object = error
            if isinstance(error, DatabaseError):
                reason = "its disk is full" if self._disk_is_full(error) else error.orig
            raise StartupError(f"The database {where} cannot be brought up to date: {reason}.") from error

    def _is_current(self) -> bool:
        """Whether the schema is the newest migration's; their files' names begin with their revision."""
        newest = max(path.name for path in (_MIGRATIONS / "versions").glob("[0-9]*.py")).partition("_")[0]
        try:
            with self._readers.connect() as connection:
                present = connection.scalar(text("SELECT version_num FROM alembic_version"))
        except DatabaseError:
            return False  # new, or not a database at all: migrating tells
        return bool(present == newest)

    def dispose(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _sqlite_code(error: DatabaseError) -> int:
    """SQLite's primary result code, without the bits that say where in SQLite; 0 for others' errors."""
    return int(getattr(error.orig, "sqlite_errorcode", 0)) & 0xFF


def _configure_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # Python's sqlite3 would begin transactions late, and deferred
    cursor = connection.cursor()
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
        f"busy_timeout = {_BUSY_TIMEOUT_MS}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('begin', 'IMMEDIATE')}")
