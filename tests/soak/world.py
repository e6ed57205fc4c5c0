"""What all threads of a soak share: the service over its lives, what was promised, what went wrong."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from comps.finetuning.cluster.local_head import LocalHead
from tests.service_process import ServiceProcess

MARK = "FINETUNE_SOAK"  # in the environment of the service and of all that it starts
MAX_UPLOAD = 24_000_000
SLOW_SECONDS = 60.0  # a request that takes longer counts as not answered


@dataclass
class Promises:
    """What the service has answered, and must not forget: ids of files (with their contents' digest) and of
    jobs (with the kind of :data:`tests.soak.plans.JOB_KINDS`, ``extract`` or ``merge``)."""

    files: dict[str, str] = field(default_factory=dict)
    good_files: list[str] = field(default_factory=list)  # to train on
    bad_files: list[str] = field(default_factory=list)  # that fail each job that trains on them
    deleted_files: set[str] = field(default_factory=set)  # or perhaps deleted: the answer was lost
    jobs: dict[str, str] = field(default_factory=dict)


class World:
    """One service and its data directory. ``violations`` are sentences."""

    def __init__(self, directory: Path) -> None:
        self.began = time.monotonic()
        self.promises = Promises()
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        self.life = 0  # starts of the service so far
        self.starts: list[float] = []  # seconds that each took, after the first
        self.up = False
        self._printing = threading.Lock()
        data_dir = directory / "data"
        marks = {MARK: str(data_dir.resolve()), "FINETUNING_MAX_UPLOAD_BYTES": str(MAX_UPLOAD)}
        self.service = ServiceProcess(directory, ray=True, **marks)
        self._has_started()

    @property
    def data_dir(self) -> Path:
        return self.service.data_dir

    @property
    def head(self) -> LocalHead:
        return LocalHead(self.data_dir / "ray")

    # -- the service's lives --------------------------------------------------------------------------

    def _has_started(self) -> None:
        self.life += 1
        self.up = True

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """The service is ended in this block; it is started again at its end."""
        self.up = False
        yield
        began = time.monotonic()
        self.service.start()
        self.starts.append(round(time.monotonic() - began, 2))
        self._has_started()

    # -- asking ---------------------------------------------------------------------------------------

    def client(self) -> httpx.Client:
        """A client for one thread."""
        return httpx.Client(base_url=self.service.url, timeout=SLOW_SECONDS)

    def ask(
        self, http: httpx.Client, method: str, path: str, allowed: Collection[int] = (200,), **parts: Any
    ) -> httpx.Response | None:
        """Send a request. ``None`` when the service was ended meanwhile, and nobody knows what became of it.

        Any other answer than the ``allowed`` ones, or none, is a violation.
        """
        life, up = self.life, self.up
        response, problem = None, ""
        try:
            response = http.request(method, path, **parts)
        except httpx.TransportError as error:
            problem = f"was not answered ({error!r})"
        if not (up and self.up and life == self.life):
            self.counts["requests while the service went down or up"] += 1
            return response if response is not None and response.status_code in allowed else None
        self.counts["requests"] += 1
        if response is not None and response.status_code not in allowed:
            problem = f"was answered with {response.status_code}: {response.text[:300]}"
        if problem:
            self.violation(f"{method} {path} {problem}")
            return None
        return response

    # -- telling --------------------------------------------------------------------------------------

    def violation(self, sentence: str) -> None:
        self.violations.append(sentence)
        self.say("VIOLATION", sentence)

    def say(self, who: str, what: object) -> None:
        with self._printing:
            print(f"{time.monotonic() - self.began:7.1f} s  {who:11} {what}", flush=True)
