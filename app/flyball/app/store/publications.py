"""What is to be published on Kafka: stored with what it tells of, removed once the brokers have it."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, delete, func, insert, select

from flyball.app.store.rows import Publication
from flyball.app.store.tables import publications


def put(c: Connection, found: Sequence[Publication], owner: int) -> None:
    """Behind what waits already.

    Args:
        owner: epoch of the Flyball that writes.
    """
    if found:
        rows = [{"topic": p.topic, "key": p.key, "id": p.id, "owner": owner, "body": p.body} for p in found]
        c.execute(insert(publications), rows)


def waiting(c: Connection, limit: int) -> list[tuple[int, Publication, int]]:
    """(place in the order, publication, owner), oldest first."""
    t = publications.c
    rows = c.execute(select(t.seq, t.topic, t.key, t.id, t.body, t.owner).order_by(t.seq).limit(limit))
    return [(seq, Publication(topic, key, name, body), owner) for seq, topic, key, name, body, owner in rows]


def remove(c: Connection, until: int) -> None:
    """The brokers have everything up to this place."""
    c.execute(delete(publications).where(publications.c.seq <= until))


def count(c: Connection) -> int:
    return int(c.execute(select(func.count()).select_from(publications)).scalar() or 0)
