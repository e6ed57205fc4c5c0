"""The service's database, read after its end without the service's code in between."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """All rows that say what there is. ``moves`` holds each job's statuses as its events tell them, in order;
    ``lines`` the messages of its run that became events."""

    data_dir: Path
    jobs: list[Row]
    files: list[Row]
    parts: list[Row]  # of uploads that have not ended
    models: list[Row]
    checkpoints: list[Row]
    moves: dict[str, list[str]]
    lines: dict[str, list[str]]
    damage: list[str]  # what SQLite finds wrong with the database

    def job_directory(self, job_id: str) -> Path:
        return self.data_dir / "jobs" / job_id


def read_record(data_dir: Path) -> Record:
    """Read ``<data dir>/finetuning.db``."""
    with closing(sqlite3.connect(data_dir / "finetuning.db")) as database:
        database.row_factory = sqlite3.Row

        def rows(query: str) -> list[Row]:
            return [dict(row) for row in database.execute(query)]

        damage = [row["integrity_check"] for row in rows("PRAGMA integrity_check")]
        damage = [line for line in damage if line != "ok"]
        damage += [f"a row of {row['table']} has lost its parent" for row in rows("PRAGMA foreign_key_check")]
        moves: dict[str, list[str]] = {}
        lines: dict[str, list[str]] = {}
        for event in rows("SELECT job_id, message, data, source_offset FROM events ORDER BY sequence"):
            if event["source_offset"] is not None:
                lines.setdefault(event["job_id"], []).append(event["message"])
            elif status := json.loads(event["data"]).get("status"):
                moves.setdefault(event["job_id"], []).append(status)
        return Record(
            data_dir=data_dir,
            jobs=rows("SELECT * FROM jobs ORDER BY sequence"),
            files=rows("SELECT * FROM files"),
            parts=rows(
                "SELECT upload_parts.* FROM upload_parts JOIN uploads ON uploads.id = upload_id "
                "WHERE status = 'pending'"
            ),
            models=rows("SELECT * FROM models"),
            checkpoints=rows("SELECT * FROM checkpoints"),
            moves=moves,
            lines=lines,
            damage=damage,
        )
