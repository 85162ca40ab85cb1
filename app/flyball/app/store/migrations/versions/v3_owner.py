"""Schema 3: who owns the database and who wrote what; how far sources were read."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Integer

from flyball.app.store.dialects import whole, words

revision = "3"
down_revision = "2"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("ledger", "directives"):
        op.add_column(table, Column("owner", whole(), nullable=False, server_default="0"))
    op.create_table(
        "owner",
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("epoch", whole(), nullable=False),
        Column("holder", words(), nullable=False),
    )
    op.create_table(
        "offsets",
        Column("source", words(), primary_key=True),
        Column("partition", Integer, primary_key=True, autoincrement=False),
        Column("next_offset", whole(), nullable=False),
    )
    op.execute("update meta set value = '3' where key = 'schema'")
