"""What tests of uploads ask of a service, and where they look for what is left."""

from __future__ import annotations

import time
from typing import Any

from openai.types import Upload
from service_process import ServiceProcess
from sqlalchemy import update

from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import UploadRow

Json = dict[str, Any]


def stored(service: ServiceProcess) -> set[str]:
    """The names of everything in the service's directory of files."""
    return {path.name for path in (service.data_dir / "files").iterdir()}


def database_of(service: ServiceProcess) -> Database:
    return Database(Settings(data_dir=service.data_dir).database_url)


def announce(service: ServiceProcess, size: int, **fields: Any) -> Upload:
    """Begin an upload of ``size`` bytes."""
    named = {"filename": "train.jsonl", "purpose": "fine-tune", "mime_type": "application/jsonl", **fields}
    return service.openai.uploads.create(bytes=size, **named)


def send(service: ServiceProcess, upload: Upload, *contents: bytes) -> list[str]:
    """Add parts; returns their ids."""
    return [service.openai.uploads.parts.create(upload.id, data=content).id for content in contents]


def state(service: ServiceProcess, upload: Upload) -> Json:
    """What the service says of an upload, its parts included."""
    answer = service.http.get(f"/v1/uploads/{upload.id}")
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    return found


def content(service: ServiceProcess, upload: Upload) -> bytes:
    """The bytes of the file that an upload became."""
    assert upload.file is not None
    return service.openai.files.content(upload.file.id).read()


def expire(service: ServiceProcess, upload_id: str) -> None:
    """Let an upload's hour be over."""
    database = database_of(service)
    with database.session() as session:
        past = time.time() - 1
        session.execute(update(UploadRow).where(UploadRow.id == upload_id).values(expires_at=past))
    database.dispose()


def until(condition: Any, seconds: float = 10, pause: float = 0.01) -> None:
    """Wait for something that will soon be so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(pause)
