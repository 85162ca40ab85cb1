"""The input of a chaos run, and what the embedded runtime makes of it.

The lab's simulator is governed once, with an outage of a provider. What it sent is then moved in time and sent again: five quiet minutes at once,
before any worker runs; what leads to the outage and follows it when it is due, once the workers have read that.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from flyball.app.pipeline import Pipeline
from flyball.app.records import Record, record_of
from flyball.app.settings import Settings
from flyball.app.store import acts, store
from flyball.app.store.database import reading
from flyball.app.store.ledger import list_ledger, verify_ledger
from flyball.app.store.postgres import open_postgres_reader
from flyball.app.store.rows import entry_of
from flyball.app.wiring import pipeline_config
from flyball.core.columns import SUMS, Window
from flyball.core.estate import Emissions
from flyball.core.events import Batch
from flyball.core.incident import Incident
from flyball.lab import Lab
from flyball.lab.sim import START_AT
from flyball.streams.portion import Portion

GIVEN: dict[str, Any] = {"mode": "auto", "modes": {"provider-failover": "auto"}, "max_delay_s": 6.0}
"""Settings of a run. A short delay ends it sooner."""
WINDOW_S = 10.0
BEFORE_S = 8.0
"""How long before the outage the telemetry is sent when it is due, not all at once."""
Row = tuple[float, tuple[str, ...]]


def settings() -> Settings:
    return Settings.model_validate(GIVEN)


def make_pipeline() -> Pipeline:
    return Pipeline(pipeline_config(settings()))


@dataclass(frozen=True)
class Course:
    """`script`: batches in order of arrival, and ticks of every second between them. The outage begins at `zero`."""

    zero: float
    script: Sequence[Batch | float]

    @property
    def bodies(self) -> list[Batch]:
        return [b for b in self.script if isinstance(b, Batch)]

    @property
    def ends_at(self) -> float:
        return max(b.received_at or 0.0 for b in self.bodies)

    def at(self, quiet_ends_at: float, now: float) -> Course:
        """The same at other times: the quiet minutes end at about `quiet_ends_at`, and what then leads to the outage begins within a window of `now`.

        All is moved by whole windows, or they would hold other calls. In between nobody calls.
        """
        begins = self.zero - BEFORE_S
        early_by = (quiet_ends_at - begins) // WINDOW_S * WINDOW_S
        live_by = max(early_by, (now - begins) // WINDOW_S * WINDOW_S + WINDOW_S)
        early = [_moved(s, early_by) for s in self.script if _when(s) < begins]
        live = [_moved(s, live_by) for s in self.script if _when(s) >= begins]
        between = [begins + early_by + k for k in range(1, int(live_by - early_by))]
        return Course(self.zero + live_by, [*early, *between, *live])

    @property
    def early(self) -> list[Batch]:
        """Bodies of the quiet minutes."""
        return [b for b in self.bodies if _when(b) < self.zero - BEFORE_S]

    @property
    def live(self) -> list[Batch]:
        """Bodies that are sent when they are due."""
        return [b for b in self.bodies if _when(b) >= self.zero - BEFORE_S]


def _when(step: Batch | float) -> float:
    return step if isinstance(step, float) else step.received_at or 0.0


def _moved(batch: Batch | float, by_s: float) -> Batch | float:
    if isinstance(batch, float):
        return batch + by_s
    events = [msgspec.structs.replace(e, at=e.at + by_s) for e in batch.events]
    arrived = None if batch.received_at is None else batch.received_at + by_s
    return Batch(events=events, sender=batch.sender, received_at=arrived)


class _Taped:
    """The lab's governor, which keeps what it is given. What enforcement points report is not part of the course."""

    def __init__(self) -> None:
        self.pipeline = make_pipeline()
        self.script: list[Batch | float] = []

    def feed(self, batch: Batch) -> Emissions:
        self.script.append(batch)
        return self.pipeline.feed(batch)

    def tick(self, now: float) -> Emissions:
        self.script.append(now)
        return self.pipeline.tick(now)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)


@functools.cache
def outage(lasts_s: float, seed: int = 301) -> Course:
    """Five quiet minutes, then a provider fails for most callers."""
    tape = _Taped()
    lab = Lab(lambda: tape, seed=seed, rate=10.0, warmup="5m", start_at=START_AT // WINDOW_S * WINDOW_S)
    lab.at("0s").provider("b").fails(0.6)
    lab.run(lasts_s)
    return Course(lab.zero, tape.script)


# --- what came of it --------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """All that can be compared: of the embedded runtime, and of the log of the one on Kafka."""

    windows: list[Window] = field(default_factory=list)
    anomalies: list[tuple[str, str]] = field(default_factory=list)
    """(id, phase)"""
    incidents: dict[str, Incident] = field(default_factory=dict)
    courses: dict[str, list[str]] = field(default_factory=dict)
    """Incident → its states, in order."""
    directives: list[tuple[Any, ...]] = field(default_factory=list)
    """(change, kind, scope, params, incident, runbook, step) of each."""
    ledger: set[tuple[str, ...]] = field(default_factory=set)
    """(kind, incident, runbook, what) of decisions that came to something and of outcomes."""
    keys: set[str] = field(default_factory=set)
    """Keys of all lines of the ledger."""
    events: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    late: int = 0

    def add(self, said: Emissions) -> None:
        self.windows += said.windows
        self.anomalies += [(a.id, a.phase) for a in said.anomalies]
        for c in said.changes:
            self.incidents[c.incident.id] = c.incident
            if c.old != c.new:
                self.courses.setdefault(c.incident.id, []).append(c.new)
        for moved in said.directives:
            d = moved.directive
            what = (
                moved.change,
                d.kind,
                sorted(d.scope.items()),
                repr(d.params),
                d.incident,
                d.runbook,
                d.step,
            )
            self.directives.append(what)
        for items in (said.decisions, said.directives, said.outcomes, said.operations, said.people):
            self.keys.update(entry_of(item).key for item in items)
        for decision in said.decisions:
            if decision.decision in ("run", "suggest"):
                self.ledger.add(("decision", decision.incident, decision.runbook, decision.decision.value))
        for o in said.outcomes:
            self.ledger.add(("outcome", o.incident, o.runbook, f"{o.step} {o.result}"))

    def counted(self, pipeline: Pipeline) -> Result:
        self.events, self.duplicates = +pipeline.counters.events, pipeline.duplicates
        self.late = pipeline.window_stats.late
        return self


def embedded(course: Course, until: float) -> Result:
    """What the pipeline alone says about the course, with a tick of every second up to `until`."""
    pipeline, result = make_pipeline(), Result()
    last = 0.0
    for step in course.script:
        if isinstance(step, Batch):
            result.add(pipeline.feed(step))
        else:
            result.add(pipeline.tick(step))
            last = step
    while last < until:
        last += 1.0
        result.add(pipeline.tick(last))
    return result.counted(pipeline)


def from_log(url: str) -> tuple[Result, float]:
    """What a database's log leads to when it is read from its beginning, and the time of its last tick.

    Raises: AssertionError when what is stored, over however many lives, is not that.
    """
    pipeline, result, ticked = make_pipeline(), Result(), 0.0
    engine = open_postgres_reader(url)
    with engine.connect() as c:
        end, first, skipped = store.last_log_id(c), store.first_log_id(c), acts.skipped_positions(c)
    assert (first, skipped) == (1, set())
    for row in store.iter_log(engine, 0, end):
        record = record_of(row)
        if isinstance(record.payload, float):
            ticked = record.payload
        result.add(_process(pipeline, record))
    engine.dispose()
    result.counted(pipeline)
    with reading(url) as c:
        stored = {i.id: (i.state, i.revision) for i in store.list_incidents(c, 1000)}
        assert stored == {i.id: (i.state, i.revision) for i in result.incidents.values()}
        assert verify_ledger(c) is None
        assert {line["key"] for line in list_ledger(c, limit=1_000_000)} == result.keys
        assert {d.id for d in acts.live_directives(c)} == {d.id for d in pipeline.directives()}
        totals = store.counters(c)
    assert totals["events"] == dict(result.events)
    assert totals["windows"] == len(result.windows)
    return result, ticked


def _process(pipeline: Pipeline, record: Record) -> Emissions:
    payload = record.payload
    if isinstance(payload, Portion):
        return pipeline.feed_portion(payload, record.received_at)
    if isinstance(payload, Batch):
        return pipeline.feed(payload)
    if isinstance(payload, float):
        return pipeline.tick(payload)
    return pipeline.take(payload)


# --- compared ---------------------------------------------------------------------------------------------------------


def rows(windows: Iterable[Window]) -> dict[Row, list[float]]:
    """Every cell of every window: its counts, and its sums to nine digits."""
    found: dict[Row, list[float]] = {}
    for window in windows:
        cells = window.cells
        columns = [cells.calls, *cells.by_class.T, *(cells.counts[k] for k in sorted(cells.counts))]
        sums = [cells.sums[k] for k in SUMS]
        for i, slot in enumerate(cells.ids.tolist()):
            key = (window.start, tuple(cells.labels[slot]))
            assert key not in found, f"twice: {key}"
            found[key] = [float(c[i]) for c in columns] + [float(f"{s[i]:.9g}") for s in sums]
    return found


def differences(found: Result, wanted: Result) -> list[str]:
    """What is otherwise than in the embedded run; empty when nothing is.

    `wanted` goes on for longer: what faults have held up is asked, granted and verified later, so `found` may not have come as far.
    """
    said: list[str] = []

    def compare(what: str, ours: Any, theirs: Any) -> None:
        if ours != theirs:
            said.append(f"{what}: {ours} instead of {theirs}")

    compare("events", dict(found.events), dict(wanted.events))
    compare("duplicates", found.duplicates, wanted.duplicates)
    compare("late", found.late, wanted.late)
    ours, theirs = rows(found.windows), rows(wanted.windows)
    compare("windows", [w.start for w in found.windows], [w.start for w in wanted.windows])
    wrong = [k for k in sorted(ours.keys() | theirs.keys()) if not _alike(ours.get(k), theirs.get(k))]
    for key in wrong[:10]:
        said.append(f"cell {key}: {_brief(ours.get(key))} instead of {_brief(theirs.get(key))}")
    if wrong:
        said.append(f"{len(wrong)} cells of {len(theirs)} are wrong")
    compare("anomalies", sorted(found.anomalies), sorted(wanted.anomalies))
    compare("incidents", _about(found), _about(wanted))
    for incident, states in wanted.courses.items():
        ours_so_far = found.courses.get(incident, [])
        compare(f"course of {incident}", ours_so_far, states[: max(1, len(ours_so_far))])
    compare("directives", found.directives, wanted.directives[: max(1, len(found.directives))])
    compare("ledger beyond", sorted(found.ledger - wanted.ledger), [])
    ran = {line for line in wanted.ledger if line[0] == "decision"}
    compare("decisions", sorted(found.ledger & ran), sorted(ran))
    return said


def _about(result: Result) -> dict[str, tuple[Any, ...]]:
    """Not how many anomalies an incident has: what follows from our own redirect joins it, and that was granted at another moment."""
    return {
        i.id: (str(i.root), i.signal, i.klass, i.page)
        for i in sorted(result.incidents.values(), key=lambda i: i.id)
    }


def _alike(ours: list[float] | None, theirs: list[float] | None) -> bool:
    """Counts are equal; sums are up to the order in which they were added."""
    if ours is None or theirs is None:
        return False
    return all(abs(a - b) <= 1e-6 * max(1.0, abs(a), abs(b)) for a, b in zip(ours, theirs, strict=True))


def _brief(row: list[float] | None) -> str:
    return "nothing" if row is None else f"{row[0]:g} calls"


__all__ = ["Course", "Result", "differences", "embedded", "from_log", "outage", "settings"]
