"""A Ray head of the service's own: loopback only, token authentication on, one process group.

The head outlives the service (a killed service must not take running jobs with it), so what is
needed to find it again is kept in ``<data dir>/ray/head.json``. Nothing here runs ``ray stop``, which
would end every Ray on the machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from comps.tuning.rundir import write_json


def token_file(directory: Path) -> Path:
    """The service's Ray token (hex, mode 0600), made at first use."""
    path = directory / "auth_token"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
    return path


def _free_ports(count: int) -> list[int]:
    """Ports that are free now. Another process may still take one: the caller tries again then."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class LocalHead:
    """Start, find and stop the head that belongs to one data directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory = directory
        self.token_path = token_file(directory)
        self._record = directory / "head.json"
        # Ray puts Unix sockets below its temporary directory, and their paths are limited to 107
        # bytes; a data directory may lie deeper than that leaves room for.
        name = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:12]
        self._temp_dir = Path("/tmp") / f"ray-{os.getuid()}-{name}"

    @property
    def token(self) -> str:
        return self.token_path.read_text().strip()

    def environment(self) -> dict[str, str]:
        """What a process needs besides its own environment to talk to this head."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_path.resolve())}

    def find(self) -> str | None:
        """The dashboard's address of a head that an earlier service started and that still runs."""
        record = self._read_record()
        return record["dashboard"] if record and self._process(record) else None

    def start(self) -> str:
        """Start a head and return its dashboard's address at once; it answers some seconds later."""
        self.stop()
        gcs, dashboard, client_server = _free_ports(3)
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
            "--node-ip-address=127.0.0.1", f"--port={gcs}",
            "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client_server}", "--dashboard-agent-listen-port=0",
            "--metrics-export-port=0", "--disable-usage-stats", f"--temp-dir={self._temp_dir}",
            # Jobs exchange tensors through gloo and files through the disk, not through Ray's store.
            f"--object-store-memory={128 * 1024 * 1024}",
        ]  # fmt: skip
        environment = {**os.environ, **self.environment()}
        # A stale address from the operator's shell must not lead the new head astray, and the
        # operator's secrets are no business of every job's.
        for name in ("RAY_ADDRESS", "HF_TOKEN", "FINETUNING_API_KEYS", "OPEA_API_KEYS"):
            environment.pop(name, None)
        with open(self.directory / "head.log", "ab") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        address = f"http://127.0.0.1:{dashboard}"
        created = psutil.Process(process.pid).create_time()
        write_json(self._record, {"pid": process.pid, "created": created, "dashboard": address})
        return address

    def alive(self) -> bool:
        record = self._read_record()
        return bool(record and self._process(record))

    def stop(self, grace: float = 10) -> None:
        """End the head and all its processes: SIGTERM, then SIGKILL for what is left after ``grace`` s."""
        record = self._read_record()
        if record is None:
            return
        members = self._members(record)
        for process in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(members, timeout=grace)
        # Ray's GCS may outlive SIGTERM, and new workers may have appeared meanwhile.
        for process in {*left, *self._members(record)}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)
        self._record.unlink(missing_ok=True)

    def _read_record(self) -> dict[str, Any] | None:
        if not self._record.exists():
            return None
        record: dict[str, Any] = json.loads(self._record.read_text())
        return record

    def _process(self, record: dict[str, Any]) -> psutil.Process | None:
        """The head's first process, unless its id belongs to another process by now."""
        try:
            process = psutil.Process(record["pid"])
            same = abs(process.create_time() - record["created"]) < 1
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None

    def _members(self, record: dict[str, Any]) -> list[psutil.Process]:
        """All processes of the head, also when its first one is gone: those of its session, and those
        that carry its token (a job's driver gets a session of its own)."""
        members = []
        token_path = str(self.token_path.resolve())
        for process in psutil.process_iter():
            try:
                # Older than the head: an id that was used again, or the shell that we came from.
                if process.pid == os.getpid() or process.create_time() < record["created"] - 1:
                    continue
                ours = os.getsid(process.pid) == record["pid"]
                if ours or process.environ().get("RAY_AUTH_TOKEN_PATH") == token_path:
                    members.append(process)
            except (psutil.Error, ProcessLookupError, PermissionError):
                continue  # gone meanwhile, or another user's
        return members
