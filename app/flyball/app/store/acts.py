"""What people stopped, what enforcement points may see of the leases, and which records of the log are left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
from sqlalchemy import Connection, delete, func, insert, select, update

from flyball.app.store.dialects import upsert
from flyball.app.store.rows import Skipped
from flyball.app.store.tables import directives, skipped, stops
from flyball.core.directives import Directive, DirectiveChange, StopChange
from flyball.core.stops import Stops

# --- stops -----------------------------------------------------------------------------------------------------------


def put_stops(c: Connection, now: Stops) -> None:
    """What is stopped from now on, in place of what was."""
    c.execute(delete(stops))
    rows = [{"scope": scope, "body": msgspec.json.encode(s)} for scope, s in sorted(now.live.items())]
    if rows:
        c.execute(insert(stops), rows)


def live_stops(c: Connection) -> Stops:
    rows = c.execute(select(stops.c.body).order_by(stops.c.scope))
    found = [msgspec.json.decode(body, type=StopChange) for (body,) in rows]
    return Stops({s.scope: s for s in found})


# --- leases ----------------------------------------------------------------------------------------------------------


def put_directive(c: Connection, moved: DirectiveChange, shown: Directive | None, owner: int = 0) -> None:
    """Args:
    shown: what enforcement points see of it now; None when nothing.
    owner: epoch of the Flyball that writes.
    """
    d = moved.directive
    values = {
        "id": d.id, "epoch": d.epoch, "expires_at": d.expires_at, "change": moved.change, "reason": moved.reason,
        "ended_at": moved.at if moved.change in ("released", "expired") else None, "body": msgspec.json.encode(d),
        "shown": None if shown is None else msgspec.json.encode(shown), "owner": owner,
    }  # fmt: skip
    c.execute(upsert(c, directives).values(values).on_conflict_do_update(index_elements=["id"], set_=values))


def live_directives(c: Connection) -> list[Directive]:
    query = select(directives.c.body).where(directives.c.ended_at.is_(None)).order_by(directives.c.id)
    return [msgspec.json.decode(b, type=Directive) for (b,) in c.execute(query)]


def shown_directives(c: Connection) -> dict[str, Directive]:
    """By id: what enforcement points see of the live ones."""
    t = directives.c
    query = select(t.shown).where(t.ended_at.is_(None), t.shown.is_not(None)).order_by(t.id)
    found = (msgspec.json.decode(b, type=Directive) for (b,) in c.execute(query))
    return {d.id: d for d in found}


def show_directives(c: Connection, shown: Mapping[str, Directive]) -> None:
    """What enforcement points see of all live ones from now on: somebody took back a stop."""
    c.execute(update(directives).where(directives.c.ended_at.is_(None)).values(shown=None))
    for d in shown.values():
        c.execute(update(directives).where(directives.c.id == d.id).values(shown=msgspec.json.encode(d)))


# --- records that are left out ---------------------------------------------------------------------------------------


def put_skipped(c: Connection, records: Iterable[Skipped]) -> None:
    for r in records:
        row = {"position": r.position, "at": r.at, "kind": r.kind, "reason": r.reason}
        c.execute(upsert(c, skipped).values(row).on_conflict_do_nothing())


def skipped_positions(c: Connection) -> set[int]:
    return {p for (p,) in c.execute(select(skipped.c.position))}


def skipped_count(c: Connection) -> int:
    return int(c.execute(select(func.count()).select_from(skipped)).scalar() or 0)


def newest_skipped(c: Connection) -> str:
    """Why the last record that was left out was; empty when none was."""
    found = c.execute(select(skipped.c.reason).order_by(skipped.c.position.desc()).limit(1)).scalar()
    return str(found or "")
