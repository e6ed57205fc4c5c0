"""The event object of a fine-tuning job."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from comps.finetuning.store.tables import EventRow


class JobEvent(BaseModel):
    """OpenAI knows two types; events of ours that are neither (``checkpoint``, ``progress``) are messages
    whose ``data`` has their ``type``."""

    id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    data: dict[str, Any]
    type: Literal["message", "metrics"]

    @classmethod
    def of(cls, row: EventRow) -> JobEvent:
        known = row.type in ("message", "metrics")
        return cls.model_validate(
            {
                "id": row.id,
                "created_at": int(row.created_at),
                "level": row.level if row.level in ("info", "warn", "error") else "info",
                "message": row.message,
                "data": row.data if known else row.data | {"type": row.type},
                "type": row.type if known else "message",
            }
        )


class EventList(BaseModel):
    """One page of events, newest first."""

    object: Literal["list"] = "list"
    data: list[JobEvent]
    has_more: bool
