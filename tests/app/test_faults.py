"""A record that makes a stage raise: left out, counted, told, kept with its bytes; the process goes on, now and at every restart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flyball.app.embedded import Embedded
from flyball.app.finite import finite
from flyball.app.http.read import status
from flyball.app.pipeline import Pipeline
from flyball.app.store import store
from flyball.app.store.sqlite import SCHEMA_VERSION, open_reader, open_writer
from flyball.core.codec import decode_events
from flyball.core.entities import Entity
from flyball.core.errors import ConfigError
from flyball.core.estate import Emissions
from flyball.core.events import Batch
from flyball.core.incident import Impact, Incident, IncidentChange, RootCandidate
from tests.app._runtime import NOW, SetClock, calls, incident, make_pipeline, started, take


class Fragile(Pipeline):
    """Counts a batch of app `poison` before it raises over it: half of what it did stands."""

    def feed(self, batch: Batch) -> Emissions:
        if any(getattr(e, "app", "") == "poison" for e in batch.events):
            self.counters.events["llm_call"] += 1000
            raise ValueError("a stage broke over this")
        return super().feed(batch)


def fragile() -> Pipeline:
    return Fragile(make_pipeline().config)


def poison() -> list[Any]:
    return calls(3, app="poison", prefix="poison")


def test_a_record_that_makes_a_stage_raise_is_left_out_and_everything_else_counts(tmp_path: Path) -> None:
    with started(tmp_path, pipeline=fragile) as runtime:
        take(runtime, calls(5, prefix="before"))
        take(runtime, poison())
        take(runtime, calls(7, prefix="after"))
        assert runtime.failure is None
        assert runtime.wait_for(runtime.appended)
        assert runtime.figures.totals["events"] == {"llm_call": 12}
        assert status(runtime)["left_out"] == 1
        assert status(runtime)["rejected"] == {"stage_raised": 3}


def test_it_is_kept_with_its_reason_and_its_bytes(tmp_path: Path) -> None:
    with started(tmp_path, pipeline=fragile) as runtime:
        take(runtime, poison())
        assert runtime.wait_for(runtime.appended)
        with runtime.reader.connect() as c:
            (letter,) = store.list_dead_letters(c)
        assert (letter["reason"], letter["sender"], letter["format"]) == ("stage_raised", "gateway", "events")
        assert letter["detail"] == "record 1: ValueError: a stage broke over this"
        assert decode_events(letter["body"]) == poison()


def test_people_are_told_by_an_incident_about_flyball_itself(tmp_path: Path) -> None:
    with started(tmp_path, pipeline=fragile) as runtime:
        take(runtime, poison())
        assert runtime.wait_for(runtime.appended)
        with runtime.reader.connect() as c:
            (found,) = store.list_incidents(c)
        assert (found.root, found.signal) == (Entity("stream", "flyball"), "stream.poison")
        assert found.evidence["record"] == 1


def test_a_restart_leaves_it_out_too_and_goes_on(tmp_path: Path) -> None:
    with started(tmp_path, pipeline=fragile) as runtime:
        take(runtime, calls(5, prefix="before"))
        take(runtime, poison())
        assert runtime.wait_for(runtime.appended)
        before = runtime.figures.totals
    with started(tmp_path, pipeline=fragile) as again:
        assert again.failure is None
        assert again.figures.totals == before
        assert again.faults == 1
        take(again, calls(2, prefix="after"))
        assert again.figures.totals["events"] == {"llm_call": 7}


def test_the_state_is_as_if_the_record_had_never_been(tmp_path: Path) -> None:
    """Also after the stages were made again from a snapshot and the log."""
    with started(tmp_path, pipeline=fragile, snapshot_every_s=0.0) as runtime:
        for i in range(10):
            take(runtime, calls(5, NOW + i, prefix=str(i)))
            if i in (3, 7):
                take(runtime, poison())
        assert runtime.wait_for(runtime.appended)
        left = runtime.figures.totals["events"]
        estate = runtime.ask(lambda p: p.windows.snapshot()).result(30)
    straight = make_pipeline()
    for i in range(10):
        straight.feed(Batch(calls(5, NOW + i, prefix=str(i)), "gateway", NOW))
    assert left == {"llm_call": 50}
    assert estate == straight.windows.snapshot()


def test_a_record_that_only_a_newer_version_fails_over_is_left_out_when_it_is_read_again(
    tmp_path: Path,
) -> None:
    """A restart reads the log behind its snapshot again; without one, all of it."""
    with started(tmp_path) as runtime:  # takes it without a word
        take(runtime, calls(5, prefix="before"))
        take(runtime, poison())
        position = runtime.position
    engine = open_writer(tmp_path / "flyball.sqlite3")
    with engine.begin() as c:
        c.exec_driver_sql("delete from snapshots")
    engine.dispose()
    with started(tmp_path, pipeline=fragile) as again:
        assert again.figures.totals["events"] == {"llm_call": 5}
        assert again.faults == 1
        assert again.wait_for(position + 1)  # the record that says so
        take(again, calls(1, prefix="after"))
        assert status(again)["left_out"] == 1
    with started(tmp_path, pipeline=fragile) as third:
        assert third.faults == 1


def test_what_says_nothing_about_a_record_still_ends_the_process(tmp_path: Path) -> None:
    class Full(Pipeline):
        def feed(self, batch: Batch) -> Emissions:
            raise MemoryError

    runtime = Embedded(lambda: Full(make_pipeline().config), tmp_path / "flyball.sqlite3", SetClock())
    runtime.start()
    runtime.ingest(calls(1), "s", NOW).result(30)
    assert not runtime.wait_for(1)
    assert isinstance(runtime.failure, MemoryError)
    assert not runtime.stop()
    assert runtime.faults == 0


# --- figures that are no numbers ------------------------------------------------------------------------------------


def strange() -> IncidentChange:
    nan, root = math.nan, Entity("provider", "a")
    found = Incident(
        id="INC-1", at=NOW, since=NOW, updated_at=NOW, root=root, signal="llm.errors", confidence=math.inf,
        candidates=(RootCandidate(root, nan),), evidence={"observed": nan, "n": 3, "expected": -math.inf, "classes": ["x"]},
        impact=Impact(calls=3, usd_per_min_now=nan, apps=(("shop", 3, nan),)),
    )  # fmt: skip
    return IncidentChange(incident=found, at=NOW, old="", new="open", reason="opened", notify=True)


def test_what_is_no_number_is_left_out_before_it_is_stored_or_sent() -> None:
    clean = finite(strange()).incident
    assert clean.evidence == {"n": 3, "classes": ["x"]}
    assert (clean.confidence, clean.candidates[0].confidence) == (0.0, 0.0)
    assert (clean.impact.usd_per_min_now, clean.impact.apps) == (0.0, (("shop", 3, 0.0),))
    assert msgspec.json.decode(msgspec.json.encode(clean), type=Incident) == clean
    well = msgspec.structs.replace(strange(), incident=clean)
    assert finite(well) is well


def test_an_incident_that_was_stored_with_such_a_figure_can_still_be_listed(tmp_path: Path) -> None:
    clock = SetClock()
    with started(tmp_path, clock) as runtime:
        found = incident(runtime, clock)
        with runtime.reader.connect() as c:
            kept = store.get_incident(c, found)
        assert kept is not None
        worse = msgspec.structs.replace(
            kept, evidence=strange().incident.evidence, impact=strange().incident.impact
        )
        body = msgspec.json.encode(worse)
        assert b"null" in body
        runtime.write(lambda c: c.exec_driver_sql("update incidents set body = ?", (body,))).result(30)
        with runtime.reader.connect() as c:
            (listed,) = store.list_incidents(c)
            assert store.get_incident(c, found) == listed
        assert listed.evidence == {"n": 3, "classes": ["x"]}
        assert listed.impact.apps == (("shop", 3, 0.0),)


# --- folders of other versions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", ["1", str(int(SCHEMA_VERSION) + 1)], ids=["older", "newer"])
def test_a_folder_of_another_schema_is_refused_in_one_sentence_and_not_touched(
    tmp_path: Path, schema: str
) -> None:
    path = tmp_path / "flyball.sqlite3"
    import sqlite3

    database = sqlite3.connect(path)
    database.execute("create table meta (key text primary key, value text not null)")
    database.execute("insert into meta values ('schema', ?)", (schema,))
    database.commit()
    database.close()
    needs = f"is of schema {schema}, this Flyball needs {SCHEMA_VERSION} .*another `data` folder"
    with pytest.raises(ConfigError, match=needs):
        Embedded(make_pipeline, path, SetClock())
    reader = open_reader(path)
    with reader.connect() as c:
        tables = [r[0] for r in c.exec_driver_sql("select name from sqlite_master where type = 'table'")]
    reader.dispose()
    assert tables == ["meta"]
