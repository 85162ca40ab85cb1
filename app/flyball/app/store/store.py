"""What is written in one transaction, and what can be asked. The statements are SQLAlchemy Core; no row leaves this module."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, delete, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from flyball.app.store.tables import (
    dead_letters,
    directives,
    incident_changes,
    incidents,
    ledger,
    log,
    meta,
    outbox,
    snapshots,
)
from flyball.core.directives import Decision, Directive, DirectiveChange, LedgerEntry, Outcome
from flyball.core.ids import short_id
from flyball.core.incident import Incident, IncidentChange, State


@dataclass(frozen=True, slots=True)
class LogRow:
    """One record of the log as stored. `id` is its position."""

    id: int
    kind: str
    received_at: float
    sender: str
    n: int
    body: bytes


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """What could not be taken, with its bytes unless a setting says otherwise. `n` events share it when a body was mostly bad."""

    at: float
    sender: str
    format: str
    reason: str
    detail: str
    size: int
    body: bytes | None
    n: int = 1

    def without_bytes(self) -> DeadLetter:
        return replace(self, body=None)


@dataclass(frozen=True, slots=True)
class EdgeTotals:
    """What the edge has counted since the beginning, and what it holds on disk now."""

    received: dict[str, int]
    """Events by format."""
    rejected: dict[str, int]
    """Events by reason."""
    log_bytes: int
    dead: int
    dead_bytes: int


@dataclass(frozen=True, slots=True)
class Removed:
    rows: int
    size: int


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """One message for one channel. `id` depends on incident, channel and revision: the same one is never stored twice."""

    id: str
    incident: str
    revision: int
    channel: str
    created_at: float
    due_at: float
    why: str
    body: bytes
    attempts: int = 0


@dataclass(slots=True)
class Commit:
    """All that one stretch of the log led to; stored together with the position behind it, or not at all."""

    position: int
    changes: list[IncidentChange] = field(default_factory=list)
    entries: list[LedgerEntry] = field(default_factory=list)
    directives: list[DirectiveChange] = field(default_factory=list)
    outbox: list[OutboxRow] = field(default_factory=list)
    snapshot: bytes | None = None
    counters: dict[str, Any] | None = None
    at: float = 0.0


def entry_of(item: Decision | DirectiveChange | Outcome) -> LedgerEntry:
    """The ledger's line for what was decided or done; its key is the same in every replay."""
    body = msgspec.to_builtins(item)
    if isinstance(item, Decision):
        key = short_id(
            "DEC", item.incident, item.runbook, item.decision, item.reason, item.at, item.plan_hash, length=14
        )
        return LedgerEntry(
            key=key, at=item.at, kind="decision", incident=item.incident, runbook=item.runbook, body=body
        )
    if isinstance(item, DirectiveChange):
        d = item.directive
        key = short_id("DIR", d.id, d.epoch, item.change, item.at, length=14)
        return LedgerEntry(
            key=key, at=item.at, kind="directive", incident=d.incident, runbook=d.runbook, body=body
        )
    key = short_id(
        "OUT", item.incident, item.runbook, item.step, item.result, item.at, item.directive, length=14
    )
    return LedgerEntry(
        key=key, at=item.at, kind="outcome", incident=item.incident, runbook=item.runbook, body=body
    )


# --- writing: only ever on the writer's connection -----------------------------------------------------------------


def append_log(c: Connection, rows: Sequence[LogRow]) -> None:
    c.execute(
        insert(log),
        [
            {
                "id": r.id,
                "kind": r.kind,
                "received_at": r.received_at,
                "sender": r.sender,
                "n": r.n,
                "size": len(r.body),
                "body": r.body,
            }
            for r in rows
        ],
    )


def append_dead_letters(c: Connection, letters: Sequence[DeadLetter]) -> None:
    if not letters:
        return
    c.execute(
        insert(dead_letters),
        [
            {
                "at": d.at, "sender": d.sender, "format": d.format, "reason": d.reason,
                "detail": d.detail, "size": d.size, "body": d.body, "n": d.n,
            }
            for d in letters
        ],
    )  # fmt: skip


def apply_commit(c: Connection, commit: Commit) -> None:
    """Everything of `commit`, inside the caller's transaction."""
    for change in commit.changes:
        _put_incident(c, change)
    for entry in commit.entries:
        _put_entry(c, entry)
    for moved in commit.directives:
        _put_directive(c, moved)
    for row in commit.outbox:
        values = {k: getattr(row, k) for k in OutboxRow.__slots__} | {"state": "pending", "receipt": ""}
        c.execute(upsert(outbox).values(values).on_conflict_do_nothing())
    if commit.snapshot is not None:
        c.execute(
            upsert(snapshots)
            .values(position=commit.position, at=commit.at, body=commit.snapshot)
            .on_conflict_do_nothing()
        )
        newest = select(snapshots.c.position).order_by(snapshots.c.position.desc()).limit(2)
        c.execute(delete(snapshots).where(snapshots.c.position.not_in(newest)))
    if commit.counters is not None:
        put_meta(c, "counters", json.dumps(commit.counters))
    put_meta(c, "position", str(commit.position))


def _put_incident(c: Connection, change: IncidentChange) -> None:
    i = change.incident
    body = msgspec.json.encode(i)
    values = {
        "id": i.id, "at": i.at, "updated_at": i.updated_at, "state": i.state.value, "root": str(i.root),
        "revision": i.revision, "body": body,
    }  # fmt: skip
    seq = select(func.coalesce(func.max(incidents.c.seq), 0) + 1).scalar_subquery()
    c.execute(
        upsert(incidents).values(seq=seq, **values).on_conflict_do_update(index_elements=["id"], set_=values)
    )
    if change.old != change.new:
        c.execute(
            insert(incident_changes).values(
                incident=i.id,
                at=change.at,
                old=change.old,
                new=change.new,
                reason=change.reason,
                revision=i.revision,
            )
        )


def _put_entry(c: Connection, entry: LedgerEntry) -> None:
    previous = c.execute(select(ledger.c.hash).order_by(ledger.c.seq.desc()).limit(1)).scalar() or b""
    body = msgspec.json.encode(entry.body, order="sorted")
    values = {k: getattr(entry, k) for k in ("key", "at", "kind", "incident", "runbook")}
    c.execute(
        upsert(ledger)
        .values(**values, body=body, hash=ledger_hash(previous, list(values.values()), body))
        .on_conflict_do_nothing()
    )


def ledger_hash(previous: bytes, columns: list[Any], body: bytes) -> bytes:
    """Each line seals all before it: changing or removing one breaks every later hash. `columns`: all but sequence, body and hash."""
    sealed = msgspec.json.encode(columns)
    return blake2b(previous + sealed + b"\0" + body, digest_size=32).digest()


def _put_directive(c: Connection, moved: DirectiveChange) -> None:
    d = moved.directive
    values = {
        "id": d.id, "epoch": d.epoch, "expires_at": d.expires_at, "change": moved.change, "reason": moved.reason,
        "ended_at": moved.at if moved.change in ("released", "expired") else None, "body": msgspec.json.encode(d),
    }  # fmt: skip
    c.execute(upsert(directives).values(values).on_conflict_do_update(index_elements=["id"], set_=values))


def put_meta(c: Connection, key: str, value: str) -> None:
    c.execute(
        upsert(meta)
        .values(key=key, value=value)
        .on_conflict_do_update(index_elements=["key"], set_={"value": value})
    )


def put_edge(c: Connection, received: Mapping[str, int], rejected: Mapping[str, int]) -> None:
    put_meta(c, "edge", json.dumps({"received": received, "rejected": rejected}))


def trim_log(c: Connection, before: float, over_bytes: int, limit: int) -> Removed:
    """Removes the oldest records: those from before `before`, and as many as make up `over_bytes`.

    At most `limit` of them, and never one that a restart would read again: the older of two snapshots must still do.
    """
    needed = c.execute(select(func.min(snapshots.c.position))).scalar()
    if needed is None:
        return Removed(0, 0)
    oldest = c.execute(
        select(log.c.id, log.c.received_at, log.c.size)
        .where(log.c.id <= needed)
        .order_by(log.c.id)
        .limit(limit)
    ).all()
    last, rows, removed = 0, 0, 0
    for row_id, received_at, size in oldest:
        if received_at >= before and removed >= over_bytes:
            break
        last, rows, removed = row_id, rows + 1, removed + size
    if rows:
        c.execute(delete(log).where(log.c.id <= last))
    return Removed(rows, removed)


def trim_dead_letters(c: Connection, before: float, limit: int) -> Removed:
    """Removes at most `limit` dead letters of before `before`."""
    t = dead_letters.c
    found = c.execute(
        select(t.id, func.coalesce(func.length(t.body), 0)).where(t.at < before).order_by(t.id).limit(limit)
    ).all()
    if found:
        c.execute(delete(dead_letters).where(t.id.in_([row_id for row_id, _ in found])))
    return Removed(len(found), sum(size for _, size in found))


# --- reading -----------------------------------------------------------------------------------------------------


def position(c: Connection) -> int:
    return int(c.execute(select(meta.c.value).where(meta.c.key == "position")).scalar() or 0)


def counters(c: Connection) -> dict[str, Any]:
    found = c.execute(select(meta.c.value).where(meta.c.key == "counters")).scalar()
    return json.loads(found) if found else {}


def edge(c: Connection) -> EdgeTotals:
    found = c.execute(select(meta.c.value).where(meta.c.key == "edge")).scalar()
    raw = json.loads(found) if found else {"received": {}, "rejected": {}}
    log_bytes = c.execute(select(func.coalesce(func.sum(log.c.size), 0))).scalar() or 0
    body = func.coalesce(func.sum(func.length(dead_letters.c.body)), 0)
    dead, dead_bytes = c.execute(select(func.count(), body).select_from(dead_letters)).one()
    return EdgeTotals(raw["received"], raw["rejected"], int(log_bytes), int(dead), int(dead_bytes))


def oldest_unread(c: Connection, after: int) -> float | None:
    """When the first record behind `after` arrived; None when all were read."""
    found = c.execute(select(log.c.received_at).where(log.c.id > after).order_by(log.c.id).limit(1)).scalar()
    return float(found) if found is not None else None


def last_log_id(c: Connection) -> int:
    """The newest position ever given, also when its row was trimmed."""
    return max(int(c.execute(select(func.coalesce(func.max(log.c.id), 0))).scalar() or 0), position(c))


def newest_snapshots(c: Connection) -> list[tuple[int, bytes]]:
    """(position, state), newest first."""
    rows = c.execute(
        select(snapshots.c.position, snapshots.c.body).order_by(snapshots.c.position.desc())
    ).all()
    return [(int(row[0]), row[1]) for row in rows]


def first_log_id(c: Connection) -> int:
    """The oldest record that was not trimmed; 0 when the log is empty."""
    return int(c.execute(select(func.coalesce(func.min(log.c.id), 0))).scalar() or 0)


def read_log(
    c: Connection, after: int, until: int | None = None, *, limit: int = 1024, most_bytes: int = 8 << 20
) -> list[LogRow]:
    """Records behind `after`, up to `until`, in order: at least one if there is one, then until `most_bytes` are full."""
    query = select(log.c.id, log.c.kind, log.c.received_at, log.c.sender, log.c.n, log.c.body)
    query = query.where(log.c.id > after).order_by(log.c.id).limit(limit)
    if until is not None:
        query = query.where(log.c.id <= until)
    rows: list[LogRow] = []
    size = 0
    with c.execute(query) as found:
        for row in found:
            rows.append(LogRow(*row))
            size += len(rows[-1].body)
            if size >= most_bytes:
                break
    return rows


def iter_log(engine: Engine, after: int, until: int) -> Iterator[LogRow]:
    while after < until:
        with engine.connect() as c:
            rows = read_log(c, after, until)
        if not rows:
            return
        yield from rows
        after = rows[-1].id


def backlog_bytes(c: Connection, after: int) -> int:
    return int(
        c.execute(select(func.coalesce(func.sum(log.c.size), 0)).where(log.c.id > after)).scalar() or 0
    )


def list_incidents(c: Connection, limit: int = 100, after: str = "") -> list[Incident]:
    """Newest first; `after` is the id of the last one of the page before."""
    query = select(incidents.c.body).order_by(incidents.c.seq.desc()).limit(limit)
    if after:
        seq = select(incidents.c.seq).where(incidents.c.id == after).scalar_subquery()
        query = query.where(incidents.c.seq < seq)
    return [msgspec.json.decode(b, type=Incident) for (b,) in c.execute(query)]


def get_incident(c: Connection, incident_id: str) -> Incident | None:
    body = c.execute(select(incidents.c.body).where(incidents.c.id == incident_id)).scalar()
    return msgspec.json.decode(body, type=Incident) if body else None


def changes_of(c: Connection, incident_id: str) -> list[dict[str, Any]]:
    t = incident_changes.c
    rows = c.execute(select(t.at, t.old, t.new, t.reason).where(t.incident == incident_id).order_by(t.seq))
    return [{"at": at, "from": old, "to": new, "reason": reason} for at, old, new, reason in rows]


def incident_counts(c: Connection) -> dict[str, int]:
    found = {state.value: 0 for state in State}
    found.update(
        (row[0], row[1])
        for row in c.execute(select(incidents.c.state, func.count()).group_by(incidents.c.state))
    )
    return found


def live_directives(c: Connection) -> list[Directive]:
    query = select(directives.c.body).where(directives.c.ended_at.is_(None)).order_by(directives.c.id)
    return [msgspec.json.decode(b, type=Directive) for (b,) in c.execute(query)]


def list_ledger(c: Connection, incident: str = "", limit: int = 1000) -> list[dict[str, Any]]:
    query = select(
        ledger.c.seq,
        ledger.c.key,
        ledger.c.at,
        ledger.c.kind,
        ledger.c.incident,
        ledger.c.runbook,
        ledger.c.body,
    )
    if incident:
        query = query.where(ledger.c.incident == incident)
    rows = c.execute(query.order_by(ledger.c.seq).limit(limit))
    names = ("seq", "key", "at", "kind", "incident", "runbook")
    return [dict(zip(names, r[:6], strict=True)) | {"body": json.loads(r[6])} for r in rows]


def verify_ledger(c: Connection) -> int | None:
    """None when every hash holds, else the first broken `seq`."""
    previous = b""
    t = ledger.c
    query = select(t.seq, t.key, t.at, t.kind, t.incident, t.runbook, t.body, t.hash)
    for seq, *columns, body, found in c.execute(query.order_by(t.seq)):
        # Who changes a line by hand may leave text where bytes were.
        if ledger_hash(previous, columns, body if isinstance(body, bytes) else str(body).encode()) != found:
            return int(seq)
        previous = found
    return None


def list_dead_letters(c: Connection, limit: int = 100) -> list[dict[str, Any]]:
    t = dead_letters.c
    rows = c.execute(
        select(t.id, t.at, t.sender, t.format, t.reason, t.detail, t.size, t.body)
        .order_by(t.id.desc())
        .limit(limit)
    )
    names = ("id", "at", "sender", "format", "reason", "detail", "size", "body")
    return [dict(zip(names, r, strict=True)) for r in rows]


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
