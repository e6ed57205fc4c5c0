"""The sub-adapters that searches have found, by the names that extraction takes: ``best``, ``pareto-<k>``."""

from __future__ import annotations

import re

from sqlalchemy import ColumnElement, Select, exists, select
from sqlalchemy.orm import Session

from comps.cores.errors import InvalidRequest
from comps.finetuning.jobs.find import visible
from comps.finetuning.jobs.states import TERMINAL
from comps.finetuning.owner import Owner
from comps.finetuning.store.tables import JobRow, ModelRow

BEST = "best"
_SEARCHED = re.compile(rf"{BEST}|pareto-(\d{{1,9}})")


def is_searched(version: str) -> bool:
    """Whether the name is kept for what a search finds."""
    return _SEARCHED.fullmatch(version) is not None


def ended_searches(source: str, owner: Owner, *conditions: ColumnElement[bool]) -> Select[JobRow]:
    """The searches of a job or model that a caller may see and that have ended, newest first.

    Those of an earlier model of the same name are not of this one.
    """
    registered_since = exists().where(ModelRow.id == source, ModelRow.created_at > JobRow.created_at)
    query = select(JobRow).where(JobRow.kind == "search", JobRow.source == source, *conditions)
    ended = JobRow.status.in_(TERMINAL)
    return query.where(ended, visible(JobRow, owner), ~registered_since).order_by(JobRow.sequence.desc())


def found_by_search(
    session: Session, source: str, version: str, search_id: str | None, owner: Owner
) -> tuple[str, tuple[int, ...]] | None:
    """The search that ``version`` comes from, and its ranks: of the search ``search_id``, or of the newest of
    ``source`` that has succeeded. ``None`` when there is none.

    Raises :class:`InvalidRequest` for a search that is not the source's, or has found no such version.
    """
    conditions = [JobRow.status == "succeeded"] + ([JobRow.id == search_id] if search_id else [])
    search = session.scalar(ended_searches(source, owner, *conditions).limit(1))
    if search is None:
        if search_id:
            raise InvalidRequest(
                f"search_id: no search {search_id[:80]!r} of {source} has succeeded.", param="search_id"
            )
        return None
    result = search.result or {}
    match = _SEARCHED.fullmatch(version)
    if match is None or match[1] is None:
        return search.id, tuple(result["best"]["config"])
    if int(match[1]) >= len(result["front"]):
        raise InvalidRequest(
            f"adapter_version: the front of the search {search.id} has pareto-0 to "
            f"pareto-{len(result['front']) - 1}, and no {version}.",
            param="adapter_version",
        )
    return search.id, tuple(result["front"][int(match[1])]["config"])
