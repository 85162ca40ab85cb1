"""One source partition: what it hands on, from where it must be read again, and that a restart changes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.codec import SnapshotError
from flyball.core.events import AgentStep, Batch, Change, Evaluation, Event, GpuSample, LlmCall
from flyball.streams.front import Front
from flyball.streams.portion import Halt, Portion, decode_portion, encode_portion
from flyball.streams.windows import WindowSettings
from tests.streams.test_windows_properties import calls

SMALL = WindowSettings(lateness_s=2.0, max_delay_s=15.0, max_cells=500)


def call(at: float, event_id: str = "", **more: Any) -> LlmCall:
    return LlmCall(at=at, id=event_id or f"c{at}", provider="p", **more)


def fed(front: Front, *events: Event, received_at: float | None = None) -> Portion:
    first = front.last + 1
    offsets = np.arange(first, first + len(events))
    front.feed(Batch(events=list(events), received_at=received_at), offsets, first + len(events) - 1)
    portion = front.cut()
    assert portion is not None
    return portion


def test_a_portion_holds_closed_windows_and_the_offsets_they_span() -> None:
    portion = fed(Front("t/0", SMALL), call(1001.0), call(1011.0), call(1002.0), call(1013.0))
    (partial,) = portion.partials
    assert (portion.first, portion.last, partial.number) == (0, 3, 100)
    assert (partial.first, partial.last, partial.calls) == (0, 2, 2)
    assert (portion.newest, portion.watermark) == (1013.0, 1011.0)


def test_everything_but_calls_outside_runs_is_handed_on_one_by_one() -> None:
    wanted: list[Event] = [
        call(1001.0, run="r"), AgentStep(at=1001.0, run="r"), GpuSample(at=1001.0), Change(at=1001.0, kind="deploy"),
        Evaluation(at=1001.0, name="q", score=1.0),
    ]  # fmt: skip
    portion = fed(Front("t/0", SMALL), call(1000.0), *wanted)
    assert [s.event for s in portion.singles] == wanted
    assert [s.offset for s in portion.singles] == [1, 2, 3, 4, 5]


def test_the_key_of_a_single_event_is_the_newest_time_when_it_came() -> None:
    front = Front("t/0", SMALL)
    portion = fed(front, call(1005.0), AgentStep(at=1004.0, run="r"), AgentStep(at=1006.0, run="r"))
    assert [s.key for s in portion.singles] == [1005.0, 1006.0]
    assert [s.key for s in fed(front, AgentStep(at=1001.0, run="r")).singles] == [1006.0]


def test_copies_are_dropped_and_the_rest_keeps_its_offsets() -> None:
    portion = fed(
        Front("t/0", SMALL),
        call(1001.0, "x", run="r"),
        call(1001.0, "x", run="r"),
        AgentStep(at=1002.0, run="r"),
    )
    assert [s.offset for s in portion.singles] == [0, 2]
    assert portion.totals["duplicates"] == 1
    assert portion.totals["llm_call"] == 1


def test_what_is_needed_again_is_the_first_record_of_the_oldest_open_window() -> None:
    front = Front("t/0", SMALL, origin=7)
    assert front.needed_from == 7
    fed(front, call(1001.0), call(1002.0), call(1010.5), call(1011.0))
    assert front.needed_from == 7
    fed(front, call(1013.0))
    assert front.needed_from == 9
    front.tick(2000.0)
    assert front.cut() is not None
    assert front.needed_from == 12


def test_what_was_read_but_not_cut_is_needed_again() -> None:
    front = Front("t/0", SMALL)
    front.feed(Batch(events=[AgentStep(at=1001.0, run="r")]), np.array([0]), 0)
    assert front.needed_from == 0
    front.cut()
    assert front.needed_from == 1


def test_nothing_new_makes_no_portion_and_time_alone_only_when_a_window_passes() -> None:
    front = Front("t/0", SMALL)
    assert front.cut() is None
    fed(front, call(1001.0), received_at=1001.0)
    assert front.cut() is None
    front.tick(1005.0)
    assert front.cut() is None
    front.tick(1026.0)
    portion = front.cut()
    assert portion is not None
    assert [p.number for p in portion.partials] == [100]
    assert portion.last < portion.first


def test_a_quiet_partition_is_idle_once_no_window_is_open() -> None:
    front = Front("t/0", SMALL)
    told = front.cut(quiet=True)
    assert told is not None
    assert told.idle
    assert told.watermark == -math.inf
    front.feed(Batch(events=[call(1001.0)], received_at=1001.0), np.array([0]), 0)
    busy = front.cut(quiet=True)
    assert busy is not None
    assert not busy.idle
    front.tick(1026.0)
    again = front.cut(quiet=True)
    assert again is not None
    assert again.idle


def test_late_calls_are_counted_and_hold_nothing_back() -> None:
    front = Front("t/0", SMALL)
    fed(front, call(1001.0), call(1013.0))
    assert fed(front, call(1002.0)).totals["late"] == 1
    assert front.needed_from == 1


def test_late_calls_are_known_by_their_place_and_by_how_late_they_were() -> None:
    front = Front("t/0", SMALL)
    fed(front, call(1001.0), call(1013.0), call(1013.5))
    # One record holds a change, a copy, a late call and one in time; another the next late one.
    late, later = call(1002.0, "late"), call(1009.5, "later", run="r")
    events: list[Event] = [Change(at=1002.0, kind="deploy"), call(1013.5), late, call(1014.0), later]
    front.feed(Batch(events=events), np.array([7, 7, 7, 7, 9]), 9)
    assert [(x.offset, x.index, x.event, x.behind_s) for x in front.late] == [
        (7, 2, late, 1011.5 - 1002.0), (9, 0, later, 1011.5 - 1009.5),
    ]  # fmt: skip
    fed(front, call(1015.0))
    assert front.late == []


def test_that_a_source_stands_is_told_until_it_is_over_and_survives_a_restart() -> None:
    front = Front("t/0", SMALL)
    fed(front, call(1001.0))
    front.halt = halt = Halt(5.0, 1, "json", 8, 10, 0.5)
    told = front.cut()
    assert told is not None
    assert (told.halt, told.first, told.last) == (halt, 1, 0)
    assert decode_portion(encode_portion(told)).halt == halt
    assert front.cut() is None, "told once"
    again = Front("t/0", SMALL)
    again.restore(front.snapshot())
    assert (again.cut(), again.halt) == (None, halt)
    again.halt = None
    over = again.cut()
    assert over is not None
    assert over.halt is None


def test_records_without_events_count_as_read() -> None:
    front = Front("t/0", SMALL)
    front.feed(Batch(events=[]), np.empty(0, np.int64), 4)
    portion = front.cut()
    assert portion is not None
    assert (portion.first, portion.last) == (0, 4)


def test_damaged_times_stand_where_they_came() -> None:
    steps = [AgentStep(at=at, run="r") for at in (1000.0, math.inf, 1001.0)]
    portion = fed(Front("t/0", SMALL), *steps)
    assert [s.key for s in portion.singles] == [1000.0, 1000.0, 1001.0]
    assert portion.totals["damaged_time"] == 1


def test_the_state_of_another_source_is_refused() -> None:
    with pytest.raises(SnapshotError, match="t/0"):
        Front("t/1", SMALL).restore(Front("t/0", SMALL).snapshot())


feeds = st.lists(
    st.tuples(st.lists(calls | st.builds(AgentStep, at=st.integers(1000, 1060).map(float), run=st.just("r")), max_size=6),
              st.booleans(), st.booleans()),
    max_size=12,
)  # fmt: skip


def shell(body: Sequence[tuple[list[Event], bool, bool]], restart_at: frozenset[int]) -> list[bytes]:
    front, out = Front("t/0", SMALL), list[bytes]()
    for i, (events, cut, tick) in enumerate(body):
        if i in restart_at:
            state = front.snapshot()
            front = Front("t/0", SMALL)
            front.restore(state)
            assert front.snapshot() == state
        first = front.last + 1
        front.feed(Batch(events=events), np.arange(first, first + len(events)), first + len(events))
        if tick:
            front.tick(1000.0 + 5 * i)
        portion = front.cut() if cut else None
        if portion is not None:
            out.append(encode_portion(portion))
    front.flush()
    portion = front.cut()
    return [*out, encode_portion(portion)] if portion is not None else out


@settings(max_examples=80, deadline=None)
@given(feeds, st.frozensets(st.integers(0, 11)))
def test_a_restart_at_any_point_changes_no_portion(
    body: list[tuple[list[Event], bool, bool]], restart_at: frozenset[int]
) -> None:
    assert shell(body, restart_at) == shell(body, frozenset())
