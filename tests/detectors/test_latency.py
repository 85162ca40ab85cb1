"""Slow answers, spend, retries and cold caches: what the level machinery says of each."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.anomaly import Anomaly
from flyball.core.errors import ConfigError
from flyball.detectors._budget import PageBudget
from flyball.detectors.cache_loss import CacheLoss
from flyball.detectors.latency import Latency, Params
from tests.detectors._windows import Calls, Traffic, calls

HOUR = 360
"""Windows."""


def usual(
    latency_s: float = 2.0, *, n: int = 100, answer: float = 300, tenants: int = 10, ttft_s: float = 0.4
) -> Calls:
    return calls(
        n,
        provider="b",
        model="m",
        tenants=tenants,
        latency_s=latency_s,
        ttft_s=ttft_s,
        output_tokens=answer,
        spread=0.6,
    )


def on(found: list[Anomaly], signal: str, **labels: str) -> list[Anomaly]:
    return [a for a in found if a.phase == "on" and a.signal == signal and a.labels == labels]


def test_a_provider_twice_as_slow_is_said_within_four_windows() -> None:
    traffic, detector = Traffic(), Latency()
    detector.feed(traffic.windows(HOUR, usual()))
    (found,) = on(detector.feed(traffic.windows(4, usual(4.0))), "llm.latency", provider="b")
    assert found.klass == "slow"
    assert found.expected == pytest.approx(2.0, rel=0.02)
    assert found.observed == pytest.approx(4.0, rel=0.1)
    assert found.evidence["mean_latency_s"] == pytest.approx(4.0)


def test_in_its_first_minutes_a_provider_must_be_far_slower_than_later() -> None:
    """Providers have fast and slow tens of minutes: one of them is not known as the normal yet."""
    for learned, said in ((60, False), (HOUR, True)):
        traffic, detector = Traffic(), Latency()
        detector.feed(traffic.windows(learned, usual()))
        found = on(detector.feed(traffic.windows(40, usual(3.5))), "llm.latency", provider="b")
        assert bool(found) is said, f"after {learned} windows"
    detector = Latency()
    detector.feed(traffic.windows(60, usual()))
    assert on(detector.feed(traffic.windows(4, usual(6.0))), "llm.latency", provider="b")


def test_a_late_first_token_is_a_signal_of_its_own() -> None:
    traffic, detector = Traffic(), Latency()
    detector.feed(traffic.windows(60, usual()))
    found = detector.feed(traffic.windows(4, usual(ttft_s=2.0)))
    assert on(found, "llm.ttft", provider="b", model="m")
    assert not on(found, "llm.latency", provider="b")


def test_longer_answers_explain_longer_waits() -> None:
    traffic, detector = Traffic(), Latency()
    detector.feed(traffic.windows(60, usual()))
    longer = usual(2.0 * 3**0.8, answer=900)
    assert [a for a in detector.feed(traffic.windows(60, longer)) if a.signal == "llm.latency"] == []


def test_one_tenants_slow_calls_do_not_blame_the_provider() -> None:
    traffic, detector = Traffic(), Latency()
    detector.feed(traffic.windows(60, usual(tenants=1)))
    assert detector.feed(traffic.windows(60, usual(6.0, tenants=1))) == []


def test_a_single_slow_window_wakes_nobody() -> None:
    traffic, detector = Traffic(), Latency()
    detector.feed(traffic.windows(60, usual()))
    for _ in range(5):
        assert detector.feed([traffic.window(usual(8.0)), *traffic.windows(10, usual())]) == []


def test_recovery_is_said_once() -> None:
    traffic, detector = Traffic(), Latency()
    detector.feed(traffic.windows(60, usual()))
    detector.feed(traffic.windows(20, usual(6.0)))
    found = [a for a in detector.feed(traffic.windows(20, usual())) if a.labels == {"provider": "b"}]
    assert [a.phase for a in found].count("off") == 1
    assert found[-1].phase == "off"


def test_params_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="output_elasticity"):
        Params(output_elasticity=2.0)
    with pytest.raises(ConfigError, match="latency needs warmup_windows"):
        Params(warmup_windows=0)


def test_a_cache_that_went_cold_is_said_and_one_that_never_was_warm_is_not() -> None:
    traffic, detector = Traffic(), CacheLoss()

    def both(share: float) -> tuple[Calls, Calls]:
        warm = calls(100, app="warm", input_tokens=1000, cache_read_tokens=1000 * share)
        never = calls(100, app="never", input_tokens=1000, cache_read_tokens=100 * share)
        return warm, never

    detector.feed(traffic.windows(60, *both(0.8)))
    found = detector.feed(traffic.windows(6, *both(0.1)))
    assert {a.labels["app"] for a in found} == {"warm"}
    assert (found[0].phase, found[0].signal, found[0].klass) == ("on", "llm.cache", "cold")
    assert found[0].expected == pytest.approx(0.8, abs=0.01)
    assert found[0].observed < 0.3


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.sampled_from([1.0, 2.0, 9.0]), st.booleans()),
        min_size=5,
        max_size=30,
    ),
    st.integers(0, 30),
)
def test_a_restart_at_any_point_changes_nothing(plan: list[tuple[int, float, bool]], cut: int) -> None:
    traffic, quick = Traffic(), Params(warmup_windows=3, min_calls=5)
    windows = [
        traffic.window(*([usual(s, n=n, answer=900 if long else 300)] if n else [])) for n, s, long in plan
    ]
    whole = Latency(quick, PageBudget(floor_series=1))
    expected = [whole.feed([w]) for w in windows]
    first, second = (Latency(quick, PageBudget(floor_series=1)) for _ in range(2))
    found = [first.feed([w]) for w in windows[:cut]]
    second.restore(first.snapshot())
    found += [second.feed([w]) for w in windows[cut:]]
    assert found == expected
    assert second.snapshot() == whole.snapshot()
