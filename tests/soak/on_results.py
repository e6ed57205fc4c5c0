"""What comes of jobs: sub-adapters, merged models; and looks at everything there is."""

from __future__ import annotations

import time
from typing import Any

import httpx

from tests.soak import bodies
from tests.soak.asking import ACTIVE, Asking
from tests.soak.plans import pick

MADE_SECONDS = 400.0  # a request that waits for its result may take as long


class OnResults(Asking):
    """Extract, merge, delete, look, follow. Methods are named after actions and return what came of it."""

    def _adapter(self, what: str, job: float, version: str | None, wait: bool) -> object:
        chosen = pick(self.jobs("succeeded") or self.jobs(), job)
        if chosen is None:
            return "no job yet"
        body: dict[str, Any] = {"fine_tuning_job_id": chosen["id"], "wait": wait}
        if chosen["metadata"]["kind"] != "plain":
            body["adapter_version"] = version
            if what == "extract" and version in bodies.CUSTOM:
                body["custom_config"] = bodies.CUSTOM[version]
        # 409: it has not succeeded, or the version is being made. 404: it was not extracted, or was deleted.
        # 422: no elastic ranks. With wait, 422 and 500 also tell of runs that did not succeed.
        path, allowed = f"/v1/finetune/{what}_adapter", (200, 404, 409, 422, *([500] if wait else []))
        answer = self.ask("POST", path, *allowed, json=body, timeout=MADE_SECONDS)
        if answer is not None and answer.status_code == 200:
            self.world.promises.jobs[answer.json()["id"]] = what
        elif answer is not None and answer.status_code == 500 and "in a row" not in answer.text:
            self.world.violation(f"POST {path} was answered with 500: {answer.text[:300]}")
        return answer

    def extract(self, job: float, version: str, wait: bool) -> object:
        return self._adapter("extract", job, version, wait)

    def merge(self, job: float, version: str, wait: bool) -> object:
        return self._adapter("merge", job, version, wait)

    def delete_model(self, model: float) -> object:
        answer = self.ask("GET", "/v1/models")
        made = [each["id"] for each in answer.json()["data"]] if answer is not None else []
        name = pick(sorted(each for each in made if each != bodies.MODEL), model)
        return name and self.ask("DELETE", f"/v1/models/{name}", 200, 404, 409)

    def look(self, at: str, job: float) -> object:
        chosen = pick([*self.world.promises.jobs], job)
        of_job = {"job": "", "events": "/events", "checkpoints": "/checkpoints", "logs": "/logs?tail=50"}
        if at in of_job:
            # The job itself, and its checkpoints, are there for fine-tuning jobs only.
            if chosen is None or (at in ("job", "checkpoints") and not chosen.startswith("ft-job-")):
                return "nothing to look at"
            return self.ask("GET", f"/v1/fine_tuning/jobs/{chosen}{of_job[at]}")
        paths = {"jobs": "/v1/fine_tuning/jobs?limit=100", "files": "/v1/files", "models": "/v1/models"}
        paths |= {"statistics": "/v1/statistics", "metrics": "/metrics", "docs": "/openapi.json"}
        return self.ask("GET", paths[at])

    def follow(self, job: float, what: str, seconds: float) -> object:
        """Reads a growing log, or events as they come, and hangs up."""
        chosen = pick(self.jobs(*ACTIVE) or self.jobs(), job)
        if chosen is None:
            return "no job yet"
        path = f"/v1/fine_tuning/jobs/{chosen['id']}/{what}"
        path += "?follow=true" if what == "logs" else ""
        headers = {"Accept": "text/event-stream"} if what == "events" else {}
        received, until = 0, time.monotonic() + seconds
        try:
            with self.http.stream("GET", path, headers=headers, timeout=seconds) as stream:
                for chunk in stream.iter_raw():
                    received += len(chunk)
                    if time.monotonic() > until:
                        break
                if stream.status_code != 200 and self.world.up:
                    self.world.violation(f"GET {path} was answered with {stream.status_code}")
        except httpx.TransportError as error:  # nothing came for so long, or the service went down
            return f"{received} bytes, {type(error).__name__}"
        return f"{received} bytes"
