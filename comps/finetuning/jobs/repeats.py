"""Requests with an ``Idempotency-Key``: carried out once, however often they are sent.

The key is claimed in the very transaction that makes what is asked for, and the answer is kept there, too: so
there is never one without the other, whatever is killed when. Of two requests at once the database lets one
claim the key; all that the other has done is undone, and it is answered with what the first one made. A
request that is refused makes nothing and keeps nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from comps.cores.errors import InvalidRequest
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import IdempotencyRow

HEADER = "Idempotency-Key"
LIFETIME = 24 * 3600  # seconds
_LONGEST = 255

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Repeat:
    """A request that may come again. ``owner`` is empty where there are no API keys; ``request`` is a
    :func:`digest`."""

    owner: str
    key: str
    request: str


class KeyTaken(Exception):
    """Another request has claimed the key since it was looked for."""


def check_key(key: str) -> str:
    """Raises :class:`ValueError` for what cannot be a key."""
    if not 1 <= len(key) <= _LONGEST or not key.isascii() or not key.isprintable():
        raise ValueError(f"1 to {_LONGEST} printable ASCII characters were expected")
    return key


def digest(method: str, path: str, body: bytes) -> str:
    """What two requests have in common if and only if they ask for the same."""
    return hashlib.sha256(b"\0".join((method.encode(), path.encode(), body))).hexdigest()


def once(
    database: Database,
    repeat: Repeat | None,
    make: Callable[[], Answer],
    again: Callable[[dict[str, Any]], Answer | None],
) -> Answer:
    """What ``make()`` gives, or ``again(answer)`` for a request that was carried out before.

    ``make`` must :func:`claim` and :func:`keep` in its transaction. ``again`` returns ``None`` when what was
    made has failed: an error is no answer to keep, so the request is carried out anew. Raises
    :class:`InvalidRequest` when the key came with another request, and what ``make`` raises.
    """
    if repeat is None:
        return make()
    while True:
        answer = _kept(database, repeat)
        try:
            if answer is None:
                return make()
        except KeyTaken:
            continue
        if (given := again(answer)) is not None:
            return given
        _free(database, repeat, answer)


def claim(session: Session, repeat: Repeat | None) -> None:
    """Begin a transaction with this. Raises :class:`KeyTaken`, which undoes it."""
    if repeat is None:
        return
    session.add(IdempotencyRow(owner=repeat.owner, key=repeat.key, request=repeat.request, answer={}))
    try:
        session.flush()
    except IntegrityError as error:
        raise KeyTaken from error


def keep(session: Session, repeat: Repeat | None, answer: BaseModel) -> None:
    """Keep the answer to a request: in the transaction that claimed its key, or a better one later."""
    if repeat is not None and (row := _row(session, repeat)) is not None:
        row.answer = answer.model_dump(mode="json")


def keep_afterwards(database: Database, repeat: Repeat | None, answer: BaseModel) -> None:
    """:func:`claim` and :func:`keep` in a transaction of their own, for what may be carried out twice without
    a difference. Raises :class:`KeyTaken`."""
    if repeat is not None:
        with database.session() as session:
            claim(session, repeat)
            keep(session, repeat, answer)


def forget_old(database: Database) -> None:
    """Free the keys that are older than :data:`LIFETIME`."""
    with database.session() as session:
        session.execute(delete(IdempotencyRow).where(IdempotencyRow.created_at < time.time() - LIFETIME))


def _row(session: Session, repeat: Repeat) -> IdempotencyRow | None:
    return session.get(IdempotencyRow, (repeat.owner, repeat.key))


def _kept(database: Database, repeat: Repeat) -> dict[str, Any] | None:
    with database.reading() as session:
        row = _row(session, repeat)
    if row is not None and row.request != repeat.request:
        raise InvalidRequest(
            f"The {HEADER} {repeat.key[:80]!r} was used for another request; give each a key of its own.",
            param=HEADER,
            code="idempotency_key_reused",
        )
    return row.answer if row else None


def _free(database: Database, repeat: Repeat, answer: dict[str, Any]) -> None:
    with database.session() as session:
        row = _row(session, repeat)
        if row is not None and row.answer == answer:  # or another request has already made it anew
            session.delete(row)
