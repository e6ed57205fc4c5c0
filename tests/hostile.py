"""Names that want out of their directory or into a shell, pickles that run code, and what tells of it."""

from __future__ import annotations

import hashlib
import io
import pickle
import socket
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECRET = "canary-that-nobody-may-read"


def traversals(root: Path) -> list[str]:
    """Names that lead out of a directory and to ``root``, or would if they were decoded or cut."""
    target = f"{root.name}/secret"
    return [
        "..", ".", "/", "../", "../secret", f"../{target}", f"../../{target}", f"../../../{target}",
        f"a/../../{target}", f"....//....//{target}", f"./../{target}", "../" * 40 + "etc/passwd",
        str(root / "secret"), f"//{root}/secret", f"{root}-evil", "../data-evil/secret",
        "../models-evil/secret", f"..\\..\\{root.name}\\secret", "C:\\Windows\\win.ini",
        "\\\\host\\share\\secret", "..\\", f"%2e%2e%2f{root.name}%2fsecret", "%2e%2e/secret",
        "..%2fsecret", "%252e%252e%252fsecret", "..%5csecret", "..%c0%afsecret", "%c0%ae%c0%ae/secret",
        "%00", "\0", "secret\0.json", "..\0/secret", "\uff0e\uff0e\uff0fsecret", "\u2024\u2024/secret",
        "..\u2215secret", "..\u2044secret", "\u2025/secret",
        "x" * 300, "/" * 300, "../" * 100, "é" * 300, "\U0001f40d", "\u202e..", "link", "link/secret",
        "~", "~root", "$HOME/secret", "-rf", "--help", " ", "\n", "a\r\nX-Evil: 1", "file:///etc/passwd",
        "CON", ".hidden", "*", "?", "[a]", "'; DROP TABLE jobs; --", "{0.__class__}", "%s%n",
    ]  # fmt: skip


def shell_lines(canary: Path) -> list[str]:
    """What a shell, or a careless template, would turn into the file ``canary``."""
    touch = f"touch {canary}"
    return [
        f"; {touch}", f"$({touch})", f"`{touch}`", f"| {touch}", f"&& {touch} &&", f"\n{touch}\n",
        f"'; {touch}; '", f'"; {touch}; "', f";>{canary};", f"{{{{ cycler.__init__('{touch}') }}}}",
        f"${{IFS}};{touch}", f"--output={canary}", f"__import__('os').system('{touch}')",
    ]  # fmt: skip


def tree(*roots: Path) -> dict[str, str]:
    """Every file and link below ``roots`` with its content's hash or its target."""
    found = {}
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.is_symlink():
                found[str(path)] = str(path.readlink())
            elif path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(path)] = "directory"
    return found


class Bomb:
    """Unpickled, it writes the file ``canary``."""

    def __init__(self, canary: Path) -> None:
        self._canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({self._canary!r}, 'w').close()",)


def plain_pickle(canary: Path) -> bytes:
    return pickle.dumps(Bomb(canary), protocol=2)


def torch_pickle(canary: Path) -> bytes:
    """As ``torch.save`` writes them today: a ZIP archive with a pickle in it."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Bomb(canary), protocol=2))
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return archive.getvalue()


class Listener:
    """A server that nobody is meant to ask; ``asked`` has the first bytes of each who did."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            with connection:
                connection.settimeout(5)
                self.asked.append(connection.recv(200))
                connection.sendall(
                    b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@contextmanager
def listener() -> Iterator[Listener]:
    """A :class:`Listener` on a port of its own."""
    server = Listener()
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()
