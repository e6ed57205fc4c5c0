"""Runs the migrations on the connection that ``Database.migrate`` (or a test) hands over."""

from alembic import context

from comps.finetuning.store.tables import Base

connection = context.config.attributes["connection"]
# SQLite cannot alter most things in place; "batch" copies the table instead.
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
