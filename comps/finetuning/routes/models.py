"""Models: list, look at, register, delete."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from fastapi import Path as PathParameter
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from comps.cores.errors import Conflict, InvalidRequest, NotFound
from comps.finetuning import catalog
from comps.finetuning.dependencies import (
    DatabaseDep,
    OwnerDep,
    ReaderDep,
    RepeatDep,
    SettingsDep,
    SparsityDep,
)
from comps.finetuning.jobs.adapters import versions_directory
from comps.finetuning.jobs.find import find_base_model, find_model, visible
from comps.finetuning.jobs.names import check_not_taken
from comps.finetuning.jobs.repeats import Repeat, claim, keep, once
from comps.finetuning.jobs.uses import check_not_a_base, check_not_read, is_in, shown
from comps.finetuning.owner import Owner
from comps.finetuning.registry import inspect_directory
from comps.finetuning.schemas.models import ModelDeleted, ModelList, ModelObject, RegisterModel
from comps.finetuning.schemas.tolerant import request_warnings
from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.removal import removal
from comps.finetuning.store.tables import CheckpointRow, ModelRow

router = APIRouter(prefix="/v1/models", tags=["models"])

ModelId = Annotated[str, PathParameter(max_length=1000)]


def found_on_disk(settings: Settings, name: str) -> ModelObject | None:
    """The base model that lies in the models root under this name, without anyone's registration."""
    if name not in catalog.list_local_models(settings.models_dir):
        return None
    directory = settings.models_dir / name
    created = int(directory.stat().st_mtime)
    return ModelObject(id=name, created=created, owned_by="local", kind="base", path=str(directory))


@router.get("")
def list_models(owner: OwnerDep, settings: SettingsDep, session: ReaderDep) -> ModelList:
    """All models that requests can name, newest first."""
    rows = session.scalars(select(ModelRow).where(visible(ModelRow, owner)))
    known = {row.id: ModelObject.of(row) for row in rows}
    for name in catalog.list_local_models(settings.models_dir):
        if name not in known and (found := found_on_disk(settings, name)):
            known[name] = found
    for model in known.values():
        if model.sparsity:
            model.sparsity = {key: value for key, value in model.sparsity.items() if key != "layers"}
    return ModelList(data=sorted(known.values(), key=lambda model: (-model.created, model.id)))


@router.post("")
def register_model(
    body: RegisterModel,
    owner: OwnerDep,
    settings: SettingsDep,
    database: DatabaseDep,
    repeat: RepeatDep,
) -> ModelObject:
    """Give a directory under the models root a name: a base model, or a super-adapter trained elsewhere."""
    make = partial(_register, body, owner, settings, database, repeat)
    return once(database, repeat, make, ModelObject.model_validate)


def _register(
    body: RegisterModel, owner: Owner, settings: Settings, database: Database, repeat: Repeat | None
) -> ModelObject:
    # Files are read outside any transaction, so that a slow disk holds nobody up.
    found = inspect_directory(settings.models_dir, body.path)
    local = catalog.find_local_model(settings.models_dir, body.id)
    if local is not None and local != found.directory:
        raise Conflict(f"The name {body.id!r} belongs to another directory in the models root.", param="id")
    with database.reading() as session:
        base_model = _base_model(session, settings, body, found.base_model, owner)
    if found.kind == "super_adapter" and base_model is None:
        message = "base_model is missing, and the adapter's own config names no base model."
        raise InvalidRequest(message, param="base_model")
    row = ModelRow(
        id=body.id,
        kind=found.kind,
        owner=owner.id,
        path=str(found.directory),
        base_model=base_model,
        details={},
    )
    with database.session() as session:
        claim(session, repeat)
        check_not_taken(session, body.id, "id", owner)
        session.add(row)
        session.flush()
        answer = ModelObject.of(row, request_warnings(body))
        keep(session, repeat, answer)
    return answer


def _base_model(
    session: Session, settings: Settings, body: RegisterModel, from_config: str | None, owner: Owner
) -> str | None:
    """The base model's name: the given one must be known, the adapter's own is taken as it is."""
    if body.base_model is not None:
        try:
            find_base_model(session, settings, body.base_model, owner)
        except (NotFound, InvalidRequest) as error:
            raise InvalidRequest(error.message, param="base_model", code=error.code) from error
        return body.base_model
    if from_config is None:
        return None
    try:
        return catalog.check_name(from_config, "base_model")
    except InvalidRequest as error:
        message = (
            f"The adapter's config names {from_config[:200]!r} as its base model; give base_model instead."
        )
        raise InvalidRequest(message, param="base_model") from error


@router.get("/{model_id:path}")
def retrieve_model(
    model_id: ModelId, owner: OwnerDep, settings: SettingsDep, database: DatabaseDep, sparsity: SparsityDep
) -> ModelObject:
    """One model; of a base or merged one also how many of its linear weights are zero. The zeros of a large
    model are counted when it is first asked for: then `warnings` says so, and a later answer has them."""
    with database.reading() as session:
        row = find_model(session, model_id, owner)
    model = ModelObject.of(row) if row else found_on_disk(settings, model_id)
    if model is None:
        raise _unknown(model_id)
    if model.kind in ("base", "merged") and model.sparsity is None:
        count = sparsity.of(Path(model.path))
        model.sparsity = count.report
        if count.why_not:
            model.warnings.append(count.why_not)
    return model


@router.delete("/{model_id:path}")
def delete_model(
    model_id: ModelId, owner: OwnerDep, settings: SettingsDep, database: DatabaseDep
) -> ModelDeleted:
    """Forget a registered model (its files stay), or remove a model that a job made with its files."""
    with removal(settings.data_dir) as taken, database.session() as session:
        row = find_model(session, model_id, owner)
        if row is None:
            if found_on_disk(settings, model_id):
                message = (
                    f"The model {model_id!r} lies in the models root and is not the service's to remove."
                )
                raise Conflict(message, param="model")
            raise _unknown(model_id)
        _check_unused(session, settings, row, owner)
        session.delete(row)
        path = Path(row.path)
        ours = path.is_relative_to(settings.data_dir) and not path.is_relative_to(settings.models_dir)
        if _made_here(row) and ours:
            session.execute(delete(CheckpointRow).where(is_in(CheckpointRow.path, row.path)))
            taken.take(path)
    return ModelDeleted(id=model_id)


def _check_unused(session: Session, settings: Settings, row: ModelRow, owner: Owner) -> None:
    thing, made_here = f"The model {row.id!r}", _made_here(row)
    check_not_read(session, thing, row.path, owner, "model")
    check_not_a_base(session, thing, [row.id], row.path if made_here else None, owner, "model")
    # What was made of a registered super-adapter would be taken for that of the next one of this name.
    versions = row.path if made_here else str(versions_directory(settings, row.id))
    made_of_it = select(ModelRow).where(ModelRow.id != row.id, is_in(ModelRow.path, versions))
    if (other := session.scalar(made_of_it.limit(1))) is not None:
        who = shown(other, owner)
        message = f"{who[0].upper()}{who[1:]} was made of {row.id!r}: delete {who} first."
        raise Conflict(message, param="model")


def _made_here(row: ModelRow) -> bool:
    """Whether a job of this service wrote the model, so that its files go with it."""
    return row.job_id is not None or row.kind in ("adapter", "merged")


def _unknown(model_id: str) -> NotFound:
    return NotFound(f"There is no model {model_id[:200]!r}.", param="model", code="model_not_found")
