"""Verification has three answers; too little data is never the good one."""

from __future__ import annotations

import msgspec
import pytest

from flyball.core.plans import Measure, Term, Verify
from flyball.remediation.verify import (
    Answer,
    VerifySettings,
    figures_before,
    judge,
    measure,
    shifted,
    source_health,
)
from tests.remediation._estate import T0, Row, World, window
from tests.remediation._site import Facts, Flow
from tests.remediation.test_executor import plan

SETTINGS = VerifySettings()
STEP = plan(T0).steps[0]


def world(a: tuple[int, float], b: tuple[int, float], windows: int = 3) -> World:
    w = World({"a": a[0], "b": b[0]})
    w.fails = {"a": a[1], "b": b[1]}
    w.advance(windows=windows)
    return w


def verdict(w: World, in_force: Answer = "yes", step: object = STEP) -> str:
    judged = judge(step, w.estate, T0, in_force, SETTINGS)  # type: ignore[arg-type]
    return "none" if judged is None else judged.reason


def test_a_healthy_target_beside_a_failing_rest_is_good() -> None:
    assert verdict(world((100, 0.0), (100, 0.6))) == "as_expected"


def test_before_one_whole_window_there_is_no_verdict() -> None:
    assert verdict(world((100, 0.0), (100, 0.6), windows=1)) == "none"


def test_what_is_not_in_force_proves_nothing() -> None:
    assert verdict(world((100, 0.0), (100, 0.6)), "no") == "not_in_force"
    assert verdict(world((100, 0.0), (100, 0.6)), "unknown") == "not_in_force"


def test_too_few_calls_at_the_target_prove_nothing() -> None:
    assert verdict(world((5, 0.0), (100, 0.6))) == "too_few_calls"


def test_a_rest_without_calls_is_no_comparison() -> None:
    assert verdict(world((100, 0.0), (1, 0.0))) == "no_comparison"


def test_a_rest_that_does_as_well_shows_no_benefit() -> None:
    assert verdict(world((100, 0.0), (100, 0.0))) == "no_benefit"


def test_without_comparison_asked_for_the_target_alone_decides() -> None:
    step = msgspec.structs.replace(STEP, verify=Verify(against="nothing"))
    assert verdict(world((100, 0.0), (1, 0.0)), step=step) == "as_expected"


def test_a_failing_target_is_harm() -> None:
    judged = judge(STEP, world((100, 0.5), (100, 0.6)).estate, T0, "yes", SETTINGS)
    assert judged is not None
    assert (judged.good, judged.harmed) == (False, True)


def test_a_cost_that_nobody_told_is_unknown() -> None:
    w = World({})
    rows = [Row(50, labels={"provider": "a"}), Row(50, 30, labels={"provider": "b"})]
    w.estate.feed([window(T0 + 10.0 * i, rows) for i in range(3)])
    step = msgspec.structs.replace(STEP, verify=Verify(expect=(Term("usd_per_hour", "to", "<", 9.0),)))
    judged = judge(step, w.estate, T0, "yes", SETTINGS)
    assert judged is not None
    assert judged.reason == "too_few_calls"


def test_recovery_needs_enough_calls_of_the_slice_that_was_left() -> None:
    assert source_health({"provider": "b"}, world((9, 0.0), (9, 0.0), 1).estate, SETTINGS) == "unknown"
    assert source_health({"provider": "b"}, world((9, 0.0), (9, 0.0), 6).estate, SETTINGS) == "yes"
    assert source_health({"provider": "b"}, world((9, 0.0), (9, 0.5), 6).estate, SETTINGS) == "no"
    assert source_health({"provider": "x"}, world((9, 0.0), (9, 0.5), 6).estate, SETTINGS) == "unknown"


def test_traffic_that_did_not_move_is_not_in_force() -> None:
    moved = world((125, 0.0), (75, 0.6))
    assert shifted(STEP, 0, 0.5, moved.estate, T0, SETTINGS) == "yes"
    still = world((100, 0.0), (100, 0.6))
    assert shifted(STEP, 0, 0.5, still.estate, T0, SETTINGS) == "no"
    assert shifted(STEP, 0, 0.0, still.estate, T0, SETTINGS) == "unknown"


# --- measures -------------------------------------------------------------------------------------------------------

_B = {"provider": "b"}


def _facts(*flows: Flow, windows: int = 3) -> Facts:
    facts = Facts()
    for i in range(windows):
        facts.add(T0 + 10.0 * (i + 1), flows)
    return facts


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("errors", 0.2),
        ("calls", 90.0),
        ("calls_per_min", 180.0),
        ("tokens_per_min", 6000.0),
        ("usd_per_hour", 180.0),
        ("latency_s", 1.5),
    ],
)
def test_each_measure_counts_what_got_through(what: Measure, value: float) -> None:
    seen = _facts(Flow(_B, 40, refused=10, bad=6, usd=0.5, tokens=1000.0, latency_s=1.5))
    assert measure(what, _B, seen, 30.0) == pytest.approx(value)


def test_what_is_refused_altogether_costs_nothing_and_what_is_not_heard_of_is_unknown() -> None:
    assert measure("usd_per_hour", _B, _facts(Flow(_B, 40, refused=40)), 30.0) == 0.0
    assert measure("tokens_per_min", _B, _facts(Flow(_B, 40)), 30.0) is None
    assert measure("usd_per_hour", _B, _facts(Flow({"provider": "a"}, 40)), 30.0) is None
    assert measure("errors", _B, _facts(), 30.0) is None


def _judged(term: Term, seen: Facts, before: dict[str, float] | None = None) -> str:
    step = msgspec.structs.replace(
        STEP, source=_B, target=_B, verify=Verify(expect=(term,), against="nothing")
    )
    judged = judge(step, seen, T0, "yes", SETTINGS, before or {})
    assert judged is not None
    return judged.reason


def test_a_multiple_of_before_needs_a_figure_from_before() -> None:
    term = Term("usd_per_hour", "from", "<", 0.7, times_before=True)
    seen = _facts(Flow(_B, 40, usd=0.5))
    assert _judged(term, seen, {"from_usd_per_hour": 300.0}) == "as_expected"
    assert _judged(term, seen, {"from_usd_per_hour": 200.0}) == "not_as_expected"
    assert _judged(term, seen) == "too_few_calls"


def test_a_count_is_compared_with_as_long_a_span_before() -> None:
    seen = _facts(Flow(_B, 40))  # two whole windows: 80 calls
    term = Term("calls", "from", "<", 0.9, times_before=True)
    assert _judged(term, seen, {"from_calls_per_min": 300.0}) == "as_expected"
    assert _judged(term, seen, {"from_calls_per_min": 240.0}) == "not_as_expected"


def test_few_calls_are_no_lack_of_data_where_most_are_refused() -> None:
    term = Term("usd_per_hour", "from", "<", 50.0)
    assert _judged(term, _facts(Flow(_B, 40, refused=38, usd=0.02))) == "as_expected"
    assert _judged(term, _facts(Flow(_B, 2, usd=0.02))) == "too_few_calls"
    assert _judged(Term("errors", "from", "<", 0.1), _facts(Flow(_B, 40, refused=38))) == "too_few_calls"


def test_a_count_of_nothing_is_data() -> None:
    assert _judged(Term("calls", "from", "<", 1.0), _facts(Flow({"provider": "a"}, 9))) == "as_expected"


def test_where_nothing_moves_there_is_no_untouched_slice_to_compare_with() -> None:
    step = msgspec.structs.replace(STEP, target=STEP.source, verify=Verify())
    judged = judge(step, _facts(Flow(_B, 100)), T0, "yes", SETTINGS)
    assert judged is not None
    assert judged.reason == "as_expected"


def test_a_slow_source_is_left_for_a_fast_target_though_neither_fails() -> None:
    seen = _facts(Flow(_B, 100, latency_s=9.0), Flow({"provider": "a"}, 100, latency_s=1.0))
    fast = Verify(expect=(Term("latency_s", "to", "<", 3.0),))
    judged = judge(msgspec.structs.replace(STEP, verify=fast), seen, T0, "yes", SETTINGS)
    assert judged is not None
    assert judged.good
    back = msgspec.structs.replace(STEP, source=STEP.target, target=_B, verify=fast)
    judged = judge(back, seen, T0, "yes", SETTINGS)
    assert judged is not None
    assert not judged.good


def test_figures_before_are_taken_of_source_and_target() -> None:
    seen = _facts(
        Flow(_B, 30, bad=15, usd=0.3, tokens=300.0, latency_s=2.0), Flow({"provider": "a"}, 10, latency_s=1.0)
    )
    before = figures_before(STEP, seen, 60.0, SETTINGS)
    assert before["share"] == 0.75
    assert before["from_errors"] == 0.5
    assert before["to_latency_s"] == 1.0
    assert "to_usd_per_hour" not in before
