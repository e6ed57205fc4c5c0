"""Uploads in parts: which change is allowed when, and how parts become a file.

A part is a blob, then a row. Completing first writes down which file the upload is about to become, then
copies the parts into that file's blob; one transaction adds the file's row, marks the upload and forgets
the parts, whose bytes go last. So whenever the service is killed, the upload is either as it was or
complete, and :func:`comps.finetuning.sweep.tidy` knows which bytes are left over.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import Counter

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from comps.cores.errors import Conflict, InvalidRequest, NotFound, TooLarge
from comps.finetuning.jobs.find import find_upload
from comps.finetuning.owner import Owner
from comps.finetuning.schemas.uploads import MAX_PARTS
from comps.finetuning.store.blobs import Blobs, BlobWriter
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import FileRow, PartRow, UploadRow

LIFETIME_SECONDS = 3600  # from the upload's beginning to its completion, as OpenAI has it

# A client that lost the answer sends a part again, OpenAI's up to twice; in the end only listed parts count.
_TIMES = 3
_BLOCK = 2**20
_FILE_IDS = uuid.UUID("0c8ac35e-39a4-4de0-8a0a-4e0ee7b0e7a6")


def check_pending(upload: UploadRow, at: float | None = None) -> None:
    """Raise :class:`Conflict` unless ``upload`` can still be changed at the time ``at`` (now)."""
    match upload.status_at(at):
        case "pending":
            return
        case "completed":
            what = f"is completed: it became the file {upload.file_id}"
        case "expired":
            what = f"has expired: {LIFETIME_SECONDS} seconds are allowed from its creation to its completion"
        case ended:
            what = f"was {ended}"
    message = f"The upload {upload.id} {what}."
    raise Conflict(message, param="upload_id", code=f"upload_{upload.status_at(at)}")


def check_part(session: Session, upload: UploadRow, size: int = 0) -> None:
    """Raise :class:`Conflict` or :class:`TooLarge` unless a part of ``size`` bytes may be added."""
    check_pending(upload)
    counted = select(func.count(), func.sum(PartRow.bytes)).where(PartRow.upload_id == upload.id)
    parts, stored = session.execute(counted).one()
    if parts >= MAX_PARTS:
        message = f"The upload {upload.id} has {MAX_PARTS} parts, which is the limit; send larger ones."
        raise TooLarge(message, param="upload_id", code="too_many_parts")
    if (stored or 0) + size > _TIMES * upload.bytes:
        raise TooLarge(
            f"The upload {upload.id} was announced with {upload.bytes} bytes, and its parts may hold "
            f"{_TIMES} times as many, to make up for repeated ones; cancel it and begin again.",
            param="upload_id",
            code="too_many_parts",
        )


def keep_part(database: Database, blobs: Blobs, writer: BlobWriter, part: PartRow, owner: Owner) -> PartRow:
    """Store a part that was received, if its upload still takes it."""
    with blobs.published(writer), database.session() as session:
        check_part(session, _locked(session, part.upload_id, owner), part.bytes)
        session.add(part)
    return part


def cancel(database: Database, blobs: Blobs, upload_id: str, owner: Owner) -> UploadRow:
    """End an upload and remove its parts. Cancelling it again changes nothing."""
    with database.session() as session:
        upload = _locked(session, upload_id, owner)
        if upload.status == "cancelled":
            return upload
        check_pending(upload)
        upload.status = "cancelled"
        parts = forget_parts(session, upload)
    for part_id in parts:
        blobs.delete(part_id)
    return upload


def complete(
    database: Database, blobs: Blobs, upload_id: str, owner: Owner, part_ids: list[str], md5: str | None
) -> tuple[UploadRow, FileRow]:
    """Make a file of the parts in this order. The same request again gives the same file again.

    Blocking, for as long as it takes to copy the file; to be called for one upload at a time. Raises
    :class:`InvalidRequest` when size or ``md5`` are not as announced; the upload can then still be
    completed in another way.
    """
    began = time.time()
    # The id tells the request: a repeated one is known by the file that its upload became.
    file_id = f"file-{uuid.uuid5(_FILE_IDS, ' '.join([upload_id, md5 or '-', *part_ids]))}"
    with database.session() as session:
        upload = _locked(session, upload_id, owner)
        file = session.get(FileRow, file_id)
        if file is not None and upload.status == "completed":
            return upload, file
        check_pending(upload)
        _check_list(session, upload, part_ids)
        upload.file_id = file_id

    excess = TooLarge(f"The parts are larger than the {upload.bytes} announced bytes.", param="part_ids")
    writer = blobs.writer(file_id, upload.bytes, excess)
    try:
        found = _copy(blobs, part_ids, writer)
        if md5 not in (None, found):
            raise InvalidRequest(
                f"md5: the parts in this order have the MD5 checksum {found}, not {md5}.",
                param="md5",
                code="checksum_mismatch",
            )
        with blobs.published(writer), database.session() as session:
            upload = _locked(session, upload_id, owner)
            check_pending(upload, began)
            now = time.time()
            file = FileRow(
                id=file_id, filename=upload.filename, purpose=upload.purpose, bytes=writer.size,
                sha256=writer.sha256, created_at=now, owner=upload.owner,
                expires_at=now + upload.file_lifetime if upload.file_lifetime else None,
            )  # fmt: skip
            session.add(file)
            upload.status = "completed"
            parts = forget_parts(session, upload)
    except FileNotFoundError:
        # The parts of an upload that was cancelled, or has expired, go while they are copied.
        with database.reading() as session:
            check_pending(find_upload(session, upload_id, owner))
        raise
    finally:
        writer.discard()
    for part_id in parts:
        blobs.delete(part_id)
    return upload, file


def forget_parts(session: Session, upload: UploadRow) -> list[str]:
    """Delete the rows of an upload's parts; returns their ids, whose bytes go after the commit."""
    mine = PartRow.upload_id == upload.id
    parts = list(session.scalars(select(PartRow.id).where(mine)))
    session.execute(delete(PartRow).where(mine))
    return parts


def _locked(session: Session, upload_id: str, owner: Owner) -> UploadRow:
    """The upload, which nobody else can change before this transaction ends."""
    upload = find_upload(session, upload_id, owner)
    session.refresh(upload, with_for_update=True)
    return upload


def _check_list(session: Session, upload: UploadRow, part_ids: list[str]) -> None:
    sizes = dict(
        session.execute(select(PartRow.id, PartRow.bytes).where(PartRow.upload_id == upload.id))
        .tuples()
        .all()
    )
    for part_id, times in Counter(part_ids).items():
        if part_id not in sizes:
            message = f"part_ids: the upload {upload.id} has no part {part_id[:80]!r}."
            raise NotFound(message, param="part_ids", code="part_not_found")
        if times > 1:
            message = f"part_ids: the part {part_id} is listed {times} times."
            raise InvalidRequest(message, param="part_ids")
    if (total := sum(sizes[part_id] for part_id in part_ids)) != upload.bytes:
        raise InvalidRequest(
            f"part_ids: these parts hold {total} bytes, but the upload was announced with {upload.bytes}.",
            param="part_ids",
            code="size_mismatch",
        )


def _copy(blobs: Blobs, part_ids: list[str], writer: BlobWriter) -> str:
    """Write the parts one after the other; returns the MD5 of all in hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    for part_id in part_ids:
        with open(blobs.path(part_id), "rb", buffering=0) as stream:
            while block := stream.read(_BLOCK):
                writer.write(block)
                digest.update(block)
    return digest.hexdigest()
