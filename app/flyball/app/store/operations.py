"""Requests to remediation hooks: a durable queue. What was begun and not answered is known after a crash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, case, select, update

from flyball.app.store.dialects import upsert
from flyball.app.store.tables import operations
from flyball.core.directives import Operation, OperationReport
from flyball.remediation.hooks import OperationRow
from flyball.remediation.hooks.dispatcher import State

_DONE = "done"


def put_operation(c: Connection, operation: Operation) -> None:
    """One row an operation and verb; a later attempt takes the place of an earlier one. The same attempt is stored once."""
    values = {
        "id": operation.id, "verb": operation.verb, "attempt": operation.attempt, "hook": operation.hook,
        "at": operation.at, "due_at": operation.at, "state": "reserved", "since": 0.0, "tries": 0, "told": "",
        "body": msgspec.json.encode(operation),
    }  # fmt: skip
    t = operations.c
    c.execute(
        upsert(c, operations)
        .values(values)
        .on_conflict_do_update(
            index_elements=["id", "verb"], set_=values, where=t.attempt < operation.attempt
        )
    )


def due_operations(c: Connection, now: float, limit: int) -> list[OperationRow]:
    """Rows that are not finished and whose time has come: undo and cancel first, then by age."""
    t, starts = operations.c, operations.alias()
    started = (
        select(starts.c.since)
        .where(starts.c.id == t.id, starts.c.verb == "start")
        .correlate(operations)
        .scalar_subquery()
    )
    rows = c.execute(
        select(t.body, t.state, t.since, t.tries, t.told, t.verb, started)
        .where(t.state != _DONE, t.due_at <= now)
        .order_by(case((t.verb == "start", 1), else_=0), t.at, t.id)
        .limit(limit)
    )
    return [_row(r) for r in rows]


def _row(r: Sequence[Any]) -> OperationRow:
    body, state, since, tries, told, verb, started = r
    return OperationRow(
        operation=msgspec.json.decode(body, type=Operation), state=state, since=since, tries=tries, told=told,
        started=verb != "cancel" or bool(started),
    )  # fmt: skip


def mark_sending(c: Connection, operation: Operation, at: float) -> bool:
    """`reserved` becomes `sending`. False, and no change, when the row is in any other state or holds another attempt."""
    t = operations.c
    marked = c.execute(
        update(operations)
        .where(
            t.id == operation.id, t.verb == operation.verb, t.attempt == operation.attempt, t.state == "reserved"
        )
        .values(state="sending", since=case((t.since == 0.0, at), else_=t.since))
    )  # fmt: skip
    return marked.rowcount == 1


def put_off(c: Connection, operation: Operation, state: State | None, at: float) -> None:
    """Due again at `at` in this state, or finished (None)."""
    t = operations.c
    c.execute(
        update(operations)
        .where(t.id == operation.id, t.verb == operation.verb, t.attempt == operation.attempt)
        .values(state=state or _DONE, due_at=at, tries=t.tries + 1)
    )


def note_report(c: Connection, report: OperationReport, state: State | None, at: float) -> None:
    """What became of it; a report about an attempt that the row does not hold any more leaves it alone."""
    t = operations.c
    c.execute(
        update(operations)
        .where(t.id == report.id, t.verb == report.verb, t.attempt == report.attempt)
        .values(state=state or _DONE, due_at=at, tries=t.tries + 1, told=report.status)
    )


def hook_of(c: Connection, operation_id: str) -> str:
    """The name of the hook that an operation went to; empty when there is no such operation."""
    return str(c.execute(select(operations.c.hook).where(operations.c.id == operation_id)).scalar() or "")


def open_starts(c: Connection) -> list[str]:
    """Operations whose start is not finished."""
    t = operations.c
    rows = c.execute(select(t.id).where(t.verb == "start", t.state != _DONE).order_by(t.id))
    return [r for (r,) in rows]


def unfinished(c: Connection) -> list[dict[str, Any]]:
    """For people: what is asked of hooks and not answered, oldest first."""
    t = operations.c
    rows = c.execute(
        select(t.id, t.verb, t.attempt, t.hook, t.state, t.told, t.due_at)
        .where(t.state != _DONE)
        .order_by(t.at)
    )
    names = ("id", "verb", "attempt", "hook", "state", "told", "due_at")
    return [dict(zip(names, r, strict=True)) for r in rows]
