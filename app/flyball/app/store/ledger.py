"""The ledger: the durable record of every decision and action, each line sealed by its hash over all before it."""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, select

from flyball.app.store.dialects import upsert
from flyball.app.store.tables import ledger, meta
from flyball.core.directives import LedgerEntry

_HEAD: Final = "ledger_head"
"""Key in `meta` of the newest line's hash: without it, lines removed at the end would not be missed."""


def put_entry(c: Connection, entry: LedgerEntry, owner: int = 0) -> None:
    """An entry is written once; the same key again changes nothing.

    Args:
        owner: epoch of the Flyball that writes. Not sealed: the same decisions have the same seals, whoever was there to write them.
    """
    newest = c.execute(select(ledger.c.seq, ledger.c.hash).order_by(ledger.c.seq.desc()).limit(1)).first()
    last, previous = newest or (0, b"")
    body = msgspec.json.encode(entry.body, order="sorted")
    values = {k: getattr(entry, k) for k in ("key", "at", "kind", "incident", "runbook")}
    sealed = ledger_hash(previous, list(values.values()), body)
    line = {"seq": last + 1, **values, "body": body, "hash": sealed, "owner": owner}
    if c.execute(upsert(c, ledger).values(line).on_conflict_do_nothing(index_elements=["key"])).rowcount:
        head = {"value": sealed.hex()}
        c.execute(
            upsert(c, meta).values(key=_HEAD, **head).on_conflict_do_update(index_elements=["key"], set_=head)
        )


def ledger_hash(previous: bytes, columns: list[Any], body: bytes) -> bytes:
    """Each line seals all before it: changing or removing one breaks every later hash. `columns`: all but sequence, body and hash."""
    sealed = msgspec.json.encode(columns)
    return blake2b(previous + sealed + b"\0" + body, digest_size=32).digest()


_COLUMNS: Final = (
    ledger.c.seq,
    ledger.c.key,
    ledger.c.at,
    ledger.c.kind,
    ledger.c.incident,
    ledger.c.runbook,
    ledger.c.owner,
)


def list_ledger(
    c: Connection,
    incident: str = "",
    limit: int = 1000,
    *,
    runbook: str = "",
    kind: str = "",
    after: int = 0,
    newest: bool = False,
) -> list[dict[str, Any]]:
    """Lines in the order in which they were written, behind line `after`; with `newest` the last ones instead of the first."""
    query = select(*_COLUMNS, ledger.c.body).where(ledger.c.seq > after)
    for column, wanted in ((ledger.c.incident, incident), (ledger.c.runbook, runbook), (ledger.c.kind, kind)):
        if wanted:
            query = query.where(column == wanted)
    order = ledger.c.seq.desc() if newest else ledger.c.seq
    found = [_line(r) for r in c.execute(query.order_by(order).limit(limit))]
    return found[::-1] if newest else found


def get_entry(c: Connection, key: str) -> dict[str, Any] | None:
    """One line by its key or its number, with its hash."""
    by = ledger.c.seq == int(key) if key.isdecimal() and len(key) < 19 else ledger.c.key == key
    row = c.execute(select(*_COLUMNS, ledger.c.body, ledger.c.hash).where(by)).first()
    return _line(row) | {"hash": row[8].hex()} if row is not None else None


def _line(row: Any) -> dict[str, Any]:
    names = ("seq", "key", "at", "kind", "incident", "runbook", "owner")
    return dict(zip(names, row[:7], strict=True)) | {"body": json.loads(row[7])}


def verify_ledger(c: Connection) -> int | None:
    """None when every hash holds and the end is there, else the first broken `seq`."""
    previous, last = b"", 0
    t = ledger.c
    query = select(t.seq, t.key, t.at, t.kind, t.incident, t.runbook, t.body, t.hash)
    for seq, *columns, body, found in c.execute(query.order_by(t.seq)):
        # Who changes a line by hand may leave text where bytes were.
        if ledger_hash(previous, columns, body if isinstance(body, bytes) else str(body).encode()) != found:
            return int(seq)
        previous, last = found, seq
    head = c.execute(select(meta.c.value).where(meta.c.key == _HEAD)).scalar()
    return last + 1 if head is not None and head != previous.hex() else None
