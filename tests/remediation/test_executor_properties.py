"""What holds whatever happens, and in whatever order: random interleavings of traffic, news, answers, stops and crashes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.codec import SnapshotError
from flyball.core.directives import Directive, DirectiveChange, Enforced, Operation, OperationReport, Outcome
from flyball.core.plans import Plan, Retry, StepApproval, Term, Verify
from flyball.remediation.executor import Executor, Moved
from flyball.remediation.runs import unpack
from flyball.remediation.scripted import ScriptedExecutor
from tests.remediation._site import Customer, Site, block, cap, drain, limit, plan, redirect, tenant

NEVER = Verify(within_s=40.0, expect=(Term("usd_per_hour", "from", "<", 0.0),), against="nothing")
ASKS = StepApproval(expires_s=60.0, on_expire="undo")
RETRIES = Retry(count=1, backoff_s=10.0)
HOLD_S = 400.0

PLANS: tuple[Callable[[int], Plan], ...] = (
    lambda n: plan(limit(200.0, 100.0, hold_s=HOLD_S), attempt=n),
    lambda n: plan(cap(hold_s=HOLD_S, progress="ladder", verify=NEVER), block(scope={"tenant": "t1"}, hold_s=HOLD_S, progress="ladder"), attempt=n),
    lambda n: plan(cap(hold_s=HOLD_S), limit(90.0, hold_s=HOLD_S, approval=ASKS), attempt=n, on_failure="page"),
    lambda n: plan(redirect(0.25, 0.95, hold_s=HOLD_S), attempt=n, incident="INC-2", locks=("provider:a", "provider:b")),
    lambda n: plan(drain(hold_s=HOLD_S, retry=RETRIES), attempt=n, incident="INC-3", locks=("node:n1",)),
    lambda n: plan(drain(hold_s=HOLD_S, dry_run_first=True, retry=RETRIES), limit(50.0, hold_s=HOLD_S, scope={"provider": "a"}), attempt=n, incident="INC-3", locks=("node:n1", "provider:a")),
    lambda n: plan(block(hold_s=HOLD_S, release="expiry"), attempt=n, incident="INC-4", locks=("run:r1",), dry_run=n % 3 == 0),
)  # fmt: skip
SIGNALS = {"INC-1": "llm.cost", "INC-2": "llm.errors", "INC-3": "gpu.fault", "INC-4": "agent.loop"}
SCOPES = (
    "all",
    "tenant:t1",
    "tenant:t2",
    "runbook:a-runbook",
    "action:limit",
    "action:hook",
    "action:redirect",
)
STATUSES = (
    "accepted", "rejected", "not_reached", "unsupported", "succeeded", "failed_not_applied", "failed_applied", "ambiguous",
    "superseded", "cancelled",
)  # fmt: skip

Act = tuple[str, int]
Acts = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["window", "window", "plan", "report", "answer"]), st.integers(0, 200)),
        st.tuples(
            st.sampled_from(
                ["demand", "fail", "resolve", "reopen", "stop", "resume", "report", "deaf", "release", "jump", "enforced"]
            ),
            st.integers(0, 200),
        ),
    ),
    max_size=50,
)  # fmt: skip


def site(executor: Executor | None = None) -> Site:
    at = Site(
        tenant("t1", 120), tenant("t2", 60), Customer({"provider": "b", "tenant": "t3"}, 100, fails=0.5),
        Customer({"run": "r1"}, 5), executor=executor,
    )  # fmt: skip
    for id, signal in SIGNALS.items():
        at.incident(id=id, signal=signal)
    return at


def act(at: Site, what: str, n: int) -> list[Moved]:
    if what == "window":
        return at.run((1, 2, 12)[n % 3])
    if what == "plan":
        return at.order(PLANS[n % len(PLANS)](n % 5))
    if what == "answer":
        waits = at.executor.waiting(at.now)
        return at.answer(n % 3 != 0, waiting=waits[0].hash if waits else "STEP-UNKNOWN")
    if what == "demand":
        at.customers[0].calls = (10, 120, 0)[n % 3]
        at.customers[3].calls = (0, 5)[n % 2]
        return []
    if what == "fail":
        at.customers[2].fails = (0.0, 0.6)[n % 2]
        return []
    if what in ("resolve", "reopen"):
        id = list(SIGNALS)[n % len(SIGNALS)]
        return at.incident("resolved" if what == "resolve" else "open", SIGNALS[id], id=id)
    if what in ("stop", "resume"):
        return at.stop(SCOPES[n % len(SCOPES)], what)
    if what == "report":
        if not at.sent:
            return []
        order = at.sent[-1 - n % min(3, len(at.sent))]
        status: Any = STATUSES[n % len(STATUSES)] if n < 100 else ("accepted", "succeeded")[n % 2]
        report = OperationReport(
            id=order.id, verb=order.verb, at=at.now, status=status, attempt=order.attempt, transient=n % 2 == 0,
            dry_run=order.dry_run,
        )  # fmt: skip
        return at.feed(report) + at.feed(report)
    if what == "deaf":
        at.obeys, at.reports = n % 2 == 0, n % 3 == 0
        return []
    if what == "release":
        subjects = ["", *(d.id for d in at.live()), *(o.id for o in at.sent), "DIR-UNKNOWN"]
        return at.release(subjects[n % len(subjects)])
    if what == "enforced":
        return at.feed(Enforced(point="gw", at=at.now - n, directives={d.id: n % 2 for d in at.live()}))
    return at.tick((-30.0, 45.0, 500.0)[n % 3])  # the clock jumps


def play(
    acts: Sequence[Act], *, every: int = 0, check: Callable[[Site, str, list[Moved]], None] | None = None
) -> Site:
    at = site()
    for i, (what, n) in enumerate(acts):
        said = act(at, what, n)
        if check is not None:
            check(at, what, said)
        if every and i % every == 0:
            state = at.executor.snapshot()
            at.executor = Executor()
            at.executor.restore(state)
    return at


@given(Acts)
@settings(max_examples=150, deadline=None)
def test_nothing_is_in_force_past_its_expiry_nor_longer_than_its_hold(acts: list[Act]) -> None:
    def check(at: Site, what: str, said: list[Moved]) -> None:
        for m in said:
            if isinstance(m, DirectiveChange) and m.change in ("granted", "renewed"):
                assert m.directive.expires_at <= m.directive.granted_at + HOLD_S
        if what in ("window", "jump"):
            assert all(d.expires_at > at.now for d in at.executor.directives())

    at = play(acts, check=check)
    assert at.executor.directives(at.now + HOLD_S + 31.0) == []


@given(Acts)
@settings(max_examples=150, deadline=None)
def test_under_a_stop_of_all_nothing_begins_widens_or_is_renewed(acts: list[Act]) -> None:
    newest: dict[str, Directive] = {}

    def check(at: Site, what: str, said: list[Moved]) -> None:
        for m in said:
            if isinstance(m, Operation) and "all" in at.executor.stops.live:
                assert m.verb != "start"
            if isinstance(m, DirectiveChange):
                before = newest.get(m.directive.id)
                newest[m.directive.id] = m.directive
                if "all" in at.executor.stops.live and m.change in ("granted", "renewed"):
                    assert before is not None
                    assert m.directive.expires_at == before.expires_at
                    assert m.directive.params == before.params or "easing" in m.reason
                    assert {str(e) for e in before.exempt} <= {str(e) for e in m.directive.exempt}

    play(acts, check=check)


@given(Acts, st.sampled_from(SCOPES))
@settings(max_examples=150, deadline=None)
def test_a_release_is_never_refused_whatever_the_stops(acts: list[Act], scope: str) -> None:
    at = play(acts)
    at.stop(scope)
    at.release()
    assert at.executor.directives() == []
    assert at.executor.waiting(at.now) == []
    for run in unpack(at.executor.snapshot()).runs.values():
        for stage in run.stages:  # what is left is being cancelled or undone
            assert stage.phase in ("over", "undoing", "sending", "unclear")
            assert stage.work is None or stage.work.state in ("cancelling", "undoing", "unclear", "done")


@given(Acts)
@settings(max_examples=150, deadline=None)
def test_epochs_rise_starts_are_finite_and_what_is_ambiguous_is_not_begun_again(acts: list[Act]) -> None:
    epochs: dict[str, int] = {}
    over: set[str] = set()

    def check(at: Site, what: str, said: list[Moved]) -> None:
        for m in said:
            if isinstance(m, DirectiveChange):
                assert m.directive.epoch > epochs.get(m.directive.id, 0)
                epochs[m.directive.id] = m.directive.epoch
            elif isinstance(m, Operation):
                assert m.epoch > epochs.get(m.id, 0)
                epochs[m.id] = m.epoch
                assert not (m.verb == "start" and m.id in over)
                assert m.verb != "start" or m.attempt <= 1 + RETRIES.count
            elif m.result in ("ambiguous", "cancelled", "not_accepted"):
                over.add(str(m.values.get("operation", "")))

    play(acts, check=check)


@given(Acts)
@settings(max_examples=150, deadline=None)
def test_every_plan_ends_once_and_nothing_is_said_of_it_after(acts: list[Act]) -> None:
    ended: set[str] = set()

    def check(at: Site, what: str, said: list[Moved]) -> None:
        for m in said:
            if isinstance(m, Outcome):
                key = str(m.values["plan"])
                assert key not in ended
                if m.values.get("plan_ended"):
                    ended.add(key)
        running = [run.plan for run in unpack(at.executor.snapshot()).runs.values()]
        assert ended.isdisjoint(p.plan_hash for p in running)
        locks = [lock for p in running for lock in p.locks]
        assert len(locks) == len(set(locks))

    at = play(acts, check=check)
    at.release()
    for _ in range(4):  # whoever does not answer is given up in the end
        at.tick(90_000.0)
    assert unpack(at.executor.snapshot()).runs == {}


@given(Acts, st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_snapshot_and_restore_between_any_two_inputs_change_nothing_after(
    acts: list[Act], every: int
) -> None:
    once, again = play(acts).log, play(acts, every=every).log
    assert [msgspec.json.encode(m) for m in once] == [msgspec.json.encode(m) for m in again]


@given(Acts)
@settings(max_examples=60, deadline=None)
def test_no_feed_twice_over_begins_anything_twice(acts: list[Act]) -> None:
    at = site()
    for what, n in acts:
        act(at, what, n)
        if what == "plan":
            assert at.order(PLANS[n % len(PLANS)](n % 5)) == []


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_damaged_byte_of_a_snapshot_is_read(data: st.DataObject) -> None:
    at = site()
    at.order(PLANS[2](1))
    state = bytearray(at.executor.snapshot())
    state[data.draw(st.integers(0, len(state) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SnapshotError):
        Executor().restore(bytes(state))


@pytest.mark.parametrize(
    "n",
    [0, 1, 3, 4, 5, 6],
    ids=["a limit", "a ladder", "a redirect", "an operation", "a dry run first", "a block"],
)
def test_a_replay_carries_out_every_kind_by_assumption(n: int) -> None:
    at = site(ScriptedExecutor())
    at.obeys = at.reports = False
    at.order(PLANS[n](1))
    at.run(15)
    assert "verified" in at.results
    assert not {"failed", "unverified", "undone"} & set(at.results)
    at.run(60)
    assert at.ended


def test_in_a_replay_nobody_answers_a_step_that_asks() -> None:
    at = site(ScriptedExecutor())
    at.order(PLANS[2](1))
    at.run(20)
    assert [m.reason for m in at.log if isinstance(m, Outcome) and m.result == "cancelled"] == [
        "approval_expired"
    ]
