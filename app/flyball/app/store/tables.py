"""The tables. Bodies are JSON or msgpack of core types; columns beside them exist only to be searched by.

A change here is a migration too: `migrations/versions/`, and a test holds the two together.
"""

from __future__ import annotations

from sqlalchemy import Column, Float, Index, Integer, LargeBinary, MetaData, Table

from flyball.app.store.dialects import text, whole, words

metadata = MetaData()

log = Table(
    "log",
    metadata,
    Column("id", whole(), primary_key=True, autoincrement=False),
    Column("kind", words(), nullable=False),  # events, portion, tick, order
    Column("received_at", Float, nullable=False),
    Column("sender", words(), nullable=False),
    Column("n", Integer, nullable=False),
    Column("size", whole(), nullable=False),
    Column("body", LargeBinary, nullable=False),
)

meta = Table(
    "meta", metadata, Column("key", words(), primary_key=True), Column("value", text(), nullable=False)
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("position", whole(), primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    Column("body", LargeBinary, nullable=False),
)

incidents = Table(
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

incident_changes = Table(
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

ledger = Table(
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
    Column("owner", whole(), nullable=False, server_default="0"),  # epoch of the Flyball that wrote it
)

directives = Table(
    "directives",
    metadata,
    Column("id", words(), primary_key=True),
    Column("epoch", Integer, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("ended_at", Float),
    Column("change", words(), nullable=False),
    Column("reason", text(), nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("shown", LargeBinary),  # as enforcement points see it; empty while a stop keeps it from them
    Column("owner", whole(), nullable=False, server_default="0"),  # epoch of the Flyball that changed it last
)

stops = Table(
    "stops",
    metadata,
    Column("scope", words(), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)

operations = Table(
    "operations",
    metadata,
    Column("id", words(), primary_key=True),
    Column("verb", words(), primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("hook", words(), nullable=False),
    Column("at", Float, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("state", words(), nullable=False),  # reserved, sending, asking, done
    Column("since", Float, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("told", words(), nullable=False),
    Column("body", LargeBinary, nullable=False),
    Index("operations_due", "state", "due_at"),
)

skipped = Table(
    "skipped",
    metadata,
    Column("position", whole(), primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    Column("kind", words(), nullable=False),
    Column("reason", text(), nullable=False),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", words(), primary_key=True),
    Column("incident", words(), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("channel", words(), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("state", words(), nullable=False),  # pending, sent, dead, superseded
    Column("why", text(), nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("receipt", text(), nullable=False),
    Index("outbox_due", "state", "due_at"),
)

dead_letters = Table(
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

owner = Table(
    "owner",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # one row: 1
    Column("epoch", whole(), nullable=False),  # grows whenever another Flyball takes the database
    Column("holder", words(), nullable=False),  # host and process, for people
)

offsets = Table(
    "offsets",
    metadata,
    Column("source", words(), primary_key=True),
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("next_offset", whole(), nullable=False),
)

publications = Table(
    "publications",
    metadata,
    Column("seq", whole(), primary_key=True),
    Column("topic", words(), nullable=False),  # without prefix
    Column("key", words(), nullable=False),
    Column("id", words(), nullable=False),  # the same in every replay
    Column("owner", whole(), nullable=False),  # epoch of the Flyball that stored it
    Column("body", LargeBinary, nullable=False),
)
