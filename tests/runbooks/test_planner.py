"""Every guard of the planner by name, and the thin thread from an incident to a released lease."""

from __future__ import annotations

import pytest

from flyball.core.directives import (
    DirectiveChange,
    Operation,
    Outcome,
    Verdict,
)
from flyball.core.errors import ConfigError
from flyball.core.incident import Severity, State
from flyball.remediation.executor import Executor
from flyball.runbooks.planner import Planner
from tests.remediation._estate import Row, incident, window
from tests.runbooks._desk import YAML, Desk, books, one, verdicts


def word(moved: DirectiveChange | Outcome | Operation) -> str:
    if isinstance(moved, Outcome):
        return moved.result
    return moved.change if isinstance(moved, DirectiveChange) else moved.verb


def test_an_outage_of_a_provider_is_planned_with_reason_values_and_frozen_targets() -> None:
    decision, plan = one(Desk().news())
    assert (decision.decision, decision.reason) == (Verdict.RUN, "when_matched")
    assert decision.values["from_errors"] > 0.05
    assert decision.values["blast_traffic"] == pytest.approx(0.38)
    assert plan is not None
    assert decision.plan_hash == plan.plan_hash
    step = plan.steps[0]
    assert step.scope == {"provider": "b"}
    assert step.stages == ({"to": {"provider": "a"}, "share": 0.25}, {"to": {"provider": "a"}, "share": 0.95})
    assert plan.locks == ("provider:b", "provider:a")


def test_a_decision_is_given_once_and_not_at_every_tick() -> None:
    desk = Desk(ceiling="suggest")
    assert verdicts(desk.news()) == [("suggest", "mode_suggest")]
    assert desk.tick(5) == []


def test_an_incident_that_the_condition_does_not_match_gets_no_decision() -> None:
    assert Desk().news(incident(severity=Severity.LOW)) == []


@pytest.mark.parametrize(
    ("mode", "ceiling", "expected"),
    [
        ("auto", "auto", ("run", "when_matched")),
        ("auto", "approve", ("suggest", "mode_approve")),
        ("auto", "suggest", ("suggest", "mode_suggest")),
        ("auto", "observe", ("hold", "mode_observe")),
        ("approve", "auto", ("suggest", "mode_approve")),
        ("suggest", "auto", ("suggest", "mode_suggest")),
        ("observe", "auto", ("hold", "mode_observe")),
    ],
)
def test_the_more_careful_of_both_modes_counts(mode: str, ceiling: str, expected: tuple[str, str]) -> None:
    desk = Desk(("mode: auto", f"mode: {mode}"), ceiling=ceiling)
    decision, plan = one(desk.news())
    assert (decision.decision.value, decision.reason) == expected
    assert (plan is not None and plan.may_act) == (expected[0] == "run")


def test_an_unknown_mode_of_the_environment_stops_start_up() -> None:
    with pytest.raises(ConfigError, match=r"unknown mode 'outo'; did you mean 'auto'\?"):
        Planner(books(YAML), "outo")


def test_a_condition_must_stay_true_for_the_hold_time() -> None:
    desk = Desk(("mode: auto", "mode: auto\nhold: 30s"))
    decision, _ = one(desk.news())
    assert (decision.reason, decision.until) == ("hold", desk.world.now + 30.0)
    assert desk.tick(2) == []
    assert verdicts(desk.tick(1)) == [("run", "when_matched")]


def test_a_condition_that_clears_during_the_hold_starts_again() -> None:
    desk = Desk(("mode: auto", "mode: auto\nhold: 30s"))
    desk.news()
    desk.tick(2)
    assert verdicts(desk.news(incident(severity=Severity.LOW))) == [("hold", "condition_cleared")]
    assert verdicts(desk.news()) == [("hold", "hold")]
    assert desk.tick(2) == []


def test_an_incident_without_news_is_stale_and_never_acted_on() -> None:
    desk = Desk()
    old = incident(at=desk.world.now - 400.0)
    assert verdicts(desk.news(old)) == [("refuse", "stale")]


def test_a_detector_outage_freezes_auto_mode() -> None:
    desk = Desk()
    desk.world.now += 100.0
    assert verdicts(desk.news(incident(at=desk.world.now))) == [("hold", "no_telemetry")]


def test_the_kill_switch_holds_and_lets_go() -> None:
    desk = Desk()
    desk.stop()
    assert verdicts(desk.news()) == [("hold", "stopped")]
    desk.stop("all", "resume")
    assert verdicts(desk.tick()) == [("run", "when_matched")]


def test_a_resolved_incident_is_planned_for_no_more() -> None:
    desk = Desk(("mode: auto", "mode: auto\nhold: 30s"))
    desk.news()
    desk.news(incident(at=desk.world.now, state=State.RESOLVED))
    assert desk.tick(5) == []


def test_second_incident_within_cooldown_is_held() -> None:
    desk = Desk(
        ("limits: {cooldown: 30m", "limits: {cooldown: 1m"), ("mode: auto", "mode: auto\nmax_age: 1h")
    )
    _, plan = one(desk.news())
    desk.end(plan)
    desk.tick()
    decision, _ = one(desk.news(incident(at=desk.world.now, id="INC-2")))
    assert (decision.decision, decision.reason) == (Verdict.HOLD, "cooldown")
    assert decision.until == desk.world.now + 50.0
    assert ("run", "when_matched") in verdicts(desk.tick(6))


def test_runs_of_one_runbook_are_limited_within_a_span() -> None:
    desk = Desk(("cooldown: 30m", "cooldown: 0s"), ("runs: 3/1h", "runs: 2/1h"))
    for n in range(2):
        decision, plan = one(desk.news(incident(at=desk.world.now, id=f"INC-{n}")))
        assert decision.decision is Verdict.RUN
        desk.end(plan)
        desk.news(incident(at=desk.world.now, id=f"INC-{n}", state=State.RESOLVED))
    assert verdicts(desk.news(incident(at=desk.world.now, id="INC-9"))) == [("hold", "runs")]


def test_attempts_for_one_incident_are_finite() -> None:
    desk = Desk(("cooldown: 30m", "cooldown: 0s"), ("mode: auto", "mode: auto\nmax_age: 1h"))
    seen = verdicts(planned := desk.news())
    for _ in range(4):
        if planned and planned[0][1] is not None:
            desk.end(planned[0][1], "undone")
        planned = desk.tick()
        seen += verdicts(planned)
    assert seen == [("run", "when_matched"), ("run", "when_matched"), ("refuse", "attempts")]


def test_each_attempt_is_a_plan_of_its_own() -> None:
    desk = Desk(("cooldown: 30m", "cooldown: 0s"))
    _, first = one(desk.news())
    desk.end(first, "undone")
    _, second = one(desk.news())
    assert first is not None
    assert second is not None
    assert first.plan_hash != second.plan_hash


def test_one_target_is_in_the_hands_of_one_plan_whatever_the_runbook() -> None:
    other = YAML.replace("name: failover", "name: another")
    assert verdicts(Desk(YAML, other).news()) == [("run", "when_matched"), ("hold", "lock")]


def test_the_provider_that_took_over_is_not_left_for_the_one_it_took_over_from() -> None:
    desk = Desk(("traffic: 60%", "traffic: 100%"))
    one(desk.news())
    desk.world.fails.update(a=0.6)
    desk.world.advance(windows=6)
    decision, _ = one(desk.news(incident("a", at=desk.world.now, id="INC-2")))
    assert (decision.decision, decision.reason) == (Verdict.HOLD, "lock")


def test_with_every_provider_failing_nothing_is_done() -> None:
    desk = Desk()
    desk.world.fails.update(a=0.6, c=0.6)
    desk.world.advance(windows=2)
    decision, plan = one(desk.news())
    assert (decision.decision, decision.reason, plan) == (Verdict.REFUSE, "no_candidate", None)


def test_a_candidate_appears_later_and_the_runbook_runs_then() -> None:
    desk = Desk()
    desk.world.fails.update(a=0.6, c=0.6)
    desk.world.advance(windows=2)
    desk.news(incident(at=desk.world.now))
    desk.world.fails.update(c=0.0)
    assert ("run", "when_matched") in verdicts(desk.tick(13))


def test_a_root_that_is_no_provider_is_no_target_of_a_redirect() -> None:
    desk = Desk(('incident.root.kind == "provider" && ', ""))
    assert verdicts(desk.news(incident("shop", at=desk.world.now, kind="app"))) == [("refuse", "no_target")]


def test_a_precondition_that_is_not_met_refuses_and_says_which() -> None:
    text = (
        "preconditions: [{id: nearly_down, check: 'errors(incident.scope, duration(\"20s\")) > 0.9'}]\nsteps:"
    )
    desk = Desk(("steps:", text))
    decision, _ = one(desk.news())
    assert (decision.decision, decision.reason) == (Verdict.HOLD, "precondition")
    assert decision.values["precondition"] == "nearly_down"
    decision, _ = one(desk.tick(4))
    assert (decision.decision, decision.reason) == (Verdict.REFUSE, "precondition")


def test_a_precondition_without_data_is_not_met_not_even_by_negation() -> None:
    text = 'preconditions: [{id: p, check: \'!(errors({"provider": "x"}, duration("2m")) > 0.1)\'}]\nsteps:'
    decision, _ = one(Desk(("steps:", text)).news())
    assert decision.reason == "precondition"
    assert "no calls" in decision.detail


def test_a_blast_radius_over_the_limit_is_refused_with_its_figure() -> None:
    decision, _ = one(Desk(("traffic: 60%", "traffic: 30%")).news())
    assert (decision.decision, decision.reason) == (Verdict.REFUSE, "blast_radius")
    assert decision.values["blast_traffic"] == pytest.approx(0.38)
    assert decision.detail == "38% of the traffic; the limit is 30%"


def test_too_many_tenants_are_refused() -> None:
    desk = Desk(("tenants: 20", "tenants: 1"))
    rows = [
        Row(50, labels={"provider": "b", "model": "m", "app": "shop", "tenant": f"t{i}"}) for i in range(4)
    ]
    desk.world.estate.feed([window(desk.world.now, rows)])
    decision, _ = one(desk.news())
    assert (decision.reason, decision.values["blast_tenants"]) == ("blast_radius", 4)


def test_an_unknown_blast_radius_is_refused() -> None:
    """No call of the failing provider within the measured span: nobody can say what would be touched."""
    desk = Desk()
    desk.world.calls["b"] = 0
    desk.world.advance(windows=13)
    decision, _ = one(desk.news(incident(at=desk.world.now)))
    assert (decision.decision, decision.reason) == (Verdict.REFUSE, "blast_radius")
    assert decision.detail.startswith("unknown")


def test_an_unknown_cost_is_refused_where_cost_is_limited() -> None:
    desk = Desk(("tenants: 20", "usd_per_hour: 1000"))
    assert one(desk.news())[0].values["blast_usd_per_hour"] == pytest.approx(684.0)


def test_an_approved_plan_takes_its_locks_and_a_second_answer_is_refused() -> None:
    desk = Desk(ceiling="approve")
    _, plan = one(desk.news())
    decision, approved = desk.answer(plan)
    assert (decision.decision, decision.reason, decision.by) == (Verdict.RUN, "approved", "ana")
    assert approved is not None
    assert approved.may_act
    assert (approved.plan_hash, approved.mode, approved.approved_by) == (decision.plan_hash, "approve", "ana")
    again, none = desk.answer(plan)
    assert (again.decision, again.reason, none) == (Verdict.REFUSE, "approval_used", None)


def test_from_the_incident_to_the_released_lease_and_no_second_run() -> None:
    """After the release: held by the cooldown, then refused as stale, because the test sends no more news."""
    desk = Desk()
    executor = Executor()
    log: list[str] = []
    planned = desk.news()
    for i in range(60):
        world = desk.world
        moved = executor.feed([p for _, p in planned if p is not None], world.estate, world.now)
        moved += executor.tick(world.now, world.estate)
        desk.planner.feed(moved, world.estate, world.now)
        log += [d.decision.value for d, _ in planned]
        log += [word(m) for m in moved]
        if i == 10:
            world.fails["b"] = 0.0
        world.advance(executor.directives(world.now))
        planned = desk.planner.tick(world.now, world.estate)
    assert log == [
        "run", "granted", "applied", "verified", "renewed", "applied", "verified", "renewed", "released", "released", "hold",
        "refuse",
    ]  # fmt: skip


# --- what changes without news ----------------------------------------------------------------------------------------------


def test_a_condition_that_reads_the_age_becomes_true_by_itself() -> None:
    desk = Desk(("severity >= HIGH", "severity >= HIGH && incident.age_s >= 30.0"))
    assert desk.news() == []
    assert desk.tick(2) == []
    assert verdicts(desk.tick()) == [("run", "when_matched")]


def test_a_condition_that_reads_the_age_ends_by_itself() -> None:
    desk = Desk(("severity >= HIGH", "severity >= HIGH && incident.age_s < 30.0"), ceiling="suggest")
    desk.news()
    assert desk.tick(2) == []
    assert verdicts(desk.tick()) == [("hold", "condition_cleared")]
    assert desk.planner.waiting(desk.world.now) == []


def test_a_condition_that_reads_live_traffic_is_asked_again_when_a_window_closes() -> None:
    reads = 'when: >-\n  incident.severity >= HIGH && errors({"provider": "c"}, duration("20s")) > 0.5'
    desk = Desk(('when: incident.root.kind == "provider" && incident.severity >= HIGH', reads))
    assert desk.news() == []
    desk.world.fails["c"] = 0.9
    assert verdicts(desk.tick(2)) == [("run", "when_matched")]


def test_a_new_set_of_runbooks_judges_every_incident_at_the_next_tick() -> None:
    desk = Desk(("severity >= HIGH", "severity >= CRITICAL"))
    assert desk.news() == []
    desk.planner.reload(books(YAML))
    assert verdicts(desk.tick()) == [("run", "when_matched")]


def test_a_set_that_changed_while_flyball_was_down_judges_every_incident_too() -> None:
    desk = Desk(("severity >= HIGH", "severity >= CRITICAL"))
    desk.news()
    state = desk.planner.snapshot()
    desk.planner = Planner(books(YAML), "auto")
    desk.planner.restore(state)
    assert verdicts(desk.tick()) == [("run", "when_matched")]


def test_what_runs_goes_on_under_its_own_plan_when_its_runbook_goes() -> None:
    desk = Desk()
    _, plan = one(desk.news())
    desk.planner.reload(books(YAML.replace("failover", "another")))
    assert verdicts(desk.tick()) == [("hold", "lock")]
    desk.end(plan)
    assert verdicts(desk.tick()) == [("hold", "cooldown")]


def test_a_ceiling_that_is_lifted_lets_run_what_waited() -> None:
    desk = Desk(ceiling="approve")
    _, plan = one(desk.news())
    desk.planner.reload(books(YAML), "auto")
    assert verdicts(desk.tick()) == [("run", "when_matched")]
    assert desk.answer(plan)[0].reason == "approval_withdrawn"


def test_a_ceiling_that_is_lowered_takes_the_offer_back() -> None:
    desk = Desk(ceiling="approve")
    desk.news()
    desk.planner.reload(books(YAML), "observe")
    assert verdicts(desk.tick()) == [("hold", "mode_observe")]
    assert desk.planner.waiting(desk.world.now) == []
