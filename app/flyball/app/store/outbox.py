"""Messages that wait for their channels."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, func, select, update

from flyball.app.store.dialects import upsert
from flyball.app.store.rows import OutboxRow
from flyball.app.store.tables import outbox


def put_outbox(c: Connection, row: OutboxRow) -> None:
    """The same message is never stored twice."""
    values = {k: getattr(row, k) for k in OutboxRow.__slots__} | {"state": "pending", "receipt": ""}
    c.execute(upsert(c, outbox).values(values).on_conflict_do_nothing())


def due_outbox(c: Connection, now: float, limit: int) -> list[tuple[OutboxRow, str]]:
    """Rows whose time has come, oldest first, each with the last receipt of its incident and channel."""
    t, sent = outbox.c, outbox.alias()
    receipt = (
        select(sent.c.receipt)
        .where(sent.c.incident == t.incident, sent.c.channel == t.channel, sent.c.receipt != "")
        .order_by(sent.c.revision.desc())
        .limit(1)
        .scalar_subquery()
    )
    rows = c.execute(
        select(
            t.id, t.incident, t.revision, t.channel, t.created_at, t.due_at, t.why, t.body, t.attempts,
            func.coalesce(receipt, ""),
        )
        .where(t.state == "pending", t.due_at <= now)
        .order_by(t.created_at, t.id)
        .limit(limit)
    )  # fmt: skip
    return [(OutboxRow(*r[:-1]), r[-1]) for r in rows]


def finish_outbox(
    c: Connection, row_id: str, *, state: str, receipt: str = "", repeat_at: float | None = None
) -> None:
    """The row is done, or with `repeat_at` comes back then (unless a newer one supersedes it)."""
    values: dict[str, Any] = {"state": state}
    if receipt:
        values["receipt"] = receipt
    if repeat_at is not None:
        values |= {"state": "pending", "due_at": repeat_at, "attempts": 0}
    c.execute(update(outbox).where(outbox.c.id == row_id).values(values))


def postpone_outbox(c: Connection, row_id: str, at: float) -> None:
    c.execute(update(outbox).where(outbox.c.id == row_id).values(due_at=at, attempts=outbox.c.attempts + 1))


def channels_told(c: Connection) -> dict[str, set[str]]:
    """Incident id → channels that had something of it."""
    told: dict[str, set[str]] = {}
    for incident, channel in c.execute(select(outbox.c.incident, outbox.c.channel).distinct()):
        told.setdefault(incident, set()).add(channel)
    return told
