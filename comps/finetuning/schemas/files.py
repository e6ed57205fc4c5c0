"""The file object of the OpenAI files API."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from pydantic import BaseModel

from comps.cores.errors import InvalidRequest
from comps.finetuning.store.tables import FileRow

# What clients may upload files for; only "fine-tune" files can be trained on.
PURPOSES = ("fine-tune", "assistants", "batch", "evals", "user_data", "vision")

_NAME_LIMIT = 255
SHORTEST_LIFE, LONGEST_LIFE = 3600, 30 * 24 * 3600  # seconds, as OpenAI has them


class FileObject(BaseModel):
    """One file. Times are Unix seconds."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    expires_at: int | None = None
    status_details: str | None = None

    @classmethod
    def of(cls, row: FileRow) -> FileObject:
        return cls(
            id=row.id,
            bytes=row.bytes,
            created_at=int(row.created_at),
            filename=row.filename,
            purpose=row.purpose,
            status=row.status,
            expires_at=int(row.expires_at) if row.expires_at else None,
        )


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


def display_name(filename: str) -> str:
    """What a client called its file, for showing and for look-up; it never becomes a path of ours."""
    last = re.split(r"[/\\]", filename)[-1]
    shown = "".join(char for char in last if unicodedata.category(char)[0] != "C").strip()
    return shown[:_NAME_LIMIT] or "upload"


def check_purpose(purpose: str | None) -> str:
    """Raises :class:`InvalidRequest` unless ``purpose`` is one that files are uploaded for."""
    if purpose in PURPOSES:
        return purpose
    given = "is missing" if purpose is None else f"has the value {purpose[:80]!r}"
    message = f"The upload's field 'purpose' {given}; it must be one of {', '.join(PURPOSES)}."
    raise InvalidRequest(message, param="purpose")


def lifetime(fields: dict[str, str]) -> int | None:
    """Seconds from creation to expiry, out of the form fields ``expires_after[anchor]`` and ``[seconds]``."""
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        message = "expires_after.anchor must be 'created_at'."
        raise InvalidRequest(message, param="expires_after.anchor")
    if (
        seconds is None
        or not re.fullmatch(r"[0-9]{1,9}", seconds)
        or not SHORTEST_LIFE <= int(seconds) <= LONGEST_LIFE
    ):
        message = f"expires_after.seconds must be a whole number from {SHORTEST_LIFE} to {LONGEST_LIFE}."
        raise InvalidRequest(message, param="expires_after.seconds")
    return int(seconds)
