"""What every client of a soak can do: ask, and tell what came of it."""

from __future__ import annotations

from typing import Any

import httpx

from tests.soak.world import World

ACTIVE = ("validating_files", "queued", "running", "paused")


class Asking:
    """An HTTP client of one thread."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.http = world.client()

    def ask(self, method: str, path: str, *allowed: int, **parts: Any) -> httpx.Response | None:
        """:meth:`World.ask`; 200 alone is allowed when nothing is said."""
        return self.world.ask(self.http, method, path, allowed or (200,), **parts)

    def jobs(self, *statuses: str) -> list[dict[str, Any]]:
        """The jobs as the service lists them, oldest first; those in ``statuses`` if any are given."""
        answer = self.ask("GET", "/v1/fine_tuning/jobs?limit=1000")
        listed = answer.json()["data"][::-1] if answer is not None else []
        return [job for job in listed if not statuses or job["status"] in statuses]
