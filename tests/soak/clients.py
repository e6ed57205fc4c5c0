"""Clients of the service: each a thread that carries out its plans, one after the other."""

from __future__ import annotations

import json
import threading
import traceback

from tests.soak.on_files import OnFiles
from tests.soak.on_jobs import OnJobs
from tests.soak.on_results import OnResults
from tests.soak.plans import CLIENT, plan
from tests.soak.world import World


class Acting(OnFiles, OnJobs, OnResults):
    """All that clients do."""


class Client(threading.Thread):
    """Carries out the plans of ``name`` until ``done``, with pauses of ``pause`` seconds in the mean."""

    def __init__(self, world: World, name: str, seed: int, pause: float, pausing: bool) -> None:
        super().__init__(name=name, daemon=True)
        self.done = threading.Event()
        self._world, self._seed, self._pause = world, seed, pause
        self._acting = Acting(world)
        self._acting.pausing = pausing

    def run(self) -> None:
        number = 0
        self._acting.upload("json", 24)  # so that there is something to train on from the start
        while not self.done.is_set():
            step = plan(self._seed, self.name, number, CLIENT, self._pause)
            self.done.wait(step.pause)
            try:
                outcome = getattr(self._acting, step.action)(**step.parameters)
            except Exception:
                self._world.violation(f"{self.name} #{number} {step} broke:\n{traceback.format_exc()}")
                outcome = "broke"
            self._world.say(self.name, f"#{number} {step} -> {outcome}")
            self._world.counts[step.action] += 1
            number += 1
        self._acting.http.close()


def can_pause(world: World) -> bool:
    """Whether this service has the routes to pause and resume a job."""
    with world.client() as http:
        schema = json.loads(http.get("/openapi.json").content)
    wanted = {f"/v1/fine_tuning/jobs/{{fine_tuning_job_id}}/{verb}" for verb in ("pause", "resume")}
    return wanted <= {*schema["paths"]}
