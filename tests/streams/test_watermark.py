"""How far time has come, and whose clock is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.streams.watermark import Watermarks


def deliver(
    w: Watermarks, name: str, *at: float, received_at: float | None = None, calls: bool = True
) -> list[float]:
    """Feed one body; returns the corrected times."""
    sender = w.sender(name)
    corrected = w.correct(sender, np.array(at), received_at)
    w.observe(name, sender, float(corrected.max()), received_at, calls=calls)
    return [float(x) for x in corrected]


def test_the_watermark_is_the_newest_event_less_the_lateness() -> None:
    w = Watermarks(2.0, 15.0)
    deliver(w, "a", 100.0, 98.0)
    assert w.value == 98.0


def test_the_slowest_active_sender_is_waited_for() -> None:
    w = Watermarks(2.0, 15.0)
    deliver(w, "slow", 95.0)
    deliver(w, "fast", 100.0)
    assert w.value == 93.0


def test_a_sender_is_never_waited_for_longer_than_the_delay() -> None:
    w = Watermarks(2.0, 15.0)
    deliver(w, "stuck", 100.0, received_at=100.0)
    for now in range(101, 130):
        deliver(w, "alive", float(now), received_at=float(now))
        deliver(w, "stuck", 100.0, received_at=float(now))
    assert w.value == 129.0 - 15.0


def test_a_sender_that_died_stops_holding_time_back() -> None:
    w = Watermarks(2.0, 15.0)
    deliver(w, "dead", 100.0)
    deliver(w, "alive", 115.5)
    assert w.value == 113.5


def test_the_watermark_never_goes_back() -> None:
    w = Watermarks(2.0, 15.0)
    deliver(w, "a", 100.0)
    deliver(w, "b", 50.0)
    assert w.value == 98.0


def test_ticks_move_time_on_when_nothing_arrives() -> None:
    w = Watermarks(2.0, 15.0)
    deliver(w, "a", 100.0, received_at=101.0)
    w.tick(110.0)
    assert w.value == 98.0
    w.tick(117.0)
    assert w.value == 102.0


def test_a_tick_before_the_first_event_means_nothing() -> None:
    w = Watermarks(2.0, 15.0)
    w.tick(1e9)
    assert w.value == -math.inf


def test_ticks_do_not_overtake_a_stream_that_always_runs_a_minute_behind() -> None:
    w = Watermarks(2.0, 15.0)
    for now in range(200, 230):
        deliver(w, "a", now - 60.0, received_at=float(now))
        w.tick(now + 0.5)
        assert w.value <= now - 60.0 - 2.0


def test_a_sender_that_reports_no_calls_holds_nobody_back() -> None:
    w = Watermarks(2.0, 15.0)
    deliver(w, "deploys", 95.0, calls=False)
    deliver(w, "gateway", 100.0)
    assert w.value == 98.0


def test_timestamps_from_the_future_are_clamped_and_counted() -> None:
    w = Watermarks(2.0, 15.0)
    assert deliver(w, "a", 100.0, 101.5, 4e9, received_at=100.0) == [100.0, 101.5, 100.0]
    assert w.clamped_future == 1
    assert w.newest == 101.5


def test_without_an_arrival_nothing_is_clamped() -> None:
    w = Watermarks(2.0, 15.0)
    assert deliver(w, "a", 100.0, 500.0) == [100.0, 500.0]
    assert w.clamped_future == 0


def test_a_clock_that_leads_is_measured_and_taken_out() -> None:
    w = Watermarks(2.0, 15.0)
    for now in range(100, 110):
        corrected = deliver(w, "a", now + 30.0, now + 29.0, received_at=float(now))
    assert w.sender("a").correction_s == -30.0
    assert corrected == [109.0, 108.0]
    assert w.clamped_future == 2 * 4  # until five bodies have told


def test_a_clock_that_lags_by_minutes_is_measured_and_taken_out() -> None:
    w = Watermarks(2.0, 15.0)
    for now in range(1000, 1010):
        corrected = deliver(w, "a", now - 300.0, received_at=float(now))
    assert w.sender("a").correction_s == 300.0
    assert corrected == [1009.0]


def test_a_backlog_being_worked_off_is_late_not_skewed() -> None:
    w = Watermarks(2.0, 15.0)
    for i in range(20):
        deliver(w, "a", 1000.0 + 60.0 * i, received_at=3000.0 + i)
    assert w.sender("a").correction_s == 0.0


def test_one_held_back_body_is_no_skew() -> None:
    w = Watermarks(2.0, 15.0)
    for now in range(1000, 1020):
        deliver(w, "a", now - (600.0 if now == 1010 else 1.0), received_at=float(now))
    assert w.sender("a").correction_s == 0.0


def test_a_corrected_clock_that_is_put_right_is_believed_again() -> None:
    w = Watermarks(2.0, 15.0)
    for now in range(100, 140):
        deliver(w, "a", now + (30.0 if now < 120 else 0.0), received_at=float(now))
    assert w.sender("a").correction_s == 0.0


def test_a_few_broken_timestamps_in_every_body_do_not_shift_the_good_ones() -> None:
    w = Watermarks(2.0, 15.0)
    for now in range(100, 120):
        corrected = deliver(w, "a", float(now), now - 1.0, now + 3600.0, received_at=float(now))
    assert corrected == [119.0, 118.0, 119.0]


def test_senders_are_forgotten_when_there_are_too_many() -> None:
    w = Watermarks(2.0, 15.0, max_senders=100)
    for i in range(5000):
        deliver(w, f"pod-{i}", 100.0 + i)
    assert len(w.senders) <= 100
    assert len(w._queue) <= 200
    assert w.value == 5099.0 - 2.0 - 13.0


deliveries = st.lists(
    st.tuples(st.sampled_from("abc"), st.floats(0, 200), st.none() | st.floats(0, 200), st.booleans()),
    max_size=30,
)


@given(deliveries)
def test_the_watermark_is_monotone_and_never_too_far_behind(
    body: list[tuple[str, float, float | None, bool]],
) -> None:
    w = Watermarks(2.0, 15.0)
    last = -math.inf
    for name, at, received_at, tick in body:
        deliver(w, name, at, received_at=received_at)
        if tick:
            w.tick(at)
        assert w.value >= max(last, w.newest - 15.0)
        last = w.value


@given(deliveries, st.integers(0, 30))
def test_restoring_changes_nothing(body: list[tuple[str, float, float | None, bool]], cut: int) -> None:
    one, two = Watermarks(2.0, 15.0), Watermarks(2.0, 15.0)
    for i, (name, at, received_at, tick) in enumerate(body):
        if i == cut:
            state = two.state()
            two = Watermarks(2.0, 15.0)
            two.restore(state)
        for w in (one, two):
            deliver(w, name, at, received_at=received_at)
            if tick:
                w.tick(at + 1.0)
        assert one.value == pytest.approx(two.value, abs=0)
        assert {k: s.correction_s for k, s in one.senders.items()} == {
            k: s.correction_s for k, s in two.senders.items()
        }


def sparse(w: Watermarks, bodies: int, held_s: float) -> None:
    """A sender of little traffic whose bodies reach back `held_s`, beside one that sends each second."""
    for now in range(1000, 1000 + 7 * bodies):
        deliver(w, "busy", now - 0.5, received_at=float(now))
        if now % 7 == 0:
            deliver(w, "sparse", now - held_s, now - held_s + 0.1, received_at=float(now))


def test_a_sparse_sender_that_never_holds_events_back_for_long_is_not_waited_for_longer_than_that() -> None:
    w = Watermarks(2.0, 15.0)
    sparse(w, bodies=10, held_s=3.0)
    last = w._now
    assert w.value >= last - 3.0 - 2.0 - 1.0


def test_a_sender_is_waited_for_as_before_until_its_habit_is_known() -> None:
    w = Watermarks(2.0, 15.0)
    for now in (1000.0, 1007.0, 1014.0):
        deliver(w, "sparse", now - 3.0, received_at=now)
    deliver(w, "busy", 1019.0, received_at=1019.5)
    assert w.value == 1011.0 - 2.0


def test_a_sender_that_once_held_events_back_longer_is_waited_for_longer() -> None:
    w = Watermarks(2.0, 15.0)
    sparse(w, bodies=10, held_s=3.0)
    now = w._now + 1
    deliver(w, "sparse", now - 9.0, received_at=now)
    before = w.value
    deliver(w, "busy", now + 3.5, received_at=now + 4.0)
    assert w.value == max(before, now + 4.0 - 9.0 - 2.0)
