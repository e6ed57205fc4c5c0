"""How often in a row a job's run went with its Ray."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


# There is no way back: a copy of the database from before the upgrade is.
def upgrade() -> None:
    op.add_column("jobs", sa.Column("losses", BIG, nullable=False, server_default="0"))
