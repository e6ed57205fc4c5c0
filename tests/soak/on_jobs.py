"""Jobs of all kinds: made, cancelled, paused, resumed."""

from __future__ import annotations

from tests.soak import bodies
from tests.soak.asking import ACTIVE, Asking
from tests.soak.plans import pick

MAX_ACTIVE = 6  # jobs that have not ended, beyond which none are made


class OnJobs(Asking):
    """What clients do with jobs. Methods are named after actions and return what came of it."""

    pausing = True  # whether the service can pause jobs

    def create(self, kind: str, file: float, steps: int, job: float) -> object:
        if len(self.jobs(*ACTIVE)) >= MAX_ACTIVE:
            return "enough jobs wait"
        promises = self.world.promises
        stored = promises.bad_files if kind == "bad_data" else promises.good_files
        file_id = pick([each for each in stored if each not in promises.deleted_files], file)
        if file_id is None:
            return "no file yet"
        checkpoint = self._checkpoint(job) if kind == "resumed" else None
        kind = "nls" if kind == "resumed" and checkpoint is None else kind
        body = bodies.job(kind, file_id, steps, checkpoint)
        # 404: the file, or the checkpoint, was deleted meanwhile.
        answer = self.ask("POST", "/v1/fine_tuning/jobs", 200, 404, json=body)
        if answer is None or answer.status_code != 200:
            return answer
        promises.jobs[answer.json()["id"]] = kind
        return answer.json()["id"]

    def _checkpoint(self, position: float) -> str | None:
        """A checkpoint of some NLS job that has one."""
        source = pick([job for job in self.jobs("succeeded") if job["metadata"]["kind"] == "nls"], position)
        if source is None:
            return None
        answer = self.ask("GET", f"/v1/fine_tuning/jobs/{source['id']}/checkpoints")
        found = answer.json()["data"] if answer is not None else []
        return str(found[0]["id"]) if found else None

    def create_refused(self, fault: str) -> object:
        promises = self.world.promises
        file_id = pick([each for each in promises.good_files if each not in promises.deleted_files], 0)
        if file_id is None:
            return "no file yet"
        content, status = bodies.refused_job(fault, file_id)
        # 404: the file was deleted meanwhile.
        return self.ask("POST", "/v1/fine_tuning/jobs", status, 404, content=content)

    def _change(self, job: float, what: str, *statuses: str) -> object:
        chosen = pick(self.jobs(*statuses) or self.jobs(), job)
        return chosen and self.ask("POST", f"/v1/fine_tuning/jobs/{chosen['id']}/{what}", 200, 409)

    def cancel(self, job: float) -> object:
        return self._change(job, "cancel", *ACTIVE)

    def pause(self, job: float) -> object:
        return self._change(job, "pause", *ACTIVE) if self.pausing else "there is no such route"

    def resume(self, job: float) -> object:
        return self._change(job, "resume", "paused") if self.pausing else "there is no such route"
