"""A Ray head of the service's own: loopback only, token authentication on, found again after a crash.

The head outlives the service (a killed service must not take running jobs with it), so what is
needed to find it again is kept in ``<data dir>/ray/head.json``. Its processes are known by a variable
in their environment, which all of them inherit: process ids and sessions can belong to others after a
reboot. Nothing here runs ``ray stop``, which would end every Ray on the machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from comps.tuning.rundir import create_file, write_json

# Carried by every process of a head, with the head's directory as its value.
MARK = "COMPS_RAY_HEAD"
# Ray replaces 127.0.0.1 by the machine's address and listens on all interfaces, except where clusters are
# not supported: then it stays on loopback. This switch says so.
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Not for jobs: the operator's secrets, and addresses and settings that would lead the head astray.
_PRIVATE = ("FINETUNING_", "OPEA_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_ADDRESS")


def token_file(directory: Path) -> Path:
    """The service's Ray token (hex, mode 0600), made at first use."""
    path = directory / "auth_token"
    if not path.exists():
        create_file(path, secrets.token_hex(32).encode(), 0o600)
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
        self.directory = directory.resolve()
        self.token_path = token_file(self.directory)
        self.log = self.directory / "head.log"
        self._record = self.directory / "head.json"
        self._child: subprocess.Popen[bytes] | None = None
        # Ray puts Unix sockets below its temporary directory, and their paths are limited to 107
        # bytes; a data directory may lie deeper than that leaves room for.
        name = hashlib.sha256(str(self.directory).encode()).hexdigest()[:12]
        self.private_dir = Path("/tmp") / f"ray-{os.getuid()}-{name}"

    @property
    def token(self) -> str:
        return self.token_path.read_text().strip()

    def find(self) -> str | None:
        """The dashboard's address of a head that an earlier service started and that still runs."""
        try:
            record: dict[str, Any] = json.loads(self._record.read_text())
        except (FileNotFoundError, ValueError):  # a damaged one is as good as none
            return None
        with contextlib.suppress(psutil.Error):  # there is none, or it is another user's
            if self._owns(psutil.Process(record["pid"])):
                return str(record["dashboard"])
        return None

    def alive(self) -> bool:
        """Whether the head's first process runs; it ends when any other of the head's does."""
        return self.find() is not None

    def start(self) -> str:
        """Start a head and return its dashboard's address at once; it answers some seconds later.

        What is left of an earlier head is ended first. Raises ``OSError`` when there is no place for it.
        """
        self.stop()
        gcs, dashboard, client_server = _free_ports(3)
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
            "--node-ip-address=127.0.0.1", f"--port={gcs}",
            "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client_server}", "--dashboard-agent-listen-port=0",
            "--metrics-export-port=0", "--disable-usage-stats", f"--temp-dir={self._session_dir()}",
            # No autoscaler, and runs write their own logs: two processes less.
            "--no-monitor", "--include-log-monitor=false",
            # Jobs exchange tensors through gloo and files through the disk, not through Ray's store.
            f"--object-store-memory={128 * 1024 * 1024}",
        ]  # fmt: skip
        with open(self.log, "ab") as log:
            self._child = subprocess.Popen(
                command, env=self._environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        address = f"http://127.0.0.1:{dashboard}"
        write_json(self._record, {"pid": self._child.pid, "dashboard": address})
        return address

    def stop(self, grace: float = 2) -> None:
        """End all processes of the head: SIGTERM, then SIGKILL for what is left after ``grace`` seconds."""
        members = self.processes()
        for process in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        psutil.wait_procs(members, timeout=grace)
        # Ray's GCS may outlive SIGTERM, and new processes may have appeared meanwhile.
        while left := self.processes():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=1)
        if self._child:
            self._child.wait()
        self._record.unlink(missing_ok=True)

    def processes(self) -> list[psutil.Process]:
        """All processes of the head, also those of its jobs, also when its first one is gone."""
        members = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):  # gone meanwhile, or another user's
                if self._owns(process):
                    members.append(process)
        return members

    def _owns(self, process: psutil.Process) -> bool:
        mark: str | None = process.environ().get(MARK)
        return mark == str(self.directory)

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_PRIVATE)}
        return (
            inherited
            | ON_LOOPBACK
            | {
                MARK: str(self.directory),
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(self.token_path),
                # At the level info Ray logs the environment of every job, with its tokens.
                "RAY_LOGGER_LEVEL": "warning",
                # Ray's processes rename themselves; this keeps their environment (the mark) readable.
                "SPT_NOENV": "1",
                # Jobs have an environment of their own, which workers started in advance don't fit.
                "RAY_prestart_worker_first_driver": "0",
            }
        )

    def _session_dir(self) -> Path:
        """Ray's temporary directory, within one that only this user may enter; Ray opens its own to all.

        Of earlier sessions the newest is kept, so that its logs can tell why it ended.
        """
        self.private_dir.mkdir(mode=0o700, exist_ok=True)
        facts = self.private_dir.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
            raise PermissionError(f"{self.private_dir} is not a directory of this user")
        self.private_dir.chmod(0o700)
        sessions = [path for path in self.private_dir.glob("s/session_*") if not path.is_symlink()]
        for old in sorted(sessions)[:-1]:
            shutil.rmtree(old)
        return self.private_dir / "s"
