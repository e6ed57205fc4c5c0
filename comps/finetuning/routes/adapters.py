"""Extraction and merge, under all the paths that documents give them."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request

from comps.finetuning.dependencies import DatabaseDep, NewsDep, OwnerDep, RepeatDep, SettingsDep
from comps.finetuning.jobs.adapters import create_extract, create_merge
from comps.finetuning.routes.waiting import answer_when_done
from comps.finetuning.schemas.adapters import AdapterAnswer, ExtractRequest, MergeRequest

router = APIRouter(prefix="/v1", tags=["adapters"])


@router.post("/finetune/extract_adapter")
@router.post("/finetune/extract_sub_adapter")
@router.post("/sqft/extract_sub_adapter")
async def extract_adapter(
    body: ExtractRequest,
    request: Request,
    owner: OwnerDep,
    settings: SettingsDep,
    database: DatabaseDep,
    news: NewsDep,
    repeat: RepeatDep,
) -> AdapterAnswer:
    """Cut a sub-adapter out of a super-adapter. The answer comes when it is written."""
    make = partial(create_extract, database, settings, body, owner, repeat)
    of = partial(AdapterAnswer.of, request=body)
    return await answer_when_done(request, database, news, repeat, make, AdapterAnswer, of, wait=body.wait)


@router.post("/finetune/merge_adapter")
@router.post("/ffinetune/merge_adapter")
@router.post("/sqft/merge_adapter")
async def merge_adapter(
    body: MergeRequest,
    request: Request,
    owner: OwnerDep,
    settings: SettingsDep,
    database: DatabaseDep,
    news: NewsDep,
    repeat: RepeatDep,
) -> AdapterAnswer:
    """Merge an adapter into its base model. The answer comes when the model is written."""
    make = partial(create_merge, database, settings, body, owner, repeat)
    of = partial(AdapterAnswer.of, request=body)
    return await answer_when_done(request, database, news, repeat, make, AdapterAnswer, of, wait=body.wait)
