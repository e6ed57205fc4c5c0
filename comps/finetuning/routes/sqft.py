"""New base models made of others: pruned ones and quantised ones."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request

from comps.finetuning.dependencies import DatabaseDep, NewsDep, OwnerDep, RepeatDep, SettingsDep
from comps.finetuning.jobs.bases import create_prune, create_quantize
from comps.finetuning.routes.waiting import answer_when_done
from comps.finetuning.schemas.bases import NewBaseAnswer, PruneRequest, QuantizeRequest

router = APIRouter(prefix="/v1/sqft", tags=["base models"])


@router.post("/prune")
async def prune_model(
    body: PruneRequest,
    request: Request,
    owner: OwnerDep,
    settings: SettingsDep,
    database: DatabaseDep,
    news: NewsDep,
    repeat: RepeatDep,
) -> NewBaseAnswer:
    """Make a sparse base model of a base model. The answer comes when it is written.

    The run can be looked at, followed and cancelled by its id, as any job.
    """
    make = partial(create_prune, database, settings, body, owner, repeat)
    of = NewBaseAnswer.of
    return await answer_when_done(request, database, news, repeat, make, NewBaseAnswer, of, wait=body.wait)


@router.post("/quantize")
async def quantize_model(
    body: QuantizeRequest,
    request: Request,
    owner: OwnerDep,
    settings: SettingsDep,
    database: DatabaseDep,
    news: NewsDep,
    repeat: RepeatDep,
) -> NewBaseAnswer:
    """Make an INT4 model of a base model. The answer comes when it is written.

    It is a base model like any other here: it can be trained on, and a `quantization_aware` job on it, or on
    its parent, ends in an INT4 model. The run can be looked at, followed and cancelled by its id.
    """
    make = partial(create_quantize, database, settings, body, owner, repeat)
    of = NewBaseAnswer.of
    return await answer_when_done(request, database, news, repeat, make, NewBaseAnswer, of, wait=body.wait)
