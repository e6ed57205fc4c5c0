"""A bounded number of places for requests that cost more than others, such as uploads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from comps.cores.errors import Unavailable


class TooManyUploads(Unavailable):
    """All places are taken. A client that heeds ``Retry-After``, as OpenAI's does, comes back by itself."""

    code = "too_many_uploads"
    headers: ClassVar[Mapping[str, str]] = {"retry-after": "5"}


class UploadSlots:
    """``limit`` uploads may be received at a time; ``setting`` is what changes that.

    For the event loop's thread alone, which is why it needs no lock.
    """

    def __init__(self, limit: int, setting: str) -> None:
        self._limit, self._setting = limit, setting
        self._taken = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold a place during the block. Raises :class:`TooManyUploads` at once when there is none."""
        if self._taken >= self._limit:
            raise TooManyUploads(
                f"The service is receiving {self._limit} uploads, which is its limit ({self._setting}); "
                "try again in some seconds."
            )
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1
