"""Files: upload, list, look at, download, delete."""

from __future__ import annotations

import json
import time
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from sqlalchemy import select, tuple_
from starlette.concurrency import run_in_threadpool

from comps.cores.app import content
from comps.cores.errors import Conflict, InvalidRequest, TooLarge
from comps.cores.uploads import receive_upload
from comps.finetuning.dependencies import (
    BlobsDep,
    DatabaseDep,
    IdempotencyKey,
    OwnerDep,
    ReaderDep,
    SettingsDep,
    UploadSlot,
)
from comps.finetuning.jobs.find import find_file, needs_file, usable_files, visible
from comps.finetuning.jobs.repeats import Repeat, claim, digest, keep, once
from comps.finetuning.jobs.uses import shown
from comps.finetuning.schemas.files import (
    FileDeleted,
    FileList,
    FileObject,
    check_purpose,
    display_name,
    lifetime,
)
from comps.finetuning.store.blobs import Blobs, BlobWriter
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import FileRow, JobRow, new_id

router = APIRouter(prefix="/v1/files", tags=["files"])

_UPLOAD_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string"},
                        "expires_after[anchor]": {"type": "string"},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                }
            }
        },
    }
}


@router.post("", openapi_extra=_UPLOAD_FORM, dependencies=[UploadSlot])
async def upload_file(
    request: Request,
    owner: OwnerDep,
    settings: SettingsDep,
    database: DatabaseDep,
    blobs: BlobsDep,
    key: IdempotencyKey = None,
) -> FileObject:
    """Store a file; its bytes go to the disk as they arrive."""
    file_id = new_id("file")
    limit = settings.max_upload_bytes
    message = f"The file is larger than the limit of {limit} bytes (FINETUNING_MAX_UPLOAD_BYTES)."
    writer = await run_in_threadpool(blobs.writer, file_id, limit, TooLarge(message, param="file"))
    try:
        upload = await receive_upload(request, "file", writer, settings.upload_idle_seconds)
        if upload.filename is None:
            raise InvalidRequest("The upload's field 'file' is missing.", param="file")
        if writer.size == 0:
            raise InvalidRequest(f"The file {display_name(upload.filename)!r} is empty.", param="file")
        row = FileRow(
            id=file_id,
            filename=display_name(upload.filename),
            purpose=check_purpose(upload.fields.get("purpose")),
            bytes=writer.size,
            sha256=writer.sha256,
            created_at=(now := time.time()),
            expires_at=now + seconds if (seconds := lifetime(upload.fields)) else None,
            owner=owner.id,
        )
        repeat = None
        if key is not None:
            # The bytes as they came would not do: each time they have another boundary.
            sent = json.dumps([upload.filename, upload.fields, writer.sha256], sort_keys=True)
            repeat = Repeat(owner.id or "", key, digest(request.method, request.url.path, sent.encode()))
        make = partial(_keep, database, blobs, writer, row, repeat)
        return await run_in_threadpool(once, database, repeat, make, FileObject.model_validate)
    finally:
        writer.discard()


def _keep(
    database: Database, blobs: Blobs, writer: BlobWriter, row: FileRow, repeat: Repeat | None
) -> FileObject:
    with blobs.published(writer), database.session() as session:
        claim(session, repeat)
        session.add(row)
        session.flush()
        keep(session, repeat, FileObject.of(row))
    return FileObject.of(row)


@router.get("")
def list_files(
    owner: OwnerDep,
    session: ReaderDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> FileList:
    """Files by time of creation, newest first unless asked otherwise."""
    place = tuple_(FileRow.created_at, FileRow.id)
    query = usable_files(owner)
    if purpose is not None:
        query = query.where(FileRow.purpose == purpose)
    if after is not None:
        last = session.scalar(select(FileRow).where(FileRow.id == after, visible(FileRow, owner)))
        if last is None:
            raise InvalidRequest(f"after: there is no file {after[:80]!r}.", param="after")
        here = tuple_(last.created_at, last.id)
        query = query.where(place > here if order == "asc" else place < here)
    columns = (FileRow.created_at, FileRow.id)
    query = query.order_by(*(column.asc() if order == "asc" else column.desc() for column in columns))
    rows = session.scalars(query.limit(limit + 1)).all()
    data = [FileObject.of(row) for row in rows[:limit]]
    return FileList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(rows) > limit,
    )


@router.get("/{file_id}")
def retrieve_file(file_id: str, owner: OwnerDep, session: ReaderDep) -> FileObject:
    """One file's description."""
    return FileObject.of(find_file(session, file_id, owner))


@router.get("/{file_id}/content", response_class=FileResponse, responses=content("application/octet-stream"))
def download_file(file_id: str, owner: OwnerDep, session: ReaderDep, blobs: BlobsDep) -> FileResponse:
    """One file's bytes, always as a download: what it holds is the uploader's, not ours."""
    row = find_file(session, file_id, owner)
    return FileResponse(blobs.path(row.id), media_type="application/octet-stream", filename=row.filename)


@router.delete("/{file_id}")
def delete_file(file_id: str, owner: OwnerDep, database: DatabaseDep, blobs: BlobsDep) -> FileDeleted:
    """Remove a file that no unfinished job needs."""
    with database.session() as session:
        row = find_file(session, file_id, owner)
        job = session.scalar(select(JobRow).where(needs_file(row.id)).limit(1))
        if job is not None:
            message = f"The file {row.id} is used by {shown(job, owner)}, which has not ended."
            raise Conflict(message, param="file_id")
        session.delete(row)
    blobs.delete(file_id)
    return FileDeleted(id=file_id)
