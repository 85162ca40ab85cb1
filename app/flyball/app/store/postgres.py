"""PostgreSQL: the same tables and statements, and one active owner among many processes.

The owner holds an advisory lock in the very session that writes. The server ends a session whose process died, whose host is gone,
or which says nothing for `SILENT_S`, and the lock with it; an open transaction is then rolled back. So nobody can take over while the
one before could still commit. The epoch says the same a second time, in every transaction, for where the first does not hold: a pooler
between the two that gives sessions away.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from threading import Event
from typing import Any, Final

import structlog
from sqlalchemy import URL, Connection, Engine, create_engine, event, func, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.pool import NullPool, QueuePool

from flyball.app.store import owner
from flyball.app.store.owner import DatabaseLost, InUse, NeedsUpgrade
from flyball.app.store.sqlite import SCHEMA_VERSION, schema_of
from flyball.core.errors import ConfigError

_log = structlog.get_logger(__name__)

SILENT_S: Final = 10.0
"""After so long without a word the server ends the owner's session: its process hangs, or its host is cut off."""
_PATIENCE_S: Final = 3.0
"""How long an owner that was just killed may take to be gone."""
_TRY_S: Final = 0.1
_STANDBY_S: Final = 60.0
"""A standby asks again in the same session for so long, then in a new one, so that it would notice another schema."""
_OLDEST: Final = 140_000
"""PostgreSQL 14: the first that ends silent sessions by itself."""
_LOCK: Final = int.from_bytes(blake2b(b"flyball owner", digest_size=4).digest(), "big", signed=True)
_KEEPALIVE: Final = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "application_name": "flyball",
}


def address(url: str) -> URL:
    """The address, with the driver we use. Raises: ConfigError when it is none, or the driver is missing."""
    try:
        found = make_url(url)
    except (ArgumentError, ValueError) as e:
        raise ConfigError(f"cannot be read; {_LIKE}", where="database") from e
    if found.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise ConfigError(f"{found.drivername}: is no database Flyball knows; {_LIKE}", where="database")
    try:
        import psycopg  # noqa: F401 - asked for here, so that one message says what is missing
    except ImportError as e:
        raise ConfigError(
            "PostgreSQL needs a driver that is not installed; pip install 'flyball[postgres]'",
            where="database",
        ) from e
    return found.set(drivername="postgresql+psycopg")


ASK: Final = "; is it running, and are address, user and password right?"
_LIKE: Final = "write for example postgresql://flyball:PASSWORD@db.example.com:5432/flyball"


def shown(url: URL) -> str:
    """For people, without the password."""
    return url.set(drivername="postgresql").render_as_string(hide_password=True)


@contextmanager
def told_plainly(name: str, hint: str = "; a restart goes on from what is stored") -> Iterator[None]:
    """Raises: DatabaseLost in place of the driver's error about a connection."""
    try:
        yield
    except (OperationalError, InterfaceError) as e:
        raise DatabaseLost(f"{name}: {reason(e)}{hint}") from e


def reason(e: DBAPIError) -> str:
    """What the server or the driver said, in one line."""
    lines = [line.strip() for line in str(e.orig).splitlines() if line.strip()]
    return lines[0] if lines else type(e.orig).__name__


def engine_of(url: URL, *, settings: dict[str, str], pooled: bool = False) -> Engine:
    """`settings` of the server hold for each of its sessions."""
    pool: dict[str, Any] = {"poolclass": NullPool}
    if pooled:
        # Nothing that a reader asks needs more than one statement's view, and so no transaction.
        pool = {"poolclass": QueuePool, "pool_size": 4, "max_overflow": 4, "isolation_level": "AUTOCOMMIT"}
    engine = create_engine(url, connect_args=dict(_KEEPALIVE), **pool)

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        before, connection.autocommit = connection.autocommit, True
        for name, value in settings.items():
            connection.execute("select set_config(%s, %s, false)", (name, value))
        connection.autocommit = before

    return engine


def open_postgres_reader(where: str) -> Engine:
    return engine_of(address(where), settings={"default_transaction_read_only": "on"}, pooled=True)


@contextmanager
def reading_postgres(where: str) -> Iterator[Connection]:
    """A connection that cannot write. Raises: ConfigError, NeedsUpgrade, DatabaseLost."""
    url = address(where)
    engine = open_postgres_reader(where)
    try:
        with told_plainly(shown(url), ASK), engine.connect() as c:
            _require_schema(c, shown(url))
            yield c
    finally:
        engine.dispose()


def try_lock(c: Connection, patience_s: float, stopped: Event | None = None) -> bool:
    """Whether this session is the owner's now. It is until it ends."""
    # The schema is part of the key: two Flyballs may share a database, each in a schema of its own.
    key = func.hashtext(func.coalesce(func.current_schema(), ""))
    stopped = stopped or Event()
    end = time.monotonic() + patience_s
    while True:
        with c.begin():
            if c.execute(select(func.pg_try_advisory_lock(_LOCK, key))).scalar():
                return True
        if stopped.wait(_TRY_S) or time.monotonic() >= end:
            return False


def _require_schema(c: Connection, name: str) -> None:
    found = schema_of(c)
    if found == SCHEMA_VERSION:
        return
    if not found or int(found) < int(SCHEMA_VERSION):
        what = f"is of schema {found}" if found else "has no tables of Flyball yet"
        raise NeedsUpgrade(
            f"{what}, this Flyball needs schema {SCHEMA_VERSION}; say `flyball database upgrade --database URL` once",
            where=name,
        )
    raise ConfigError(
        f"is of schema {found}, this Flyball knows only up to {SCHEMA_VERSION}; install the version that made it",
        where=name,
    )


class PostgresDatabase:
    """A database on a server, owned by this process until it closes, dies or falls silent.

    Raises: InUse, NeedsUpgrade, DatabaseLost, ConfigError.
    """

    def __init__(
        self,
        where: str,
        synchronous: str = "full",
        *,
        silent_s: float = SILENT_S,
        patience_s: float = _PATIENCE_S,
        stopped: Event | None = None,
    ) -> None:
        url = address(where)
        self.name = shown(url)
        self.ping_s: float | None = silent_s / 4
        self._silent_s = silent_s
        settings = {
            "tcp_keepalives_idle": "3",
            "tcp_keepalives_interval": "2",
            "tcp_keepalives_count": "3",
        }
        if synchronous == "normal":
            settings["synchronous_commit"] = "off"
        self._engine = engine_of(url, settings=settings)
        with told_plainly(self.name, ASK):
            self._session = self._engine.connect()
        try:
            with told_plainly(self.name):
                self._own(synchronous, patience_s, stopped)
        except BaseException:
            self._session.close()
            raise
        self.reader = open_postgres_reader(where)
        _log.info("database.owned", database=self.name, epoch=self.epoch)

    def _own(self, synchronous: str, patience_s: float, stopped: Event | None) -> None:
        c = self._session
        with c.begin():
            version = int(c.execute(text("show server_version_num")).scalar_one())
            if version < _OLDEST:
                raise ConfigError(
                    f"is PostgreSQL {version // 10_000}; Flyball needs 14 or newer", where=self.name
                )
            _require_schema(c, self.name)
            if synchronous == "full":
                off = select(func.set_config("synchronous_commit", "on", False))
                c.execute(off.where(func.current_setting("synchronous_commit") == "off"))
        if not try_lock(c, patience_s, stopped):
            with c.begin():
                epoch, who = owner.current(c)
            raise InUse(
                f"is in use by the Flyball {who} (epoch {epoch}); stop that one, or set another `database`",
                where=self.name,
            )
        with c.begin():
            self.epoch = owner.take_over(c, owner.holder())

    def connect(self) -> Connection:
        with told_plainly(self.name), self._session.begin():
            # From now on the writer says something every `ping_s`.
            for name in ("idle_session_timeout", "idle_in_transaction_session_timeout"):
                self._session.execute(select(func.set_config(name, f"{self._silent_s * 1000:.0f}", False)))
        return self._session

    @contextmanager
    def transaction(self, connection: Connection) -> Iterator[None]:
        with told_plainly(self.name), connection.begin():
            owner.check(connection, self.epoch)
            yield

    def close(self) -> None:
        self.reader.dispose()
        self._session.close()  # the session ends, and the lock with it
        self._engine.dispose()


def stand_by(where: str, stopped: Event, synchronous: str = "full") -> PostgresDatabase | None:
    """Tries until it owns the database; None once `stopped` is set. See `database.wait_for_ownership`."""
    seen, told = False, ""
    while not stopped.is_set():
        try:
            return PostgresDatabase(where, synchronous, patience_s=_STANDBY_S, stopped=stopped)
        except InUse as e:
            seen, why = True, str(e)
        except DatabaseLost as e:
            if not seen:
                raise
            why = str(e)
            stopped.wait(1.0)
        if why != told:
            _log.info("database.waiting", why=why)
            told = why
    return None
