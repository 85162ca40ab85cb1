"""The tables. Bodies are JSON or msgpack of core types; columns beside them exist only to be searched by."""

from __future__ import annotations

from sqlalchemy import Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, Text

metadata = MetaData()

log = Table(
    "log",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", String, nullable=False),  # events, tick, order
    Column("received_at", Float, nullable=False),
    Column("sender", String, nullable=False),
    Column("n", Integer, nullable=False),
    Column("size", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),
)

meta = Table("meta", metadata, Column("key", String, primary_key=True), Column("value", Text, nullable=False))

snapshots = Table(
    "snapshots",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("body", LargeBinary, nullable=False),
)

incidents = Table(
    "incidents",
    metadata,
    Column("id", String, primary_key=True),
    Column("seq", Integer, nullable=False),
    Column("at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("state", String, nullable=False),
    Column("root", String, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Index("incidents_seq", "seq"),
)

incident_changes = Table(
    "incident_changes",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("incident", String, nullable=False, index=True),
    Column("at", Float, nullable=False),
    Column("old", String, nullable=False),
    Column("new", String, nullable=False),
    Column("reason", Text, nullable=False),
    Column("revision", Integer, nullable=False),
)

ledger = Table(
    "ledger",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("key", String, nullable=False, unique=True),
    Column("at", Float, nullable=False),
    Column("kind", String, nullable=False),
    Column("incident", String, nullable=False, index=True),
    Column("runbook", String, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
)

directives = Table(
    "directives",
    metadata,
    Column("id", String, primary_key=True),
    Column("epoch", Integer, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("ended_at", Float),
    Column("change", String, nullable=False),
    Column("reason", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("shown", LargeBinary),  # as enforcement points see it; empty while a stop keeps it from them
)

stops = Table(
    "stops",
    metadata,
    Column("scope", String, primary_key=True),
    Column("body", LargeBinary, nullable=False),
)

operations = Table(
    "operations",
    metadata,
    Column("id", String, primary_key=True),
    Column("verb", String, primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("hook", String, nullable=False),
    Column("at", Float, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("state", String, nullable=False),  # reserved, sending, asking, done
    Column("since", Float, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("told", String, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Index("operations_due", "state", "due_at"),
)

skipped = Table(
    "skipped",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("kind", String, nullable=False),
    Column("reason", Text, nullable=False),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", String, primary_key=True),
    Column("incident", String, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("channel", String, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("state", String, nullable=False),  # pending, sent, dead, superseded
    Column("why", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("receipt", Text, nullable=False),
    Index("outbox_due", "state", "due_at"),
)

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("sender", String, nullable=False),
    Column("format", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("detail", Text, nullable=False),
    Column("n", Integer, nullable=False),
    Column("size", Integer, nullable=False),
    Column("body", LargeBinary),
)
