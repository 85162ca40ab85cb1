"""One seam for the two databases: a file of SQLite in a folder of its own, or PostgreSQL at an address."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Protocol

from sqlalchemy import Connection, Engine

from flyball.app.store.sqlite import SqliteDatabase, open_reader

if TYPE_CHECKING:
    from flyball.app.store.postgres import PostgresDatabase


class Database(Protocol):
    """A database that this process owns until `close`, or until somebody else takes it."""

    name: str
    """For people: the file, or the address without its password."""
    reader: Engine
    """Connections that cannot write."""
    epoch: int
    """Grows with each owner; stands in every line of the ledger and every directive."""
    ping_s: float | None
    """The writer lets the database hear from it at least this often, by an empty transaction; None when it need not."""

    def connect(self) -> Connection:
        """The one connection that writes."""
        ...

    def transaction(self, connection: Connection) -> AbstractContextManager[None]:
        """Stores all that is written in the block, or nothing. Raises: Fenced, DatabaseLost."""
        ...

    def close(self) -> None: ...


def open_database(where: Path | str, synchronous: str = "full") -> Database:
    """Takes the database for this process: a file (Path) or an address (`postgresql://…`).

    Raises: InUse when another Flyball owns it; NeedsUpgrade; DatabaseLost when there is no answer; ConfigError.
    """
    if isinstance(where, Path):
        return SqliteDatabase(where, synchronous)
    from flyball.app.store.postgres import PostgresDatabase

    return PostgresDatabase(where, synchronous)


def wait_for_ownership(url: str, stopped: Event, synchronous: str = "full") -> PostgresDatabase | None:
    """As `open_database`, for a standby: blocks until the database is this process's own; None once `stopped` is set.

    An owner that dies leaves it within a second; one that hangs is cut off by the server after `SILENT_S`.

    Raises: NeedsUpgrade, ConfigError; DatabaseLost when the first attempt finds nobody.
    """
    from flyball.app.store.postgres import stand_by

    return stand_by(url, stopped, synchronous)


@contextmanager
def reading(where: Path | str) -> Iterator[Connection]:
    """A connection that cannot write, beside whoever owns the database. Raises: ConfigError, NeedsUpgrade, DatabaseLost."""
    if isinstance(where, Path):
        engine = open_reader(where)
        try:
            with engine.connect() as c:
                yield c
        finally:
            engine.dispose()
        return
    from flyball.app.store.postgres import reading_postgres

    with reading_postgres(where) as c:
        yield c
