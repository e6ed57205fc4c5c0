"""Uploads in parts: begin, add parts, look at, complete, cancel."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from comps.cores.errors import InvalidRequest, TooLarge
from comps.cores.uploads import receive_upload
from comps.finetuning.dependencies import (
    BlobsDep,
    DatabaseDep,
    OwnerDep,
    ReaderDep,
    RepeatDep,
    SettingsDep,
    UploadSlot,
)
from comps.finetuning.jobs.find import find_upload
from comps.finetuning.jobs.repeats import claim, keep, keep_afterwards, once
from comps.finetuning.owner import Owner
from comps.finetuning.schemas.files import check_purpose, display_name
from comps.finetuning.schemas.tolerant import request_warnings
from comps.finetuning.schemas.uploads import (
    CompleteRequest,
    PartObject,
    UploadObject,
    UploadRequest,
    UploadState,
)
from comps.finetuning.store.blobs import PART
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import FileRow, PartRow, UploadRow, new_id
from comps.finetuning.uploads import LIFETIME_SECONDS, cancel, check_part, complete, keep_part

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

UploadPath = Annotated[str, Path(max_length=200)]

_PART_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


@router.post("")
def create_upload(
    body: UploadRequest, owner: OwnerDep, settings: SettingsDep, database: DatabaseDep, repeat: RepeatDep
) -> UploadObject:
    """Begin an upload in parts; it must be completed within an hour."""
    if body.bytes > settings.max_upload_bytes:
        raise TooLarge(
            f"bytes: the file is larger than the limit of {settings.max_upload_bytes} bytes "
            "(FINETUNING_MAX_UPLOAD_BYTES).",
            param="bytes",
        )
    upload = UploadRow(
        id=new_id("upload"), filename=display_name(body.filename), purpose=check_purpose(body.purpose),
        bytes=body.bytes, mime_type=body.mime_type, owner=owner.id,
        status="pending", created_at=(now := time.time()), expires_at=now + LIFETIME_SECONDS,
        file_lifetime=body.expires_after.seconds if body.expires_after else None,
    )  # fmt: skip

    def make() -> UploadObject:
        with database.session() as session:
            claim(session, repeat)
            session.add(upload)
            session.flush()
            answer = UploadObject.of(upload, warnings=request_warnings(body))
            keep(session, repeat, answer)
        return answer

    return once(database, repeat, make, UploadObject.model_validate)


@router.get("/{upload_id}")
def retrieve_upload(upload_id: UploadPath, owner: OwnerDep, session: ReaderDep) -> UploadState:
    """What became of an upload, and which parts are there: where to go on after a lost connection."""
    upload = find_upload(session, upload_id, owner)
    file = session.get(FileRow, upload.file_id) if upload.status == "completed" else None
    query = select(PartRow).where(PartRow.upload_id == upload.id).order_by(PartRow.created_at, PartRow.id)
    parts = [PartObject.of(part) for part in session.scalars(query)]
    return UploadState.of(upload, file, parts=parts)


@router.post("/{upload_id}/parts", openapi_extra=_PART_FORM, dependencies=[UploadSlot])
async def add_part(
    upload_id: UploadPath,
    request: Request,
    owner: OwnerDep,
    settings: SettingsDep,
    database: DatabaseDep,
    blobs: BlobsDep,
) -> PartObject:
    """Store a part; it is on the disk when it is answered. Parts may come side by side, in any order."""
    announced = await run_in_threadpool(_room_for_part, database, upload_id, owner)
    part_id = new_id(PART)
    message = f"The part is larger than the {announced} bytes that were announced for the whole upload."
    writer = await run_in_threadpool(blobs.writer, part_id, announced, TooLarge(message, param="data"))
    try:
        received = await receive_upload(request, "data", writer, settings.upload_idle_seconds)
        if received.filename is None:
            raise InvalidRequest("The part's field 'data' is missing, or is not a file.", param="data")
        if writer.size == 0:
            raise InvalidRequest("The part is empty.", param="data")
        part = PartRow(id=part_id, upload_id=upload_id, bytes=writer.size, created_at=time.time())
        return PartObject.of(await run_in_threadpool(keep_part, database, blobs, writer, part, owner))
    finally:
        writer.discard()


def _room_for_part(database: Database, upload_id: str, owner: Owner) -> int:
    """The bytes announced, if the upload takes a part: before the first byte of the part is read."""
    with database.reading() as session:
        upload = find_upload(session, upload_id, owner)
        check_part(session, upload)
        return upload.bytes


@router.post("/{upload_id}/complete")
async def complete_upload(
    upload_id: UploadPath,
    body: CompleteRequest,
    request: Request,
    owner: OwnerDep,
    database: DatabaseDep,
    blobs: BlobsDep,
    repeat: RepeatDep,
) -> UploadObject:
    """Make a file of the parts. A client that lost the answer may ask again and gets the same one."""

    def make() -> UploadObject:
        upload, file = complete(database, blobs, upload_id, owner, body.part_ids, body.md5)
        answer = UploadObject.of(upload, file, warnings=request_warnings(body))
        keep_afterwards(database, repeat, answer)
        return answer

    async with request.app.state.completing:
        return await run_in_threadpool(once, database, repeat, make, UploadObject.model_validate)


@router.post("/{upload_id}/cancel")
def cancel_upload(
    upload_id: UploadPath, owner: OwnerDep, database: DatabaseDep, blobs: BlobsDep, repeat: RepeatDep
) -> UploadObject:
    """Give an upload up and remove its parts. Cancelling it again changes nothing."""

    def make() -> UploadObject:
        answer = UploadObject.of(cancel(database, blobs, upload_id, owner))
        keep_afterwards(database, repeat, answer)
        return answer

    return once(database, repeat, make, UploadObject.model_validate)
