"""Asks a running service for its health all the time, beside whatever else a test does with it."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import httpx


class HealthWatch:
    """A context manager; ``seconds`` holds how long each answer took. An answer that fails is an error at
    the end of the block."""

    def __init__(self, url: str, pause: float = 0.02) -> None:
        self.seconds: list[float] = []
        self._url, self._pause = f"{url}/health", pause
        self._errors: list[str] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="health", daemon=True)

    def __enter__(self) -> HealthWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if kind is None:
            assert not self._errors, self._errors
            assert self.seconds

    def _ask(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self._done.is_set():
                began = time.perf_counter()
                try:
                    client.get(self._url).raise_for_status()
                except httpx.HTTPError as error:
                    self._errors.append(repr(error))
                self.seconds.append(time.perf_counter() - began)
                time.sleep(self._pause)
