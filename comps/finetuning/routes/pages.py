"""Pages of rows by the id of the last one seen, as OpenAI's cursor pages work."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query
from sqlalchemy import Select
from sqlalchemy.orm import Session

from comps.cores.errors import InvalidRequest
from comps.finetuning.store.tables import CheckpointRow, EventRow, JobRow

After = Annotated[str | None, Query(max_length=200, description="The last id of the page before")]
Limit = Annotated[int, Query(ge=1, le=1000)]

Paged = type[JobRow] | type[EventRow] | type[CheckpointRow]


def newest_first(
    session: Session, table: Paged, query: Select[Any], after: str | None, limit: int
) -> tuple[list[Any], bool]:
    """The rows of ``query`` that come after the row ``after``, at most ``limit``; and whether there are more.

    Raises :class:`InvalidRequest` when none of the rows has that id.
    """
    if after is not None:
        last = session.scalar(query.with_only_columns(table.sequence).where(table.id == after))
        if last is None:
            raise InvalidRequest(f"after: nothing in this list has the id {after[:80]!r}.", param="after")
        query = query.where(table.sequence < last)
    rows = list(session.scalars(query.order_by(table.sequence.desc()).limit(limit + 1)))
    return rows[:limit], len(rows) > limit
