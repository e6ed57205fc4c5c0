"""Whether every job has ended, on a way that is allowed, and as one of its kind should."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise

from comps.finetuning.jobs.states import MOVES, TERMINAL
from tests.soak.record import Record, Row

# What a job without fault of its own may fail with, when its workers are killed often enough.
KILLED_TOO_OFTEN = "in a row without a new checkpoint"
DELETED = "was deleted before the job began"


def unfinished(record: Record) -> list[str]:
    """Jobs that are in no end state, or lack the time of their end."""
    found = []
    for job in record.jobs:
        if job["status"] not in TERMINAL:
            found.append(f"{job['kind']} {job['id']} is {job['status']} at the end")
        elif job["finished_at"] is None:
            found.append(f"{job['kind']} {job['id']} is {job['status']} without a time of its end")
    return found


def illegal_histories(record: Record) -> list[str]:
    """Jobs whose events tell of a move that :data:`MOVES` does not allow, or end elsewhere than the job."""
    found = []
    for job in record.jobs:
        now = "validating_files" if job["kind"] == "fine_tuning" else "queued"
        path = [now, *record.moves.get(job["id"], [])]
        for before, after in pairwise(path):
            if after not in MOVES.get(before, ()):  # type: ignore[call-overload]
                found.append(f"{job['id']} went from {before} to {after} ({' -> '.join(path)})")
        if path[-1] != job["status"]:
            found.append(f"{job['id']} is {job['status']}, but its events end with {path[-1]}")
    return found


def forgotten(record: Record, jobs: Mapping[str, str], files: set[str]) -> list[str]:
    """What was answered with an id, and is not there."""
    there = {row["id"] for row in (*record.jobs, *record.files)}
    found = [f"the {kind} job {job_id} was forgotten" for job_id, kind in jobs.items() if job_id not in there]
    return found + [f"the file {file_id} was forgotten" for file_id in files - there]


def unexpected_ends(record: Record, kinds: Mapping[str, str]) -> list[str]:
    """Jobs that ended otherwise than their kind of :data:`tests.soak.plans.JOB_KINDS` lets expect."""
    return [
        f"the {kinds[job['id']]} job {job['id']} has {job['status']} with {job['error']}"
        for job in record.jobs
        if job["id"] in kinds and job["status"] in TERMINAL and not _as_expected(job, kinds[job["id"]])
    ]


def _as_expected(job: Row, kind: str) -> bool:
    error = json.loads(job["error"] or "null") or {"code": None, "message": ""}
    if job["status"] == "cancelled":
        return kind not in ("extract", "merge")  # nobody can cancel these
    deleted = kind not in ("extract", "merge") and DELETED in error["message"]
    if kind == "bad_data":
        return job["status"] == "failed" and error["code"] == "invalid_training_file"
    if kind == "too_big":
        return job["status"] == "failed" and (error["code"] == "insufficient_resources" or deleted)
    return job["status"] == "succeeded" or KILLED_TOO_OFTEN in error["message"] or deleted


def lost_lines(record: Record) -> list[str]:
    """Succeeded runs of which not every event, or one twice, is in the table."""
    found = []
    for job in record.jobs:
        if job["status"] != "succeeded" or not (record.job_directory(job["id"]) / "events.jsonl").exists():
            continue
        written = []
        for line in (record.job_directory(job["id"]) / "events.jsonl").read_text("utf-8").splitlines():
            try:
                written.append(json.loads(line)["message"])
            except ValueError:  # torn by a kill
                continue
        if (known := record.lines.get(job["id"], [])) != written:
            found.append(
                f"{job['id']} has {len(known)} of its run's {len(written)} events, or in another order"
            )
    return found
