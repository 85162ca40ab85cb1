"""Alembic runs this for every command. The connection comes from `flyball.app.store.migrate`, inside its transaction."""

from __future__ import annotations

from alembic import context

from flyball.app.store.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata)
context.run_migrations()
