"""Connections that cost nothing but a file descriptor, bounded in time and number.

uvicorn waits for ever for the first request of a connection and for the rest of a head that has begun, and
takes connections until the process has no descriptor left: then nobody gets in, and the log fills up.
"""

from __future__ import annotations

import asyncio
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

# Beyond this, more connections are of use to nobody.
_PLENTY = 1000


def most_connections() -> int:
    """How many connections may be open at a time: half of this process's file descriptors, at most a
    thousand. The rest is for the database, for files and for those that are accepted in one go."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _PLENTY if soft == resource.RLIM_INFINITY else max(1, min(_PLENTY, soft // 2))


def accepted_at_once() -> int:
    """The backlog to listen with: the event loop accepts so many before it looks at any of them."""
    return max(1, most_connections() // 8)


class BoundedConnection(H11Protocol):
    """uvicorn's connection, closed when it has waited ``timeout_keep_alive`` seconds for the end of a
    request's head: since it was made, or since the answer before. What still arrives of a body that was
    answered without being read gets as long.

    When there are too many, the one that has waited longest makes room for the newest.
    """

    most = most_connections()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waits_since: float | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._look()
        if len(self.connections) > self.most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def _look(self) -> None:
        """Begin to wait for a request, go on waiting, or stop because there is one."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._waits_since is None and not self.transport.is_closing():
            self._waits_since = self.loop.time()
            self._deadline = self.loop.call_later(self.timeout_keep_alive, self.transport.close)

    def _stop_waiting(self) -> None:
        self._waits_since = None
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _make_room(self) -> None:
        waiting = [
            (each._waits_since, each)
            for each in self.connections
            if isinstance(each, BoundedConnection) and each._waits_since is not None
        ]
        _, oldest = min(waiting, key=lambda pair: pair[0], default=(0, self))
        self.connections.discard(oldest)  # it is gone only in the loop's next turn
        oldest.transport.abort()
