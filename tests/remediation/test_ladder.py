"""How a plan goes on: ramps, ladders, steps that ask a person, failures, dry runs."""

from __future__ import annotations

from typing import Any

import pytest

from flyball.core.directives import DirectiveChange
from flyball.core.plans import StepApproval, Term, Verify
from tests.remediation._site import CHEAPER, Site, block, cap, drain, limit, outcomes, plan, tenant, words

NEVER = Verify(within_s=60.0, expect=(Term("usd_per_hour", "from", "<", 0.0),), against="nothing")
"""Nothing costs less than nothing: a rung that can never be proved."""
ASKS = StepApproval(expires_s=300.0)


def burning(**more: Any) -> Site:
    at = Site(tenant("t1", 120), tenant("t2", 60), **more)
    at.incident()
    return at


# --- ramps and ladders ------------------------------------------------------------------------------------------


def test_a_ramp_goes_on_when_a_stage_is_verified_and_then_to_the_next_step() -> None:
    at = burning()
    at.order(plan(cap(), limit(80.0, 70.0)))
    at.run(12)
    assert at.results == [
        "granted", "applied", "verified", "granted", "applied", "verified", "renewed", "applied", "verified",
    ]  # fmt: skip
    assert [d.kind for d in sorted(at.live(), key=lambda d: d.granted_at)] == ["cap", "limit"]


def test_a_ladder_stays_on_the_first_rung_that_is_enough() -> None:
    at = burning()
    at.order(plan(cap(progress="ladder"), block(scope={"tenant": "t1"}, progress="ladder")))
    at.run(30)
    assert [d.kind for d in at.live()] == ["cap"]
    assert "unverified" not in at.results


def test_a_ladder_goes_on_when_a_rung_is_not_enough_and_leaves_it_in_place() -> None:
    at = burning()
    at.order(plan(cap(progress="ladder", verify=NEVER), limit(40.0, progress="ladder", verify=NEVER), cap(id="last", progress="ladder")))  # fmt: skip
    at.run(14)
    assert at.results[:4] == ["granted", "applied", "unverified", "granted"]
    assert outcomes(at.log)[1].values["next_rung"] is True
    assert len(at.live()) == 3


def test_the_stages_of_one_step_are_rungs_too() -> None:
    enough = Verify(within_s=60.0, expect=(Term("usd_per_hour", "from", "<", 100.0),), against="nothing")
    at = burning()
    at.order(plan(limit(300.0, 90.0, 10.0, progress="ladder", verify=enough)))
    at.run(20)
    assert [w for w in at.results if w != "applied"] == ["granted", "unverified", "renewed", "verified"]
    assert at.live()[0].params == {"usd_per_hour": 90.0}


def test_after_the_last_rung_everything_is_taken_back() -> None:
    at = burning()
    at.order(plan(cap(progress="ladder", verify=NEVER), limit(80.0, progress="ladder", verify=NEVER)))
    at.run(20)
    assert at.results[-5:] == ["unverified", "released", "undone", "released", "undone"]
    assert at.live() == []
    released = [m.directive.kind for m in at.log if isinstance(m, DirectiveChange) and m.change == "released"]
    assert released == ["limit", "cap"]  # the last granted goes first
    assert at.ended


def test_a_ladder_whose_time_is_up_goes_to_the_next_step() -> None:
    at = burning()
    at.order(plan(limit(400.0, 390.0, 380.0, progress="ladder", verify=NEVER, timeout_s=50.0), cap(progress="ladder")))  # fmt: skip
    at.run(6)
    assert sorted(d.kind for d in at.live()) == ["cap", "limit"]
    assert [o.reason for o in outcomes(at.log) if o.result == "unverified"] == ["timeout"]


def test_a_stage_that_had_to_wait_does_not_lose_its_time() -> None:
    at = burning()
    at.order(plan(limit(200.0, 100.0, timeout_s=100.0)))
    at.stop()
    at.run(12)
    assert at.results.count("verified") == 1  # proved once, and waiting
    at.stop(change="resume")
    at.run(6)
    assert at.results.count("verified") == 2


def test_steps_recover_each_on_their_own() -> None:
    at = burning()
    at.order(plan(cap(release="resolved"), limit(60.0)))
    at.run(12)
    assert len(at.live()) == 2
    at.customers[0].calls = 30
    at.run(6)
    assert [d.kind for d in at.live()] == ["cap"]
    assert not at.ended
    at.incident("resolved")
    assert at.ended


# --- failure ----------------------------------------------------------------------------------------------------


def test_on_failure_page_leaves_what_is_in_force_until_it_expires_and_says_so() -> None:
    at = burning()
    at.order(plan(limit(300.0, verify=NEVER), on_failure="page"))
    until = at.live()[0].expires_at
    at.run(8)
    said = outcomes(at.log)[-1]
    assert (said.result, said.values["left"], said.values["left_until"]) == (
        "unverified",
        [at.live()[0].id],
        until,
    )
    assert "plan_ended" not in said.values
    at.run(30)
    assert at.results[-2:] == ["expired", "expired"]
    assert at.ended


def test_on_failure_page_still_takes_back_what_does_harm() -> None:
    ok = Verify(within_s=60.0, expect=(Term("errors", "to", "<", 0.02),), against="nothing")
    at = burning()
    at.order(plan(cap(verify=ok), on_failure="page"))
    at.customers[0].fails = 0.5
    at.run(3)
    assert at.results[-3:] == ["failed", "released", "undone"]
    assert outcomes(at.log)[-1].reason == "target_harmed"


def test_what_failed_before_is_not_called_harm_of_ours() -> None:
    ok = Verify(within_s=90.0, expect=(Term("errors", "to", "<", 0.02),), against="nothing")
    at = Site(tenant("t1", 120, fails=0.6))
    at.incident(signal="llm.errors")
    at.order(plan(limit(200.0, verify=ok)))
    at.run(4)
    assert "failed" not in at.results


def test_what_is_left_after_a_failure_is_still_released_when_it_recovers() -> None:
    at = burning()
    at.order(plan(limit(300.0, verify=NEVER), on_failure="page"))
    at.run(8)
    at.customers[0].calls = 10
    at.run(6)
    assert (at.results[-1], outcomes(at.log)[-1].reason) == ("released", "recovered")


# --- dry runs ---------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_done_and_does_nothing() -> None:
    at = burning()
    said = at.order(plan(limit(200.0, 100.0), drain(), dry_run=True))
    assert [(o.result, o.reason) for o in outcomes(said)] == [("applied", "dry_run")]
    assert outcomes(said)[0].values["plan_ended"] is True
    assert len(outcomes(said)[0].values["stages"]) == 3
    assert (len(said), at.live(), at.sent) == (1, [], [])
    assert at.run(3) == []


def test_a_dry_run_is_refused_for_what_the_plan_itself_would_be_refused_for() -> None:
    at = burning()
    at.stop()
    assert [o.reason for o in outcomes(at.order(plan(limit(200.0), dry_run=True)))] == ["stopped"]


# --- steps that ask ---------------------------------------------------------------------------------------------


def test_a_step_that_asks_waits_and_is_carried_out_once_approved() -> None:
    at = burning()
    at.order(plan(limit(200.0, approval=ASKS)))
    waits = at.executor.waiting(at.now)
    assert [(w.step, w.until - w.since) for w in waits] == [("limit_1", 300.0)]
    assert waits[0].values["usd_per_hour"] == 200.0
    assert (at.results, at.live()) == (["waiting"], [])
    at.answer(True)
    assert at.results == ["waiting", "granted"]
    assert at.executor.waiting(at.now) == []


def test_an_answer_is_used_once() -> None:
    at = burning()
    at.order(plan(limit(200.0, approval=ASKS)))
    asked = at.executor.waiting(at.now)[0].hash
    at.answer(True)
    assert at.answer(True, waiting=asked) == []
    assert at.answer(False, waiting=asked) == []


def test_the_first_step_of_a_plan_that_a_person_approved_does_not_ask_again() -> None:
    at = burning()
    at.order(plan(cap(approval=ASKS), limit(80.0, approval=ASKS), mode="approve", approved_by="ana"))
    assert at.results == ["granted"]
    at.run(4)
    assert at.results[-1] == "waiting"


@pytest.mark.parametrize("how", ["denied", "approval_expired"])
@pytest.mark.parametrize(
    ("on_expire", "left"), [("hold", ["cap"]), ("undo", [])], ids=["hold keeps", "undo takes back"]
)
def test_a_no_keeps_or_takes_back_what_is_in_force(on_expire: Any, left: list[str], how: str) -> None:
    at = burning()
    at.order(plan(cap(), limit(80.0, approval=StepApproval(expires_s=100.0, on_expire=on_expire))))
    at.run(3)
    if how == "denied":
        at.answer(False)
    else:
        at.run(10)
    assert [d.kind for d in at.live()] == left
    cancelled = [o for o in outcomes(at.log) if o.result == "cancelled"]
    assert [(o.step, o.reason) for o in cancelled] == [("limit_1", how)]
    assert at.ended == (not left)


def test_a_plan_whose_only_step_is_denied_is_over() -> None:
    at = burning()
    at.order(plan(limit(200.0, approval=ASKS)))
    at.answer(False)
    assert at.results == ["waiting", "cancelled"]
    assert at.ended
    assert at.order(plan(limit(200.0, approval=ASKS))) == []


def test_an_answer_that_comes_too_late_is_a_no() -> None:
    at = burning()
    at.order(plan(limit(200.0, approval=ASKS)))
    asked = at.executor.waiting(at.now)[0].hash
    at.now += 300.0
    said = at.answer(True, waiting=asked)
    assert [(o.result, o.reason) for o in outcomes(said)] == [("cancelled", "approval_expired")]


def test_who_made_the_change_does_not_approve_its_remedy() -> None:
    at = burning()
    at.incident(actor="ben")
    at.order(plan(limit(200.0, approval=ASKS)))
    said = at.answer(True, by="ben")
    assert [(o.result, o.reason) for o in outcomes(said)] == [("waiting", "own_change")]
    assert words(at.answer(True, by="ana")) == ["granted"]


def test_an_answer_given_under_a_stop_is_not_used_up() -> None:
    at = burning()
    at.order(plan(limit(200.0, approval=ASKS)))
    at.stop()
    assert [o.reason for o in outcomes(at.answer(True))] == ["stopped"]
    at.stop(change="resume")
    assert words(at.answer(True)) == ["granted"]


def test_an_answer_for_an_incident_that_is_over_is_cancelled() -> None:
    at = burning()
    at.order(plan(limit(200.0, approval=ASKS)))
    at.incident("resolved")
    assert at.results == ["waiting", "cancelled"]
    assert at.executor.waiting(at.now) == []


def test_a_step_of_a_ladder_may_ask_before_it_goes_on() -> None:
    at = burning()
    at.order(plan(cap(progress="ladder", verify=NEVER), limit(80.0, approval=ASKS, progress="ladder")))
    at.run(8)
    assert at.results[-2:] == ["unverified", "waiting"]
    assert [d.kind for d in at.live()] == ["cap"]


def test_what_is_proved_is_proved_by_what_it_was_before() -> None:
    at = burning()
    at.order(plan(cap(verify=CHEAPER)))
    at.run(3)
    verified = outcomes(at.log)[-1]
    assert verified.values["from_usd_per_hour_before"] == 432.0
    assert verified.values["from_usd_per_hour"] < 0.7 * 432.0
