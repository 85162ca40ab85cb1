"""Windows and single events of many sources, however their portions come, against one stream over all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.columns import Window
from flyball.core.events import AgentStep, Batch, Change, Event, LlmCall
from flyball.streams.front import Front
from flyball.streams.merging import Merged, Merger
from flyball.streams.portion import Portion, PortionError, decode_portion, encode_in_pieces
from flyball.streams.windows import Windows, WindowSettings
from tests.streams.test_windows_properties import calls as any_call
from tests.streams.test_windows_properties import check

SMALL = WindowSettings(lateness_s=2.0, max_delay_s=1e6, max_cells=500)

steps = st.builds(
    AgentStep, at=st.integers(0, 240).map(lambda n: 1000 + n / 4), run=st.sampled_from("pqr"), id=st.uuids().map(str)
)  # fmt: skip
changes = st.builds(
    Change, at=st.integers(0, 240).map(lambda n: 1000 + n / 4), kind=st.just("deploy"), id=st.uuids().map(str)
)
in_runs = st.builds(lambda c, run: msgspec.structs.replace(c, run=run), any_call, st.sampled_from(["", "p"]))
streams = st.lists(in_runs | in_runs | steps | changes, max_size=60)


@dataclass
class Partition:
    """A log of records, each with one or two events, and whoever reads it: fed, cut, snapshotted, killed at any point."""

    name: str
    records: list[list[Event]]
    random: Random
    front: Front = field(init=False)
    saved: bytes | None = None
    sent: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.front = Front(self.name, SMALL)

    @property
    def done(self) -> bool:
        return self.front.last + 1 >= len(self.records)

    def read(self) -> None:
        first = self.front.last + 1
        some = self.records[first : first + self.random.randint(1, 9)]
        events = [e for r in some for e in r]
        offsets = np.array([first + i for i, r in enumerate(some) for _ in r], np.int64)
        self.front.feed(Batch(events=events), offsets, first + len(some) - 1)

    def cut(self, sources: Sequence[str] = ()) -> None:
        portion = self.front.cut(sources=sources)
        if portion is not None:
            self.sent += encode_in_pieces(portion, self.random.choice([500, 1 << 20]))

    def die(self) -> None:
        """What was sent stays sent; what was read since the newest snapshot is read again, otherwise cut."""
        front = Front(self.name, SMALL)
        if self.saved is not None:
            front.restore(self.saved)
        self.front = front

    def live(self, sources: Sequence[str], *, crashes: bool) -> None:
        """Reads to the end, with whatever may happen on the way."""
        self.cut(sources)
        deaths = 4 if crashes else 0
        while not self.done:
            self.read()
            if self.random.random() < 0.4:
                self.cut()
            if self.random.random() < 0.2:
                self.saved = self.front.snapshot()
            if deaths and self.random.random() < 0.2:
                deaths -= 1
                self.die()
        self.front.flush()
        self.cut()


def partitions(events: Sequence[Event], n: int, seed: int) -> list[Partition]:
    """Calls by their id, so that copies of one meet; everything of a run in one place; in the order of time."""
    random = Random(seed)
    logs: list[list[Event]] = [[] for _ in range(n)]
    where: dict[str, int] = {}
    for e in sorted(events, key=lambda e: e.at):
        identity = getattr(e, "run", "") or str(getattr(e, "id", ""))
        log = logs[where.setdefault(identity, random.randrange(n))]
        log.append(e)
        if type(e) is LlmCall and random.random() < 0.2:
            log.append(e)  # told twice
    made = []
    for k, log in enumerate(logs):
        records, rest = [], list(log)
        while rest:
            size = random.randint(0, 2)
            records.append(rest[:size])
            rest = rest[size:]
        made.append(Partition(f"t/{k}", records, Random(seed + k)))
    return made


def interleaved(lines: Sequence[Sequence[bytes]], seed: int, *, twice: bool) -> Iterator[Portion]:
    """Each line in its own order, some portions once more right after, or later."""
    random = Random(seed)
    left = [list(line) for line in lines]
    while any(left):
        line = random.choice([x for x in left if x])
        raw = line.pop(0)
        yield decode_portion(raw)
        if twice and random.random() < 0.3:
            yield decode_portion(raw)
        if twice and line and random.random() < 0.1:
            line.insert(random.randrange(len(line)), raw)


def merged(portions: Iterator[Portion], restart: Random | None = None) -> tuple[list[Merged], Merger]:
    merger, out = Merger(SMALL), list[Merged]()
    for portion in portions:
        if restart is not None and restart.random() < 0.3:
            state = merger.snapshot()
            merger = Merger(SMALL)
            merger.restore(state)
            assert merger.snapshot() == state
        out += merger.feed(portion, 0.0)
    return out + merger.flush(), merger


def in_order(out: Sequence[Merged]) -> list[Any]:
    """What came, one by one: cutting into batches aside."""
    found: list[Any] = []
    for item in out:
        found += [item.start] if isinstance(item, Window) else list(item.events)
    return found


@settings(max_examples=120, deadline=None)
@given(streams, st.integers(1, 4), st.integers(0, 2**32), st.booleans(), st.booleans())
def test_merged_windows_equal_those_of_one_stream_whatever_happens_to_the_portions(
    events: list[Event], n: int, seed: int, crashes: bool, twice: bool
) -> None:
    parts = partitions(events, n, seed)
    for p in parts:
        p.live([q.name for q in parts], crashes=crashes)
    out, merger = merged(
        interleaved([p.sent for p in parts], seed, twice=twice), Random(seed) if crashes else None
    )
    windows = [w for w in out if isinstance(w, Window)]
    calls = [e for e in events if type(e) is LlmCall]
    check(windows, calls)
    whole = Windows(replace(SMALL, max_delay_s=1e6))
    straight = whole.feed(Batch(events=sorted(calls, key=lambda e: e.at))) + whole.flush()
    assert [w.start for w in windows] == [w.start for w in straight]
    singles = [e for item in out if isinstance(item, Batch) for e in item.events]
    wanted = [e for e in events if type(e) is not LlmCall or e.run]
    assert sorted(map(repr, singles)) == sorted(map(repr, wanted)), "nothing lost, nothing twice"
    assert (merger.late, merger.missed, merger.stats.late) == (0, 0, 0)
    assert merger.totals["llm_call"] == len(calls)
    assert sum(merger.stats.events.values()) == len(events)


@settings(max_examples=80, deadline=None)
@given(streams, st.integers(1, 4), st.integers(0, 2**32), st.integers(0, 2**32), st.integers(0, 2**32))
def test_the_order_of_what_comes_out_does_not_depend_on_interleaving_cuts_or_crashes(
    events: list[Event], n: int, split: int, one: int, other: int
) -> None:
    orders = []
    for seed, rough in ((one, False), (other, True)):
        parts = partitions(events, n, split)
        for k, p in enumerate(parts):
            p.random = Random(seed + k)
            p.live([q.name for q in parts], crashes=rough)
        orders.append(in_order(merged(interleaved([p.sent for p in parts], seed, twice=rough))[0]))
    assert orders[0] == orders[1]


@settings(max_examples=60, deadline=None)
@given(streams, st.integers(0, 2**32))
def test_a_front_that_lost_its_state_and_reads_again_from_what_is_needed_changes_no_window(
    events: list[Event], seed: int
) -> None:
    """Without copies, which only its memory could tell."""
    random = Random(seed)
    records = [[e] for e in sorted(events, key=lambda e: e.at)]
    partition = Partition("t/0", records, random)
    partition.cut(["t/0"])
    committed = 0
    while not partition.done:
        partition.read()
        if random.random() < 0.5:
            partition.cut()
            committed = partition.front.needed_from
        if random.random() < 0.2:
            partition.front = Front("t/0", SMALL, origin=committed)
    partition.front.flush()
    partition.cut()
    out, merger = merged(decode_portion(raw) for raw in partition.sent)
    check([w for w in out if isinstance(w, Window)], [e for e in events if type(e) is LlmCall])
    singles = [e for item in out if isinstance(item, Batch) for e in item.events]
    assert sorted(map(repr, singles)) == sorted(repr(e) for e in events if type(e) is not LlmCall or e.run)
    assert (merger.late, merger.missed) == (0, 0)


def call(at: float, k: int = 0, **more: Any) -> LlmCall:
    return LlmCall(at=at, id=f"{at}-{k}", provider="p", **more)


def told(
    front: Front,
    *events: Event,
    quiet: bool = False,
    sources: Sequence[str] = (),
    still: dict[str, float] | None = None,
) -> Portion:
    first = front.last + 1
    front.feed(Batch(events=list(events)), np.arange(first, first + len(events)), first + len(events) - 1)
    portion = front.cut(quiet=quiet, sources=sources, still=still)
    assert portion is not None
    return portion


def two() -> tuple[Front, Front, Merger]:
    return Front("a", SMALL), Front("b", SMALL), Merger(SMALL, stall_s=30.0)


BOTH = ("a", "b")


def test_a_window_waits_for_the_slowest_source() -> None:
    a, b, merger = two()
    assert merger.feed(told(a, call(1001.0), call(1013.0), sources=BOTH), 0.0) == []
    assert merger.feed(told(b, call(1002.0), call(1009.0)), 0.0) == []
    (window,) = merger.feed(told(b, call(1012.5)), 1.0)
    assert isinstance(window, Window)
    assert window.cells.calls.sum() == 3


def test_an_idle_source_holds_nobody_back() -> None:
    a, b, merger = two()
    assert merger.feed(told(b, quiet=True, sources=BOTH), 0.0) == []
    (window,) = merger.feed(told(a, call(1001.0), call(1013.0)), 0.0)
    assert isinstance(window, Window)


def test_a_source_whose_time_stands_still_holds_the_others_for_no_longer_than_the_setting() -> None:
    a, b, merger = two()
    merger.feed(told(b, call(1000.5), sources=BOTH), 0.0)
    assert merger.feed(told(a, call(1001.0), call(1013.0)), 5.0) == []
    assert merger.tick(29.9) == []
    assert merger.feed(told(a, call(1014.0)), 29.95) == []
    (window,) = merger.tick(30.0)
    assert isinstance(window, Window)
    assert window.cells.calls.sum() == 1
    assert merger.feed(told(b, call(1013.0)), 31.0) == []
    assert merger.late == 1, "what the stalled one had of that window came too late, and is counted"


def test_a_source_that_is_expected_but_silent_is_waited_for_until_it_counts_as_stalled() -> None:
    a, _, merger = two()
    assert merger.feed(told(a, call(1001.0), call(1013.0), sources=BOTH), 100.0) == []
    assert merger.tick(129.0) == []
    assert [type(x) for x in merger.feed(told(a, call(1014.0)), 131.0)] == [Window]


def test_when_nobody_was_at_work_nobody_counts_as_stalled() -> None:
    a, b, merger = two()
    merger.feed(told(b, call(1000.5), sources=BOTH), 0.0)
    merger.feed(told(a, call(1001.0), still={}), 1.0)
    # All workers, or the brokers, are down for a minute; who reads `a` is back first.
    assert merger.tick(61.0) == []
    assert merger.feed(told(a, call(1061.0), sources=BOTH, still={}), 62.0) == []
    out = merger.feed(told(b, call(1013.0), call(1061.0), sources=BOTH), 63.0)
    assert [w.cells.calls.sum() for w in out if isinstance(w, Window)] == [2, 1]
    assert merger.late == 0


def test_a_source_that_stands_still_while_others_are_at_work_is_passed_over_also_when_they_have_nothing() -> (
    None
):
    a, b, merger = two()
    merger.feed(told(b, call(1000.5), sources=BOTH), 0.0)
    assert merger.feed(told(a, call(1001.0), call(1013.0)), 1.0) == []
    found = [w for at in range(2, 32) for w in merger.feed(told(a, still={}), float(at))]
    assert len(found) == 1


def test_what_comes_to_an_idle_source_while_nobody_reads_it_is_waited_for() -> None:
    a, b, merger = two()
    merger.feed(told(b, quiet=True, sources=BOTH), 1000.0)
    assert merger.feed(told(a, call(1001.0), still={"b": 1002.0}), 1002.0) == []
    # Then its worker dies, and something comes that is read only when another has taken over.
    assert merger.feed(told(a, call(1013.0), still={}), 1014.0) == []
    out = merger.feed(told(b, call(1005.0), call(1013.5), sources=BOTH), 1015.0)
    assert [w.cells.calls.sum() for w in out if isinstance(w, Window)] == [2]
    assert merger.late == 0


def test_the_word_that_an_idle_source_is_still_read_lets_time_pass_in_it() -> None:
    a, b, merger = two()
    merger.feed(told(b, quiet=True, sources=BOTH), 1000.0)
    merger.feed(told(a, call(1001.0), still={"b": 1002.0}), 1002.0)
    assert merger.feed(told(a, call(1013.0)), 1013.5) == []
    again = Merger(SMALL, stall_s=30.0)
    again.restore(merger.snapshot())
    for m in (merger, again):
        assert len(m.feed(told(Front("a", SMALL), still={"b": 1013.0}), 1014.0)) == 1


def one_is_empty() -> tuple[Front, Front, Merger]:
    """`b` had a call at 995, and its window has closed by time alone: at 1016 it is empty."""
    settings = WindowSettings(lateness_s=2.0, max_delay_s=15.0, max_cells=500)
    a, b, merger = Front("a", settings), Front("b", settings), Merger(settings, stall_s=30.0)
    merger.feed(told(b, call(995.0), sources=BOTH), 996.0)
    merger.feed(told(a, call(1014.0)), 1016.0)
    b.tick(1016.0)
    assert len(merger.feed(told(b, quiet=True, still={"b": 1016.0}), 1016.0)) == 1
    return a, b, merger


def test_what_a_sender_held_back_is_not_late_in_a_partition_that_was_empty_meanwhile() -> None:
    a, b, merger = one_is_empty()
    # A sender to both sends what it gathered over five seconds, and `b` is read a moment after `a`.
    assert merger.feed(told(a, call(1022.0), call(1023.0), still={"b": 1023.9}), 1024.0) == []
    out = merger.feed(told(b, call(1019.0), call(1022.9)), 1024.5)
    assert [w.cells.calls.sum() for w in out if isinstance(w, Window)] == [2]
    assert merger.late == 0


def test_a_partition_that_stays_empty_is_waited_for_as_long_as_exporters_hold_calls_back() -> None:
    a, _, merger = one_is_empty()
    assert merger.feed(told(a, call(1040.0), still={"b": 1026.9}), 1041.0) == []
    (window,) = merger.feed(told(a, still={"b": 1027.0}), 1041.5)
    assert isinstance(window, Window)


def test_single_events_come_in_order_of_time_and_windows_between_them() -> None:
    a, b, merger = two()
    late_step = AgentStep(at=1012.5, run="b")
    assert merger.feed(told(a, AgentStep(at=1001.0, run="a"), call(1013.0), sources=BOTH), 0.0) == []
    out = merger.feed(told(b, AgentStep(at=1000.0, run="b"), call(1003.0), late_step), 0.0)
    assert [type(x) for x in out] == [Batch, Window, Batch]
    assert isinstance(out[0], Batch)
    assert [e.at for e in out[0].events] == [1000.0, 1001.0]
    assert isinstance(out[2], Batch)
    assert out[2].events == [late_step]


def test_the_only_source_is_not_waited_for() -> None:
    a, _, merger = two()
    (batch,) = merger.feed(told(a, AgentStep(at=1001.0, run="a")), 0.0)
    assert isinstance(batch, Batch)


def test_a_merged_window_ignores_the_same_part_again_and_counts_what_more_comes() -> None:
    a, _, merger = two()
    first = told(a, call(1001.0), call(1013.0))
    assert len(merger.feed(first, 0.0)) == 1
    assert merger.feed(first, 0.0) == []
    assert merger.late == 0
    more = Front("a", SMALL)
    assert merger.feed(told(more, call(1001.0), call(1002.0), call(1013.0), call(1014.0)), 0.0) == []
    assert merger.late == 1


def test_a_front_that_begins_again_from_the_start_counts_nothing_twice() -> None:
    a, _, merger = two()
    events: list[Event] = [call(1001.0), AgentStep(at=1001.5, run="a"), call(1013.0)]
    merger.feed(told(a, *events, sources=BOTH), 0.0)
    again = Front("a", SMALL)
    taken_on = again.cut(sources=BOTH)
    assert taken_on is not None
    merger.feed(taken_on, 1.0)
    merger.feed(told(again, *events, call(1014.0)), 1.0)
    assert merger.stats.events == {"llm_call": 3, "agent_step": 1}


def test_records_that_nobody_told_are_counted_as_missed() -> None:
    a, _, merger = two()
    merger.feed(told(a, call(1001.0)), 0.0)
    merger.feed(told(Front("a", SMALL, origin=5), call(1002.0)), 0.0)
    assert merger.missed == 4


def test_windows_of_another_length_are_refused_before_anything_is_taken() -> None:
    merger = Merger(SMALL)
    before = merger.snapshot()
    portion = told(Front("a", replace(SMALL, window_s=5.0)), call(1001.0), call(1013.0))
    with pytest.raises(PortionError, match="set window_s alike"):
        merger.feed(portion, 0.0)
    assert merger.snapshot() == before


def test_a_portion_in_pieces_counts_once_it_is_whole_also_when_a_stranger_speaks_between() -> None:
    a, _, merger = two()
    portion = told(a, *[call(1001.0, k, app=f"app-{k}") for k in range(40)], call(1013.0))
    mine = [decode_portion(raw) for raw in encode_in_pieces(portion, 300)]
    assert len(mine) > 2
    other = told(Front("a", SMALL), *[call(1001.0, k, app=f"app-{k}") for k in range(60)], call(1013.0))
    stranger = decode_portion(encode_in_pieces(other, 300)[0])
    for piece in [mine[0], stranger, *mine[1:-1], mine[0]]:
        assert merger.feed(piece, 0.0) == []
    again = Merger(SMALL)
    again.restore(merger.snapshot())
    (window,) = again.feed(mine[-1], 0.0)
    assert isinstance(window, Window)
    assert window.cells.calls.sum() == 40
    assert again.feed(mine[-1], 0.0) == []


def test_the_watermark_is_that_of_what_was_merged() -> None:
    a, _, merger = two()
    assert merger.watermark == -math.inf
    merger.feed(told(a, call(1001.0), call(1013.0)), 0.0)
    assert merger.watermark == 1010.0
    assert merger.stats.windows_closed == 1
