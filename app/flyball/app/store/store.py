"""What is written in one transaction, and what can be asked. The statements are SQLAlchemy Core; no row leaves this module."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, delete, func, insert, select

from flyball.app.store import publications
from flyball.app.store.acts import put_directive, put_skipped
from flyball.app.store.dialects import upsert
from flyball.app.store.ledger import put_entry
from flyball.app.store.operations import put_operation
from flyball.app.store.outbox import put_outbox
from flyball.app.store.rows import Commit, DeadLetter, EdgeTotals, LogRow, Removed
from flyball.app.store.tables import dead_letters, incident_changes, incidents, log, meta, offsets, snapshots
from flyball.core.directives import Directive, DirectiveChange
from flyball.core.incident import Incident, IncidentChange, State

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


def apply_commit(
    c: Connection,
    commit: Commit,
    shown: Sequence[tuple[DirectiveChange, Directive | None]] = (),
    owner: int = 0,
) -> None:
    """Everything of `commit`, inside the caller's transaction.

    Args:
        shown: the commit's directives, each with what enforcement points see of it.
        owner: epoch of the Flyball that writes; stands in every line of the ledger and every directive.
    """
    for change in commit.changes:
        _put_incident(c, change)
    for entry in commit.entries:
        put_entry(c, entry, owner)
    for moved, visible in shown:
        put_directive(c, moved, visible, owner)
    for row in commit.outbox:
        put_outbox(c, row)
    for operation in commit.operations:
        put_operation(c, operation)
    publications.put(c, commit.publications, owner)
    put_skipped(c, commit.skipped)
    if commit.snapshot is not None:
        c.execute(
            upsert(c, snapshots)
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
        upsert(c, incidents)
        .values(seq=seq, **values)
        .on_conflict_do_update(index_elements=["id"], set_=values)
    )
    if change.old != change.new:
        c.execute(
            insert(incident_changes).values(
                seq=select(func.coalesce(func.max(incident_changes.c.seq), 0) + 1).scalar_subquery(),
                incident=i.id,
                at=change.at,
                old=change.old,
                new=change.new,
                reason=change.reason,
                revision=i.revision,
            )
        )


def put_meta(c: Connection, key: str, value: str) -> None:
    c.execute(
        upsert(c, meta)
        .values(key=key, value=value)
        .on_conflict_do_update(index_elements=["key"], set_={"value": value})
    )


def put_offsets(c: Connection, consumed: Mapping[tuple[str, int], int]) -> None:
    """How far sources were read: (source, partition) → the offset that comes next. Stored with what was read, or not at all."""
    for (source, partition), next_offset in consumed.items():
        found = {"next_offset": next_offset}
        row = {"source": source, "partition": partition} | found
        key = ["source", "partition"]
        c.execute(upsert(c, offsets).values(row).on_conflict_do_update(index_elements=key, set_=found))


def get_offsets(c: Connection, source: str | None = None) -> dict[tuple[str, int], int]:
    """(source, partition) → the offset that comes next; of one source or of all."""
    t = offsets.c
    query = select(t.source, t.partition, t.next_offset).order_by(t.source, t.partition)
    if source is not None:
        query = query.where(t.source == source)
    return {(name, partition): next_offset for name, partition, next_offset in c.execute(query)}


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
    sizes = select(log.c.id, log.c.size).where(log.c.id > after).order_by(log.c.id).limit(limit)
    if until is not None:
        sizes = sizes.where(log.c.id <= until)
    # Sizes first: PostgreSQL's driver takes a whole answer into memory, and one record may be megabytes.
    last = full = 0
    for row_id, size in c.execute(sizes).all():
        last, full = row_id, full + size
        if full >= most_bytes:
            break
    query = select(log.c.id, log.c.kind, log.c.received_at, log.c.sender, log.c.n, log.c.body)
    rows = c.execute(query.where(log.c.id > after, log.c.id <= last).order_by(log.c.id))
    return [LogRow(*row) for row in rows]


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
    return [_incident_of(b) for (b,) in c.execute(query)]


def get_incident(c: Connection, incident_id: str) -> Incident | None:
    body = c.execute(select(incidents.c.body).where(incidents.c.id == incident_id)).scalar()
    return _incident_of(body) if body else None


def _incident_of(body: bytes) -> Incident:
    """An incident as stored. JSON has no NaN: such a figure was stored as null by earlier versions, and is left out here."""
    try:
        return msgspec.json.decode(body, type=Incident)
    except msgspec.ValidationError:
        return msgspec.convert(_without_nulls(json.loads(body)), Incident)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [0.0 if v is None else _without_nulls(v) for v in value]
    return value


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


def list_dead_letters(c: Connection, limit: int = 100) -> list[dict[str, Any]]:
    t = dead_letters.c
    rows = c.execute(
        select(t.id, t.at, t.sender, t.format, t.reason, t.detail, t.size, t.body)
        .order_by(t.id.desc())
        .limit(limit)
    )
    names = ("id", "at", "sender", "format", "reason", "detail", "size", "body")
    return [dict(zip(names, r, strict=True)) for r in rows]
