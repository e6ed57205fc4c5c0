"""Uploads in parts, as OpenAI's uploads API has them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from comps.finetuning.schemas.files import LONGEST_LIFE, SHORTEST_LIFE, FileObject
from comps.finetuning.schemas.tolerant import Integer, Tolerant, no_boolean
from comps.finetuning.store.tables import FileRow, PartRow, UploadRow

# More than any client makes of a file, and few enough to be listed in one body.
MAX_PARTS = 10_000


def _check_media_type(value: str) -> str:
    if not re.fullmatch(r"[ -~]{1,255}", value):
        raise ValueError("a media type such as application/jsonl was expected")
    return value


def _check_md5(value: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{32}", value):
        raise ValueError("an MD5 checksum of 32 hexadecimal digits was expected")
    return value.lower()


class ExpiresAfter(Tolerant):
    """How long the file will be kept, from its creation on."""

    anchor: Literal["created_at"]
    seconds: Annotated[Integer, Field(ge=SHORTEST_LIFE, le=LONGEST_LIFE)]


class UploadRequest(Tolerant):
    """The body of ``POST /v1/uploads``: the file that the parts will make up."""

    filename: str = Field(min_length=1, max_length=1024)
    purpose: str = Field(max_length=1024)
    bytes: Annotated[int, BeforeValidator(no_boolean), Field(ge=1)] = Field(
        description="The file's size; the parts must add up to it"
    )
    mime_type: Annotated[str, AfterValidator(_check_media_type)] = "application/octet-stream"
    expires_after: ExpiresAfter | None = None


PartId = Annotated[str, Field(max_length=200)]


class CompleteRequest(Tolerant):
    """The body of ``POST /v1/uploads/{upload_id}/complete``."""

    part_ids: list[PartId] = Field(
        min_length=1,
        max_length=MAX_PARTS,
        description="The parts, in the order in which they make up the file",
    )
    md5: Annotated[str, AfterValidator(_check_md5)] | None = Field(
        None, description="MD5 of the whole file in hexadecimal digits, if it is to be checked"
    )


class PartObject(BaseModel):
    """One part: OpenAI's fields, then ours."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str
    bytes: int

    @classmethod
    def of(cls, row: PartRow) -> PartObject:
        return cls(id=row.id, created_at=int(row.created_at), upload_id=row.upload_id, bytes=row.bytes)


class UploadObject(BaseModel):
    """One upload: OpenAI's fields, then ours. ``file`` is what it became."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None = None
    mime_type: str
    warnings: list[str] = Field(default_factory=list)

    @classmethod
    def of(cls, row: UploadRow, file: FileRow | None = None, **ours: Any) -> Self:
        return cls.model_validate(
            {
                "id": row.id,
                "bytes": row.bytes,
                "created_at": int(row.created_at),
                "expires_at": int(row.expires_at),
                "filename": row.filename,
                "purpose": row.purpose,
                "status": row.status_at(),
                "file": FileObject.of(file) if file else None,
                "mime_type": row.mime_type,
                **ours,
            }
        )


class UploadState(UploadObject):
    """As above, with the parts that are there, in the order in which they came."""

    parts: list[PartObject]
