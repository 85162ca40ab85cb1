"""One owner of a PostgreSQL at a time: a standby takes over, and who was fenced off stores nothing."""

from __future__ import annotations

import os
import threading

import psycopg
import pytest
from sqlalchemy import func, select

from flyball.app.embedded import Embedded, Stopped
from flyball.app.store import migrate, store
from flyball.app.store.database import open_database, reading, wait_for_ownership
from flyball.app.store.owner import DatabaseLost, Fenced, InUse
from flyball.app.store.postgres import PostgresDatabase
from flyball.core.errors import ConfigError
from tests.app._runtime import NOW, SetClock, calls, make_pipeline, started, take
from tests.processes import eventually
from tests.servers.postgres import Postgres


def log_ids(url: str) -> list[int]:
    with reading(url) as c:
        return [r.id for r in store.read_log(c, 0)]


def sessions(postgres: Postgres, url: str) -> list[int]:
    """Server processes of those who write or wait to."""
    name = url.rpartition("/")[2]
    asked = (
        "select a.pid from pg_stat_activity a join pg_locks l on l.pid = a.pid and l.locktype = 'advisory' "
        f"where a.datname = '{name}'"
    )
    return [pid for (pid,) in postgres.say(asked)]


# --- one at a time ---------------------------------------------------------------------------------------------------


def test_a_second_flyball_is_refused_and_told_who_has_the_database(postgres: Postgres) -> None:
    url = postgres.migrated()
    with started(url) as runtime:
        with pytest.raises(
            InUse, match=rf"is in use by the Flyball \S+:{os.getpid()} \(epoch 1\); stop that one"
        ) as e:
            PostgresDatabase(url, patience_s=0.0)
        assert "flyball-secret" not in str(e.value)
        assert take(runtime, calls(3)) == 1
    with started(url) as after:
        assert after.database.epoch == 2


def test_a_standby_waits_until_the_owner_lets_go(postgres: Postgres) -> None:
    url = postgres.migrated()
    owned: list[PostgresDatabase | None] = []
    stopped = threading.Event()
    waiting = threading.Thread(target=lambda: owned.append(wait_for_ownership(url, stopped)))
    with started(url) as runtime:
        take(runtime, calls(3))
        waiting.start()
        take(runtime, calls(3, NOW + 1))
        assert waiting.is_alive()
    waiting.join(30)
    assert owned[0] is not None
    assert owned[0].epoch == 2
    with started(owned[0]) as runtime:
        assert take(runtime, calls(3, NOW + 2)) == 3


def test_a_standby_that_is_told_to_stop_stops(postgres: Postgres) -> None:
    url = postgres.migrated()
    stopped = threading.Event()
    owned: list[PostgresDatabase | None] = []
    with started(url):
        waiting = threading.Thread(target=lambda: owned.append(wait_for_ownership(url, stopped)))
        waiting.start()
        stopped.set()
        waiting.join(30)
        assert owned == [None]


def test_two_schemas_of_one_database_have_an_owner_each(postgres: Postgres) -> None:
    url = postgres.migrated()
    other = f"{url}?options=-csearch_path%3Dother"
    with psycopg.connect(url, autocommit=True) as c:
        c.execute("create schema other")
    migrate.upgrade(other)
    with started(url) as one, started(other) as two:
        assert take(one, calls(3)) == take(two, calls(3)) == 1


# --- fenced off ------------------------------------------------------------------------------------------------------


def test_who_was_fenced_off_stores_nothing_and_says_who_took_over(postgres: Postgres) -> None:
    """The lock is taken from it, as by a pooler that gives its session away: the epoch still holds."""
    url = postgres.migrated()
    with started(url) as old:
        take(old, calls(3))
        old.write(lambda c: c.execute(select(func.pg_advisory_unlock_all()))).result(30)
        with started(url) as new:
            assert new.database.epoch == old.database.epoch + 1
            with pytest.raises(Stopped, match="nothing was stored"):
                old.ingest(calls(3, NOW + 1), "s", NOW).result(30)
            assert isinstance(old.failure, Fenced)
            assert f"{os.getpid()} has taken over (epoch 2, this process had 1)" in str(old.failure)
            assert log_ids(url) == [1]
            assert take(new, calls(3, NOW + 2)) == 2


def test_nobody_takes_over_in_the_middle_of_a_transaction(postgres: Postgres) -> None:
    url = postgres.migrated()
    with started(url) as old:

        def slow(c: object) -> None:
            old_connection = c
            old_connection.execute(select(func.pg_advisory_unlock_all()))  # type: ignore[attr-defined]
            begun.set()
            assert go_on.wait(30)
            store.put_offsets(old_connection, {("x", 0): 1})  # type: ignore[arg-type]

        begun, go_on = threading.Event(), threading.Event()
        written = old.write(slow)
        assert begun.wait(30)
        owned: list[PostgresDatabase] = []
        taking = threading.Thread(target=lambda: owned.append(PostgresDatabase(url)))
        taking.start()
        name = url.rpartition("/")[2]
        blocked = (
            f"select count(*) from pg_stat_activity where datname = '{name}' and wait_event_type = 'Lock'"
        )
        assert eventually(lambda: postgres.say(blocked)[0][0] == 1)
        go_on.set()
        written.result(30)  # whole, before the other's epoch counts
        taking.join(30)
        with owned[0].reader.connect() as c:
            assert store.get_offsets(c) == {("x", 0): 1}
        owned[0].close()


def test_an_owner_whose_session_is_ended_stops_and_a_restart_goes_on(postgres: Postgres) -> None:
    url = postgres.migrated()
    clock = SetClock()
    with started(url, clock) as runtime:
        take(runtime, calls(3))
        (pid,) = sessions(postgres, url)
        postgres.say(f"select pg_terminate_backend({pid})")
        with pytest.raises(Stopped):
            runtime.ingest(calls(3, NOW + 1), "s", NOW).result(30)
        assert isinstance(runtime.failure, DatabaseLost)
        assert "flyball-secret" not in str(runtime.failure)
    with started(url, clock) as runtime:
        assert take(runtime, calls(3, NOW + 1)) == 2


def test_an_idle_owner_notices_by_itself_that_it_is_none_any_more(postgres: Postgres) -> None:
    url = postgres.migrated()
    ended = threading.Event()
    runtime = Embedded(make_pipeline, PostgresDatabase(url, silent_s=2.0), SetClock())
    runtime.on_failure = ended.set
    runtime.start()
    (pid,) = sessions(postgres, url)
    postgres.say(f"select pg_terminate_backend({pid})")
    assert ended.wait(30)
    runtime.stop()


# --- what a start says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "says", "kind"),
    [
        ("postgresql://x:secret@127.0.0.1:1/x", "Connection refused; is it running", DatabaseLost),
        (
            "mysql://x:secret@h/y",
            "mysql: is no database Flyball knows; write for example postgresql://",
            ConfigError,
        ),
        ("not an address", "cannot be read; write for example postgresql://", ConfigError),
    ],
    ids=["nobody-there", "another-kind", "no-address"],
)
def test_a_wrong_address_is_told_without_its_password(address: str, says: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=says) as e:
        open_database(address)
    assert "secret" not in str(e.value)


def test_a_wrong_password_and_a_wrong_name_are_told_apart(postgres: Postgres) -> None:
    with pytest.raises(DatabaseLost, match="password authentication failed"):
        open_database(postgres.url.replace("flyball-secret", "wrong"))
    with pytest.raises(DatabaseLost, match="does not exist"):
        open_database(postgres.named("nonesuch"))
