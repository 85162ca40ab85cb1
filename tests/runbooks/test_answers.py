"""A person's answer: bound to what was read, in time, used once, and nothing that spoke for the plan may have changed."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from flyball.core.directives import Approval, Verdict
from flyball.core.incident import RelatedChange, Severity, State
from flyball.core.plans import Plan
from tests.runbooks._desk import TOUCH, YAML, Desk, book, books, one, verdicts

FRESH = ("mode: auto", "mode: auto\nmax_age: 6h")
LONG = book(YAML, FRESH)


def asked(*texts: str, **more: object) -> tuple[Desk, Plan]:
    desk = Desk(*(texts or (LONG,)), ceiling="approve", **more)  # type: ignore[arg-type]
    plan = one(desk.news())[1]
    assert plan is not None
    return desk, plan


def test_what_waits_can_be_listed_until_its_time_is_up() -> None:
    desk, plan = asked()
    waiting = desk.planner.waiting(desk.world.now)
    assert [(w.hash, w.since, w.until) for w in waiting] == [
        (plan.plan_hash, desk.world.now, desk.world.now + 600.0)
    ]
    assert waiting[0].values["blast_traffic"] == pytest.approx(0.38)
    assert desk.planner.waiting(desk.world.now + 601.0) == []


def test_an_approved_plan_is_the_one_that_was_read() -> None:
    desk, plan = asked()
    desk.tick(2)
    decision, approved = desk.answer(plan)
    assert (decision.decision, decision.reason, decision.by) == (Verdict.RUN, "approved", "ana")
    assert approved is not None
    assert (approved.steps, approved.plan_hash) == (plan.steps, plan.plan_hash)
    assert (approved.mode, approved.approved_by, approved.at) == ("approve", "ana", desk.world.now)
    assert desk.planner.waiting(desk.world.now) == []


def test_an_answer_is_used_once() -> None:
    desk, plan = asked()
    assert desk.answer(plan)[1] is not None
    assert [desk.answer(plan)[0].reason for _ in range(2)] == ["approval_used"] * 2


def test_a_replay_after_the_run_ended_approves_nothing() -> None:
    desk, plan = asked(book(LONG, ("cooldown: 30m", "cooldown: 0s")))
    at = desk.world.now
    _, approved = desk.answer(plan)
    desk.end(approved, "undone")
    assert verdicts(desk.tick()) == [("suggest", "mode_approve")]
    assert desk.answer(plan, at=at)[0].reason == "approval_used"


def test_a_hash_that_never_waited_is_refused_without_an_incident() -> None:
    desk, _ = asked()
    decision, plan = desk.answer("PLAN-nothing")
    assert (decision.reason, decision.incident, plan) == ("approval_unknown", "", None)
    assert not desk.planner.knows("PLAN-nothing")


def test_a_late_answer_is_refused_and_the_next_offer_has_a_hash_of_its_own() -> None:
    desk, plan = asked()
    offered = desk.tick(62)
    assert verdicts(offered) == [("suggest", "mode_approve")]
    fresh = offered[0][1]
    assert fresh is not None
    assert fresh.plan_hash != plan.plan_hash
    assert fresh.steps == plan.steps
    assert offered[0][0].values["instead_of"] == plan.plan_hash
    assert desk.answer(plan)[0].reason == "approval_expired"
    assert desk.answer(fresh)[0].reason == "approved"


def test_an_answer_that_comes_before_the_next_tick_but_too_late_is_refused() -> None:
    desk, plan = asked()
    desk.world.now += 601.0
    assert desk.answer(plan)[0].reason == "approval_expired"


def test_an_answer_older_than_the_offer_is_refused() -> None:
    desk, plan = asked()
    assert desk.answer(plan, at=desk.world.now - 5.0)[0].reason == "approval_expired"


def test_an_answer_without_a_name_is_refused_and_the_plan_goes_on_waiting() -> None:
    desk, plan = asked()
    assert desk.answer(plan, by=" ")[0].reason == "approval_unsigned"
    assert desk.answer(plan)[0].reason == "approved"


def test_who_made_a_related_change_cannot_approve_but_another_person_can() -> None:
    desk = Desk(LONG, ceiling="approve")
    by_bo = RelatedChange(desk.world.now - 60.0, "deploy", "gateway 1.4", actor="Bo")
    _, plan = one(desk.news(replace(desk.incident(), changes=(by_bo,))))
    decision, none = desk.answer(plan, by="bo")
    assert (decision.decision, decision.reason, none) == (Verdict.REFUSE, "own_change", None)
    assert desk.answer(plan, by="ana")[0].reason == "approved"


def test_who_made_a_related_change_may_deny() -> None:
    desk = Desk(LONG, ceiling="approve")
    by_bo = RelatedChange(desk.world.now - 60.0, "deploy", "gateway 1.4", actor="Bo")
    _, plan = one(desk.news(replace(desk.incident(), changes=(by_bo,))))
    assert desk.answer(plan, by="bo", approve=False)[0].reason == "denied"


def test_a_denied_plan_is_not_offered_again_before_the_cooldown() -> None:
    desk, plan = asked()
    decision, none = desk.answer(plan, approve=False)
    assert (decision.decision, decision.reason, decision.by, none) == (Verdict.REFUSE, "denied", "ana", None)
    assert decision.until == desk.world.now + 1800.0
    assert desk.tick(179) == []
    assert desk.news(desk.incident(severity=Severity.CRITICAL)) == []
    assert verdicts(desk.tick(2)) == [("suggest", "mode_approve")]


def test_a_denied_plan_cannot_be_approved_afterwards() -> None:
    desk, plan = asked()
    desk.answer(plan, approve=False)
    assert desk.answer(plan)[0].reason == "approval_used"


def test_a_plan_whose_targets_changed_is_refused_and_offered_anew() -> None:
    desk, plan = asked()
    desk.world.fails["a"] = 0.6
    desk.world.advance(windows=2)
    planned = desk.say(Approval(waiting=plan.plan_hash, approve=True, by="ana", at=desk.world.now))
    assert verdicts(planned) == [("refuse", "plan_changed")]
    fresh = one(desk.planner.tick(desk.world.now, desk.world.estate))[1]
    assert fresh is not None
    assert (plan.steps[0].target, fresh.steps[0].target) == ({"provider": "a"}, {"provider": "c"})
    assert desk.answer(fresh)[0].reason == "approved"


@pytest.mark.parametrize(
    ("calls", "reason"), [(220, "approved"), (400, "plan_changed")], ids=["a little", "much"]
)
def test_a_figure_of_live_traffic_may_have_moved_a_little_since_it_was_read(calls: int, reason: str) -> None:
    desk, plan = asked(book(TOUCH, FRESH, ("touch: {}", "touch: {of_now: 0.5}")))
    desk.world.calls["b"] = calls
    desk.world.advance(windows=6)
    decision, approved = desk.answer(plan)
    assert decision.reason == reason
    if approved is not None:
        assert approved.steps == plan.steps


def test_every_guard_is_asked_again_when_it_is_answered() -> None:
    desk, plan = asked()
    desk.world.now += 100.0
    assert desk.answer(plan)[0].reason == "no_telemetry"


def test_a_plan_refused_by_a_guard_is_offered_again_when_the_guard_lets_it() -> None:
    desk, plan = asked()
    desk.stop("runbook:failover")
    assert desk.answer(plan)[0].reason == "stopped"
    assert desk.planner.waiting(desk.world.now) == []
    desk.stop("runbook:failover", "resume")
    fresh = one(desk.tick())[1]
    assert fresh is not None
    assert fresh.plan_hash != plan.plan_hash
    assert desk.answer(plan)[0].reason == "approval_withdrawn"


def test_an_offer_that_a_guard_took_back_for_a_moment_is_the_same_offer_again() -> None:
    desk, plan = asked()
    desk.stop()
    assert verdicts(desk.tick()) == [("hold", "stopped")]
    assert desk.planner.waiting(desk.world.now) == []
    desk.stop("all", "resume")
    decision, again = one(desk.tick())
    assert (decision.reason, again) == ("mode_approve", plan)
    assert decision.until == plan.at + 600.0
    assert desk.answer(plan)[0].reason == "approved"


def test_an_answer_that_a_guard_refused_does_not_come_to_count_later() -> None:
    desk, plan = asked()
    at = desk.world.now
    desk.stop()
    assert desk.answer(plan)[0].reason == "stopped"
    desk.stop("all", "resume")
    fresh = one(desk.tick())[1]
    assert fresh is not None
    assert fresh.plan_hash != plan.plan_hash
    assert desk.answer(plan, at=at)[0].reason == "approval_withdrawn"


def test_a_plan_whose_runbook_was_edited_is_another_plan() -> None:
    desk, plan = asked(book(TOUCH, FRESH))
    desk.planner.reload(books(book(TOUCH, FRESH, ("cooldown: 30m", "cooldown: 31m"))))
    assert desk.answer(plan)[0].reason == "plan_changed"


def test_a_plan_of_a_resolved_incident_waits_no_more() -> None:
    desk, plan = asked()
    desk.news(desk.incident(state=State.RESOLVED))
    assert desk.planner.waiting(desk.world.now) == []
    assert desk.answer(plan)[0].reason == "approval_withdrawn"


def test_a_plan_whose_condition_cleared_waits_no_more() -> None:
    desk, plan = asked()
    assert verdicts(desk.news(desk.incident(severity=Severity.LOW))) == [("hold", "condition_cleared")]
    assert desk.answer(plan)[0].reason == "approval_withdrawn"


def test_a_plan_whose_runbook_is_gone_waits_no_more() -> None:
    desk, plan = asked()
    desk.planner.reload(books(TOUCH))
    assert desk.answer(plan)[0].reason == "approval_withdrawn"


def test_a_suggestion_may_be_approved_too() -> None:
    desk = Desk(LONG, ceiling="suggest")
    _, plan = one(desk.news())
    decision, approved = desk.answer(plan)
    assert decision.reason == "approved"
    assert approved is not None
    assert approved.may_act


def test_two_plans_for_one_target_can_both_wait_but_only_one_runs() -> None:
    desk = Desk(LONG, book(LONG, ("name: failover", "name: another")), ceiling="approve")
    first, second = (plan for _, plan in desk.news())
    assert desk.answer(first)[0].reason == "approved"
    assert desk.answer(second)[0].reason == "lock"


def test_how_long_it_waits_is_the_runbooks_to_say() -> None:
    desk, _ = asked(book(LONG, ("mode: auto", "mode: auto\napproval: 2m")))
    assert desk.planner.waiting(desk.world.now)[0].until == desk.world.now + 120.0
