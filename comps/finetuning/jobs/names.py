"""Names of models that are yet to be made: whoever asks first has the name."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from comps.cores.errors import Conflict
from comps.finetuning import catalog
from comps.finetuning.jobs.states import ACTIVE
from comps.finetuning.owner import Owner
from comps.finetuning.settings import Settings
from comps.finetuning.store.tables import JobRow, ModelRow


def check_not_taken(session: Session, name: str, param: str, owner: Owner) -> None:
    """Raises :class:`Conflict` when a model has this id, or a job that has not ended will give it to one."""
    if session.get(ModelRow, name) is not None:
        raise Conflict(f"There is already a model {name!r}.", param=param)
    makes = JobRow.spec["name"].as_string() == name
    job = session.scalar(select(JobRow).where(makes, JobRow.status.in_(ACTIVE)).limit(1))
    if job is not None:
        # Another key's jobs are nobody's business.
        which = (
            f"The job {job.id}, which has not ended," if owner.sees(job.owner) else "A job that has not ended"
        )
        raise Conflict(f"{which} makes a model {name!r}.", param=param)


def check_free(session: Session, settings: Settings, name: str, param: str, owner: Owner) -> None:
    """As :func:`check_not_taken`, and no directory of the models root may have the name."""
    check_not_taken(session, name, param, owner)
    if catalog.find_local_model(settings.models_dir, name) is not None:
        raise Conflict(f"The name {name!r} belongs to a directory in the models root.", param=param)
