"""What routes ask FastAPI for: the caller, the database, the settings, the files on disk."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic import AfterValidator
from sqlalchemy.orm import Session

from comps.cores.errors import Unauthorized
from comps.finetuning.jobs.news import News
from comps.finetuning.jobs.repeats import HEADER, Repeat, check_key, digest
from comps.finetuning.owner import EVERYBODY, Owner
from comps.finetuning.settings import Secrets, Settings
from comps.finetuning.sparsity import SparsityReports
from comps.finetuning.store.blobs import Blobs
from comps.finetuning.store.database import Database


def get_settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def get_database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


def get_blobs(request: Request) -> Blobs:
    blobs: Blobs = request.app.state.blobs
    return blobs


def get_news(request: Request) -> News:
    news: News = request.app.state.news
    return news


def get_sparsity(request: Request) -> SparsityReports:
    reports: SparsityReports = request.app.state.sparsity
    return reports


SettingsDep = Annotated[Settings, Depends(get_settings)]
DatabaseDep = Annotated[Database, Depends(get_database)]
BlobsDep = Annotated[Blobs, Depends(get_blobs)]
NewsDep = Annotated[News, Depends(get_news)]
SparsityDep = Annotated[SparsityReports, Depends(get_sparsity)]


def bearer_key(header: str | None) -> str | None:
    """The key in an ``Authorization`` header. Clients without a key send ``Bearer None`` or ``Bearer``."""
    scheme, _, key = (header or "").strip().partition(" ")
    key = key.strip()
    return key if scheme.lower() == "bearer" and key not in ("", "None") else None


def get_owner(request: Request, settings: SettingsDep) -> Owner:
    """Who calls. Raises :class:`Unauthorized`. Every route takes this as a dependency, which guards it."""
    if not settings.api_keys and not settings.operator_keys:
        return EVERYBODY
    key = bearer_key(request.headers.get("authorization"))
    if key is None:
        raise Unauthorized("This service needs an API key: send it as 'Authorization: Bearer KEY'.")
    sent = key.encode()
    ordinary, operator = _is_one_of(sent, settings.api_keys), _is_one_of(sent, settings.operator_keys)
    if not ordinary and not operator:
        raise Unauthorized("The API key is not one of this service's.")
    return Owner(hashlib.sha256(sent).hexdigest()[:16], sees_all=operator)


def _is_one_of(sent: bytes, keys: Secrets) -> bool:
    # Each comparison takes the same time wherever the keys differ, and all of them are made.
    matches = [secrets.compare_digest(sent, key.get_secret_value().encode()) for key in keys]
    return any(matches)


IdempotencyKey = Annotated[
    Annotated[str, AfterValidator(check_key)] | None,
    Header(alias=HEADER, description="The same request with the same key is carried out once, within a day"),
]


async def get_repeat(request: Request, owner: OwnerDep, key: IdempotencyKey = None) -> Repeat | None:
    """A request with a JSON body and an ``Idempotency-Key``; ``None`` without the key."""
    if key is None:
        return None
    return Repeat(owner.id or "", key, digest(request.method, request.url.path, await request.body()))


def get_session(database: DatabaseDep) -> Iterator[Session]:
    """A write transaction around the route: committed before the answer is sent, undone by an error."""
    with database.session() as session:
        yield session


def get_reader(database: DatabaseDep) -> Iterator[Session]:
    """A read-only view of the database, which never waits for writers."""
    with database.reading() as session:
        yield session


OwnerDep = Annotated[Owner, Depends(get_owner)]
RepeatDep = Annotated[Repeat | None, Depends(get_repeat)]
SessionDep = Annotated[Session, Depends(get_session, scope="function")]
ReaderDep = Annotated[Session, Depends(get_reader, scope="function")]


async def upload_slot(request: Request, _owner: OwnerDep) -> AsyncIterator[None]:
    """A place among the uploads under way, for the time of the route; strangers are refused before."""
    with request.app.state.upload_slots.one():
        yield


UploadSlot = Depends(upload_slot, scope="function")
