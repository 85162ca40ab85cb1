"""Loops of agent runs, and what only looks like one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.anomaly import Anomaly
from flyball.core.errors import ConfigError
from flyball.core.events import AgentStep, Event, LlmCall
from flyball.detectors._loops import Rules
from flyball.detectors.runaway_loop import Params, RunawayLoop

T0 = 1_700_000_000.0
JITTER = (0.0, 1.3, 0.4, 2.2, 0.9, 1.7, 0.2)


def step(i: int, tool: str, args: str, result: str, *, at: float | None = None, **more: Any) -> AgentStep:
    when = T0 + 4.0 * i + JITTER[i % len(JITTER)] if at is None else T0 + at
    fields: dict[str, Any] = {"run": "r1", "app": "shop", "agent": "worker", "id": f"s{i}", "step": i} | more
    return AgentStep(at=when, tool=tool, args_hash=args, result_hash=result, **fields)


def told(events: Sequence[Event], params: Params | None = None) -> list[Anomaly]:
    return RunawayLoop(params).feed(events)


def opened(events: Sequence[Event], params: Params | None = None) -> list[Anomaly]:
    return [a for a in told(events, params) if a.phase == "on"]


def work(n: int, start: int = 0) -> list[Event]:
    return [step(start + i, "search", f"a{start + i}", f"r{start + i}") for i in range(n)]


# --- loops ---------------------------------------------------------------------------------------------------------------


def test_the_third_equal_call_and_result_is_a_loop() -> None:
    events = work(2) + [step(i, "search_orders", "same", "empty") for i in range(2, 12)]
    found = opened(events)
    assert [a.klass for a in found] == ["repeat"]
    a = found[0]
    assert a.at == events[4].at
    assert a.since == events[2].at
    assert a.labels == {"run": "r1", "agent": "worker", "app": "shop", "tool": "search_orders"}
    assert a.evidence["pattern"] == "repeat"
    assert a.evidence["count"] == 3
    assert a.score >= a.threshold


def test_a_run_that_got_far_is_given_one_repeat_more() -> None:
    far = work(15) + [step(i, "search", "same", "same") for i in range(15, 25)]
    assert opened(far)[0].at == far[18].at


def test_tokens_and_dollars_burnt_in_the_loop_are_told() -> None:
    events: list[Event] = []
    for i in range(8):
        at = T0 + 4.0 * i
        events.append(
            LlmCall(at=at, run="r1", app="shop", input_tokens=900, output_tokens=100, cost_usd=0.02)
        )
        looping = i >= 3
        events.append(
            step(i, "get", "same" if looping else f"a{i}", "same" if looping else f"r{i}", at=4.0 * i + 1.0)
        )
    a = opened(events)[0]
    assert a.evidence["tokens"] == 2000
    assert a.evidence["usd"] == pytest.approx(0.04)
    assert a.evidence["steps"] == 3


@pytest.mark.parametrize("period", [2, 3, 4, 5, 6])
def test_a_cycle_repeated_three_times_is_a_loop(period: int) -> None:
    events = [step(i, f"t{i % period}", f"a{i % period}", f"r{i % period}") for i in range(4 * period)]
    found = opened(events, Params(rules=Rules(stale=30)))
    assert found[0].klass == "cycle"
    assert found[0].evidence["period"] == period
    assert found[0].at <= events[3 * period].at


def test_steps_that_only_repeat_earlier_ones_in_any_order_are_no_progress() -> None:
    order = [0, 1, 2, 3, 2, 0, 3, 1, 0, 2, 3, 1, 1, 0]
    found = opened([step(i, f"t{k}", f"a{k}", f"r{k}") for i, k in enumerate(order)])
    assert [a.klass for a in found] == ["no_progress"]


def test_three_failures_at_the_start_of_a_run_are_a_loop() -> None:
    events = [step(i, "search", f"a{i}", f"r{i}", error="not_found") for i in range(4)]
    found = opened(events)
    assert [a.klass for a in found] == ["failing"]
    assert found[0].at == events[2].at
    assert found[0].evidence["error"] == "not_found"


def test_a_run_that_got_far_may_fail_more_often_in_a_row() -> None:
    def fails(n: int) -> list[Event]:
        return work(30) + [step(30 + i, "pytest", f"x{i}", f"y{i}", error="exit_1") for i in range(n)]

    assert opened(fails(7)) == []
    assert [a.klass for a in opened(fails(9))] == ["failing"]


def test_agents_that_hand_each_other_the_turn_are_told() -> None:
    events = [
        LlmCall(at=T0 + 5.0 * i, run="r1", app="shop", agent="ab"[i % 2], input_tokens=500) for i in range(12)
    ]
    found = opened(events)
    assert [a.klass for a in found] == ["ping_pong"]
    assert found[0].evidence["agents"] == ["a", "b"]
    assert found[0].at == events[7].at


def test_a_model_call_that_is_refused_again_and_again_is_told() -> None:
    events = [
        LlmCall(at=T0 + 5.0 * i, run="r1", app="shop", model="m", agent="a", error="context_too_long")
        for i in range(5)
    ]
    found = told(
        [*events, LlmCall(at=T0 + 60.0, run="r1", app="shop", model="m", agent="a", input_tokens=10)]
    )
    assert [(a.klass, a.phase) for a in found] == [("failing", "on"), ("failing", "off")]


def test_without_results_more_repeats_are_needed_and_it_is_said() -> None:
    events = [step(i, "search", "same", "") for i in range(10)]
    found = opened(events)
    assert found[0].at == events[5].at
    assert found[0].evidence["result"] == "not reported"


def test_equal_calls_whose_results_differ_only_trivially_are_told_late() -> None:
    events = [step(i, "report", "same", f"r{i}", result_bytes=1000 + i % 3) for i in range(25)]
    found = opened(events)
    assert found[0].at == events[19].at
    assert "bytes long" in str(found[0].evidence["result"])


def test_a_loop_of_one_agent_is_seen_between_the_steps_of_another() -> None:
    events: list[Event] = []
    for i in range(12):
        events.append(step(2 * i, "search", "same", "same", agent="stuck"))
        events.append(step(2 * i + 1, "write", f"a{i}", f"r{i}", agent="busy"))
    found = opened(events)
    assert [(a.klass, a.labels["agent"]) for a in found] == [("repeat", "stuck")]


# --- what only looks like one --------------------------------------------------------------------------------------------


def test_paging_through_five_hundred_results_is_no_loop() -> None:
    assert told([step(i, "list_orders", f"cursor{i}", f"page{i}") for i in range(500)]) == []
    assert told([step(i, "next_page", "none", f"page{i}", result_bytes=2000) for i in range(500)]) == []


def test_polling_with_back_off_is_no_loop() -> None:
    at, events = 0.0, []
    for i in range(20):
        at += min(60.0, 2.0 * 1.7**i)
        events.append(step(i, "get_export", "job7", "pending", at=at))
    assert told(events) == []


def test_polling_by_name_is_no_loop() -> None:
    for tool in ("get_job_status", "wait", "pollExport", "check-health"):
        assert told([step(i, tool, "job7", "pending") for i in range(60)]) == []


def test_polling_without_end_is_told_after_all() -> None:
    found = opened([step(i, "get_job_status", "job7", "pending") for i in range(140)])
    assert [a.klass for a in found] == ["repeat"]
    assert "polling" in str(found[0].evidence["looks_like"])


def test_a_tool_declared_as_polling_is_treated_so() -> None:
    events = [step(i, "get_export", "job7", "pending") for i in range(30)]
    assert opened(events)
    assert told(events, Params(polling_tools=("get_export",))) == []
    assert told(events, Params(exempt_tools=("get_export",))) == []


def test_sleep_and_status_in_turn_are_no_cycle() -> None:
    events: list[Event] = []
    for i in range(30):
        events.append(step(2 * i, "sleep", "30", "ok"))
        events.append(step(2 * i + 1, "get_export", "job7", "pending"))
    assert told(events) == []


def test_re_running_tests_between_edits_is_no_loop() -> None:
    events: list[Event] = []
    for i in range(20):
        events.append(step(2 * i, "edit", f"patch{i}", "ok"))
        events.append(step(2 * i + 1, "pytest", "all", f"failed{i % 4}"))
    assert told(events) == []


def test_re_running_tests_with_equal_results_between_edits_is_no_loop() -> None:
    events: list[Event] = []
    for i in range(20):
        events.append(step(2 * i, "edit", f"patch{i}", f"diff{i}"))
        events.append(step(2 * i + 1, "pytest", "all", "2 failed"))
    assert told(events) == []


def test_a_heartbeat_at_regular_gaps_is_no_loop() -> None:
    assert told([step(i, "report_alive", "x", "ok", at=60.0 * i) for i in range(100)]) == []


def test_retries_of_what_may_pass_with_growing_gaps_are_given_time() -> None:
    at, events = 0.0, []
    for i in range(6):
        at += 2.0 * 2.0**i
        events.append(step(i, "fetch", "url", "", at=at, error="rate_limited"))
    assert told(events) == []


def test_a_users_turn_starts_anew() -> None:
    events: list[Event] = []
    for i in range(10):
        events.append(step(3 * i, "get_order", "7", "shipped"))
        events.append(step(3 * i + 1, "get_order", "7", "shipped"))
        events.append(AgentStep(at=T0 + 12.0 * i + 11.0, run="r1", app="shop", agent="worker", kind="user"))
    assert told(events) == []


def test_the_same_step_told_by_two_instrumentations_is_one() -> None:
    events: list[Event] = []
    for i in range(4):
        for scope in ("otel", "openinference"):
            events.append(step(i, "get", f"a{i // 2}", f"r{i // 2}", scope=scope, id=f"{scope}-{i}"))
    assert told(events) == []
    assert told([step(i, "get", "a", "r", span="span-1") for i in range(5)]) == []


def test_a_handover_pipeline_is_no_ping_pong() -> None:
    agents = "abcdefgh"
    assert told([LlmCall(at=T0 + 5.0 * i, run="r1", agent=agents[i], input_tokens=5) for i in range(8)]) == []


def test_providers_failures_are_not_the_runs_loop() -> None:
    assert told([LlmCall(at=T0 + i, run="r1", agent="a", error="overloaded") for i in range(30)]) == []


def test_steps_without_hashes_and_events_without_a_run_say_nothing() -> None:
    assert told([step(i, "search", "", "") for i in range(60)]) == []
    assert told([step(i, "search", "a", "r", run="") for i in range(60)]) == []


# --- life of an episode --------------------------------------------------------------------------------------------------


def test_a_loop_is_over_when_the_run_makes_progress() -> None:
    events = work(2) + [step(i, "search", "same", "same") for i in range(2, 8)] + work(3, start=8)
    phases = [(a.phase, a.id) for a in told(events)]
    assert [p for p, _ in phases] == ["on", "still", "off"]
    assert len({name for _, name in phases}) == 1


def test_a_loop_is_over_when_the_run_falls_silent() -> None:
    d = RunawayLoop()
    d.feed(work(2) + [step(i, "search", "same", "same") for i in range(2, 8)])
    assert d.tick(T0 + 300.0) == []
    ended = d.tick(T0 + 2000.0)
    assert [a.phase for a in ended] == ["off"]
    assert ended[0].evidence["why"] == "the run ended"
    assert d.tick(T0 + 9000.0) == []


def test_dwell_asks_for_more_steps_in_a_row() -> None:
    events = [step(i, "search", "same", "same") for i in range(10)]
    assert opened(events, Params(dwell_steps=3))[0].at == events[4].at


def test_runs_over_the_limit_are_forgotten_and_their_loops_ended() -> None:
    d = RunawayLoop(Params(max_runs=2))
    d.feed([step(i, "search", "same", "same") for i in range(5)])
    out = d.feed([step(9, "a", "b", "c", run="r2"), step(9, "a", "b", "c", run="r3")])
    assert [(a.phase, a.labels["run"]) for a in out] == [("off", "r1")]


def test_a_run_takes_about_a_kilobyte() -> None:
    d = RunawayLoop()
    d.feed([step(i, "search", f"a{i}", f"r{i}", run=f"run{r}") for r in range(100) for i in range(40)])
    assert len(d.snapshot()) / 100 < 1_200


@pytest.mark.parametrize(
    "wrong",
    [
        {"dwell_steps": 0},
        {"idle_s": 0.0},
        {"max_runs": 0},
        {"rules": Rules(repeats=1)},
        {"rules": Rules(window=40)},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Params(**wrong)


steps = st.lists(
    st.tuples(
        st.sampled_from(["r1", "r2"]), st.sampled_from(["tool", "user", "handoff"]), st.sampled_from(["get", "status", "edit"]),
        st.integers(0, 2), st.integers(0, 2), st.sampled_from(["", "", "exit_1"]), st.floats(0.1, 90.0),
    ),
    min_size=1, max_size=60,
)  # fmt: skip


@given(steps, st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_restoring_at_any_point_changes_nothing(
    drawn: list[tuple[str, str, str, int, int, str, float]], cut: int
) -> None:
    at, events = T0, []
    for i, (run, kind, tool, args, result, error, gap) in enumerate(drawn):
        at += gap
        events.append(
            AgentStep(at=at, run=run, kind=kind, tool=tool, agent="ab"[args % 2], args_hash=f"a{args}", result_hash=f"r{result}",
                      error=error, id=str(i))
        )  # fmt: skip
    whole, copy = RunawayLoop(), RunawayLoop()
    whole.feed(events[:cut])
    copy.restore(whole.snapshot())
    assert whole.feed(events[cut:]) == copy.feed(events[cut:])
    assert whole.tick(at + 5000.0) == copy.tick(at + 5000.0)
    assert whole.snapshot() == copy.snapshot()
