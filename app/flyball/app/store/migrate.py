"""Brings a database to this version's schema, step by step, by Alembic.

PostgreSQL gets its tables this way. SQLite makes its own, and needs this only when a newer Flyball opens an older file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, create_engine, event, inspect
from sqlalchemy.exc import DatabaseError, ProgrammingError
from sqlalchemy.pool import NullPool

from flyball.app.store import owner
from flyball.app.store.lock import FolderLock
from flyball.app.store.owner import InUse
from flyball.app.store.sqlite import OLDEST_SCHEMA, SCHEMA_VERSION, schema_of
from flyball.core.errors import ConfigError

_WAIT_S = 10.0


def current(where: Path | str) -> str:
    """The schema that a database has; empty when it has no tables of Flyball. Raises: ConfigError, DatabaseLost."""
    with _connected(where) as c:
        return schema_of(c)


def upgrade(where: Path | str) -> tuple[str, str]:
    """Its schema before and after. All or nothing; nobody else may use the database meanwhile.

    Raises: InUse; ConfigError when there is no way from its schema to this one, or no right to change it; DatabaseLost.
    """
    with _connected(where) as c:
        before = schema_of(c)
    if before == SCHEMA_VERSION:
        return before, before
    if before and not int(OLDEST_SCHEMA) <= int(before) < int(SCHEMA_VERSION):
        raise ConfigError(
            f"is of schema {before}; this Flyball knows {OLDEST_SCHEMA} to {SCHEMA_VERSION}; install the version that made it",
            where=str(where) if isinstance(where, Path) else "database",
        )
    with _connected(where, alone=True) as c:
        _run(c)
        return before, schema_of(c)


def _run(c: Connection) -> None:
    try:
        from alembic import command
        from alembic.config import Config
    except ImportError as e:
        raise ConfigError(
            "migrating needs Alembic, which is not installed; pip install 'flyball[postgres]'",
            where="database",
        ) from e
    # One line for each step is ours to say, not the library's.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = c
    if (found := schema_of(c)) and not inspect(c).has_table("alembic_version"):
        command.stamp(config, found)  # an SQLite file that Flyball itself made
    command.upgrade(config, "head")


@contextmanager
def _connected(where: Path | str, *, alone: bool = False) -> Iterator[Connection]:
    """A connection within one transaction; with `alone`, one that may write, and nobody else is the database's owner."""
    if isinstance(where, Path):
        with _sqlite(where, alone) as c:
            yield c
        return
    from flyball.app.store import postgres

    url = postgres.address(where)
    name = postgres.shown(url)
    engine = postgres.engine_of(url, settings={})
    try:
        with postgres.told_plainly(name, postgres.ASK), engine.connect() as c:
            if alone and not postgres.try_lock(c, _WAIT_S):
                with c.begin():
                    _, who = owner.current(c) if inspect(c).has_table("owner") else (0, "")
                raise InUse(
                    f"is in use by the Flyball {who or 'that migrates it'}; stop it first", where=name
                )
            with c.begin():
                yield c
    except ProgrammingError as e:
        raise ConfigError(f"cannot be changed ({postgres.reason(e)})", where=name) from e
    finally:
        engine.dispose()


@contextmanager
def _sqlite(path: Path, alone: bool) -> Iterator[Connection]:
    if not path.exists():
        raise ConfigError(
            "holds no Flyball database; `flyball run` makes one by itself", where=str(path.parent)
        )
    lock = FolderLock(path.parent) if alone else None
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def _connect(connection: object, _record: object) -> None:
        connection.isolation_level = None  # type: ignore[attr-defined] # so that tables change within the transaction

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if alone else "BEGIN")

    try:
        with engine.begin() as c:
            yield c
    except DatabaseError as e:
        raise ConfigError(f"cannot be used as a database ({e.orig})", where=str(path)) from e
    finally:
        engine.dispose()
        if lock is not None:
            lock.release()
