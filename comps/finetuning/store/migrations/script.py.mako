"""${message}."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


# There is no way back: a copy of the database from before the upgrade is.
def upgrade() -> None:
    ${upgrades if upgrades else "pass"}
