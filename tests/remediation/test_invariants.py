"""What automatic remediation must never do: one test for each invariant that the executor has a part in, by its number.

The others belong to the planner (5 denominator, 8 nothing stranded, 11 own effects).
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from flyball.core.codec import SnapshotError, pack_state
from flyball.core.directives import DirectiveChange, Enforced, Operation
from flyball.core.plans import Retry, StepApproval, Term, Verify
from flyball.core.stops import Stops
from flyball.remediation.executor import Executor
from flyball.remediation.runs import pack, unpack
from tests.remediation._site import Site, block, cap, drain, limit, outcomes, plan, tenant, words

ALL_STOPS = ("all", "tenant:t1", "runbook:a-runbook", "action:limit", "action:hook")


def burning(**more: Any) -> Site:
    at = Site(tenant("t1", 120), tenant("t2", 60), **more)
    at.incident()
    return at


def epochs(at: Site) -> list[int]:
    return [m.directive.epoch for m in at.log if isinstance(m, DirectiveChange)]


# --- 1 recovery is never blocked ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ALL_STOPS)
def test_1_no_stop_blocks_a_persons_release_of_a_lease(scope: str) -> None:
    at = burning()
    at.order(plan(limit(200.0)))
    at.run(4)
    at.stop(scope)
    lease = at.live()[0].id
    at.release(lease)
    assert at.live() == []
    assert at.ended


@pytest.mark.parametrize("scope", ALL_STOPS)
def test_1_no_stop_blocks_the_undo_of_an_operation(scope: str) -> None:
    at = burning()
    at.order(plan(drain()))
    at.reported("succeeded")
    at.stop(scope)
    at.release(at.sent[0].id)
    assert at.sent[-1].verb == "undo"
    assert at.executor.wanted(at.sent[-1].id, "undo")


def test_1_nothing_outlives_its_expiry_and_no_renewal_its_hold() -> None:
    at = burning()
    at.order(plan(limit(200.0, hold_s=700.0)))
    granted = at.now
    at.run(69)
    assert len(at.live()) == 1
    at.run(1)
    assert at.live() == []
    assert max(m.directive.expires_at for m in at.log if isinstance(m, DirectiveChange)) == granted + 700.0
    drained = burning()
    drained.order(plan(drain(hold_s=300.0)))
    drained.reported("succeeded")
    drained.run(29)
    assert [o.verb for o in drained.sent] == ["start"]
    drained.run(1)
    assert [o.verb for o in drained.sent] == ["start", "undo"]


def test_1_a_stop_blocks_neither_recovery_nor_expiry_nor_the_undo_of_a_failure() -> None:
    recovers, expires, fails = burning(), burning(), burning()
    for at, p in (
        (recovers, plan(limit(200.0))),
        (expires, plan(limit(200.0, hold_s=300.0))),
        (fails, plan(limit(400.0))),
    ):
        at.order(p)
        at.stop()
    recovers.run(4)
    recovers.customers[0].calls = 10
    for at in (recovers, expires, fails):
        at.run(35)
    assert recovers.results[-1] == "released"
    assert expires.results[-1] == "expired"
    assert fails.results[-2:] == ["released", "undone"]


# --- 2 fresh at execution -------------------------------------------------------------------------------------------


def test_2_a_retry_looks_again_before_it_acts() -> None:
    at = burning()
    at.order(plan(drain(retry=Retry(count=3, backoff_s=20.0))))
    at.reported("not_reached")
    at.now += 100.0  # nothing heard for longer than telemetry may be silent
    assert [(o.result, o.reason) for o in outcomes(at.tick())] == [("cancelled", "no_telemetry")]


def test_2_a_plan_that_waited_too_long_is_dropped_and_recorded() -> None:
    at = burning()
    said = at.feed(msgspec.structs.replace(plan(limit(200.0)), at=at.now - 301.0))
    assert [(o.result, o.reason, o.values["plan_ended"]) for o in outcomes(said)] == [
        ("not_accepted", "stale", True)
    ]


def test_2_an_operation_that_was_tried_dry_is_not_begun_when_the_incident_is_over() -> None:
    at = burning()
    at.order(plan(drain(dry_run_first=True)))
    at.incident("resolved")
    assert at.reported("accepted", order=at.sent[0]) == []
    assert at.results == ["dry start", "cancelled"]


# --- 3 cancel wins --------------------------------------------------------------------------------------------------


def test_3_a_cancelled_operation_is_never_read_as_success() -> None:
    at = burning()
    at.order(plan(drain()))
    at.reported("accepted")
    at.incident("resolved")
    assert at.results[-1] == "cancel"
    at.reported("succeeded", order=at.sent[0])  # it was done all the same
    assert at.results[-1] == "undo"
    at.reported("succeeded")
    assert {"applied", "verified"}.isdisjoint(at.results)
    assert at.results[-1] == "undone"


def test_3_a_healthy_signal_that_comes_with_the_plan_wins() -> None:
    at = burning()
    at.incident("resolved")
    assert [o.reason for o in outcomes(at.order(plan(limit(200.0))))] == ["cancelled"]


def test_3_nothing_is_widened_once_the_incident_is_over() -> None:
    at = burning()
    at.order(plan(limit(200.0, 100.0)))
    at.incident("resolved")
    at.run(8)
    assert at.live()[0].params == {"usd_per_hour": 200.0}


# --- 4 target exists ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "empty",
    [limit(200.0, scope={}), limit(200.0, scope={"tenant": ""}), msgspec.structs.replace(limit(200.0), stages=()), drain(targets=())],
    ids=["no scope", "a scope without a name", "no stage", "no target"],
)  # fmt: skip
def test_4_an_empty_target_is_refused_and_never_read_as_all(empty: Any) -> None:
    at = burning()
    said = at.order(plan(cap(), empty))
    assert [o.reason for o in outcomes(said)] == ["no_target"]
    assert at.live() == []


# --- 6 attempts are finite ------------------------------------------------------------------------------------------


def test_6_a_start_that_is_never_taken_ends_in_a_failure_that_is_said() -> None:
    at = burning()
    at.order(plan(drain(retry=Retry(count=2, backoff_s=5.0))))
    for _ in range(20):
        if at.executor.wanted(at.sent[-1].id):
            at.reported("not_reached")
        at.run(1)
    assert [(o.verb, o.attempt) for o in at.sent] == [("start", 1), ("start", 2), ("start", 3)]
    assert (at.results[-1], at.ended) == ("not_accepted", True)


# --- 7 reserve, then act; idempotent; fenced; ambiguous is not repeated; damaged state stops -------------------------


def test_7_an_operation_is_reserved_before_anything_is_sent_and_survives_a_crash_as_the_same_attempt() -> (
    None
):
    at = burning()
    reserved = at.order(plan(drain()))[0]
    assert isinstance(reserved, Operation)
    after = Executor()
    after.restore(at.executor.snapshot())
    assert after.wanted(reserved.id)
    assert after.feed([plan(drain())], at.facts, at.now) == []
    assert after.tick(at.now, at.facts) == []


def test_7_an_equal_plan_is_carried_out_once_while_it_runs_and_after() -> None:
    at = burning()
    p = plan(limit(200.0))
    at.order(p)
    assert at.order(p) == []
    at.release()
    assert at.order(p) == []


def test_7_a_hook_that_does_not_know_what_it_did_is_not_asked_to_do_it_again() -> None:
    at = burning()
    at.order(plan(drain(retry=Retry(count=9, backoff_s=1.0))))
    at.reported("ambiguous")
    at.run(20)
    assert [o.verb for o in at.sent] == ["start"]


def test_7_every_change_of_a_lease_raises_its_epoch() -> None:
    at = burning()
    at.order(plan(limit(200.0, 100.0, hold_s=600.0)))
    at.run(5)
    at.stop("tenant:t1")
    at.run(60)
    assert at.results[-1] == "expired"
    assert epochs(at) == list(range(1, len(epochs(at)) + 1))
    assert len(epochs(at)) > 3


def test_7_what_may_have_been_done_is_not_done_again() -> None:
    at = burning()
    at.order(plan(drain(retry=Retry(count=9, backoff_s=1.0))))
    at.run(60)  # never answered
    assert [o.verb for o in at.sent] == ["start", "cancel"]
    assert "ambiguous" in at.results


@pytest.mark.parametrize("at_byte", [20, 40, 60, -1], ids=lambda b: f"byte {b}")
def test_7_damaged_safety_state_stops_and_is_never_read_as_nothing(at_byte: int) -> None:
    at = burning()
    at.order(plan(limit(200.0)))
    state = bytearray(at.executor.snapshot())
    state[at_byte] ^= 0xFF
    with pytest.raises(SnapshotError):
        Executor().restore(bytes(state))


def test_7_state_that_contradicts_itself_stops() -> None:
    at = burning()
    at.order(plan(limit(200.0)))
    state = unpack(at.executor.snapshot())
    state.runs.clear()  # a lease of no plan: nobody would ever let go of it
    with pytest.raises(SnapshotError, match="belongs to no running plan"):
        Executor().restore(pack(state))
    with pytest.raises(SnapshotError):
        Executor().restore(pack_state("executor", 1, {}))


# --- 9 unverified is failed; no data is unverified ------------------------------------------------------------------


def test_9_without_data_an_effect_is_unverified_and_taken_back() -> None:
    at = burning(reports=False)
    at.order(plan(limit(200.0)))
    at.run(12)
    assert at.results == ["granted", "unverified", "released", "undone"]
    assert outcomes(at.log)[0].reason == "not_in_force"


# --- 10 one lock per target -----------------------------------------------------------------------------------------


def test_10_two_plans_never_hold_the_same_target() -> None:
    at = burning()
    at.order(plan(limit(200.0)))
    said = at.order(plan(cap(), incident="INC-2"))
    assert [o.reason for o in outcomes(said)] == ["lock"]
    at.release()
    assert words(at.order(plan(cap(), incident="INC-2", attempt=2))) == ["granted"]


# --- 12 an outage of the detector is no health ----------------------------------------------------------------------


def test_12_missing_telemetry_freezes_grants_wider_stages_and_renewals() -> None:
    at = burning()
    at.now += 100.0
    assert [o.reason for o in outcomes(at.order(plan(limit(200.0))))] == ["no_telemetry"]
    held = burning()
    held.order(plan(limit(200.0, hold_s=3600.0)))
    held.run(20)
    lease = held.live()[0]
    held.tick(61.0)
    assert held.live() == [lease]
    held.tick(lease.expires_at - held.now)
    assert held.results[-1] == "expired"


# --- 13 approval ----------------------------------------------------------------------------------------------------


def test_13_an_approval_is_bound_to_what_was_read_expires_and_is_used_once() -> None:
    ask = StepApproval(expires_s=120.0)
    first, second = plan(limit(200.0, approval=ask)), plan(limit(100.0, approval=ask))
    at, other = burning(), burning()
    at.order(first)
    other.order(second)
    asked = at.executor.waiting(at.now)[0]
    assert asked.hash != other.executor.waiting(other.now)[0].hash
    assert other.answer(True, waiting=asked.hash) == []
    assert words(at.answer(True)) == ["granted"]
    assert at.answer(True, waiting=asked.hash) == []


def test_13_an_approval_counts_for_minutes_and_not_from_whoever_made_the_change() -> None:
    at = burning()
    at.incident(actor="ben")
    at.order(plan(limit(200.0, approval=StepApproval(expires_s=120.0))))
    asked = at.executor.waiting(at.now)[0].hash
    assert [o.reason for o in outcomes(at.answer(True, by="ben"))] == ["own_change"]
    at.now += 120.0
    assert [o.reason for o in outcomes(at.answer(True, by="ana", waiting=asked))] == ["approval_expired"]
    assert at.live() == []


# --- 14 the kill switch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ALL_STOPS[:4])
def test_14_a_stop_allows_no_grant_no_wider_stage_and_no_renewal_and_survives_a_restart(scope: str) -> None:
    at = burning()
    at.order(plan(limit(200.0, 100.0)))
    at.stop(scope)
    restarted = Executor()
    restarted.restore(at.executor.snapshot())
    at.executor = restarted
    assert isinstance(restarted.stops, Stops)
    assert scope in restarted.stops.live
    said = at.run(25)
    changes = [m.directive for m in said if isinstance(m, DirectiveChange)]
    assert all(d.params == {"usd_per_hour": 200.0} for d in changes)
    refused = at.order(plan(limit(50.0), attempt=2, incident="INC-2", locks=("other",)))
    assert [o.reason for o in outcomes(refused)] == ["stopped"]
    at.run(10)
    assert at.live() == []


def test_14_a_stop_lets_no_operation_begin_and_cancels_what_the_hook_has_not_taken() -> None:
    at = burning()
    at.order(plan(drain()))
    assert at.executor.wanted(at.sent[0].id)
    at.stop("action:hook")
    assert not at.executor.wanted(at.sent[0].id)
    assert at.sent[-1].verb == "cancel"
    at.reported("cancelled")
    assert (at.results[-1], outcomes(at.log)[-1].reason) == ("cancelled", "stopped")


def test_14_a_stop_for_a_tenant_leaves_it_out_of_what_is_aimed_wider() -> None:
    at = burning()
    wide = limit(200.0, scope={"provider": "a"})
    at.order(plan(wide))
    at.run(1)
    at.stop("tenant:t2")
    assert at.live()[0].exempt == ({"tenant": "t2"},)
    assert at.live()[0].expires_at == at.live()[0].granted_at + 300.0
    at.stop("all")
    at.stop("tenant:t2", "resume")
    assert at.live()[0].exempt == ({"tenant": "t2"},)  # to reach further would be a wider effect
    at.stop("all", "resume")
    assert at.live()[0].exempt == ()
    at.stop("tenant:t2")
    later = at.order(plan(cap(scope={"provider": "a"}), incident="INC-2", locks=("x",)))
    assert [m.directive.exempt for m in later if isinstance(m, DirectiveChange)] == [({"tenant": "t2"},)]


def test_14_a_stop_for_another_tenant_does_not_touch_a_lease() -> None:
    at = burning()
    at.order(plan(limit(200.0)))
    assert at.stop("tenant:t9") == []


# --- 15 text from outside reaches no parameter ----------------------------------------------------------------------


def test_15_what_points_and_hooks_say_reaches_no_directive_and_no_request() -> None:
    at = burning()
    at.order(plan(limit(200.0), drain(id="then")))
    evil = "'; drop all {{7*7}}"
    at.feed(Enforced(point=evil, at=at.now, directives={evil: 1, at.live()[0].id: 1}))
    at.run(4)
    at.reported("rejected", code=evil, detail=evil, targets=(evil,), before={evil: evil})
    for m in at.log:
        if isinstance(m, DirectiveChange):
            assert evil not in repr(m.directive)
        elif isinstance(m, Operation):
            assert evil not in repr(m)


# --- 16 actions fail closed -----------------------------------------------------------------------------------------


def test_16_where_it_cannot_be_known_nothing_is_done_and_what_was_done_is_taken_back() -> None:
    unheard = Term("tokens_per_min", "to", "<", 1e9)
    at = Site(tenant("t1", 3))
    at.incident()
    at.order(plan(limit(5.0, verify=Verify(within_s=60.0, expect=(unheard,), against="nothing"))))
    at.run(8)
    assert at.results[-1] == "undone"
    assert [o.reason for o in outcomes(at.log) if o.result == "unverified"] == ["too_few_calls"]
    blind = Site(tenant("t1", 3))
    blind.facts.end = 0.0
    assert [o.reason for o in outcomes(blind.order(plan(block())))] == ["no_telemetry"]
