"""Schema 4: what is still to be published on Kafka."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, LargeBinary

from flyball.app.store.dialects import whole, words

revision = "4"
down_revision = "3"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "publications",
        Column("seq", whole(), primary_key=True),
        Column("topic", words(), nullable=False),
        Column("key", words(), nullable=False),
        Column("id", words(), nullable=False),
        Column("owner", whole(), nullable=False),
        Column("body", LargeBinary, nullable=False),
    )
    op.execute("update meta set value = '4' where key = 'schema'")
