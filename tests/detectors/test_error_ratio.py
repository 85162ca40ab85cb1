"""Failures against each series' own normal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.anomaly import Anomaly
from flyball.core.columns import Window
from flyball.core.errorclass import CLASS_INDEX, CLASSES
from flyball.core.errors import ConfigError
from flyball.detectors._budget import PageBudget
from flyball.detectors.error_ratio import ErrorRatio, Params
from tests.detectors._windows import START, Calls, Traffic, calls, rollup


def phases(found: list[Anomaly]) -> list[str]:
    return [a.phase for a in found]


def about(found: list[Anomaly], **labels: str) -> list[Anomaly]:
    return [a for a in found if a.labels == labels]


def quiet(provider: str = "b", n: int = 100) -> Calls:
    return calls(n, provider=provider)


def failing(
    share: float, error: str = "overloaded", provider: str = "b", n: int = 100, tenants: int = 10
) -> Calls:
    return calls(n, {error: int(n * share)}, provider=provider, tenants=tenants)


def test_a_total_outage_is_said_in_the_first_window_that_shows_it() -> None:
    traffic, detector = Traffic(), ErrorRatio()
    detector.feed(traffic.windows(60, quiet()))
    (found,) = about(detector.feed([traffic.window(failing(1.0))]), provider="b")
    assert (found.phase, found.klass, found.observed) == ("on", "overloaded", 1.0)
    assert found.since == traffic.now - 10
    assert found.score >= found.threshold > 10
    assert found.evidence["failed"] == 100
    assert found.evidence["class_overloaded"] == 100
    assert found.evidence["failing_tenants"] == 10
    assert found.samples


def test_twenty_failing_calls_of_a_series_never_seen_before_are_an_outage() -> None:
    traffic, detector = Traffic(), ErrorRatio()
    assert phases(about(detector.feed([traffic.window(failing(1.0, n=20))]), provider="b")) == ["on"]


def test_nine_calls_are_too_few_until_the_next_window() -> None:
    traffic, detector = Traffic(), ErrorRatio()
    detector.feed(traffic.windows(60, quiet()))
    assert detector.feed([traffic.window(failing(1.0, n=9))]) == []
    (found,) = about(detector.feed([traffic.window(failing(1.0, n=9))]), provider="b")
    assert (found.phase, found.n, found.since) == ("on", 18, traffic.now - 20)


def test_a_quarter_failing_must_last_two_windows_and_sixty_percent_one() -> None:
    for share, windows in ((0.25, 2), (0.6, 1)):
        traffic, detector = Traffic(), ErrorRatio()
        detector.feed(traffic.windows(60, quiet()))
        found = [detector.feed([traffic.window(failing(share))]) for _ in range(3)]
        assert [len(f) for f in found].index(1) == windows - 1


def test_a_blip_of_one_window_below_the_outage_ratio_wakes_nobody() -> None:
    traffic, detector = Traffic(), ErrorRatio()
    detector.feed(traffic.windows(60, quiet()))
    for _ in range(20):
        assert detector.feed([traffic.window(failing(0.25, n=10_000)), *traffic.windows(20, quiet())]) == []


def test_the_only_tenant_of_a_whole_estate_is_enough_to_blame_the_provider() -> None:
    """Nobody else could bear it out, and an outage that nobody is told of is worse."""
    traffic, detector = Traffic(), ErrorRatio()
    detector.feed(traffic.windows(60, calls(100, provider="b", tenants=1)))
    assert phases(about(detector.feed([traffic.window(failing(0.6, tenants=1))]), provider="b")) == ["on"]


def test_one_tenant_alone_does_not_blame_the_provider() -> None:
    traffic, detector = Traffic(), ErrorRatio()
    others = calls(100, provider="b", tenants=9)
    detector.feed(traffic.windows(60, quiet()))
    for _ in range(20):
        window = traffic.window(others, calls(80, {"server_error": 80}, provider="b", tenant="t9"))
        assert about(detector.feed([window]), provider="b") == []


def test_calls_that_name_no_tenant_can_still_blame_the_provider() -> None:
    traffic, detector = Traffic(), ErrorRatio()
    detector.feed(traffic.windows(60, calls(100, provider="b", tenants=0)))
    assert phases(about(detector.feed([traffic.window(failing(0.6, tenants=0))]), provider="b")) == ["on"]


def test_own_blocks_and_cancelled_calls_never_count() -> None:
    traffic, detector = Traffic(), ErrorRatio()
    detector.feed(traffic.windows(60, quiet()))
    blocked = calls(100, {"gateway_local": 60, "cancelled": 40}, provider="b")
    assert detector.feed(traffic.windows(30, blocked)) == []


def test_a_bad_key_is_told_at_the_tenant_and_not_at_the_provider() -> None:
    traffic, detector = Traffic(), ErrorRatio()
    detector.feed(traffic.windows(60, quiet()))
    window = traffic.window(
        calls(900, provider="b", tenants=9), calls(40, {"auth": 40}, provider="b", tenant="t9")
    )
    found = detector.feed([window])
    assert [a.labels for a in found] == [{"provider": "b", "tenant": "t9"}, {"tenant": "t9"}]
    assert {a.klass for a in found} == {"auth"}


def test_spent_quota_is_not_called_a_rate_limit() -> None:
    traffic, detector = Traffic(), ErrorRatio()
    detector.feed(traffic.windows(60, quiet()))
    found = about(detector.feed([traffic.window(failing(0.8, "quota_exhausted"))]), provider="b")
    assert [a.klass for a in found] == ["quota_exhausted"]


def test_a_prompt_too_long_is_the_apps() -> None:
    traffic, detector = Traffic(), ErrorRatio()
    normal = calls(100, provider="b", app="shop", prompt="cart@1")
    detector.feed(traffic.windows(60, normal))
    broken = calls(100, {"context_too_long": 40}, provider="b", app="shop", prompt="cart@1")
    found = detector.feed([traffic.window(broken)])
    assert [a.labels for a in found] == [{"app": "shop"}, {"app": "shop", "prompt": "cart@1"}]


def test_a_mix_of_health_classes_is_one_anomaly_named_by_the_commonest() -> None:
    traffic, detector = Traffic(), ErrorRatio()
    detector.feed(traffic.windows(60, quiet()))
    mixed = calls(100, {"overloaded": 15, "server_error": 30, "timeout": 15}, provider="b")
    (found,) = detector.feed([traffic.window(mixed)])
    assert (found.klass, found.observed) == ("server_error", 0.6)


def test_a_fault_that_comes_and_goes_every_twenty_seconds_is_one_steady_episode() -> None:
    traffic, detector = Traffic(), ErrorRatio()
    detector.feed(traffic.windows(60, quiet()))
    found: list[Anomaly] = []
    for _ in range(20):
        found += detector.feed(traffic.windows(2, failing(0.8)))
        found += detector.feed(traffic.windows(2, quiet()))
    assert phases(found) == ["on"] + ["still"] * 39
    assert len({a.id for a in found}) == 1


def test_recovery_is_said_after_three_quiet_windows_and_silence_says_nothing() -> None:
    traffic, detector = Traffic(), ErrorRatio()
    detector.feed(traffic.windows(60, quiet()))
    (on,) = detector.feed([traffic.window(failing(0.8))])
    assert detector.feed(traffic.windows(30)) == []
    assert detector.feed(traffic.windows(2, quiet())) == []
    (off,) = detector.feed([traffic.window(quiet())])
    assert (off.phase, off.id, off.since) == ("off", on.id, on.since)
    assert detector.feed(traffic.windows(5, quiet())) == []


def test_one_lucky_call_a_window_is_no_recovery() -> None:
    traffic, detector = Traffic(), ErrorRatio()
    detector.feed(traffic.windows(60, quiet()))
    detector.feed([traffic.window(failing(0.8))])
    assert detector.feed(traffic.windows(9, calls(1, provider="b"))) == []
    assert phases(detector.feed([traffic.window(calls(1, provider="b"))])) == ["off"]


def test_what_is_anomalous_does_not_become_normal() -> None:
    traffic, detector = Traffic(), ErrorRatio()
    detector.feed(traffic.windows(60, quiet()))
    found = detector.feed(traffic.windows(360, failing(0.25)))
    assert phases(found) == ["on"] + ["still"] * 358
    assert found[-1].expected == pytest.approx(found[0].expected)


def test_after_a_day_the_new_level_is_accepted() -> None:
    traffic, detector = Traffic(), ErrorRatio(Params(accept_after_s=600.0))
    detector.feed(traffic.windows(60, quiet()))
    found = detector.feed(traffic.windows(200, failing(0.25)))
    assert phases(found) == ["on"] + ["still"] * 58 + ["off"]
    assert found[-1].evidence["accepted_as_normal"] == 1


def test_a_series_whose_normal_is_bad_is_judged_by_its_own_normal() -> None:
    traffic, detector = Traffic(), ErrorRatio()
    usual = calls(100, {"content_filter": 10}, app="chat")
    assert detector.feed(traffic.windows(300, usual)) == []
    assert detector.feed(traffic.windows(30, calls(100, {"content_filter": 18}, app="chat"))) == []
    assert phases(detector.feed([traffic.window(calls(100, {"content_filter": 60}, app="chat"))])) == ["on"]


def test_a_slot_that_now_means_another_series_forgets_the_old_one() -> None:
    detector = ErrorRatio()
    broken = np.zeros((1, len(CLASSES)), np.int64)
    broken[0, CLASS_INDEX["overloaded"]] = 100
    fine = np.zeros((1, len(CLASSES)), np.int64)
    fine[0, 0] = 100
    empty = Traffic().window().cells
    first = rollup(["provider"], [("old",)], broken)
    second = rollup(["provider"], [("new",)], fine, born=np.array([START + 10]))
    (on,) = detector.feed([Window(START, START + 10, empty, {("provider",): first}, {})])
    assert on.labels == {"provider": "old"}
    later = [
        Window(START + 10 * i, START + 10 * i + 10, empty, {("provider",): second}, {}) for i in range(1, 9)
    ]
    assert detector.feed(later) == []


def test_params_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="effect_times"):
        Params(effect_times=1.0)


window_parts = st.lists(
    st.tuples(
        st.sampled_from(["a", "b"]),
        st.integers(0, 60),
        st.integers(0, 100),
        st.sampled_from(["timeout", "auth"]),
    ),
    max_size=3,
)


def built(plan: list[list[tuple[str, int, int, str]]]) -> list[Window]:
    traffic = Traffic()
    return [
        traffic.window(
            *(calls(n, {e: n * share // 100}, provider=p, app="x", prompt="y@1") for p, n, share, e in parts)
        )
        for parts in plan
    ]


@settings(max_examples=40, deadline=None)
@given(st.lists(window_parts, min_size=1, max_size=25), st.integers(0, 25))
def test_a_restart_at_any_point_changes_nothing(
    plan: list[list[tuple[str, int, int, str]]], cut: int
) -> None:
    windows = built(plan)
    whole = ErrorRatio(budget=PageBudget(floor_series=10))
    expected = [whole.feed([w]) for w in windows]
    first, second = (
        ErrorRatio(budget=PageBudget(floor_series=10)),
        ErrorRatio(budget=PageBudget(floor_series=10)),
    )
    found = [first.feed([w]) for w in windows[:cut]]
    second.restore(first.snapshot())
    found += [second.feed([w]) for w in windows[cut:]]
    assert found == expected
    assert second.snapshot() == whole.snapshot()


def test_quiet_over_dispersed_traffic_stays_within_the_page_budget() -> None:
    """200 series, 3,000 windows (8.3 h): beta-binomial failures, negative-binomial calls, a daily cycle. Budget: 0.1."""
    rng = np.random.default_rng(7)
    n_series, n_windows = 200, 3000
    labels = [(f"p{i}",) for i in range(n_series)]
    size = np.exp(rng.normal(4.0, 1.2, n_series))
    ratio = np.exp(rng.normal(np.log(0.01), 0.8, n_series))
    rho = rng.uniform(0.001, 0.03, n_series)
    detector, empty, found = ErrorRatio(), Traffic().window().cells, []
    for i in range(n_windows):
        mean = size * (1 + 0.6 * np.sin(2 * np.pi * i / 8640))
        n = rng.negative_binomial(2.0, 2.0 / (2.0 + mean))
        p = rng.beta(ratio * (1 / rho - 1), (1 - ratio) * (1 / rho - 1))
        by_class = np.zeros((n_series, len(CLASSES)), np.int64)
        by_class[:, CLASS_INDEX["server_error"]] = rng.binomial(n, p)
        by_class[:, 0] = n - by_class[:, CLASS_INDEX["server_error"]]
        at = START + 10 * i
        found += detector.feed(
            [Window(at, at + 10, empty, {("provider",): rollup(["provider"], labels, by_class)}, {})]
        )
    assert [a for a in found if a.phase == "on"] == []
