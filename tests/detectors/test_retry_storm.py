"""Attempts that multiply while they fail."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.anomaly import Anomaly
from flyball.detectors._budget import PageBudget
from flyball.detectors.retry_storm import Params, RetryStorm
from tests.detectors._windows import Calls, Traffic, calls


def shop(n: int, failed: int = 0) -> Calls:
    return calls(n, {"server_error": failed}, provider="b", app="shop")


def wild(seed: int, windows: int, mean: float = 50) -> list[Calls]:
    """Quiet call counts as they are: far from Poisson."""
    rng = np.random.default_rng(seed)
    return [shop(int(n)) for n in 1 + rng.negative_binomial(2, 2 / (2 + mean), windows)]


def about_app(found: list[Anomaly]) -> list[Anomaly]:
    return [a for a in found if a.labels == {"app": "shop"}]


def test_attempts_that_multiply_while_they_fail_are_a_storm_of_the_app() -> None:
    traffic, detector = Traffic(), RetryStorm()
    detector.feed(traffic.windows(60, shop(50)))
    (found,) = about_app(detector.feed(traffic.windows(2, shop(300, failed=250))))
    assert (found.phase, found.klass, found.signal) == ("on", "retry_storm", "llm.retries")
    assert found.evidence["attempts"] == 300
    assert found.evidence["failed"] == 250
    assert found.observed > 5 * found.expected


def test_it_is_found_in_wild_traffic_too() -> None:
    traffic, detector = Traffic(), RetryStorm()
    detector.feed([traffic.window(c) for c in wild(1, 200)])
    assert about_app(detector.feed(traffic.windows(6, shop(600, failed=500))))


def test_volume_alone_is_no_storm() -> None:
    traffic, detector = Traffic(), RetryStorm()
    detector.feed(traffic.windows(60, shop(50)))
    assert detector.feed(traffic.windows(100, shop(2000, failed=200))) == []


def test_failures_alone_are_no_storm() -> None:
    traffic, detector = Traffic(), RetryStorm()
    detector.feed(traffic.windows(60, shop(50)))
    assert detector.feed(traffic.windows(100, shop(60, failed=55))) == []


def test_our_own_blocks_are_no_attempts() -> None:
    traffic, detector = Traffic(), RetryStorm()
    detector.feed(traffic.windows(60, shop(50)))
    blocked = calls(500, {"gateway_local": 450}, provider="b", app="shop")
    assert detector.feed(traffic.windows(30, blocked)) == []


def test_wild_quiet_counts_wake_nobody() -> None:
    traffic, detector = Traffic(), RetryStorm()
    assert detector.feed([traffic.window(c) for c in wild(2, 1000)]) == []


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 100)), min_size=5, max_size=30), st.integers(0, 30)
)
def test_a_restart_at_any_point_changes_nothing(plan: list[tuple[int, int]], cut: int) -> None:
    traffic, quick = Traffic(), Params(warmup_windows=3)
    windows = [traffic.window(shop(n, failed=n * share // 100)) for n, share in plan]
    whole = RetryStorm(quick, PageBudget(floor_series=1))
    expected = [whole.feed([w]) for w in windows]
    first, second = (RetryStorm(quick, PageBudget(floor_series=1)) for _ in range(2))
    found = [first.feed([w]) for w in windows[:cut]]
    second.restore(first.snapshot())
    assert found + [second.feed([w]) for w in windows[cut:]] == expected
    assert second.snapshot() == whole.snapshot()
