"""On whose behalf a request acts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Owner:
    """``id`` is written to what the request makes: a digest of the caller's API key, or ``None`` when the
    service has no keys. ``sees_all``: whether everything of everyone may be seen and changed, which is so
    for an operator's key, and for everybody where there are no keys."""

    id: str | None
    sees_all: bool = False


EVERYBODY = Owner(None, sees_all=True)
