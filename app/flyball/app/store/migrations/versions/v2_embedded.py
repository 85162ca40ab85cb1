"""Schema 2: the tables of the embedded runtime. An SQLite database of that schema was made without Alembic, and is taken to stand here."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Float, Index, Integer, LargeBinary, MetaData, Table, insert

from flyball.app.store.dialects import text, whole, words

revision = "2"
down_revision = None
branch_labels = None
depends_on = None

metadata = MetaData()

Table(
    "log",
    metadata,
    Column("id", whole(), primary_key=True, autoincrement=False),
    Column("kind", words(), nullable=False),
    Column("received_at", Float, nullable=False),
    Column("sender", words(), nullable=False),
    Column("n", Integer, nullable=False),
    Column("size", whole(), nullable=False),
    Column("body", LargeBinary, nullable=False),
)

meta = Table(
    "meta", metadata, Column("key", words(), primary_key=True), Column("value", text(), nullable=False)
)

Table(
    "snapshots",
    metadata,
    Column("position", whole(), primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    Column("body", LargeBinary, nullable=False),
)

Table(
    "incidents",
    metadata,
    Column("id", words(), primary_key=True),
    Column("seq", whole(), nullable=False),
    Column("at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("state", words(), nullable=False),
    Column("root", words(), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Index("incidents_seq", "seq"),
)

Table(
    "incident_changes",
    metadata,
    Column("seq", whole(), primary_key=True, autoincrement=False),
    Column("incident", words(), nullable=False, index=True),
    Column("at", Float, nullable=False),
    Column("old", words(), nullable=False),
    Column("new", words(), nullable=False),
    Column("reason", text(), nullable=False),
    Column("revision", Integer, nullable=False),
)

Table(
    "ledger",
    metadata,
    Column("seq", whole(), primary_key=True, autoincrement=False),
    Column("key", words(), nullable=False, unique=True),
    Column("at", Float, nullable=False),
    Column("kind", words(), nullable=False),
    Column("incident", words(), nullable=False, index=True),
    Column("runbook", words(), nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
)

Table(
    "directives",
    metadata,
    Column("id", words(), primary_key=True),
    Column("epoch", Integer, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("ended_at", Float),
    Column("change", words(), nullable=False),
    Column("reason", text(), nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("shown", LargeBinary),
)

Table(
    "stops",
    metadata,
    Column("scope", words(), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)

Table(
    "operations",
    metadata,
    Column("id", words(), primary_key=True),
    Column("verb", words(), primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("hook", words(), nullable=False),
    Column("at", Float, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("state", words(), nullable=False),
    Column("since", Float, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("told", words(), nullable=False),
    Column("body", LargeBinary, nullable=False),
    Index("operations_due", "state", "due_at"),
)

Table(
    "skipped",
    metadata,
    Column("position", whole(), primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    Column("kind", words(), nullable=False),
    Column("reason", text(), nullable=False),
)

Table(
    "outbox",
    metadata,
    Column("id", words(), primary_key=True),
    Column("incident", words(), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("channel", words(), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("state", words(), nullable=False),
    Column("why", text(), nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("receipt", text(), nullable=False),
    Index("outbox_due", "state", "due_at"),
)

Table(
    "dead_letters",
    metadata,
    Column("id", whole(), primary_key=True),
    Column("at", Float, nullable=False),
    Column("sender", words(), nullable=False),
    Column("format", words(), nullable=False),
    Column("reason", words(), nullable=False),
    Column("detail", text(), nullable=False),
    Column("n", Integer, nullable=False),
    Column("size", whole(), nullable=False),
    Column("body", LargeBinary),
)


def upgrade() -> None:
    metadata.create_all(op.get_bind())
    op.execute(insert(meta).values(key="schema", value=revision))
