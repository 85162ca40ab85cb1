"""The store on SQLite and on PostgreSQL: one body, the same rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import Connection, insert, text

from flyball.app.orders import Command
from flyball.app.store import acts, ledger, migrate, operations, outbox, store, tables
from flyball.app.store.database import Database, open_database, reading
from flyball.app.store.dialects import upsert
from flyball.app.store.owner import NeedsUpgrade
from flyball.app.store.rows import Commit, DeadLetter, LogRow, OutboxRow, Removed, Skipped
from flyball.app.store.sqlite import SCHEMA_VERSION
from flyball.core.directives import LedgerEntry, Operation, StopChange
from flyball.core.errors import ConfigError
from flyball.core.stops import Stops
from tests.app._runtime import NOW, SetClock, calls, incident, make_pipeline, started, take
from tests.servers.postgres import Postgres


@pytest.fixture
def database(where: Path | str) -> Iterator[Database]:
    opened = open_database(where)
    yield opened
    opened.close()


@pytest.fixture
def c(database: Database) -> Iterator[Connection]:
    """The writer's connection, within a transaction."""
    with database.connect() as connection, database.transaction(connection):
        yield connection


def entry(n: int, **more: object) -> LedgerEntry:
    fields = {
        "key": f"DEC-{n}",
        "at": NOW + n,
        "kind": "decision",
        "incident": "INC-1",
        "runbook": "r",
        "body": {"n": n},
    }
    return msgspec.convert(fields | more, LedgerEntry)


def rows(n: int, size: int = 10) -> list[LogRow]:
    return [LogRow(i, "events", NOW + i, "gateway", 1, bytes([i % 256]) * size) for i in range(1, n + 1)]


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_lines_of_the_ledger_are_numbered_without_gaps_also_when_one_comes_twice(c: Connection) -> None:
    for n in (1, 2, 2, 1, 3):
        store.apply_commit(c, Commit(position=n, entries=[entry(n)]), owner=7)
    lines = ledger.list_ledger(c)
    assert [(line["seq"], line["key"], line["owner"]) for line in lines] == [
        (1, "DEC-1", 7), (2, "DEC-2", 7), (3, "DEC-3", 7),
    ]  # fmt: skip
    assert ledger.verify_ledger(c) is None
    assert [line["key"] for line in ledger.list_ledger(c, limit=2, newest=True)] == ["DEC-2", "DEC-3"]
    by_number = ledger.get_entry(c, "2")
    assert by_number is not None
    assert by_number == ledger.get_entry(c, "DEC-2")


@pytest.mark.parametrize(
    "statement", ["update ledger set runbook = 'x' where seq = 2", "delete from ledger where seq = 2"]
)
def test_a_line_that_was_changed_or_removed_is_found(c: Connection, statement: str) -> None:
    for n in range(1, 5):
        ledger.put_entry(c, entry(n))
    c.execute(text(statement))
    assert ledger.verify_ledger(c) in (2, 3)


def test_lines_that_are_missing_at_the_end_are_found(c: Connection) -> None:
    for n in range(1, 5):
        ledger.put_entry(c, entry(n))
    c.execute(text("delete from ledger where seq = 4"))
    assert ledger.verify_ledger(c) == 4


# --- the log ---------------------------------------------------------------------------------------------------------


def test_the_log_is_read_in_stretches_of_rows_and_bytes_and_at_least_one(c: Connection) -> None:
    store.append_log(c, rows(10, 100))
    assert [r.id for r in store.read_log(c, 0, limit=3)] == [1, 2, 3]
    assert [r.id for r in store.read_log(c, 3, 5)] == [4, 5]
    assert [r.id for r in store.read_log(c, 5, most_bytes=150)] == [6, 7]
    assert [r.id for r in store.read_log(c, 9, most_bytes=1)] == [10]
    assert store.read_log(c, 10) == []
    assert store.read_log(c, 0, limit=1)[0] == rows(1, 100)[0]
    assert (store.last_log_id(c), store.first_log_id(c), store.backlog_bytes(c, 4)) == (10, 1, 600)
    assert store.oldest_unread(c, 4) == NOW + 5


def test_retention_takes_the_oldest_and_never_what_a_restart_reads(c: Connection) -> None:
    store.append_log(c, rows(10, 100))
    assert store.trim_log(c, NOW + 1e9, 0, 500).rows == 0  # no snapshot yet
    for position in (4, 6, 8):
        store.apply_commit(c, Commit(position=position, snapshot=b"s", at=NOW))
    assert [p for p, _ in store.newest_snapshots(c)] == [8, 6]
    assert store.trim_log(c, NOW + 3, 0, 500) == Removed(2, 200)
    assert store.trim_log(c, 0.0, 150, 500) == Removed(2, 200)
    assert store.trim_log(c, NOW + 1e9, 0, 1).rows == 1
    assert store.trim_log(c, NOW + 1e9, 0, 500).rows == 1
    assert store.first_log_id(c) == 7


def test_dead_letters_keep_any_bytes_and_any_text_and_go_by_age(c: Connection) -> None:
    odd = "a\0b\u2028 ü 😀"
    letters = [DeadLetter(NOW + i, odd, "native", "json", odd, 3, b"\0\xff\\x", 1) for i in range(3)]
    letters.append(DeadLetter(NOW + 9, "s", "native", "json", "", 3, None, 1))
    store.append_dead_letters(c, letters)
    store.put_edge(c, {"native": 4}, {"json": 4})
    found = store.list_dead_letters(c)
    assert [(d["at"], d["body"]) for d in found][1:] == [(NOW + i, b"\0\xff\\x") for i in (2, 1, 0)]
    assert found[1]["detail"].replace("\u2400", "\0") == odd  # PostgreSQL's text cannot hold the character 0
    totals = store.edge(c)
    assert (totals.received, totals.rejected, totals.dead, totals.dead_bytes) == (
        {"native": 4},
        {"json": 4},
        4,
        12,
    )
    assert store.trim_dead_letters(c, NOW + 2, 500) == Removed(2, 8)


# --- what a commit carries -------------------------------------------------------------------------------------------


def test_offsets_are_put_over_older_ones_and_read_back_by_source(c: Connection) -> None:
    store.put_offsets(c, {("flyball.windows", 0): 5, ("flyball.windows", 1): 1 << 40, ("other", 0): 7})
    store.put_offsets(c, {("flyball.windows", 0): 6})
    assert store.get_offsets(c, "flyball.windows") == {
        ("flyball.windows", 0): 6,
        ("flyball.windows", 1): 1 << 40,
    }
    assert len(store.get_offsets(c)) == 3


def test_a_later_attempt_of_an_operation_takes_the_place_of_an_earlier_one_only(c: Connection) -> None:
    def operation(attempt: int) -> Operation:
        return Operation(
            id="OP-1", verb="start", hook="h", action="restart", plan="P", incident="INC-1", runbook="r", step="s",
            targets=("tenant:t",), params={}, at=NOW, deadline=NOW + 60, attempt=attempt,
        )  # fmt: skip

    for attempt in (2, 1, 2, 3):
        operations.put_operation(c, operation(attempt))
    assert [(o["id"], o["attempt"]) for o in operations.unfinished(c)] == [("OP-1", 3)]
    assert not operations.mark_sending(c, operation(2), NOW)
    assert operations.mark_sending(c, operation(3), NOW)
    assert not operations.mark_sending(c, operation(3), NOW)
    assert [r.state for r in operations.due_operations(c, NOW, 10)] == ["sending"]
    operations.put_off(c, operation(3), None, NOW)
    assert operations.open_starts(c) == []


def test_messages_wait_in_order_of_age_and_then_of_their_ids_byte_by_byte(c: Connection) -> None:
    for name in ("b", "a", "B", "_", "ä"):
        outbox.put_outbox(c, OutboxRow(name, "INC-1", 1, "slack", NOW, NOW, "opened", b"{}"))
    outbox.put_outbox(c, OutboxRow("a", "INC-2", 1, "slack", NOW, NOW, "opened", b"{}"))
    assert [row.id for row, _ in outbox.due_outbox(c, NOW, 10)] == ["B", "_", "a", "b", "ä"]
    outbox.finish_outbox(c, "B", state="sent", receipt="r1")
    assert {receipt for _, receipt in outbox.due_outbox(c, NOW, 10)} == {"r1"}
    assert outbox.channels_told(c) == {"INC-1": {"slack"}}


def test_stops_and_records_left_out_come_back_as_they_were(c: Connection) -> None:
    live = {
        s: StopChange(change="stop", scope=s, by="ann", at=NOW) for s in ("tenant:b", "all", "tenant:a\0")
    }
    acts.put_stops(c, Stops(live))
    assert acts.live_stops(c).live == live
    left = Skipped(3, NOW, "events", "s", 1, "ValueError: \0", b"")
    acts.put_skipped(c, [left, left])
    assert (acts.skipped_positions(c), acts.skipped_count(c)) == ({3}, 1)
    assert acts.newest_skipped(c).startswith("ValueError")


# --- a runtime on each -----------------------------------------------------------------------------------------------


def test_a_restart_goes_on_where_the_runtime_was(where: Path | str) -> None:
    clock = SetClock()
    with started(where, clock) as runtime:
        found = incident(runtime, clock)
        first = runtime.database.epoch
        runtime.stop()
        before, state = runtime.figures.totals, runtime.pipeline.snapshot()
    with started(where, clock) as again:
        assert again.database.epoch > first
        assert again.figures.totals == before
        assert again.pipeline.snapshot() == state
        with again.reader.connect() as c:
            kept = store.get_incident(c, found)
            assert kept is not None
            assert ledger.verify_ledger(c) is None
            assert {line["owner"] for line in ledger.list_ledger(c)} == {first}


def test_what_is_stored_with_a_record_is_there_as_soon_as_the_record_is_and_not_before(
    where: Path | str,
) -> None:
    with started(where) as runtime:
        order = Command(kind="ack", incident="INC-NONE", by="ann", at=NOW)
        stored: Future[int] = runtime.order(
            order, also=lambda c: store.put_offsets(c, {("flyball.windows", 0): 42})
        )
        position = stored.result(30)
        with runtime.reader.connect() as c:
            assert store.last_log_id(c) >= position
            assert store.get_offsets(c) == {("flyball.windows", 0): 42}


def test_a_record_is_not_stored_when_what_belongs_to_it_cannot_be(where: Path | str) -> None:
    def broken(c: Connection) -> None:
        store.put_offsets(c, {("flyball.windows", 0): 42})
        raise OSError("no")

    with started(where) as runtime:
        take(runtime, calls(3))
        order = Command(kind="ack", incident="INC-NONE", by="ann", at=NOW)
        with pytest.raises(Exception, match="nothing was stored"):
            runtime.order(order, also=broken).result(30)
        assert isinstance(runtime.failure, OSError)
    with reading(where) as c:
        assert store.get_offsets(c) == {}
        assert store.last_log_id(c) == 1


def test_a_stop_that_comes_with_something_to_store_stops_as_well(where: Path | str) -> None:
    with started(where) as runtime:
        stop = StopChange(change="stop", scope="all", by="ann", at=NOW)
        runtime.order(stop, also=lambda c: store.put_offsets(c, {("x", 0): 1})).result(30)
        assert runtime.switchboard.stops.live
        with runtime.reader.connect() as c:
            assert (acts.live_stops(c).live, store.get_offsets(c)) == ({"all": stop}, {("x", 0): 1})


def test_readers_cannot_write(where: Path | str) -> None:
    with (
        started(where) as runtime,
        runtime.reader.connect() as c,
        pytest.raises(Exception, match=r"readonly|read-only"),
    ):
        c.execute(insert(tables.meta).values(key="x", value="y"))


# --- migrations ------------------------------------------------------------------------------------------------------


def test_the_migrations_lead_to_the_tables_that_the_code_knows(postgres: Postgres, tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    url, old = postgres.empty(), old_file(tmp_path)
    assert migrate.current(url) == ""
    assert migrate.upgrade(url) == ("", SCHEMA_VERSION)
    assert migrate.upgrade(url) == (SCHEMA_VERSION, SCHEMA_VERSION)
    assert migrate.upgrade(old) == ("2", SCHEMA_VERSION)
    for each in (url, old):
        with reading(each) as c:
            options = {
                "include_name": lambda name, kind, _parents: (kind, name) != ("table", "alembic_version")
            }
            assert compare_metadata(MigrationContext.configure(c, opts=options), tables.metadata) == []


def old_file(folder: Path) -> Path:
    """A database as schema 2 left it, with a line in the ledger."""
    with started(folder) as runtime:
        runtime.write(lambda c: ledger.put_entry(c, entry(1))).result(30)
    path = folder / "flyball.sqlite3"
    with sqlite3.connect(path) as c:
        for statement in (
            "drop table owner", "drop table offsets", "drop table publications", "alter table ledger drop column owner",
            "alter table directives drop column owner", "update meta set value = '2' where key = 'schema'",
        ):  # fmt: skip
            c.execute(statement)
    c.close()
    return path


def test_a_file_of_the_schema_before_is_refused_with_the_step_to_take_and_keeps_its_content(
    tmp_path: Path,
) -> None:
    path = old_file(tmp_path)
    with pytest.raises(
        NeedsUpgrade, match=f"is of schema 2, .* `flyball database upgrade --data {tmp_path}`"
    ):
        open_database(path)
    assert migrate.current(path) == "2"
    migrate.upgrade(path)
    with started(tmp_path) as runtime, runtime.reader.connect() as c:
        assert ledger.verify_ledger(c) is None
        assert [(line["key"], line["owner"]) for line in ledger.list_ledger(c)] == [("DEC-1", 0)]


def test_an_address_without_tables_or_of_a_newer_schema_is_refused(postgres: Postgres) -> None:
    with pytest.raises(NeedsUpgrade, match=r"has no tables of Flyball yet.*say `flyball database upgrade"):
        open_database(postgres.empty())
    url = postgres.migrated()
    database = open_database(url)
    with database.connect() as c, database.transaction(c):
        found = {"value": "999"}
        row = upsert(c, tables.meta).values(key="schema", **found)
        c.execute(row.on_conflict_do_update(index_elements=["key"], set_=found))
    database.close()
    for refused in (lambda: open_database(url), lambda: migrate.upgrade(url)):
        with pytest.raises(ConfigError, match=r"schema 999.*install the version that made it"):
            refused()


def test_a_database_in_use_is_not_migrated(tmp_path: Path) -> None:
    path = old_file(tmp_path)
    from flyball.app.store.lock import FolderLock

    lock = FolderLock(tmp_path)
    with pytest.raises(ConfigError, match="in use"):
        migrate.upgrade(path)
    lock.release()
    assert migrate.current(path) == "2"


def test_a_pipeline_is_made_once_more_for_nothing(where: Path | str) -> None:
    """Opening and closing without a start leaves nothing behind that would keep the next one out."""
    open_database(where).close()
    with started(where, pipeline=make_pipeline) as runtime:
        assert runtime.ready
