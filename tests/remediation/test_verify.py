"""Verification has three answers; too little data is never the good one."""

from __future__ import annotations

import msgspec

from flyball.core.plans import Term, Verify
from flyball.remediation.verify import Answer, VerifySettings, judge, shifted, source_health
from tests.remediation._estate import T0, Row, World, window
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
