"""Token buckets: a limit holds over time, is charged after the call, forgives nobody's debt but never starves for ever."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.core.directives import Directive
from flyball.remediation.points import Buckets
from flyball.remediation.points.buckets import MOST_OWED_S, OPEN_S


class Time:
    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


def limit(id: str = "DIR-1", **params: Any) -> Directive:
    return Directive(
        id=id, kind="limit", scope={"tenant": "t1"}, params=params, granted_at=0.0, expires_at=1e9, incident="INC-1",
        runbook="r", step="s",
    )  # fmt: skip


def made(time: Time, *held: Directive, share: float = 1.0) -> Buckets:
    buckets = Buckets(time, share)
    buckets.keep(held)
    return buckets


def test_over_an_hour_a_limit_of_requests_holds_whatever_is_asked() -> None:
    time, held = Time(), limit(requests_per_min=60.0)
    buckets = made(time, held)
    passed = 0
    for step in range(3600 * 4):
        time.at = step / 4.0
        passed += sum(buckets.admit([held]) is None for _ in range(2))
    assert 3600 <= passed <= 3600 + 10


def test_a_slow_limit_still_lets_one_through_at_a_time() -> None:
    time, held = Time(), limit(requests_per_min=0.5)
    buckets = made(time, held)
    assert buckets.admit([held]) is None
    assert buckets.admit([held]) == ("DIR-1", "requests_per_min", 120.0)
    time.at = 119.0
    assert buckets.admit([held]) is not None
    time.at = 120.0
    assert buckets.admit([held]) is None


@pytest.mark.parametrize("latency_s", [0.0, 5.0, 60.0])
@pytest.mark.parametrize("at_once", [1, 40])
def test_over_an_hour_a_limit_of_dollars_holds_however_long_and_many_the_calls_are(
    latency_s: float, at_once: int
) -> None:
    """What one call costs is known when it ends; calls under way count with what those before them cost."""
    time, held, cost = Time(), limit(usd_per_hour=36.0), 0.05
    buckets = Buckets(time)
    buckets.charge([], tokens=None, usd=0.04)  # calls before there was any limit
    buckets.keep([held])
    under_way: deque[float] = deque()
    spent = 0.0
    for second in range(3600):
        time.at = float(second)
        while under_way and under_way[0] <= time.at:
            under_way.popleft()
            buckets.charge(["DIR-1"], tokens=None, usd=cost)
        for _ in range(at_once):
            if buckets.admit([held]) is None:
                under_way.append(time.at + latency_s)
                spent += cost
    assert 36.0 * 0.9 <= spent <= 36.0 * 1.1


def test_before_anybody_knows_what_calls_cost_a_limit_of_dollars_lets_them_through() -> None:
    time, held = Time(), limit(usd_per_hour=36.0)
    buckets = made(time, held)
    assert all(buckets.admit([held]) is None for _ in range(50))
    buckets.charge(["DIR-1"], tokens=None, usd=0.2)
    assert buckets.admit([held]) is not None


def test_a_limit_of_tokens_is_charged_and_paid_back() -> None:
    time, held = Time(), limit(tokens_per_min=600.0)
    buckets = made(time, held)
    assert buckets.admit([held]) is None
    buckets.charge(["DIR-1"], tokens=400.0, usd=None)
    assert buckets.admit([held]) == ("DIR-1", "tokens_per_min", 30.0)
    time.at = 31.0
    assert buckets.admit([held]) is None


def test_one_huge_call_keeps_the_others_waiting_for_ten_minutes_at_most() -> None:
    time, held = Time(), limit(usd_per_hour=1.0)
    buckets = made(time, held)
    buckets.charge(["DIR-1"], tokens=None, usd=500.0)
    found = buckets.admit([held])
    assert found is not None
    assert found[2] == pytest.approx(MOST_OWED_S)


def test_a_call_that_is_never_charged_gives_back_what_it_was_let_through_with() -> None:
    time, held = Time(), limit(usd_per_hour=36.0)
    buckets = made(time, held)
    buckets.charge(["DIR-1"], tokens=None, usd=0.09)
    time.at = 30.0
    assert buckets.admit([held]) is None
    assert buckets.admit([held]) is None
    assert buckets.admit([held]) is not None
    time.at += OPEN_S + 1.0
    assert buckets.admit([held]) is None


def test_a_failed_call_costs_nothing_and_says_nothing_about_the_others() -> None:
    time, held = Time(), limit(usd_per_hour=36.0)
    buckets = made(time, held)
    assert buckets.admit([held]) is None
    buckets.charge(["DIR-1"], tokens=None, usd=0.09)
    for _ in range(20):
        time.at += 10.0
        assert buckets.admit([held]) is None
        buckets.charge(["DIR-1"], tokens=0, usd=0.0)
    assert [buckets.admit([held]) is None for _ in range(3)] == [True, True, False], "each counts 0.09"


def test_a_limit_that_tightens_keeps_what_was_spent_and_one_that_is_gone_is_forgotten() -> None:
    time = Time()
    buckets = made(time, limit(requests_per_min=60.0))
    for _ in range(9):
        assert buckets.admit([limit()]) is None
    tighter = limit(requests_per_min=6.0)
    buckets.keep([tighter])
    assert buckets.admit([tighter]) is None
    assert buckets.admit([tighter]) is not None
    buckets.keep([])
    assert buckets.admit([tighter]) is None
    buckets.charge(["DIR-1"], tokens=1.0, usd=1.0)


def test_each_of_three_equal_points_lets_its_third_through() -> None:
    time, held = Time(), limit(requests_per_min=180.0)
    buckets = made(time, held, share=1 / 3)
    passed = 0
    for second in range(600):
        time.at = float(second)
        passed += sum(buckets.admit([held]) is None for _ in range(5))
    assert 600 <= passed <= 610


@given(
    st.lists(st.tuples(st.floats(0.0, 20.0), st.booleans(), st.floats(0.0, 500.0)), max_size=60),
    st.floats(1.0, 1000.0),
)
def test_after_a_pause_there_is_always_a_way_through(
    steps: list[tuple[float, bool, float]], per_min: float
) -> None:
    """Whatever was charged and however often it was asked, a limit is no block."""
    time, held = Time(), limit(tokens_per_min=per_min, requests_per_min=per_min)
    buckets = made(time, held)
    for pause, asks, cost in steps:
        time.at += pause
        if asks:
            buckets.admit([held])
        buckets.charge(["DIR-1"], tokens=cost, usd=None)
    found = buckets.admit([held])
    if found is not None:
        assert found[2] <= MOST_OWED_S + 61.0
        time.at += found[2] + 1.0
        assert buckets.admit([held]) is None


@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(1, 20)), max_size=50), st.floats(1.0, 600.0))
def test_no_pattern_of_asking_gets_more_than_the_limit_through(
    steps: list[tuple[float, int]], per_min: float
) -> None:
    time, held = Time(), limit(requests_per_min=per_min)
    buckets = made(time, held)
    passed = 0
    for pause, n in steps:
        time.at += pause
        passed += sum(buckets.admit([held]) is None for _ in range(n))
    assert passed <= time.at * per_min / 60.0 + max(1.0, per_min / 6.0) + 1e-6
