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

    def sees(self, owner: str | None) -> bool:
        """Whether what belongs to ``owner`` may be seen; what is nobody's, everybody sees."""
        return self.sees_all or owner in (self.id, None)


EVERYBODY = Owner(None, sees_all=True)
