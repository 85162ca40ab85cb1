"""The embedded runtime: order, acknowledgement, back-pressure, restart, retention, failure."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from flyball.app.embedded import Embedded, Limits, Overloaded, Retention, Stopped
from flyball.app.http.read import status
from flyball.app.orders import Command
from flyball.app.pipeline import Pipeline
from flyball.app.store import ledger, store
from flyball.app.store.rows import DeadLetter
from flyball.app.store.sqlite import open_reader
from flyball.core.codec import pack_state
from flyball.core.errors import ConfigError
from flyball.core.estate import Emissions
from flyball.core.events import Batch
from tests.app._runtime import NOW, SetClock, calls, incident, make_pipeline, outage, started, take, well


class Gate:
    """Holds the stages until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def pipeline(self) -> Pipeline:
        made = make_pipeline()
        gate = self.open

        class Held(Pipeline):
            def feed(self, batch: Batch) -> Emissions:
                assert gate.wait(60)
                return super().feed(batch)

        return Held(made.config)


def rows(runtime: Embedded, query: str) -> list[tuple[Any, ...]]:
    with runtime.reader.connect() as c:
        return [tuple(r) for r in c.execute(text(query))]


def log_ids(runtime: Embedded) -> list[int]:
    return [r[0] for r in rows(runtime, "select id from log order by id")]


def totals(runtime: Embedded) -> dict[str, Any]:
    """What the status shows of the past: all but what is of this moment."""
    found = status(runtime)
    return {k: v for k, v in found.items() if k not in ("lag_s", "lag_bytes", "ready", "position")}


# --- taking ---------------------------------------------------------------------------------------------------------


def test_a_body_is_acknowledged_only_when_another_connection_can_read_it(tmp_path: Path) -> None:
    with started(tmp_path) as runtime:
        seen: list[list[int]] = []
        for _ in range(20):
            stored = runtime.ingest(calls(3), "s", NOW)
            stored.add_done_callback(lambda _done: seen.append(log_ids(runtime)))
            assert stored.result(30) in log_ids(runtime)
        runtime.stop()  # the answers' callbacks have all run
    assert len(seen) == 20
    assert all(i + 1 in ids for i, ids in enumerate(seen))


def test_bodies_of_many_threads_get_one_order_without_gaps_and_each_thread_keeps_its_own(
    tmp_path: Path,
) -> None:
    with started(tmp_path) as runtime:
        positions: dict[int, list[int]] = {}

        def send(number: int) -> None:
            stored = [runtime.ingest(calls(2, prefix=f"{number}-{i}"), f"s{number}", NOW) for i in range(30)]
            positions[number] = [s.result(30) for s in stored]

        threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert sorted(p for mine in positions.values() for p in mine) == list(range(1, 121))
        assert all(mine == sorted(mine) for mine in positions.values())
        assert log_ids(runtime) == list(range(1, 121))
        assert runtime.wait_for(120)
        assert runtime.figures.totals["events"] == {"llm_call": 240}


def test_ingest_goes_on_while_the_stages_are_behind_and_what_memory_let_go_is_read_from_disk(
    tmp_path: Path,
) -> None:
    gate = Gate()
    with started(tmp_path, pipeline=gate.pipeline, limits=Limits(memory_events=200)) as runtime:
        for i in range(50):
            runtime.ingest(calls(100, prefix=str(i)), "s", NOW).result(30)
        assert (runtime.appended, runtime.position) == (50, 0)
        assert runtime.lag()[1] > 0
        gate.open.set()
        assert runtime.wait_for(50)
        assert runtime.figures.totals["events"] == {"llm_call": 5000}
        assert runtime.figures.totals["duplicates"] == 0
        assert runtime.lag() == (0.0, 0)
        behind = runtime.pipeline.snapshot()
    straight = make_pipeline()
    for i in range(50):
        straight.feed(Batch(calls(100, prefix=str(i)), "s", NOW))
    assert behind == straight.snapshot()


def taken_until_refused(runtime: Embedded, *, patient: bool) -> int:
    """How many bodies are taken before the disk budget is spent."""
    for i in range(1000):
        try:
            runtime.ingest(calls(10, prefix=f"{patient}{i}"), "s", NOW, patient=patient).result(30)
        except Overloaded:
            break
    with pytest.raises(Overloaded, match="disk") as e:
        runtime.ingest(calls(10, prefix="more"), "s", NOW, patient=patient)
    assert e.value.retry_after_s > 0
    return i


def test_over_the_disk_budget_senders_are_turned_away_and_those_that_cannot_repeat_last(
    tmp_path: Path,
) -> None:
    gate = Gate()
    with started(tmp_path, pipeline=gate.pipeline, limits=Limits(backlog_bytes=20_000)) as runtime:
        taken = taken_until_refused(runtime, patient=True)
        more = taken_until_refused(runtime, patient=False)
        assert taken > 1
        assert more > 1
        gate.open.set()
        assert runtime.wait_for(taken + more)
        runtime.ingest(calls(10, prefix="again"), "otel", NOW).result(30)


def test_over_the_memory_budget_nothing_more_is_taken(tmp_path: Path) -> None:
    with started(tmp_path, limits=Limits(pending_bytes=1000)) as runtime:
        runtime.hold(990)
        with pytest.raises(Overloaded, match="memory"):
            runtime.ingest(calls(5), "s", NOW)
        runtime.hold(-990)
        runtime.ingest(calls(5), "s", NOW).result(30)


def test_a_sender_that_leaves_before_its_answer_does_not_stop_the_writer(tmp_path: Path) -> None:
    with started(tmp_path) as runtime:
        for i in range(50):
            runtime.ingest(calls(2, prefix=str(i)), "s", NOW).cancel()
        runtime.ingest(calls(2, prefix="last"), "s", NOW).result(30)
        assert runtime.failure is None
        # The body was there: that nobody waited for the answer does not take it back.
        assert runtime.wait_for(51)
        assert runtime.figures.totals["events"] == {"llm_call": 102}


# --- stopping and starting ------------------------------------------------------------------------------------------


def test_stopping_lets_the_stages_finish_and_a_restart_continues_the_same_totals(tmp_path: Path) -> None:
    clock = SetClock()
    with started(tmp_path, clock) as runtime:
        incident(runtime, clock)
        runtime.ingest(calls(7, clock.at), "s", clock.at).result(30)
        assert runtime.stop()
        before, position = runtime.figures.totals, runtime.position
        assert position == runtime.appended
    with started(tmp_path, clock) as again:
        assert again.position == position
        assert again.figures.totals == before
        assert again.board.read()[1] == list(again.pipeline.directives())
        assert again.board.read()[1]
        assert totals(again)["incidents"]["mitigating"] == 1


def test_what_could_not_be_finished_in_time_is_read_by_the_next_start(tmp_path: Path) -> None:
    gate = Gate()
    with started(tmp_path, pipeline=gate.pipeline) as runtime:
        for i in range(5):
            runtime.ingest(calls(10, prefix=str(i)), "s", NOW).result(30)
        stopper = threading.Timer(0.3, gate.open.set)
        stopper.start()
        assert not runtime.stop(timeout_s=0.05) or runtime.position == 5
    with started(tmp_path) as again:
        assert again.wait_for(5)
        assert again.figures.totals["events"] == {"llm_call": 50}


def test_totals_of_the_edge_survive_a_restart(tmp_path: Path) -> None:
    letters = [DeadLetter(NOW, "s", "native", "json", "not JSON", 4, b"oops")]
    with started(tmp_path) as runtime:
        runtime.ingest(calls(3), "s", NOW, format="native", dead=letters).result(30)
        assert (dict(runtime.received), dict(runtime.rejected)) == ({"native": 3}, {"json": 1})
    with started(tmp_path) as again:
        again.ingest(calls(3, prefix="x"), "s", NOW, format="native", dead=letters).result(30)
        assert (dict(again.received), dict(again.rejected)) == ({"native": 6}, {"json": 2})


@pytest.mark.parametrize("damage", [pack_state("pipeline", 999, {}), b"", b"\xff\x00garbage"])
def test_a_snapshot_that_cannot_be_read_is_replaced_by_reading_the_log_again(
    tmp_path: Path, damage: bytes
) -> None:
    clock = SetClock()
    with started(tmp_path, clock) as runtime:
        incident(runtime, clock)
        runtime.stop()
        before, state = runtime.figures.totals, runtime.pipeline.snapshot()
    with sqlite3.connect(tmp_path / "flyball.sqlite3") as c:
        c.execute("update snapshots set body = ?", (damage,))
    c.close()
    with started(tmp_path, clock) as again:
        assert again.figures.totals == before
        assert again.pipeline.snapshot() == state
        assert [i for i, n in status(again)["incidents"].items() if n] == ["mitigating"]


def test_without_a_readable_snapshot_and_without_the_beginning_of_the_log_the_totals_are_kept(
    tmp_path: Path,
) -> None:
    with started(tmp_path) as runtime:
        for i in range(10):
            take(runtime, calls(5, NOW + i))
        runtime.stop()
    with sqlite3.connect(tmp_path / "flyball.sqlite3") as c:
        c.execute("delete from snapshots where position < 10")
        c.execute("update snapshots set body = x'00'")
        c.execute("delete from log where id < 8")
    c.close()
    with started(tmp_path) as again:
        assert again.figures.totals["events"] == {"llm_call": 50}
        assert take(again, calls(5, NOW + 11)) == 11
        assert again.figures.totals["events"] == {"llm_call": 55}


def test_two_processes_cannot_share_a_data_folder(tmp_path: Path) -> None:
    with started(tmp_path), pytest.raises(ConfigError, match="in use by the Flyball of process"):
        Embedded(make_pipeline, tmp_path / "flyball.sqlite3", SetClock())
    with started(tmp_path) as runtime:
        assert runtime.ready


def test_a_database_of_another_schema_is_refused_and_the_folder_is_free_again(tmp_path: Path) -> None:
    with started(tmp_path):
        pass
    path = tmp_path / "flyball.sqlite3"
    with sqlite3.connect(path) as c:
        c.execute("update meta set value = '999' where key = 'schema'")
    c.close()
    for _ in range(2):  # the second time would say "in use", had the first kept the lock
        with pytest.raises(ConfigError, match="schema 999"):
            Embedded(make_pipeline, path, SetClock())


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "flyball.sqlite3"
    path.write_bytes(b"something else entirely, and long enough to look at" * 100)
    with pytest.raises(ConfigError, match="cannot be used as a database"):
        Embedded(make_pipeline, path, SetClock())


# --- retention ------------------------------------------------------------------------------------------------------


def trimmed(runtime: Embedded) -> list[int]:
    """The log after retention has done all it would."""
    before = -1
    while before != len(log_ids(runtime)):
        before = len(log_ids(runtime))
        runtime.trim()
        runtime.write(lambda _c: None).result(30)
    return log_ids(runtime)


def test_retention_by_age_keeps_what_a_restart_reads(tmp_path: Path) -> None:
    clock = SetClock()
    short = Retention(log_s=60.0)
    with started(tmp_path, clock, retention=short, snapshot_every_s=1e9) as runtime:
        for _ in range(20):
            clock.at += 10.0
            take(runtime, calls(5, clock.at))
        assert len(trimmed(runtime)) == 20  # no snapshot yet: everything is needed
    with started(tmp_path, clock, retention=short, snapshot_every_s=1e9) as runtime:
        for _ in range(20):
            clock.at += 10.0
            take(runtime, calls(5, clock.at))
        left = trimmed(runtime)
        assert left[0] == 21  # all up to the snapshot of the stop is old enough; what is behind it is needed
        runtime.stop()
        state, before = runtime.pipeline.snapshot(), runtime.figures.totals
    with sqlite3.connect(tmp_path / "flyball.sqlite3") as c:
        c.execute("delete from snapshots where position = (select max(position) from snapshots)")
    c.close()
    with started(tmp_path, clock) as again:
        assert again.pipeline.snapshot() == state
        assert again.figures.totals == before


def test_retention_by_size_removes_the_oldest_until_the_rest_fits(tmp_path: Path) -> None:
    with started(tmp_path) as runtime:
        for i in range(40):
            take(runtime, calls(20, NOW + i))
    with started(tmp_path, retention=Retention(log_bytes=10_000)) as runtime:
        left = trimmed(runtime)
        assert 0 < len(left) < 40
        assert left == list(range(left[0], 41))
        size = rows(runtime, "select sum(size) from log")[0][0]
        assert size <= 10_000
        assert take(runtime, calls(5, NOW + 50)) == 41


def test_positions_never_start_again_after_the_whole_log_was_trimmed(tmp_path: Path) -> None:
    clock = SetClock()
    with started(tmp_path, clock) as runtime:
        take(runtime, calls(5, clock.at))
    clock.at += 1e6
    with started(tmp_path, clock) as runtime:
        assert trimmed(runtime) == []
    with started(tmp_path, clock) as runtime:
        assert take(runtime, calls(5, clock.at)) == 2


def test_dead_letters_go_with_age_and_cannot_fill_the_disk(tmp_path: Path) -> None:
    clock = SetClock()
    bad = [DeadLetter(NOW, "s", "native", "json", "not JSON", 400, b"x" * 400) for _ in range(10)]
    kept = Retention(dead_letters_s=100.0, dead_letters_bytes=1000, dead_letters=8)
    with started(tmp_path, clock, retention=kept) as runtime:
        runtime.ingest([], "s", NOW, dead=bad).result(30)
        with runtime.reader.connect() as c:
            found = store.list_dead_letters(c)
        assert len(found) == 8
        assert sum(f["body"] is not None for f in found) == 2
        assert {f["reason"] for f in found} == {"json"}
        assert dict(runtime.rejected) == {"json": 10}  # counted, kept or not
        clock.at += 101.0
        trimmed(runtime)
        assert rows(runtime, "select count(*) from dead_letters") == [(0,)]
        runtime.ingest([], "s", NOW, dead=bad[:1]).result(30)
        assert rows(runtime, "select length(body) from dead_letters") == [(400,)]


# --- failure --------------------------------------------------------------------------------------------------------


class OutOfMemory(Pipeline):
    """What says nothing about a record ends the process; see test_faults.py for what does."""

    def feed(self, batch: Batch) -> Emissions:
        raise MemoryError("no memory")


def test_a_failed_stage_is_told_and_nothing_more_is_promised(tmp_path: Path) -> None:
    told = threading.Event()
    runtime = Embedded(lambda: OutOfMemory(make_pipeline().config), tmp_path / "flyball.sqlite3", SetClock())
    runtime.on_failure = told.set
    runtime.start()
    runtime.ingest(calls(1), "s", NOW).result(30)
    assert told.wait(30)
    assert str(runtime.failure) == "no memory"
    assert not runtime.ready
    assert not runtime.stop()


def test_when_the_log_cannot_be_written_everyone_who_waits_is_told(tmp_path: Path) -> None:
    runtime = Embedded(make_pipeline, tmp_path / "flyball.sqlite3", SetClock())
    runtime.start()
    runtime.write(lambda c: c.execute(text("drop table log"))).result(30)
    waiting = [runtime.ingest(calls(1), "s", NOW)]
    try:
        while True:
            waiting.append(runtime.ingest(calls(1), "s", NOW))
    except Stopped:
        pass
    for w in waiting:
        assert isinstance(w.exception(30), Stopped)
    with pytest.raises(Stopped):
        runtime.write(lambda _c: None)
    assert runtime.failure is not None
    assert "log" in str(runtime.failure)
    runtime.stop()


def test_after_a_stop_nothing_is_taken(tmp_path: Path) -> None:
    with started(tmp_path) as runtime:
        runtime.stop()
        with pytest.raises(Stopped):
            runtime.ingest(calls(1), "s", NOW)


# --- commands, ledger -----------------------------------------------------------------------------------------------


def test_a_persons_word_goes_through_the_log_and_survives_a_restart(tmp_path: Path) -> None:
    clock = SetClock()
    with started(tmp_path, clock) as runtime:
        found = incident(runtime, clock)
        words: Sequence[tuple[str, float | None]] = (("ack", None), ("silence", clock.at + 3600))
        for kind, until in words:
            clock.at += 1.0
            position = runtime.order(Command(kind, found, "ann", clock.at, until)).result(30)
            assert runtime.wait_for(position)
        kinds = [r[0] for r in rows(runtime, "select kind from log order by id desc limit 2")]
        assert kinds == ["order", "order"]
    with started(tmp_path, clock) as again:
        with again.reader.connect() as c:
            kept = store.get_incident(c, found)
        assert kept is not None
        assert kept.acknowledged_by == "ann"
        assert kept.silenced_until is not None
        clock.at += 1.0
        assert again.wait_for(again.order(Command("resolve", found, "ann", clock.at)).result(30))
        assert status(again)["incidents"]["resolved"] == 1


def test_a_word_that_came_too_late_changes_nothing_and_stops_nothing(tmp_path: Path) -> None:
    with started(tmp_path) as runtime:
        assert runtime.wait_for(runtime.order(Command("ack", "INC-NONE", "ann", NOW)).result(30))
        assert runtime.failure is None
        assert take(runtime, calls(1)) == 2


def test_a_changed_line_of_the_ledger_is_found(tmp_path: Path) -> None:
    clock = SetClock()
    with started(tmp_path, clock) as runtime:
        incident(runtime, clock)
        for _ in range(30):
            clock.at += 1.0
            take(runtime, well(clock.at))
            runtime.wait_for(runtime.tick().result(30))
        with runtime.reader.connect() as c:
            assert ledger.verify_ledger(c) is None
            lines = ledger.list_ledger(c)
        assert len(lines) >= 2
    for change, broken in (
        ("update ledger set kind = 'person' where seq = 2", 2),
        ("update ledger set body = replace(body, 'run', 'ran') where seq = 1", 1),
        ("delete from ledger where seq = 1", 2),
    ):
        path = tmp_path / "flyball.sqlite3"
        database = sqlite3.connect(path)
        database.execute(change)
        database.commit()
        database.close()
        engine = open_reader(path)
        with engine.connect() as reader:
            assert ledger.verify_ledger(reader) == broken
        engine.dispose()


def test_the_same_outage_told_to_two_runtimes_leaves_the_same_incident(tmp_path: Path) -> None:
    ids = []
    for name in ("one", "two"):
        clock = SetClock()
        with started(tmp_path / name, clock) as runtime:
            ids.append(incident(runtime, clock))
    assert ids[0] == ids[1]


def test_ticks_let_leases_expire_while_nothing_arrives(tmp_path: Path) -> None:
    clock = SetClock()
    with started(tmp_path, clock) as runtime:
        incident(runtime, clock)
        for _ in range(5):
            clock.at += 1.0
            take(runtime, outage(clock.at))
        assert runtime.board.read()[1]
        for _ in range(80):
            clock.at += 60.0
            position = runtime.tick().result(30)
        assert runtime.wait_for(position)
        assert runtime.board.read()[1] == []
        assert runtime.pipeline.directives() == []
