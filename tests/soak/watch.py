"""Looks at the service all the time: how fast it answers, and what its process takes."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import httpx
import psutil

from tests.soak.world import World


@dataclass(frozen=True)
class Sample:
    """The service's process at ``seconds`` (monotonic) of its ``life``: resident bytes, open files."""

    life: int
    seconds: float
    rss: int
    files: int


class Health(threading.Thread):
    """Asks for ``/health``; ``seconds`` holds how long each answer took while the service was up."""

    def __init__(self, world: World, pause: float = 0.1) -> None:
        super().__init__(name="health", daemon=True)
        self.done = threading.Event()
        self.seconds: list[float] = []
        self._world, self._pause = world, pause

    def run(self) -> None:
        with self._world.client() as http:
            while not self.done.wait(self._pause):
                life, up = self._world.life, self._world.up
                problem, began = "", time.perf_counter()
                try:
                    answer = http.get("/health")
                    if answer.status_code != 200:
                        problem = f"answered {answer.status_code}"
                except httpx.TransportError as error:
                    problem = f"did not answer ({error!r})"
                took = time.perf_counter() - began
                if up and self._world.up and life == self._world.life:
                    self.seconds.append(took)
                    if problem:
                        self._world.violation(f"/health {problem}")


class Memory(threading.Thread):
    """Takes a :class:`Sample` every second."""

    def __init__(self, world: World) -> None:
        super().__init__(name="memory", daemon=True)
        self.done = threading.Event()
        self.samples: list[Sample] = []
        self._world = world

    def run(self) -> None:
        while not self.done.wait(1):
            life = self._world.life
            try:
                process = psutil.Process(self._world.service.process.pid)
                rss, files = process.memory_info().rss, process.num_fds()
            except psutil.Error:
                continue  # it was ended
            if self._world.up and life == self._world.life:
                self.samples.append(Sample(life, time.monotonic(), rss, files))
