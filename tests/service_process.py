"""A real service in a process of its own, for tests: started, asked, killed, started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import openai

from comps.finetuning.cluster.local_head import LocalHead

ROOT = Path(__file__).resolve().parents[1]
# Nothing listens on the discard port: the service runs, and waits for a Ray that never answers.
NO_RAY = "http://127.0.0.1:9"
_OURS = ("FINETUNING_", "OPEA_", "RAY_", "HF_", "OMP_")


class ServiceProcess:
    """``python -m comps.finetuning`` on a free port, with a data directory of its own.

    ``http`` is a plain HTTP client and ``openai`` the official one; both survive :meth:`restart`.
    ``prefix`` is put before the command.
    """

    start_timeout = 90.0  # a busy machine

    def __init__(
        self, directory: Path, *, ray: bool = False, prefix: Sequence[str] = (), **environment: str
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._command = [*prefix, sys.executable, "-m", "comps.finetuning"]
        self.data_dir = directory / "data"
        self.models_dir = self.data_dir / "models"
        self._output, self._log = directory / "stdout.txt", directory / "stderr.txt"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        self.environment = inherited | {
            "FINETUNING_PORT": "0",
            "FINETUNING_DATA_DIR": str(self.data_dir),
            "HF_HOME": str(directory / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            **({} if ray else {"RAY_ADDRESS": NO_RAY}),
            **environment,
        }
        key = environment.get("FINETUNING_API_KEYS", "")
        self.start()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or "None", max_retries=0)

    @property
    def log(self) -> str:
        """What the service has logged, over all its starts."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def start(self) -> None:
        """Start and wait until it answers. Keeps the port of an earlier start."""
        self._output.unlink(missing_ok=True)
        with open(self._output, "wb") as output, open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                self._command,
                cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            if "http://" in (said := self._output.read_text()):
                self.url = said.split()[-1]
                self.environment["FINETUNING_PORT"] = self.url.rpartition(":")[2]
                if self._answers():
                    return
            time.sleep(0.05)
        code = self.process.poll()
        self.kill()
        raise RuntimeError(f"the service did not start (exit code {code}):\n{self.log[-4000:]}")

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").is_success
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """``kill -9``: the service gets no chance to tidy up. Its Ray, if any, runs on."""
        self.process.kill()
        self.process.wait()

    def stop(self, timeout: float = 30) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def restart(self) -> None:
        """Stop if need be, and start again on the same port and data."""
        if self.process.poll() is None:
            self.stop()
        self.start()

    def close(self) -> None:
        """End everything, a Ray that was left behind too."""
        self.http.close()
        self.openai.close()
        if self.process.poll() is None:
            self.stop()
        head = LocalHead(self.data_dir / "ray")
        head.stop()
        shutil.rmtree(head.private_dir, ignore_errors=True)
