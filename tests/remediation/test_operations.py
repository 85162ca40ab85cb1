"""Operations of hooks: reserved, sent, answered, proved, undone; and every way in which that goes wrong."""

from __future__ import annotations

from typing import Any

import pytest

from flyball.core.directives import OperationReport
from flyball.core.plans import Retry
from flyball.remediation.operations import RECOVERY_DEADLINE_S, Work, operation_id, reserve
from tests.remediation._site import T0, Site, block, cap, drain, outcomes, plan, tenant, words

PLAN = plan(drain())
STEP = PLAN.steps[0]


def work(**more: Any) -> Work:
    p = plan(drain(**more))
    return reserve(p, p.steps[0], T0, T0 + 120.0)


def told(w: Work, status: Any, at: float = T0 + 1.0, **fields: Any) -> str:
    order = w.order
    given = {"id": order.id, "verb": order.verb, "attempt": order.attempt, "dry_run": order.dry_run, **fields}
    return w.take(OperationReport(at=at, status=status, **given), at).turn


def site(**more: Any) -> Site:
    at = Site(tenant("t1", 60))
    at.incident(signal="gpu.fault")
    on_failure = more.pop("on_failure", "undo_and_page")
    at.order(plan(drain(**more), on_failure=on_failure))
    return at


# --- the request ------------------------------------------------------------------------------------------------


def test_the_same_plan_and_step_are_the_same_operation_over_all_attempts_and_verbs() -> None:
    w = work(retry=Retry(count=1, backoff_s=5.0))
    first = w.order
    told(w, "not_reached")
    second = w.resend(T0 + 6.0)
    told(w, "accepted", T0 + 7.0)
    cancel = w.cancel(T0 + 8.0).send
    assert cancel is not None
    assert first.id == second.id == cancel.id
    assert operation_id(PLAN, STEP) == operation_id(plan(drain()), STEP)
    assert [first.attempt, second.attempt, cancel.attempt] == [1, 2, 1]
    assert [first.epoch, second.epoch, cancel.epoch] == [1, 2, 3]


def test_a_dry_run_has_an_id_of_its_own_because_a_hook_does_each_id_once() -> None:
    w = work(dry_run_first=True)
    tried = w.order
    assert tried.dry_run
    assert told(w, "accepted") == "tried"
    real = w.start(PLAN, STEP, T0 + 2.0)
    assert not real.dry_run
    assert real.id == operation_id(PLAN, STEP) != tried.id


def test_an_operation_without_targets_is_refused() -> None:
    p = plan(drain(targets=()))
    with pytest.raises(ValueError, match="names no target"):
        reserve(p, p.steps[0], T0, T0 + 1.0)


def test_a_lease_is_no_operation() -> None:
    p = plan(cap())
    with pytest.raises(ValueError, match="no operation"):
        reserve(p, p.steps[0], T0, T0 + 1.0)


# --- reports ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "turn"),
    [
        ("accepted", ""),
        ("rejected", "not_accepted"),
        ("not_reached", "not_accepted"),
        ("unsupported", "not_accepted"),
        ("succeeded", "applied"),
        ("failed_not_applied", "failed"),
        ("failed_applied", "failed_applied"),
        ("ambiguous", "ambiguous"),
        ("superseded", "superseded"),
        ("cancelled", "cancelled"),
    ],
)
def test_each_answer_to_a_start_has_one_meaning(status: str, turn: str) -> None:
    assert told(work(), status) == turn


@pytest.mark.parametrize(
    ("status", "turn"),
    [
        ("accepted", ""),
        ("rejected", "ambiguous"),
        ("not_reached", ""),
        ("unsupported", "ambiguous"),
        ("succeeded", "late"),
        ("failed_not_applied", "cancelled"),
        ("failed_applied", "late"),
        ("ambiguous", "ambiguous"),
        ("superseded", "cancelled"),
        ("cancelled", "cancelled"),
    ],
)
def test_each_answer_to_a_cancel_has_one_meaning(status: str, turn: str) -> None:
    w = work()
    w.cancel(T0 + 1.0)
    assert told(w, status, T0 + 2.0) == turn


@pytest.mark.parametrize(
    ("status", "turn"),
    [
        ("accepted", ""),
        ("rejected", "undo_failed"),
        ("not_reached", ""),
        ("unsupported", "undo_failed"),
        ("succeeded", "undone"),
        ("failed_not_applied", "undo_failed"),
        ("failed_applied", "undo_failed"),
        ("ambiguous", "undo_failed"),
    ],
)
def test_each_answer_to_an_undo_has_one_meaning(status: str, turn: str) -> None:
    w = work()
    told(w, "succeeded")
    w.undo(T0 + 2.0)
    assert told(w, status, T0 + 3.0) == turn


@pytest.mark.parametrize(
    "fields",
    [{"id": "OP-OTHER"}, {"attempt": 0}, {"attempt": 9}, {"dry_run": True}, {"verb": "undo"}],
    ids=["another operation", "an older attempt", "an attempt not made", "of a dry run", "a verb not sent"],
)
def test_a_report_that_is_not_of_the_newest_request_changes_nothing(fields: dict[str, Any]) -> None:
    w = work()
    state = repr(w)
    assert told(w, "succeeded", **fields) == ""
    assert repr(w) == state


def test_a_finished_operation_is_not_changed_by_any_report() -> None:
    w = work()
    told(w, "succeeded")
    w.undo(T0 + 2.0)
    told(w, "succeeded", T0 + 3.0)
    assert w.state == "done"
    assert told(w, "failed_applied", T0 + 4.0) == ""


def test_a_start_is_sent_again_only_after_a_certain_no_and_only_so_often() -> None:
    w = work(retry=Retry(count=2, backoff_s=5.0))
    assert told(w, "not_reached", T0) == ""
    assert w.tick(T0 + 4.9).turn == ""
    assert w.tick(T0 + 5.0).turn == "due"
    w.resend(T0 + 5.0)
    assert told(w, "rejected", T0 + 6.0, transient=True) == ""
    assert w.tick(T0 + 15.0).turn == ""  # the second wait is twice as long
    assert w.tick(T0 + 16.0).turn == "due"
    w.resend(T0 + 16.0)
    assert told(w, "not_reached", T0 + 17.0) == "not_accepted"


@pytest.mark.parametrize(
    ("status", "turn", "state"),
    [
        ("ambiguous", "ambiguous", "unclear"),
        ("accepted", "", "accepted"),
        ("succeeded", "applied", "applied"),
        ("failed_not_applied", "failed", "done"),
        ("not_reached", "", "backoff"),
    ],
)
def test_a_start_that_was_to_be_sent_again_is_not_once_somebody_says_what_came_of_it(
    status: str, turn: str, state: str
) -> None:
    w = work(retry=Retry(count=2, backoff_s=5.0))
    told(w, "not_reached", T0)
    assert told(w, status, T0 + 1.0) == turn
    assert w.state == state
    assert (w.tick(T0 + 5.0).turn == "due") == (state == "backoff")


def test_a_hook_that_asks_to_wait_is_waited_for() -> None:
    w = work(retry=Retry(count=1, backoff_s=5.0))
    told(w, "rejected", T0, transient=True, retry_after_s=30.0)
    assert (w.tick(T0 + 29.0).turn, w.tick(T0 + 30.0).turn) == ("", "due")


def test_a_retry_that_would_come_after_the_deadline_is_none() -> None:
    w = work(retry=Retry(count=9, backoff_s=500.0))
    assert told(w, "not_reached") == "not_accepted"


def test_no_answer_by_the_deadline_is_ambiguous_and_the_hook_is_told_to_stop() -> None:
    for first in ("", "accepted"):
        w = work(retry=Retry(count=9, backoff_s=1.0))
        if first:
            told(w, first)
        turned = w.tick(T0 + 120.0)
        assert (turned.turn, turned.reason) == ("ambiguous", "no_answer")
        assert turned.send is not None
        assert turned.send.verb == "cancel"


def test_an_undo_that_is_not_received_is_tried_ever_more_seldom_until_its_deadline() -> None:
    w = work()
    told(w, "succeeded")
    w.undo(T0)
    now, sent = T0, 0
    while now < T0 + RECOVERY_DEADLINE_S + 400.0:
        if w.retry_at is None and w.state == "undoing":
            told(w, "not_reached", now)
        sent += w.tick(now).send is not None
        now += 1.0
    assert w.state == "unclear"
    assert 10 < sent < 30


def test_a_dry_run_that_names_other_targets_than_were_frozen_is_not_followed() -> None:
    w = work(dry_run_first=True)
    assert told(w, "accepted", targets=("node:n1", "node:n2")) == "not_accepted"


@pytest.mark.parametrize("status", ["unsupported", "rejected", "ambiguous", "failed_not_applied"])
def test_a_dry_run_that_does_not_go_well_means_that_nothing_is_begun(status: str) -> None:
    assert told(work(dry_run_first=True), status) == "not_accepted"


# --- in a plan --------------------------------------------------------------------------------------------------


def test_a_node_is_drained_proved_and_given_back_when_the_incident_is_over() -> None:
    at = site()
    at.reported("accepted")
    at.run(1)
    at.reported("succeeded", undo_ref="u-1")
    at.run(3)
    at.incident("resolved")
    assert at.sent[-1].undo_ref == "u-1"
    assert not at.ended
    at.reported("succeeded")
    assert at.results == ["start", "applied", "verified", "undo", "released"]
    assert at.ended
    assert outcomes(at.log)[0].values["operation"] == at.sent[0].id


def test_an_operation_is_never_left_for_ever() -> None:
    at = site(hold_s=600.0)
    at.reported("succeeded")
    at.run(70)
    assert words(at.log)[-1] == "undo"
    assert at.now < T0 + 60.0 + 600.0 + 200.0
    at.reported("succeeded")
    assert (at.results[-1], outcomes(at.log)[-1].reason) == ("expired", "time_up")


def test_an_ambiguous_start_is_never_sent_again_and_stops_the_plan() -> None:
    at = Site(tenant("t1", 60))
    at.order(plan(drain(retry=Retry(count=3, backoff_s=1.0)), cap(id="then")))
    at.reported("ambiguous")
    at.run(30)
    assert [o.verb for o in at.sent] == ["start"]
    assert at.results == ["start", "ambiguous"]
    assert not at.ended  # its targets stay locked
    assert words(at.order(plan(drain(), attempt=2))) == ["not_accepted"]


def test_an_ambiguous_operation_is_undone_once_the_hook_says_that_it_was_done() -> None:
    at = site()
    at.reported("ambiguous")
    at.reported("succeeded", order=at.sent[0])
    assert at.results == ["start", "ambiguous", "undo"]
    at.reported("succeeded")
    assert at.results[-1] == "undone"
    assert at.ended


def test_an_ambiguous_operation_that_was_not_done_is_closed_as_cancelled() -> None:
    at = site()
    at.reported("ambiguous")
    at.reported("failed_not_applied", order=at.sent[0])
    assert at.results == ["start", "ambiguous", "cancelled"]
    assert at.ended


def test_a_person_can_undo_what_nobody_knows_of() -> None:
    at = site()
    at.reported("ambiguous")
    at.release(at.sent[0].id)
    assert at.results == ["start", "ambiguous", "undo"]


def test_what_nobody_knows_of_is_undone_when_its_time_is_up_and_then_given_up() -> None:
    at = site(hold_s=600.0)
    at.reported("ambiguous")
    at.tick(599.0)
    assert at.results == ["start", "ambiguous"]
    at.tick(1.0)
    assert at.results == ["start", "ambiguous", "undo"]
    at.tick(3600.0)  # nor is that answered
    assert (at.results[-1], outcomes(at.log)[-1].reason) == ("failed", "undo_no_answer")
    at.tick(3600.0)
    assert (at.results[-1], outcomes(at.log)[-1].reason) == ("ambiguous", "never_cleared")
    assert at.ended


def test_an_undo_that_is_answered_late_still_counts() -> None:
    at = site()
    at.reported("succeeded")
    at.release()
    at.reported("ambiguous")
    assert (at.results[-1], outcomes(at.log)[-1].reason) == ("failed", "undo_ambiguous")
    at.reported("succeeded")
    assert at.results[-1] == "released"
    assert at.ended


def test_what_a_dry_run_predicted_is_told_with_what_was_done() -> None:
    at = site(dry_run_first=True)
    at.reported("accepted", targets=("node:n1",), predicted={"gpus": 8, "pods": ["a"]})
    at.reported("succeeded")
    assert outcomes(at.log)[-1].values["predicted"] == {"gpus": 8}


def test_a_start_that_its_dispatcher_dropped_unsent_is_cancelled() -> None:
    at = site()
    at.reported("cancelled", code="not_wanted")
    assert at.results == ["start", "cancelled"]
    assert outcomes(at.log)[-1].values["detail"] == "not_wanted"
    assert at.ended


def test_half_done_is_failed_and_undone_even_where_the_runbook_would_only_page() -> None:
    at = site(on_failure="page")
    at.reported("failed_applied")
    assert at.results == ["start", "failed", "undo"]
    at.reported("succeeded")
    assert at.results[-1] == "undone"


def test_a_rejected_operation_is_not_accepted_and_needs_no_undo() -> None:
    at = site()
    at.reported("rejected", code="unknown_node")
    assert at.results == ["start", "not_accepted"]
    assert outcomes(at.log)[-1].reason == "unknown_node"
    assert at.ended


def test_an_operation_that_does_not_help_is_undone() -> None:
    at = Site(tenant("t1", 60, fails=0.2))
    at.order(plan(drain()))
    at.reported("succeeded")
    at.run(8)
    assert at.results == ["start", "applied", "unverified", "undo"]
    at.reported("succeeded")
    assert at.results[-1] == "undone"


def test_an_undo_that_fails_is_said_and_keeps_the_targets_locked() -> None:
    at = site()
    at.reported("succeeded")
    at.release()
    at.reported("failed_applied", code="stuck")
    assert (at.results[-1], outcomes(at.log)[-1].reason) == ("failed", "undo_stuck")
    assert not at.ended
    at.release(at.sent[0].id)  # a person may ask for it once more
    at.reported("succeeded")
    assert at.ended


def test_what_cannot_be_undone_is_never_called_undone() -> None:
    at = Site(tenant("t1", 60, fails=0.2))
    at.order(plan(drain(undoable=False)))
    at.reported("succeeded")
    at.run(8)
    assert at.results == ["start", "applied", "unverified", "failed"]
    assert outcomes(at.log)[-1].values["stays"] == "irreversible"


def test_a_request_is_wanted_until_it_is_answered_cancelled_or_too_old() -> None:
    at = site()
    first = at.sent[0]
    assert at.executor.wanted(first.id)
    assert not at.executor.wanted("OP-OTHER")
    at.incident("resolved")
    assert not at.executor.wanted(first.id)
    assert at.executor.wanted(first.id, "cancel")
    late = site()
    late.tick(119.0)
    assert late.executor.wanted(late.sent[0].id)
    late.tick(1.0)
    assert not late.executor.wanted(late.sent[0].id)


def test_a_failed_rung_of_a_ladder_that_was_not_accepted_makes_way_for_the_next() -> None:
    at = Site(tenant("t1", 60))
    at.order(plan(drain(progress="ladder"), block(scope={"tenant": "t1"}, progress="ladder")))
    at.reported("unsupported")
    assert at.results == ["start", "not_accepted", "granted"]
    assert not at.ended


def test_a_superseded_operation_is_cancelled_and_names_what_took_its_place() -> None:
    at = site()
    at.reported("superseded", superseded_by="reboot of n1")
    assert at.results == ["start", "cancelled"]
    assert outcomes(at.log)[-1].values["detail"] == "reboot of n1"
