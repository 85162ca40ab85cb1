"""Guards beyond the first: stops, breaker, attempts, hysteresis, blast radius in every unit, and what has to be asked."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from msgspec.structs import replace

from flyball.core.directives import Directive, DirectiveChange, Verdict
from flyball.core.events import AgentStep, GpuSample, LlmCall
from flyball.core.incident import Incident, Severity, State
from flyball.core.plans import Plan
from flyball.runbooks.estate import LiveEstate
from flyball.runbooks.standing import PlannerSettings
from tests.remediation._estate import Row, change, window
from tests.runbooks._desk import TOUCH, YAML, Desk, book, one, verdicts

FRESH = ("mode: auto", "mode: auto\nmax_age: 12h")
AGAIN = ("cooldown: 30m", "cooldown: 0s")
MANY = ("runs: 3/1h, attempts: 2", "runs: 100/1h, attempts: 2")


def runs(desk: Desk, n: int, result: str | None = None, start: int = 0) -> list[Plan]:
    """So many incidents in a row, each with its run, which ends with `result`."""
    plans: list[Plan] = []
    for i in range(start, start + n):
        decision, plan = one(desk.news(desk.incident(id=f"INC-{i}")))
        assert decision.decision is Verdict.RUN, decision
        assert plan is not None
        plans.append(plan)
        if result:
            desk.out(plan, result)
        desk.end(plan, "undone" if result else "released")
        desk.news(desk.incident(id=f"INC-{i}", state=State.RESOLVED))
    return plans


# --- the kill switch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "runbook:failover", "action:redirect"])
def test_the_kill_switch_names_who_stopped_what(scope: str) -> None:
    desk = Desk()
    desk.stop(scope)
    decision, plan = one(desk.news())
    assert (decision.decision, decision.reason, plan) == (Verdict.HOLD, "stopped", None)
    assert (decision.values["scope"], decision.values["by"]) == (scope, "ana")


@pytest.mark.parametrize("scope", ["tenant:t1", "runbook:another", "action:block"])
def test_a_stop_of_something_else_does_not_hold_it(scope: str) -> None:
    desk = Desk()
    desk.stop(scope)
    assert verdicts(desk.news()) == [("run", "when_matched")]


def test_what_is_aimed_at_a_stopped_tenant_is_held() -> None:
    desk = Desk(TOUCH, ("touch: {}", "touch: {scope: {tenant: t1}}"))
    desk.stop("tenant:t1")
    assert verdicts(desk.news()) == [("hold", "stopped")]


def test_a_run_of_a_stopped_tenant_is_held_too() -> None:
    desk = Desk(TOUCH, ("touch: {}", "touch: {scope: {run: r1}}"))
    desk.stop("tenant:t1")
    about = replace(desk.incident(), scope={"provider": "b", "tenant": "t1"})
    assert verdicts(desk.news(about)) == [("hold", "stopped")]


def test_the_kill_switch_survives_a_restart() -> None:
    desk = Desk()
    desk.stop()
    state = desk.planner.snapshot()
    fresh = Desk()
    fresh.planner.restore(state)
    assert verdicts(fresh.news()) == [("hold", "stopped")]
    assert "all" in fresh.planner.stops.live


# --- the breaker ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", ["failed", "unverified", "ambiguous"])
def test_three_bad_runs_in_an_hour_open_the_breaker_and_time_does_not_close_it(result: str) -> None:
    desk = Desk(AGAIN, FRESH, MANY)
    runs(desk, 3, result)
    decision, _ = one(desk.news(desk.incident(id="INC-9")))
    assert (decision.decision, decision.reason) == (Verdict.REFUSE, "breaker")
    assert desk.tick(400) == []


def test_good_runs_and_cancelled_ones_do_not_open_it() -> None:
    desk = Desk(AGAIN, FRESH, MANY)
    runs(desk, 2, "failed")
    runs(desk, 4, "verified", start=2)
    runs(desk, 2, "cancelled", start=6)
    assert verdicts(desk.news(desk.incident(id="INC-9"))) == [("run", "when_matched")]


def test_a_run_that_fails_twice_counts_once() -> None:
    desk = Desk(AGAIN, FRESH, MANY)
    _, plan = one(desk.news(desk.incident(id="INC-A")))
    for _ in range(3):
        desk.out(plan, "failed")
    desk.end(plan, "undone")
    assert verdicts(desk.news(desk.incident(id="INC-9"))) == [("run", "when_matched")]


def test_only_a_person_closes_it() -> None:
    desk = Desk(AGAIN, FRESH, MANY)
    runs(desk, 3, "unverified")
    assert verdicts(desk.news(desk.incident(id="INC-9"))) == [("refuse", "breaker")]
    desk.stop("runbook:failover", "reset")
    assert verdicts(desk.tick()) == [("run", "when_matched")]


def test_it_is_open_for_every_runbook_with_the_same_action() -> None:
    other = book(YAML, ("name: failover", "name: another"), ("severity >= HIGH", "severity >= CRITICAL"))
    desk = Desk(YAML, other, AGAIN, FRESH, MANY)
    runs(desk, 3, "failed")
    said = verdicts(desk.news(desk.incident(id="INC-9", severity=Severity.CRITICAL)))
    assert said == [("refuse", "breaker"), ("refuse", "breaker")]


def test_its_limit_is_the_runbooks_to_set() -> None:
    desk = Desk(AGAIN, FRESH, MANY, ("attempts: 2", "attempts: 2, breaker: 1/1h"))
    runs(desk, 1, "failed")
    assert verdicts(desk.news(desk.incident(id="INC-9"))) == [("refuse", "breaker")]


def test_failures_far_apart_do_not_open_it() -> None:
    desk = Desk(AGAIN, FRESH, MANY, ("attempts: 2", "attempts: 2, breaker: 2/1m"))
    for i in range(4):
        runs(desk, 1, "failed", start=i)
        desk.world.advance(windows=7)
    assert verdicts(desk.news(desk.incident(id="INC-9"))) == [("run", "when_matched")]


def test_a_rung_that_is_not_enough_is_no_failure_when_the_next_one_is() -> None:
    desk = Desk(TOUCH, AGAIN, FRESH, MANY, ("mode: auto", "mode: auto\nladder: true"), ("attempts: 2", "attempts: 2, breaker: 1/1h"))  # fmt: skip
    for i in range(2):
        _, plan = one(desk.news(desk.incident(id=f"INC-{i}")))
        desk.out(plan, "unverified")
        desk.out(plan, "verified")
        desk.end(plan)
    _, plan = one(desk.news(desk.incident(id="INC-8")))
    desk.out(plan, "unverified")
    desk.end(plan, "undone")
    assert verdicts(desk.news(desk.incident(id="INC-9"))) == [("refuse", "breaker")]


# --- attempts, locks, cooldowns -------------------------------------------------------------------------------------------


def test_two_runbooks_that_do_the_same_to_one_target_share_its_attempts() -> None:
    other = book(YAML, ("name: failover", "name: zz"))
    desk = Desk(YAML, other, AGAIN, FRESH, MANY, ("attempts: 2", "attempts: 1"))
    planned = desk.news()
    assert verdicts(planned) == [("run", "when_matched"), ("hold", "lock")]
    desk.end(planned[0][1], "undone")
    assert verdicts(desk.tick()) == [("refuse", "attempts"), ("refuse", "attempts")]


def test_after_a_run_that_helped_nobody_is_told_that_it_may_not_run_again() -> None:
    desk = Desk(FRESH, ("attempts: 2", "attempts: 1"), ("cooldown: 30m", "cooldown: 1m"))
    _, plan = one(desk.news())
    desk.out(plan, "verified")
    desk.end(plan)
    decision, _ = one(desk.tick())
    assert (decision.decision, decision.reason, decision.until) == (
        Verdict.HOLD,
        "cooldown",
        desk.world.now + 50.0,
    )
    assert verdicts(desk.tick(6)) == [("refuse", "attempts")]


@pytest.mark.parametrize("result", ["failed", "not_accepted"])
def test_after_a_run_that_did_not_help_it_says_at_once_that_a_person_has_to_look(result: str) -> None:
    desk = Desk(FRESH, ("attempts: 2", "attempts: 1"))
    _, plan = one(desk.news())
    desk.end(plan, result)
    assert verdicts(desk.tick()) == [("refuse", "attempts")]


def test_what_a_lock_held_back_is_looked_at_again_by_itself() -> None:
    other = book(YAML, ("name: failover", "name: zz"))
    desk = Desk(YAML, other, AGAIN, FRESH, MANY)
    planned = desk.news()
    assert desk.tick(3) == []
    desk.end(planned[0][1])
    assert ("run", "when_matched") in verdicts(desk.tick())


# --- there and back -------------------------------------------------------------------------------------------------------


def back_and_forth(*what: str | tuple[str, str]) -> Desk:
    """b was left for a; that is over, and now a fails while b is well."""
    desk = Desk(*what, AGAIN, FRESH, ("traffic: 60%", "traffic: 100%"))
    _, plan = one(desk.news())
    assert plan is not None
    assert plan.steps[0].target == {"provider": "a"}
    desk.end(plan)
    desk.news(desk.incident(state=State.RESOLVED))
    desk.world.fails.update(a=0.6, b=0.0)
    desk.world.advance(windows=13)
    return desk


def test_traffic_does_not_go_back_where_it_just_came_from() -> None:
    desk = back_and_forth()
    desk.world.calls["c"] = 0
    desk.world.advance(windows=13)
    ended = desk.world.now - 260.0
    decision, _ = one(desk.news(desk.incident("a", id="INC-2")))
    assert (decision.decision, decision.reason) == (Verdict.HOLD, "hysteresis")
    assert decision.until == ended + 600.0
    assert decision.values["opposite"] == "provider=b>provider=a"
    assert verdicts(desk.tick(34)) == [("run", "when_matched")]


def test_the_next_best_is_taken_where_there_is_one() -> None:
    _, plan = one(back_and_forth().news(Desk().incident("a", id="INC-2", at=1_700_000_270.0)))
    assert plan is not None
    assert plan.steps[0].target == {"provider": "c"}


def test_where_a_live_redirect_leads_away_from_is_no_place_to_go() -> None:
    desk = Desk(("traffic: 60%", "traffic: 100%"))
    lease = Directive(
        id="DIR-1", kind="redirect", scope={"provider": "a"}, params={"to": {"provider": "c"}, "share": 0.5},
        granted_at=desk.world.now, expires_at=desk.world.now + 300.0, incident="INC-0", runbook="r", step="s",
    )  # fmt: skip
    desk.say(DirectiveChange(directive=lease, at=desk.world.now, change="granted", reason="test"))
    _, plan = one(desk.news())
    assert plan is not None
    assert plan.steps[0].target == {"provider": "c"}


# --- the blast radius -----------------------------------------------------------------------------------------------------


def touched(
    limit: str, params: str = "{}", about: Incident | None = None, desk: Desk | None = None
) -> tuple[str, str, Desk]:
    desk = desk or touching(limit, params)
    planned = desk.news(about)
    decision = planned[0][0]
    return decision.reason, decision.detail, desk


def touching(limit: str, params: str = "{}") -> Desk:
    return Desk(TOUCH, ("traffic: 100%", limit), ("touch: {}", f"touch: {params}"))


def tell(desk: Desk, *rows: Row) -> None:
    desk.world.estate.feed([window(desk.world.now, rows)])
    desk.world.now += 10.0


def test_tokens_that_nobody_told_are_refused_where_tokens_are_limited() -> None:
    reason, detail, _ = touched("traffic: 100%, tokens_per_min: 1000")
    assert (reason, detail) == ("blast_radius", "unknown: no call told the tokens of the touched traffic")


@pytest.mark.parametrize(("limit", "reason"), [(20_000, "when_matched"), (5_000, "blast_radius")])
def test_tokens_per_minute_are_limited(limit: int, reason: str) -> None:
    desk = touching(f"traffic: 100%, tokens_per_min: {limit}")
    labels = {"provider": "b", "model": "m", "app": "shop", "tenant": "t1"}
    tell(desk, Row(200, labels=labels, tokens=20_000.0))
    decision, _ = desk.news(desk.incident())[0]
    assert decision.reason == reason
    assert decision.values["blast_tokens_per_min"] == pytest.approx(20_000.0 / 2.0, rel=0.01)


def test_both_limits_of_traffic_must_hold() -> None:
    assert touched("traffic: 30%, usd_per_hour: 100000")[0] == "blast_radius"
    assert touched("traffic: 100%, usd_per_hour: 1")[0] == "blast_radius"
    assert touched("traffic: 100%, usd_per_hour: 100000")[0] == "when_matched"


def test_a_target_within_another_is_counted_once() -> None:
    steps = "- touch: {}\n  - touch: {scope: {provider: b, app: shop}}"
    desk = Desk(TOUCH, ("- touch: {}", steps))
    assert one(desk.news())[0].values["blast_traffic"] == pytest.approx(0.4)


def test_a_key_that_windows_do_not_know_counts_as_all_that_it_may_be_part_of() -> None:
    about = replace(Desk().incident(), scope={"provider": "b", "app": "shop"})
    desk = touching("traffic: 100%", "{scope: {key: k1}}")
    decision, _ = one(desk.news(replace(about, at=desk.world.now, updated_at=desk.world.now)))
    assert decision.values["blast_traffic"] == pytest.approx(0.4)
    alone = touching("traffic: 90%", "{scope: {key: k1}}")
    decision, _ = one(alone.news(replace(about, scope={}, at=alone.world.now, updated_at=alone.world.now)))
    assert (decision.reason, decision.values["blast_traffic"]) == ("blast_radius", 1.0)


def steps_of(run: str, at: float, n: int, every_s: float) -> Iterable[AgentStep | LlmCall]:
    return [AgentStep(at=at - i * every_s, run=run) for i in range(n)]


@pytest.mark.parametrize(
    ("n", "every_s", "share"), [(20, 5.0, 0.0033), (500, 0.5, 0.0410)], ids=["slow", "busy"]
)
def test_a_run_is_measured_by_its_own_steps(n: int, every_s: float, share: float) -> None:
    desk = touching("traffic: 10%, tenants: 1", "{scope: {run: r1}}")
    desk.world.estate.observe(list(steps_of("r1", desk.world.now, n, every_s)))
    decision, _ = one(desk.news())
    assert decision.reason == "when_matched"
    assert decision.values["blast_traffic"] == pytest.approx(share, rel=0.3)
    assert decision.values["blast_tenants"] == 1


def only_runs(n: int) -> Desk:
    """No call is told, only steps of so many runs."""
    desk = touching("traffic: 10%, tenants: 1", "{scope: {run: r0}}")
    desk.world.estate = LiveEstate()
    desk.world.estate.observe(
        [AgentStep(at=desk.world.now - i, run=f"r{r}") for i in range(10) for r in range(n)]
    )
    return desk


def test_where_only_runs_are_watched_a_share_is_one_of_all_their_steps() -> None:
    decision, _ = one(only_runs(20).news())
    assert (decision.reason, decision.values["blast_traffic"]) == ("when_matched", 0.05)


def test_one_of_few_runs_is_stopped_only_with_approval() -> None:
    decision, plan = one(only_runs(3).news())
    assert (decision.reason, decision.values["active_runs"]) == ("must_ask", 3)
    assert plan is not None
    assert not plan.may_act


def test_a_run_that_is_much_of_the_traffic_of_many_is_refused() -> None:
    desk = only_runs(20)
    estate = desk.world.estate
    estate.observe([AgentStep(at=desk.world.now - 10.0, run="r0") for _ in range(31)])
    estate.observe([AgentStep(at=desk.world.now - 400.0, run=f"r{r}") for r in range(1, 20)])
    decision, _ = one(desk.news())
    assert decision.reason == "blast_radius"


def test_a_run_that_nobody_saw_is_unknown() -> None:
    assert (
        touched("traffic: 100%", "{scope: {run: r1}}")[1] == "unknown: no traffic in scope to measure it on"
    )


def gpus(desk: Desk, n: int) -> None:
    at = desk.world.now
    desk.world.estate.observe([GpuSample(at=at, node=f"n{i // 8}", gpu=str(i % 8)) for i in range(n)])


@pytest.mark.parametrize(
    ("limit", "touches", "fleet", "reason"),
    [
        ("gpus: 4, gpu_share: 25%", 4, 16, "when_matched"),
        ("gpus: 4, gpu_share: 25%", 4, 15, "blast_radius"),
        ("gpus: 2, gpu_share: 50%", 3, 16, "blast_radius"),
        ("gpus: 2", 2, 8, "when_matched"),
        ("gpus: 2", 2, 7, "blast_radius"),
        ("gpu_share: 100%", 9, 16, "blast_radius"),
        ("gpu_share: 25%", 1, 3, "must_ask"),
        ("gpu_share: 25%", 2, 3, "blast_radius"),
        ("gpus: 2", 1, 0, "blast_radius"),
    ],
)  # fmt: skip
def test_gpus_are_limited_by_number_and_by_share_rounded_down(
    limit: str, touches: int, fleet: int, reason: str
) -> None:
    desk = touching(f"traffic: 100%, {limit}", f"{{scope: {{node: n0}}, share: 0.0, gpus: {touches}}}")
    gpus(desk, fleet)
    decision, _ = one(desk.news(replace(desk.incident("n0", kind="node"), scope={"node": "n0"})))
    assert decision.reason == reason
    assert "blast_traffic" not in decision.values


def test_of_a_small_fleet_one_is_taken_only_with_approval() -> None:
    desk = touching("traffic: 100%, gpu_share: 25%", "{scope: {node: n0}, share: 0.0, gpus: 1}")
    gpus(desk, 3)
    decision, plan = one(desk.news(replace(desk.incident("n0", kind="node"), scope={"node": "n0"})))
    assert (decision.decision, decision.reason) == (Verdict.SUGGEST, "must_ask")
    assert plan is not None
    assert not plan.may_act
    answered, approved = desk.answer(plan)
    assert answered.reason == "approved"
    assert approved is not None
    assert approved.may_act


# --- what has to be asked -------------------------------------------------------------------------------------------------


def test_what_cannot_be_undone_waits_for_a_person_also_in_auto() -> None:
    desk = Desk(TOUCH, ("touch: {}", "touch: {must_ask: irreversible}"))
    decision, plan = one(desk.news())
    assert (decision.decision, decision.reason) == (Verdict.SUGGEST, "must_ask")
    assert plan is not None
    assert (plan.mode, plan.may_act) == ("approve", False)
    assert desk.tick(2) == []


def test_a_step_that_asks_by_itself_does_not_hold_the_plan_back() -> None:
    itself = ("- touch: {}", "- drain: {targets: [node-1]}\n    undo: none\n    approval: {expires: 5m}")
    decision, plan = one(Desk(TOUCH, itself).news())
    assert decision.reason == "when_matched"
    assert plan is not None
    step = plan.steps[0]
    assert step.approval is not None
    assert step.hook is not None
    assert (step.approval.expires_s, step.hook.undoable) == (300.0, False)


def test_observing_only_asks_nobody() -> None:
    desk = Desk(TOUCH, ("touch: {}", "touch: {must_ask: irreversible}"), ceiling="observe")
    assert verdicts(desk.news()) == [("hold", "mode_observe")]


def test_an_operation_without_targets_is_refused() -> None:
    for targets in ("[]", "[a, '']"):
        assert touched("traffic: 100%", f"{{targets: {targets}}}")[0] == "no_target"


# --- time -----------------------------------------------------------------------------------------------------------------


def test_a_precondition_is_waited_for_at_first_and_the_run_is_not_preceded_by_a_refusal() -> None:
    check = "preconditions: [{id: failing, check: 'errors(incident.scope, duration(\"30s\")) > 0.5'}]\nsteps:"
    desk = Desk(("steps:", check))
    decision, _ = one(desk.news())
    assert (decision.decision, decision.reason) == (Verdict.HOLD, "precondition")
    assert decision.detail == "failing is not met yet"
    assert verdicts(desk.tick()) == [("run", "when_matched")]


def test_windows_from_the_future_freeze_it_too() -> None:
    desk = Desk()
    desk.world.now -= 100.0
    assert verdicts(desk.news()) == [("hold", "no_telemetry")]


def test_a_clock_that_goes_back_strands_nothing() -> None:
    desk = Desk(("mode: auto", "mode: auto\nhold: 30s\nmax_age: 12h"))
    desk.news()
    now = desk.world.now
    desk.planner.tick(now, desk.world.estate)
    assert desk.planner.tick(now - 1.0, desk.world.estate) == []
    assert verdicts(desk.tick(3)) == [("run", "when_matched")]


def test_many_held_at_once_are_looked_at_some_at_a_time() -> None:
    desk = Desk(TOUCH, ("mode: auto", "mode: auto\nhold: 10s"), ("runs: 3/1h", "runs: 100/1h"), settings=PlannerSettings(looks_per_tick=2))  # fmt: skip
    desk.world.estate.feed([])
    for i in range(5):
        about = replace(desk.incident("b", id=f"INC-{i}"), scope={})
        assert verdicts(desk.news(about)) == [("hold", "hold")]
    desk.world.now += 10.0
    said = [verdicts(desk.planner.tick(desk.world.now + t, desk.world.estate)) for t in range(3)]
    assert [len(s) for s in said] == [2, 2, 1]
    assert said[0] == [("run", "when_matched"), ("hold", "lock")]


def test_of_a_storm_of_incidents_the_rest_is_judged_in_the_next_ticks() -> None:
    desk = Desk(TOUCH, ("runs: 3/1h", "runs: 100/1h"), settings=PlannerSettings(looks_per_tick=2))
    opened = [change(desk.incident(id=f"INC-{i}"), desk.world.now) for i in range(5)]
    said = verdicts(desk.say(*opened))
    assert said == [("run", "when_matched"), ("hold", "lock")]
    for _ in range(2):
        said += verdicts(desk.planner.tick(desk.world.now, desk.world.estate))
    assert said == [("run", "when_matched"), *[("hold", "lock")] * 4]


def test_a_dry_run_is_marked_as_one() -> None:
    plan = one(Desk(dry_run=True).news())[1]
    assert plan is not None
    assert plan.dry_run


def test_more_tenants_than_are_told_apart_are_an_unknown_number() -> None:
    desk = touching("traffic: 100%, tenants: 1000")
    tell(desk, Row(50, labels={"provider": "b", "model": "m", "app": "shop", "tenant": "other"}))
    decision, _ = one(desk.news())
    assert (decision.reason, decision.detail) == ("blast_radius", "unknown: more tenants than are told apart")
