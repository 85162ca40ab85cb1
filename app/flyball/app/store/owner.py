"""Who owns a database: one Flyball at a time. Its epoch grows at each take-over, and whoever has an older one stores nothing more."""

from __future__ import annotations

import os
import socket

from sqlalchemy import Connection, select

from flyball.app.store.dialects import upsert
from flyball.app.store.tables import owner
from flyball.core.errors import ConfigError, FlyballError

_ROW = 1


class NeedsUpgrade(ConfigError):
    """The database is of an older schema, or has none yet; `flyball database upgrade` mends that."""

    exit_code = 1


class InUse(ConfigError):
    """Another Flyball owns the database."""


class Fenced(FlyballError):
    """Another Flyball has taken the database since: nothing was stored, and this process must end."""


class DatabaseLost(FlyballError):
    """The database does not answer, or has ended the session. What was not acknowledged may or may not be stored."""

    exit_code = 3


def holder() -> str:
    """This process, for people."""
    return f"{socket.gethostname()}:{os.getpid()}"


def take_over(c: Connection, who: str) -> int:
    """The new owner's epoch, greater than any before. The caller holds the lock that makes it the only one."""
    found = {"epoch": owner.c.epoch + 1, "holder": who}
    first = upsert(c, owner).values(id=_ROW, epoch=1, holder=who)
    c.execute(first.on_conflict_do_update(index_elements=["id"], set_=found))
    return int(c.execute(select(owner.c.epoch)).scalar_one())


def check(c: Connection, epoch: int) -> None:
    """Holds the owner's row until the transaction ends, so that nobody takes over in between. Raises: Fenced."""
    newest, who = c.execute(select(owner.c.epoch, owner.c.holder).with_for_update(read=True)).one()
    if newest != epoch:
        raise Fenced(
            f"{who} has taken over (epoch {newest}, this process had {epoch}); nothing more is stored here"
        )


def current(c: Connection) -> tuple[int, str]:
    """The newest owner's epoch and who it is; (0, "") before the first."""
    found = c.execute(select(owner.c.epoch, owner.c.holder)).first()
    return (int(found[0]), str(found[1])) if found is not None else (0, "")
