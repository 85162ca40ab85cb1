"""SQLite: one writer connection, which alone checkpoints; readers may only query.

Python often ships an SQLite between 3.7.0 and 3.51.2, which can corrupt a WAL database when two connections write or
checkpoint at once. With a single writer it cannot happen; `flyball doctor` still says so.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event, inspect, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool, QueuePool

from flyball.app.store.dialects import upsert
from flyball.app.store.lock import FolderLock
from flyball.app.store.owner import NeedsUpgrade, holder, take_over
from flyball.app.store.tables import meta, metadata
from flyball.core.errors import ConfigError

SCHEMA_VERSION: Final = "4"
OLDEST_SCHEMA: Final = "2"
"""From here on a database can be migrated."""
WAL_RESET_FAULT_FIXED: Final = (3, 51, 3)


def has_wal_reset_fault(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> bool:
    return (3, 7, 0) <= version < WAL_RESET_FAULT_FIXED


def open_writer(path: Path, synchronous: str = "full") -> Engine:
    """The engine of the one writer. Makes the file and its tables; refuses a file of another schema.

    Raises: ConfigError when the folder cannot be written or the file is not a Flyball database of this schema.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(
            f"folder cannot be made ({e.strerror}); set `data` to one that can", where=str(path.parent)
        ) from e
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool, connect_args={"check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not guessed by the driver
        for pragma in (
            # Bodies are tens of kilobytes: a commit of large pages costs a third less than one of small ones, and a new file takes it.
            "page_size=16384",
            "journal_mode=WAL",
            f"synchronous={synchronous}",
            "busy_timeout=10000",
            # 1.6 MB: a checkpoint is part of a commit, and answers wait for commits. One of 16 MB stops them for 50 ms, and is not cheaper on the whole.
            "wal_autocheckpoint=100",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    try:
        with engine.begin() as connection:
            _refuse_others(connection, path)
            metadata.create_all(connection)
            values = {"key": "schema", "value": SCHEMA_VERSION}
            connection.execute(upsert(connection, meta).values(values).on_conflict_do_nothing())
    except DatabaseError as e:
        raise ConfigError(
            f"cannot be used as a database ({e.orig}); move it away or set another `data`", where=str(path)
        ) from e
    return engine


def schema_of(c: Connection) -> str:
    """The schema's version; empty when there are no tables of Flyball yet. Of any database."""
    if not inspect(c).has_table(meta.name):
        return ""
    return str(c.execute(select(meta.c.value).where(meta.c.key == "schema")).scalar() or "")


def _refuse_others(connection: Connection, path: Path) -> None:
    """Before anything is written: a database of another schema stays as it is."""
    found = schema_of(connection)
    if found in ("", SCHEMA_VERSION):
        return
    if found.isdecimal() and int(OLDEST_SCHEMA) <= int(found) < int(SCHEMA_VERSION):
        raise NeedsUpgrade(
            f"is of schema {found}, this Flyball needs {SCHEMA_VERSION}; make a copy, then say "
            f"`flyball database upgrade --data {path.parent}`",
            where=str(path),
        )
    raise ConfigError(
        f"is of schema {found}, this Flyball needs {SCHEMA_VERSION} and knows no way from there; "
        "set another `data` folder, or use the version that made it",
        where=str(path),
    )


def open_reader(path: Path) -> Engine:
    """An engine whose connections cannot write, for the API and the command line; also beside a running Flyball."""
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=QueuePool,
        pool_size=4,
        max_overflow=4,
        connect_args={"check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA busy_timeout=5000")
        connection.execute("PRAGMA query_only=ON")

    return engine


class SqliteDatabase:
    """One file in a folder that is locked for this process.

    Raises: ConfigError when the folder cannot be written, is in use, or holds another schema.
    """

    ping_s: float | None = None

    def __init__(self, path: Path, synchronous: str = "full") -> None:
        self.name = str(path)
        self._lock = FolderLock(path.parent)
        try:
            self._engine = open_writer(path, synchronous)
        except ConfigError:
            self._lock.release()
            raise
        self.reader = open_reader(path)
        with self._engine.begin() as c:
            self.epoch = take_over(c, holder())

    def connect(self) -> Connection:
        return self._engine.connect()

    @contextmanager
    def transaction(self, connection: Connection) -> Iterator[None]:
        # Nobody else can have taken the folder: the kernel holds the lock until this process ends.
        with connection.begin():
            yield

    def close(self) -> None:
        self.reader.dispose()
        self._engine.dispose()
        self._lock.release()
