"""Rows and directories as the service leaves them, for tests that begin in the middle of a story."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from fixtures_elastic import lora

from comps.finetuning.jobs.finish import finish
from comps.finetuning.jobs.states import transition
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import FileRow, JobRow, new_id
from comps.tuning.rundir import OUTPUT
from comps.tuning.spec import DataSpec, LoraSpec, ModelSpec, OptimizationSpec, TrainSpec


def add_file(database: Database, name: str, owner: str | None = None, **fields: Any) -> str:
    """A file's row (no bytes); returns its id."""
    row = FileRow(
        id=new_id("file"), filename=name, bytes=1, sha256="0", owner=owner,
        **{"purpose": "fine-tune", **fields},
    )  # fmt: skip
    with database.session() as session:
        session.add(row)
    return row.id


def succeeded_job(
    database: Database, jobs_dir: Path, base_model: Path, adapter: Path | None, owner: str | None = None
) -> str:
    """A finished job with a copy of the super-adapter in ``adapter`` (or a plain one); returns its id."""
    job_id = new_id("ft-job")
    directory = jobs_dir / job_id
    spec = TrainSpec(
        job_id=job_id,
        directory=directory,
        base_model=ModelSpec(name="org/tiny", path=str(base_model)),
        lora=lora() if adapter else LoraSpec(),
        data=DataSpec(train_file=directory / "none"),
        training=OptimizationSpec(),
    )
    if adapter:
        shutil.copytree(adapter, directory / OUTPUT)
    else:
        (directory / OUTPUT).mkdir(parents=True)
        (directory / OUTPUT / "adapter_config.json").write_text("{}")
    job = JobRow(
        id=job_id, kind="fine_tuning", status="running", owner=owner, model="org/tiny",
        training_file="file-0", spec=spec.model_dump(mode="json"), started_at=time.time(),
    )  # fmt: skip
    with database.session() as session:
        session.add(job)
        session.flush()
        finish(session, job, {"outcome": "succeeded", "path": str(directory / OUTPUT), "trained_tokens": 10})
    return job_id


def await_verdict(database: Database, job_id: str) -> None:
    """Return once the service has validated the job's files."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with database.reading() as session:
            if session.query(JobRow).filter_by(id=job_id).one().status != "validating_files":
                return
        time.sleep(0.05)
    raise AssertionError(f"{job_id} is still in validation")


def start_and_finish(database: Database, job_id: str, result: dict[str, Any]) -> None:
    """Move a queued row through its run to the end that ``result`` tells, as the dispatcher does."""
    with database.session() as session:
        job = session.query(JobRow).filter_by(id=job_id).one()
        transition(session, job, "running", "The job is starting")
        finish(session, job, result)
