"""The pipeline fed through fronts and portions, against the same pipeline fed directly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flyball.app.pipeline import Pipeline
from flyball.app.records import record_of
from flyball.app.store import store
from flyball.core.columns import Window
from flyball.core.directives import Directive
from flyball.core.entities import Entity
from flyball.core.estate import Emissions
from flyball.core.events import AgentStep, Batch, Event
from flyball.core.incident import Severity, State
from flyball.lab import Lab
from flyball.streams.front import Front
from flyball.streams.kafka.partition import Router
from flyball.streams.portion import Halt, Portion, decode_portion, encode_portion
from tests.app._runtime import NOW, calls, make_pipeline, outage, started

PARTITIONS = {"llm-calls": 8, "agent-steps": 4, "gpu-samples": 4, "changes": 1}


@dataclass
class Split:
    """A pipeline behind fronts: bodies are split as ingest would, each partition has a front, portions travel as bytes."""

    pipeline: Pipeline
    quiet: bool = True
    fronts: dict[str, Front] = field(default_factory=dict)
    router: Router = field(default_factory=Router)

    def __post_init__(self) -> None:
        names = [f"{topic}/{p}" for topic, n in PARTITIONS.items() for p in range(n)]
        self.fronts = {name: Front(name, self.pipeline.config.windows) for name in names}
        for front in self.fronts.values():
            self._tell(front, Emissions(), NOW, sources=names)

    def feed(self, batch: Batch) -> Emissions:
        out = Emissions()
        for (topic, partition), events in self.router.split(batch.events, PARTITIONS).items():
            front = self.fronts[f"{topic}/{partition}"]
            record = front.last + 1
            part = Batch(events=events, sender=batch.sender, received_at=batch.received_at)
            front.feed(part, np.full(len(events), record), record)
        return out

    def tick(self, now: float) -> Emissions:
        out = Emissions()
        for front in self.fronts.values():
            front.tick(now)
            self._tell(front, out, now)
        add(out, self.pipeline.tick(now))
        return out

    def _tell(self, front: Front, out: Emissions, now: float, sources: Sequence[str] = ()) -> None:
        portion = front.cut(quiet=self.quiet, sources=sources)
        if portion is not None:
            add(out, self.pipeline.feed_portion(decode_portion(encode_portion(portion)), now))


def add(out: Emissions, more: Emissions) -> None:
    for name in out.__dataclass_fields__:
        getattr(out, name).extend(getattr(more, name))


@dataclass
class Recorded:
    """The lab's governor, which notes everything that was asked of it, in order."""

    pipeline: Pipeline = field(default_factory=make_pipeline)
    script: list[tuple[str, Any]] = field(default_factory=list)
    said: Emissions = field(default_factory=Emissions)

    def _do(self, what: str, argument: Any) -> Emissions:
        self.script.append((what, argument))
        out: Emissions = getattr(self.pipeline, what)(argument)
        add(self.said, out)
        return out

    def feed(self, batch: Batch) -> Emissions:
        return self._do("feed", batch)

    def tick(self, now: float) -> Emissions:
        return self._do("tick", now)

    def take(self, order: Any) -> Emissions:
        return self._do("take", order)

    def enforced(self, report: Any) -> Emissions:
        return self._do("enforced", report)

    def directives(self) -> Sequence[Directive]:
        return self.pipeline.directives()


def told(window: Window) -> dict[tuple[str, ...], list[float]]:
    """What a window says of each cell, slots aside."""
    cells = window.cells
    columns = [cells.calls, *cells.by_class.T, *cells.counts.values(), *cells.sums.values()]
    return {
        cells.labels[slot]: [float(column[row]) for column in columns]
        for row, slot in enumerate(cells.ids.tolist())
    }


def outage_of_a_provider(lab: Lab) -> None:
    lab.at("0s").provider("b").fails(0.6)
    lab.at("100s").provider("b").recovers()
    lab.run("5m")


def loop_of_an_agent(lab: Lab) -> None:
    lab.at("0s").agent("coder").loops("repeat")
    lab.run("2m")


@functools.cache
def both(course: Callable[[Lab], None], seed: int) -> tuple[Recorded, Pipeline, Emissions]:
    """One course of the lab: governed directly, and the very same input through fronts."""
    direct = Recorded()
    course(Lab(lambda: direct, seed=seed, rate=10.0, warmup="6m"))
    split = Split(make_pipeline())
    said = Emissions()
    for what, argument in direct.script:
        target = split if what in ("feed", "tick") else split.pipeline
        add(said, getattr(target, what)(argument))
    return direct, split.pipeline, said


COURSES = [
    pytest.param(outage_of_a_provider, 201, id="outage"),
    pytest.param(loop_of_an_agent, 202, id="loop"),
]


@pytest.mark.parametrize(("course", "seed"), COURSES)
def test_fronts_and_portions_give_the_windows_of_the_direct_way(
    course: Callable[[Lab], None], seed: int
) -> None:
    direct, pipeline, said = both(course, seed)
    assert [w.start for w in said.windows] == [w.start for w in direct.said.windows]
    for ours, theirs in zip(said.windows, direct.said.windows, strict=True):
        found, wanted = told(ours), told(theirs)
        assert found.keys() == wanted.keys()
        for labels, row in wanted.items():
            assert found[labels] == pytest.approx(row, rel=1e-9)
    assert pipeline.counters.events == direct.pipeline.counters.events
    assert pipeline.duplicates == direct.pipeline.duplicates
    assert pipeline.window_stats.late == direct.pipeline.window_stats.late == 0


@pytest.mark.parametrize(("course", "seed"), COURSES)
def test_fronts_and_portions_give_the_incidents_and_directives_of_the_direct_way(
    course: Callable[[Lab], None], seed: int
) -> None:
    direct, pipeline, said = both(course, seed)
    assert direct.said.changes, "nothing happened"
    assert sorted(a.id for a in said.anomalies) == sorted(a.id for a in direct.said.anomalies)
    assert _courses(said) == _courses(direct.said)
    assert [(d.change, d.directive.id) for d in said.directives] == [
        (d.change, d.directive.id) for d in direct.said.directives
    ]
    ours, theirs = pipeline.counters.as_dict(), direct.pipeline.counters.as_dict()
    # Guards are asked again at every tick: one that stands on the edge may turn within the second or two that sources wait for each other.
    assert {k: n for k, n in ours.items() if k != "decisions"} == {
        k: n for k, n in theirs.items() if k != "decisions"
    }


def _courses(said: Emissions) -> list[tuple[str, str, str]]:
    return [(c.incident.id, c.old, c.new) for c in said.changes if c.old != c.new]


def test_the_outage_was_acted_upon() -> None:
    direct, _, _ = both(outage_of_a_provider, 201)
    assert {d.change for d in direct.said.directives} >= {"granted"}


def front_of(pipeline: Pipeline) -> Front:
    return Front("llm-calls/0", pipeline.config.windows)


def sent(front: Front, events: Sequence[Event]) -> Portion:
    record = front.last + 1
    front.feed(Batch(events=events, received_at=events[-1].at), np.full(len(events), record), record)
    portion = front.cut()
    assert portion is not None
    return portion


def test_a_restart_between_portions_changes_nothing_after() -> None:
    script = [outage(NOW + 2.0 * i) for i in range(30)]

    def course(restart: bool) -> list[Any]:
        pipeline = make_pipeline()
        front, heard = front_of(pipeline), list[Any]()
        for i, events in enumerate(script):
            if restart:
                state = pipeline.snapshot()
                pipeline = make_pipeline()
                pipeline.restore(state)
                assert pipeline.snapshot() == state
            heard.append(pipeline.feed_portion(sent(front, events), NOW + 2.0 * i).changes)
            heard.append(pipeline.tick(NOW + 2.0 * i + 1.0).changes)
        return [heard, pipeline.counters.as_dict(), pipeline.watermark, pipeline.window_stats]

    assert course(restart=True) == course(restart=False)


def test_a_portion_that_comes_twice_says_nothing_more() -> None:
    pipeline = make_pipeline()
    front = front_of(pipeline)
    first = sent(front, [*outage(NOW), AgentStep(at=NOW, run="r", id="s"), *outage(NOW + 15.0)])
    assert len(pipeline.feed_portion(first, NOW).windows) == 1
    before = pipeline.counters.as_dict()
    again = pipeline.feed_portion(first, NOW)
    assert (again.windows, again.anomalies, again.changes) == ([], [], [])
    assert pipeline.counters.as_dict() == before


def test_from_the_first_portion_on_calls_come_in_portions_only() -> None:
    pipeline = make_pipeline()
    pipeline.feed(Batch(events=calls(3)))
    portion = sent(front_of(pipeline), calls(2, NOW + 60.0))
    assert [w.cells.calls.sum() for w in pipeline.feed_portion(portion, NOW).windows] == [3], (
        "what was open is closed"
    )
    with pytest.raises(ValueError, match="in portions"):
        pipeline.feed(Batch(events=calls(1, NOW + 61.0)))
    pipeline.feed(Batch(events=[AgentStep(at=NOW + 61.0, run="r")]))
    assert pipeline.counters.events == {"llm_call": 5, "agent_step": 1}


def test_ticks_pass_over_a_source_that_says_nothing_more() -> None:
    pipeline = make_pipeline()
    front = front_of(pipeline)
    front.feed(Batch(events=calls(1)), np.array([0]), 0)
    told = front.cut(sources=("llm-calls/0", "llm-calls/1"))
    assert told is not None
    pipeline.feed_portion(told, NOW)
    assert pipeline.feed_portion(sent(front, calls(1, NOW + 30.0)), NOW + 5.0).windows == []
    assert pipeline.tick(NOW + 29.0).windows == []
    assert len(pipeline.tick(NOW + 31.0).windows) == 1


def test_the_log_takes_a_portion_and_how_far_its_topic_was_read_in_one(tmp_path: Path) -> None:
    def body(at: float) -> bytes:
        return encode_portion(sent(front, outage(at)))

    front = front_of(make_pipeline())
    with started(tmp_path) as runtime:
        for offset, at in enumerate((NOW, NOW + 15.0)):
            raw = body(at)
            runtime.take_portion(raw, decode_portion(raw), {("windows", 0): offset + 1}).result(30)
        assert runtime.wait_for(runtime.appended)
        before = runtime.figures.totals
    with started(tmp_path) as runtime:
        assert runtime.consumed("windows") == {0: 2}
        assert runtime.figures.totals == before
        assert before["windows"] == 1
        payloads = [record_of(row).payload for row in store.iter_log(runtime.reader, 0, runtime.appended)]
        assert [p.source for p in payloads if isinstance(p, Portion)] == ["llm-calls/0"] * 2


def test_a_source_that_stands_is_one_incident_about_flyball_itself_until_it_goes_well() -> None:
    pipeline = make_pipeline()
    fronts = [Front(f"llm-calls/{p}", pipeline.config.windows) for p in range(2)]
    halt = Halt(NOW + 5.0, 17, "json", 80, 100, 0.5)
    opened: list[Any] = []

    def step(second: float) -> None:
        nonlocal pipeline
        for p, front in enumerate(fronts):
            portion = sent(front, calls(2, NOW + second, prefix=f"{p}-{second}"))
            opened.extend(pipeline.feed_portion(portion, NOW + second).changes)
        opened.extend(pipeline.tick(NOW + second).changes)
        state = pipeline.snapshot()
        pipeline = make_pipeline()
        pipeline.restore(state)

    step(0.0)
    fronts[0].halt = halt
    step(10.0)
    (told,) = opened
    assert (told.incident.root, told.incident.signal) == (Entity("stream", "flyball"), "stream.poison")
    assert told.incident.severity is Severity.MEDIUM
    assert told.incident.evidence["source"] == "llm-calls/0"
    assert told.incident.evidence["record"] == 17
    fronts[1].halt = halt
    for second in range(20, 200, 10):
        step(float(second))
    fronts[0].halt = None
    for second in range(200, 400, 10):
        step(float(second))
    assert len({c.incident.id for c in opened}) == 1
    assert opened[-1].incident.state is not State.RESOLVED, "one of the two still stands"
    fronts[1].halt = None
    for second in range(400, 500, 10):
        step(float(second))
    assert len({c.incident.id for c in opened}) == 1
    assert opened[-1].incident.state is State.RESOLVED
