"""``python -m comps.finetuning``: run the service in the foreground until SIGTERM or SIGINT.

Settings come from the environment; ``--help`` lists them. What keeps the service from starting is one
sentence on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

import comps
from comps.cores.connections import BoundedConnection, accepted_at_once
from comps.cores.errors import StartupError
from comps.cores.logging import configure_logging
from comps.finetuning.app import create_app
from comps.finetuning.settings import Settings, load_settings, variables

# Requests under way get this long after SIGTERM; a client that follows a log never ends by itself.
_GRACE_SECONDS = 5


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket. Raises :class:`StartupError` when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartupError(f"Port {port} on {host} is in use; set FINETUNING_PORT to another.") from error
        raise StartupError(f"The service cannot listen on {host}, port {port}: {error.strerror}.") from error
    return bound


class Server(uvicorn.Server):
    """uvicorn, which calls ``on_exit`` at once when it is told to stop: it then waits for all answers, and
    some end only when they know."""

    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_exit = on_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._on_exit()


async def serve(settings: Settings) -> None:
    """Start everything, answer requests until a signal comes, stop everything."""
    app = create_app(settings)
    # On h11: where httptools is installed uvicorn would take that, which puts no bounds on headers.
    config = uvicorn.Config(
        app, http=BoundedConnection, ws="none", lifespan="off", log_config=None, server_header=False,
        timeout_keep_alive=settings.head_seconds, backlog=accepted_at_once(),  # type: ignore[arg-type]
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )  # fmt: skip
    server = Server(config, on_exit=app.state.news.close)
    # uvicorn takes these over while it serves and raises them again when it is done; with its own
    # handler behind, a signal during start or stop only asks for the end, too.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    with listening_socket(settings.host, settings.port) as bound:
        # uvicorn would log a failed start with a traceback; our own way keeps the one sentence.
        async with app.router.lifespan_context(app):
            bound.listen()  # so that whoever reads the line below can connect
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            address = f"http://{host}:{bound.getsockname()[1]}"
            print(f"Fine-tuning service {comps.__version__} listens on {address}", flush=True)
            await server.serve(sockets=[bound])


def main() -> int:
    """The command. Returns its exit code."""
    width = max(map(len, variables()))
    table = "\n".join(f"  {name:{width}}  {description}" for name, description in variables().items())
    parser = argparse.ArgumentParser(
        prog="python -m comps.finetuning",
        description="Run the fine-tuning service.",
        epilog=f"environment variables:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    try:
        settings = load_settings()
        configure_logging(settings.log_level)
        logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)  # ten lines at each start
        asyncio.run(serve(settings))
    except StartupError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
