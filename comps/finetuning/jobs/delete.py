"""Deletes a job that has ended, with all that came of it, unless something else still needs a part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from comps.cores.errors import Conflict, ServiceError
from comps.finetuning.jobs.find import WITH_OUTPUT, find_job, find_run
from comps.finetuning.jobs.states import TERMINAL
from comps.finetuning.jobs.uses import check_not_a_base, check_not_read, is_in, shown
from comps.finetuning.owner import Owner
from comps.finetuning.settings import Settings
from comps.finetuning.store.blobs import Blobs
from comps.finetuning.store.database import Database
from comps.finetuning.store.removal import removal
from comps.finetuning.store.tables import FileRow, JobRow, ModelRow
from comps.tuning.attempt import is_held

_PARAM = "fine_tuning_job_id"


class StillEnding(ServiceError):
    """In a moment it will be possible; OpenAI's client asks again by itself."""

    status, type, code = 409, "invalid_request_error", "job_still_ending"
    headers: ClassVar[Mapping[str, str]] = {"retry-after": "1"}


def delete_job(database: Database, settings: Settings, job_id: str, owner: Owner) -> None:
    """Remove the rows and the directories of a job and of its extractions and merges, and the models that
    they made.

    Raises :class:`NotFound`; :class:`Conflict` when it has not ended, or is in use, and by whom;
    :class:`StillEnding` while processes of it may live.
    """
    with removal(settings.data_dir) as taken, database.session() as session:
        job = find_run(session, job_id, owner)
        if job.kind not in WITH_OUTPUT:
            job = find_job(session, job_id, owner)  # which says that there is none
        if job.status not in TERMINAL:
            raise Conflict(
                f"The job {job.id} is {job.status}: cancel it first, with "
                f"POST /v1/fine_tuning/jobs/{job.id}/cancel.",
                param=_PARAM,
                code="job_not_ended",
            )
        directory = settings.jobs_dir / job.id
        _check_unused(session, job, directory, owner)
        runs = [job, *session.scalars(select(JobRow).where(JobRow.source == job.id))]
        for run in runs:
            _check_gone(run, settings.jobs_dir / run.id)
        session.execute(delete(ModelRow).where(ModelRow.job_id == job.id))
        results = (job.result or {}).get("result_files", [])
        session.execute(delete(FileRow).where(FileRow.id.in_(results)))
        for run in runs:
            session.delete(run)
            taken.take(settings.jobs_dir / run.id)
    for file_id in results:
        Blobs(settings.files_dir).delete(file_id)


def _check_unused(session: Session, job: JobRow, directory: Path, owner: Owner) -> None:
    thing = f"The job {job.id}"
    check_not_read(session, thing, str(directory), owner, _PARAM)
    models = session.scalars(select(ModelRow.id).where(ModelRow.job_id == job.id)).all()
    merged = f"A model of the job {job.id}"
    check_not_a_base(session, merged, models, str(directory), owner, _PARAM)
    # The models root may hold the data directory, and then what a job wrote can be registered.
    registered = select(ModelRow).where(ModelRow.job_id.is_(None), is_in(ModelRow.path, str(directory)))
    if (model := session.scalar(registered.limit(1))) is not None:
        raise Conflict(
            f"{thing} has the files of {shown(model, owner)}: delete that model first.", param=_PARAM
        )


def _check_gone(run: JobRow, directory: Path) -> None:
    # Ray's word first; and a process that Ray has lost sight of holds the directory as long as it writes.
    if (run.submission_id is not None and not run.stopped) or is_held(directory):
        raise StillEnding(
            f"The processes of the job {run.id} are not known to have ended; try again in some seconds.",
            param=_PARAM,
        )
