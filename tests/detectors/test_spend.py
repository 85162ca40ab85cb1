"""Money per minute against each one's own normal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.anomaly import Anomaly
from flyball.detectors._budget import PageBudget
from flyball.detectors.spend import Params, Spend
from tests.detectors._windows import Calls, Traffic, calls


def shop(n: int = 50, usd: float = 0.01) -> Calls:
    return calls(n, app="shop", team="web", tenant="t1", cost_usd=usd)


def on(found: list[Anomaly]) -> list[Anomaly]:
    return [a for a in found if a.phase == "on"]


def test_ten_times_the_usual_rate_is_said_after_some_minutes_with_its_reason() -> None:
    traffic, detector = Traffic(), Spend()
    detector.feed(traffic.windows(60 * 6, shop()))
    found = on(detector.feed(traffic.windows(6 * 6, shop(n=500))))
    assert [a.labels for a in found] == [{"tenant": "t1"}, {"app": "shop"}, {"team": "web"}]
    app = found[1]
    assert app.expected == pytest.approx(3.0, rel=0.1)
    assert app.evidence["usd_per_min"] == pytest.approx(30.0, rel=0.01)
    assert app.evidence["split_calls"] == pytest.approx(1.0, abs=0.05)
    assert app.impact <= 0.3


def test_dearer_calls_are_told_from_more_calls() -> None:
    traffic, detector = Traffic(), Spend()
    detector.feed(traffic.windows(60 * 6, shop()))
    found = on(detector.feed(traffic.windows(6 * 6, shop(usd=0.1))))
    assert found[0].evidence["split_usd_per_call"] == pytest.approx(1.0, abs=0.05)


def test_twice_the_rate_and_a_burst_of_a_minute_wake_nobody() -> None:
    traffic, detector = Traffic(), Spend()
    detector.feed(traffic.windows(60 * 6, shop()))
    assert detector.feed(traffic.windows(60 * 6, shop(n=100))) == []
    assert detector.feed([*traffic.windows(6, shop(n=2000)), *traffic.windows(60, shop())]) == []


def test_pennies_wake_nobody() -> None:
    traffic, detector = Traffic(), Spend()
    detector.feed(traffic.windows(60 * 6, shop(n=1, usd=1e-5)))
    assert detector.feed(traffic.windows(60, shop(n=20, usd=1e-5))) == []


def test_wild_quiet_spend_wakes_nobody() -> None:
    rng = np.random.default_rng(5)
    traffic, detector = Traffic(), Spend()
    counts = rng.negative_binomial(0.7, 0.7 / (0.7 + 30), 1500)
    windows = [
        traffic.window(*([shop(int(n), usd=float(np.exp(rng.normal(-4.6, 0.6))))] if n else []))
        for n in counts
    ]
    assert on(detector.feed(windows)) == []


def kinds(rng: np.random.Generator, times: int = 1) -> list[Calls]:
    """A window of a small tenant: cheap calls, and now and then one that costs fifty times as much."""
    cheap, dear = rng.poisson(4.0) * times, rng.poisson(0.3) * times
    made = [calls(int(cheap), app="complete", tenant="t9", cost_usd=0.001)] if cheap else []
    usd = float(np.exp(rng.normal(-3.0, 1.0)))
    return made + ([calls(int(dear), app="shop", tenant="t9", cost_usd=usd)] if dear else [])


def test_a_burn_is_found_although_a_few_dear_calls_make_most_of_the_spend() -> None:
    rng, traffic, detector = np.random.default_rng(3), Traffic(), Spend()
    assert on(detector.feed([traffic.window(*kinds(rng)) for _ in range(300)])) == []
    began = traffic.now
    found = on(detector.feed([traffic.window(*kinds(rng, 15)) for _ in range(30)]))
    assert found[0].labels == {"tenant": "t9"}
    assert found[0].at - began <= 260.0
    share = found[0].evidence["split_calls"]
    assert isinstance(share, float)
    assert share > 0.5


def test_calls_that_only_came_together_are_no_burn() -> None:
    rng, traffic, detector = np.random.default_rng(4), Traffic(), Spend()
    windows = [traffic.window(*kinds(rng, 12 if i % 60 in (29, 30, 31) else 1)) for i in range(900)]
    assert on(detector.feed(windows)) == []


def test_a_run_of_an_agent_is_no_burn_of_the_small_tenant_that_started_it() -> None:
    rng, traffic, detector = np.random.default_rng(5), Traffic(), Spend()
    elsewhere = [calls(3, app="bot", agent="coder", tenant=f"t{i}", cost_usd=0.1) for i in range(20, 28)]
    detector.feed([traffic.window(*kinds(rng), *elsewhere) for _ in range(300)])
    run = calls(3, app="bot", agent="coder", tenant="t9", cost_usd=0.2)
    assert on(detector.feed([traffic.window(*kinds(rng), *elsewhere, run) for _ in range(60)])) == []


def test_many_runs_of_an_agent_at_once_are_a_burn_of_the_agent() -> None:
    traffic, detector = Traffic(), Spend()
    detector.feed(traffic.windows(300, calls(8, app="bot", agent="coder", cost_usd=0.1)))
    found = on(detector.feed(traffic.windows(36, calls(80, app="bot", agent="coder", cost_usd=0.1))))
    assert [a.labels for a in found] == [{"app": "bot", "agent": "coder"}]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.sampled_from([0.001, 0.01, 0.3])), min_size=10, max_size=40),
    st.integers(0, 40),
)
def test_a_restart_at_any_point_changes_nothing(plan: list[tuple[int, float]], cut: int) -> None:
    traffic, quick = Traffic(), Params(warmup_windows=2, block_s=20.0, min_windows=1)
    windows = [traffic.window(*([shop(n, usd)] if n else [])) for n, usd in plan]
    whole = Spend(quick, PageBudget(floor_series=1))
    expected = [whole.feed([w]) for w in windows]
    first, second = (Spend(quick, PageBudget(floor_series=1)) for _ in range(2))
    found = [first.feed([w]) for w in windows[:cut]]
    second.restore(first.snapshot())
    assert found + [second.feed([w]) for w in windows[cut:]] == expected
    assert second.snapshot() == whole.snapshot()
