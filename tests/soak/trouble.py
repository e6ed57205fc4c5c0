"""Real kills: of the service, of Ray, of workers; and orderly stops. One after the other, by plan."""

from __future__ import annotations

import threading
import time
import traceback
from contextlib import suppress

import psutil

from tests.soak.plans import TROUBLE, TROUBLE_BESIDE_THE_SERVICE, pick, plan
from tests.soak.world import World

STOP_SECONDS = 60


class Trouble(threading.Thread):
    """Makes trouble every ``pause`` seconds in the mean, until ``done``.

    After ``last_end`` (monotonic seconds) it leaves the service itself alone.
    """

    def __init__(self, world: World, seed: int, pause: float, last_end: float) -> None:
        super().__init__(name="trouble", daemon=True)
        self.done = threading.Event()
        self.world = world
        self._seed, self._pause, self._last_end = seed, pause, last_end

    def run(self) -> None:
        number = 0
        while True:
            actions = TROUBLE if time.monotonic() < self._last_end else TROUBLE_BESIDE_THE_SERVICE
            step = plan(self._seed, self.name, number, actions, self._pause)
            if self.done.wait(step.pause):
                return
            try:
                outcome = getattr(self, step.action)(**step.parameters)
            except Exception:
                self.world.violation(f"{self.name} #{number} {step} broke:\n{traceback.format_exc()}")
                return  # perhaps there is no service any more
            self.world.say(self.name, f"#{number} {step} -> {outcome}")
            self.world.counts[step.action] += 1
            number += 1

    def kill_worker(self, process: float) -> object:
        """Any process of Ray's that runs a job, or a part of one."""
        working = []
        for each in self.world.head.processes():
            with suppress(psutil.Error):  # gone meanwhile
                if "comps.tuning" in each.cmdline() or each.name().startswith("ray::"):
                    working.append(each)
        chosen = pick(sorted(working, key=lambda each: each.pid), process)
        if chosen is None:
            return "nobody works"
        with suppress(psutil.NoSuchProcess):
            chosen.kill()
        return chosen.pid

    def kill_ray(self) -> object:
        """Ray's head with all its processes, jobs included."""
        killed = self.world.head.processes()
        for each in killed:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        return f"{len(killed)} processes"

    def kill_service(self, down: float) -> object:
        with self.world.down():
            self.world.service.kill()
            time.sleep(down)
        return f"life {self.world.life}"

    def kill_service_and_ray(self, down: float) -> object:
        with self.world.down():
            self.world.service.kill()
            self.kill_ray()
            time.sleep(down)
        return f"life {self.world.life}"

    def stop_service(self, down: float) -> object:
        with self.world.down():
            began = time.monotonic()
            code = self.world.service.stop(STOP_SECONDS)
            took = time.monotonic() - began
            if code != 0:
                self.world.violation(f"the service ended with exit code {code} after SIGTERM")
            if left := self.world.head.processes():
                self.world.violation(f"{len(left)} processes of Ray were left after SIGTERM")
            time.sleep(down)
        return f"life {self.world.life}, stopped within {took:.1f} s"
