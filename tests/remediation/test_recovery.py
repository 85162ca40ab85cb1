"""What recovered means for each kind, and how each is let go."""

from __future__ import annotations

from typing import Any

import pytest

from flyball.core.directives import DirectiveChange, Enforced
from flyball.core.plans import Term, Verify
from flyball.remediation.recovery import Trouble, all_of, source_over, under_limit
from flyball.remediation.verify import Answer, VerifySettings
from tests.remediation._site import (
    WINDOW_S,
    Customer,
    Facts,
    Flow,
    Site,
    block,
    cap,
    drain,
    limit,
    outcomes,
    plan,
    step,
    tenant,
    words,
)

SETTINGS = VerifySettings()
BASELINE = {"usd_per_min": 2.0}


def facts(*flows: Flow, windows: int = 12) -> Facts:
    f = Facts()
    for i in range(windows):
        f.add(1_700_000_000.0 + WINDOW_S * (i + 1), flows)
    return f


def burning(calls: int = 120, **more: Any) -> Site:
    """Tenant t1 burns $432/h; its baseline is $120/h."""
    at = Site(tenant("t1", calls), tenant("t2", 60), **more)
    at.incident(signal=more.get("signal", "llm.cost"))
    return at


# --- limits -----------------------------------------------------------------------------------------------------


def test_a_limit_stays_while_it_binds_and_goes_when_nothing_is_refused_and_less_is_asked_for() -> None:
    at = burning()
    at.order(plan(limit(200.0)))
    at.run(60)
    assert at.results[:3] == ["granted", "applied", "verified"]
    assert set(at.results[3:]) == {"renewed"}
    at.customers[0].calls = 30
    at.run(5)
    assert at.results[-2:] == ["released", "released"]
    assert outcomes(at.log)[-1].reason == "recovered"


def test_a_limit_of_which_no_point_reports_is_not_called_recovered() -> None:
    at = burning()
    at.order(plan(limit(200.0)))
    at.run(6)
    at.reports = False
    at.customers[0].calls = 30
    at.run(40)
    assert at.results[-1] == "expired"  # unknown: neither renewed nor released


@pytest.mark.parametrize(
    ("params", "answer"),
    [
        ({"requests_per_min": 400}, "yes"),
        ({"requests_per_min": 300}, "no"),
        ({"tokens_per_min": 40_000}, "yes"),
        ({"tokens_per_min": 30_000}, "no"),
        ({"usd_per_hour": 230.0}, "yes"),
        ({"usd_per_hour": 200.0}, "no"),
        ({"usd_per_hour": 230.0, "requests_per_min": 300}, "no"),
        ({}, "unknown"),
    ],
    ids=lambda v: str(v),
)
def test_what_is_asked_for_counts_with_what_was_refused(params: dict[str, Any], answer: Answer) -> None:
    # 60 calls a window, half of them refused; those let through cost $0.01 and take 100 tokens each.
    seen = facts(Flow({"tenant": "t1"}, 60, refused=30, usd=0.3, tokens=3000.0))
    assert under_limit(step("limit", params), 0, seen, SETTINGS) == answer


def test_nobody_asking_is_under_any_limit_only_while_others_are_heard() -> None:
    s = limit(100.0)
    assert under_limit(s, 0, facts(Flow({"tenant": "t2"}, 10)), SETTINGS) == "yes"
    assert under_limit(s, 0, facts(), SETTINGS) == "unknown"


def test_where_everything_is_refused_the_limit_binds() -> None:
    assert under_limit(limit(100.0), 0, facts(Flow({"tenant": "t1"}, 10, refused=10)), SETTINGS) == "no"


# --- caps -------------------------------------------------------------------------------------------------------


def test_a_cap_stays_until_the_traffic_would_cost_little_without_it() -> None:
    at = burning()
    at.order(plan(cap(baseline=BASELINE)))
    at.run(60)  # it costs $86/h now, but would cost $432/h
    assert "released" not in at.results
    at.customers[0].calls = 45
    at.run(3)
    assert at.results[-1] == "released"


@pytest.mark.parametrize("baseline", [{}, {"usd_per_min": 0.0}], ids=["none", "zero"])
def test_a_cap_without_a_baseline_stays_until_the_incident_is_resolved(baseline: dict[str, float]) -> None:
    at = burning()
    at.order(plan(cap(baseline=baseline)))
    at.customers[0].calls = 10
    at.run(9)
    assert "released" not in at.results
    at.incident("resolved")
    at.run(1)
    assert at.results[-1] == "released"


def test_a_cap_against_trouble_that_is_no_cost_is_not_judged_by_cost() -> None:
    at = burning(calls=10)
    at.incident(signal="llm.errors")
    at.order(plan(cap(baseline=BASELINE)))
    at.run(12)
    assert "released" not in at.results


# --- blocks -----------------------------------------------------------------------------------------------------


def test_a_block_goes_when_nobody_knocks_for_a_minute() -> None:
    at = Site(Customer({"run": "r1", "agent": "x"}, 5), tenant("t2", 60))
    at.incident(signal="agent.loop")
    at.order(plan(block()))
    at.run(30)
    assert set(at.results) == {"granted", "applied", "verified", "renewed"}
    at.customers[0].calls = 0
    at.run(5)
    assert at.live()
    at.run(2)
    assert at.results[-1] == "released"


def test_a_knock_that_only_the_point_sees_keeps_the_block() -> None:
    at = Site(tenant("t2", 60), reports=False)
    at.incident(signal="agent.loop")
    at.order(plan(block(verify=Verify(within_s=900.0), timeout_s=900.0)))
    lease = at.live()[0].id
    for _ in range(20):
        at.run(1)
        at.feed(Enforced(point="mw", at=at.now, directives={lease: 1}))
    assert at.live()
    at.run(8)
    assert at.results[-1] == "released"


# --- redirects and operations -----------------------------------------------------------------------------------


def _source(errors: float, latency_s: float, calls: int = 60) -> Facts:
    labels = {"provider": "b"}
    return facts(Flow(labels, calls, bad=round(calls * errors), latency_s=latency_s))


_MOVE = step("redirect", {"share": 0.25}, scope={"provider": "b"})


@pytest.mark.parametrize(
    ("signal", "errors", "latency_s", "baseline", "answer"),
    [
        ("llm.errors", 0.0, 9.0, {"latency_s": 1.0}, "yes"),
        ("llm.errors", 0.5, 1.0, {"latency_s": 1.0}, "no"),
        ("llm.latency", 0.0, 9.0, {"latency_s": 1.0}, "no"),
        ("llm.latency", 0.0, 1.2, {"latency_s": 1.0}, "yes"),
        ("llm.ttft", 0.5, 1.2, {"latency_s": 1.0}, "no"),
        ("llm.latency", 0.0, 1.0, {}, "no"),
        ("gpu.fault", 0.0, 1.0, {}, "no"),
    ],
)
def test_a_source_is_well_by_what_was_wrong_with_it(
    signal: str, errors: float, latency_s: float, baseline: dict[str, float], answer: Answer
) -> None:
    s = step("redirect", {"share": 0.25}, scope={"provider": "b"}, baseline=baseline)
    assert source_over(None, s, _source(errors, latency_s), Trouble(signal), SETTINGS) == answer


def test_without_a_baseline_a_slow_source_must_be_as_fast_as_is_expected_of_the_target() -> None:
    fast = Verify(expect=(Term("latency_s", "to", "<", 3.0),))
    s = step("redirect", {"share": 0.25}, scope={"provider": "b"}, verify=fast)
    assert source_over(None, s, _source(0.0, 2.0), Trouble("llm.latency"), SETTINGS) == "yes"
    assert source_over(None, s, _source(0.0, 4.0), Trouble("llm.latency"), SETTINGS) == "no"


def test_trouble_that_shows_elsewhere_is_over_when_the_incident_is() -> None:
    seen = _source(0.5, 9.0)
    assert source_over(None, _MOVE, seen, Trouble("gpu.fault", resolved=True), SETTINGS) == "yes"


def test_of_several_answers_a_no_weighs_most_and_a_doubt_more_than_a_yes() -> None:
    assert all_of(["yes", "unknown", "no"]) == "no"
    assert all_of(["yes", "unknown"]) == "unknown"
    assert all_of(["yes"]) == "yes"


# --- release modes ----------------------------------------------------------------------------------------------


def test_released_when_resolved_holds_through_recovery_and_goes_with_the_incident() -> None:
    at = burning()
    at.order(plan(limit(200.0, release="resolved")))
    at.customers[0].calls = 30
    at.run(50)
    assert "released" not in at.results
    assert "renewed" in at.results
    at.incident("resolved")
    assert at.results[-2:] == ["released", "released"]
    assert outcomes(at.log)[-1].reason == "resolved"


def test_released_by_time_only_stays_for_its_time_whatever_becomes_of_the_incident() -> None:
    at = burning()
    at.order(plan(limit(200.0, release="expiry", hold_s=900.0)))
    granted = at.now
    at.run(10)
    at.incident("resolved")
    at.customers[0].calls = 10
    at.run(90)
    ends = [m.at for m in at.log if isinstance(m, DirectiveChange) and m.change == "expired"]
    assert ends == [granted + 900.0]


def test_blindness_is_never_recovery() -> None:
    at = burning()
    at.order(plan(limit(200.0)))
    at.run(10)
    at.customers.clear()
    said = at.tick(100.0)
    assert said == []
    assert words(at.tick(300.0)) == ["expired", "expired"]


def test_an_operation_that_recovers_by_figures_is_undone_when_they_are_well() -> None:
    at = Site(tenant("t1", 60, fails=0.4))
    at.incident(signal="llm.errors")
    at.order(plan(drain(release="recovered", verify=Verify(within_s=600.0))))
    at.reported("succeeded")
    at.customers[0].fails = 0.0
    at.run(4)
    assert words(at.log)[-1] == "undo"
