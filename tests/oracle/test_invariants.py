"""Each of the sixteen invariants by name; and for each a deliberately broken variant, which the judge must find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from flyball.core.directives import DirectiveChange, Operation, OperationReport, Release, StopChange
from flyball.core.incident import IncidentChange
from flyball.core.plans import Plan
from flyball.remediation.executor import Executor, ExecutorSettings
from flyball.runbooks.loader import RunbookSet
from flyball.runbooks.planner import Planner
from flyball.runbooks.standing import PlannerSettings
from tests.oracle.oracle import Violation
from tests.oracle.world import HOSTILE, TEXTS, Rig, runbooks

Scene = Callable[[Rig], None]


def outage(rig: Rig, provider: str = "b", share: float = 0.6) -> None:
    rate, _ = rig.world.providers[provider]
    rig.world.providers[provider] = (rate, share)
    rig.pass_time(30.0)
    rig.incident("provider", provider)


def granted(rig: Rig) -> list[DirectiveChange]:
    return [s for r in rig.trace for s in r.said if isinstance(s, DirectiveChange) and s.change == "granted"]


def operations(rig: Rig, verb: str = "start") -> list[Operation]:
    return [s for r in rig.trace for s in r.said if isinstance(s, Operation) and s.verb == verb]


def reasons(rig: Rig) -> set[str]:
    """Reasons of decisions and outcomes."""
    return {str(s.reason) for r in rig.trace for s in r.said if hasattr(s, "reason")}


# --- the scenes: each must pass with the real parts, and hold the thing that its broken variant does wrong ---------------


def recovery_is_never_blocked(rig: Rig) -> None:
    outage(rig)
    rig.obey(20.0)
    assert rig.executor.directives(rig.now)
    rig.stop("all")
    rig.release()
    assert not rig.executor.directives(rig.now)


def a_recovered_source_is_gone_back_to_under_the_kill_switch(rig: Rig) -> None:
    outage(rig)
    rig.obey(60.0)
    assert rig.executor.directives(rig.now)
    rig.stop("all")
    rig.world.providers["b"] = (600.0, 0.0)
    rig.obey(300.0)
    assert not rig.executor.directives(rig.now)
    assert "recovered" in reasons(rig)


def what_is_executed_is_fresh(rig: Rig) -> None:
    rig.delayed = True
    outage(rig)
    assert rig.under_way
    rig.pass_time(240.0)
    rig.hand_over()
    assert not granted(rig)


def cancel_wins(rig: Rig) -> None:
    rig.delayed = True
    outage(rig)
    assert rig.under_way
    rig.resolve("INC-provider-b")
    rig.hand_over()
    assert not granted(rig)


def targets_exist_and_are_frozen(rig: Rig) -> None:
    rig.incident("tenant", "nobody-knows-them")
    outage(rig)
    rig.obey(180.0)
    assert granted(rig)


def the_denominator_is_known(rig: Rig) -> None:
    rig.world.providers["b"] = (60_000.0, 0.6)  # more of the traffic than may be touched
    rig.pass_time(30.0)
    rig.incident("provider", "b")
    assert not granted(rig)
    assert "blast_radius" in reasons(rig)


def attempts_are_finite(rig: Rig) -> None:
    outage(rig)
    for _ in range(6):  # nobody obeys: every attempt stays unverified
        rig.pass_time(240.0, step=20.0)
        rig.update("INC-provider-b")
        rig.pass_time(20.0)
        rig.stop("runbook:failover", "reset")
        rig.stop("runbook:rival", "reset")
    assert len(granted(rig)) == 2  # by all runbooks together
    assert "attempts" in reasons(rig)


def what_is_ambiguous_is_never_repeated(rig: Rig) -> None:
    rig.incident("gpu", "n1/g0")
    rig.deliver("ambiguous")
    for _ in range(6):
        rig.pass_time(10.0)
        while rig.queue:
            rig.deliver("succeeded")
    assert len(operations(rig)) == 1


def nothing_is_stranded(rig: Rig) -> None:
    outage(rig, "b")
    outage(rig, "c")  # the only target left is the one that b went to: a lock
    rig.obey(120.0)
    rig.incident("gpu", "n1/g0")
    if rig.queue:
        rig.deliver("accepted")
    rig.pass_time(30.0)
    rig.rest()


def unverified_counts_as_failed(rig: Rig) -> None:
    for provider in ("b", "c", "b"):
        outage(rig, provider)
        rig.pass_time(300.0, step=20.0)  # nobody obeys
        rig.resolve(f"INC-provider-{provider}")
        rig.world.providers[provider] = (rig.world.providers[provider][0], 0.0)
        rig.pass_time(200.0, step=20.0)
    failed = len(granted(rig))
    outage(rig, "c")
    rig.pass_time(100.0)
    assert failed >= 3
    assert "breaker" in reasons(rig)


def one_lock_for_each_target(rig: Rig) -> None:
    outage(rig)  # two runbooks want it
    rig.obey(20.0)
    assert len(rig.executor.directives(rig.now)) == 1
    assert "lock" in reasons(rig)


def silence_is_no_health(rig: Rig) -> None:
    rig.world.providers["b"] = (600.0, 0.6)
    rig.pass_time(30.0)
    rig.silent = True
    rig.pass_time(90.0)
    rig.incident("provider", "b")
    rig.pass_time(60.0)
    assert not granted(rig)
    assert "no_telemetry" in reasons(rig)


def nobody_approves_their_own_change(rig: Rig) -> None:
    rig.incident("tenant", "t1", actor="kim")
    (waiting,) = rig.waiting()
    rig.answer(waiting.hash, True, "kim")
    assert not granted(rig)
    rig.answer(waiting.hash, True, "lee")
    assert len(granted(rig)) == 1


def an_approval_is_used_once_and_in_time(rig: Rig) -> None:
    rig.incident("tenant", "t1")
    (waiting,) = rig.waiting()
    rig.answer(waiting.hash, True)
    rig.answer(waiting.hash, True)
    assert len(granted(rig)) == 1
    rig.incident("tenant", "t2")
    late = next(w for w in rig.waiting() if w.plan.incident == "INC-tenant-t2")
    while rig.now <= late.until:
        rig.update("INC-tenant-t2")
        rig.pass_time(60.0)
    rig.answer(late.hash, True)
    assert len(granted(rig)) == 1


def the_kill_switch_stops_every_effect(rig: Rig) -> None:
    rig.stop("all")
    outage(rig)
    rig.incident("gpu", "n1/g0")
    rig.world.runs["r1"] = 30.0
    rig.incident("run", "r1")
    rig.pass_time(60.0)
    assert not granted(rig)
    assert not operations(rig)
    rig.stop("all", "resume")
    rig.update("INC-run-r1")
    rig.pass_time(10.0)
    assert granted(rig)


def text_of_events_reaches_no_parameter(rig: Rig) -> None:
    for text in HOSTILE:
        rig.world.runs[text] = 30.0
        rig.incident("run", text)
        rig.incident("tenant", text)
        for waiting in rig.waiting():
            rig.answer(waiting.hash, True)
    outage(rig)
    rig.obey(30.0)
    assert granted(rig)


def what_nobody_knows_moves_nothing(rig: Rig) -> None:
    """Actions fail closed: an estate that knows nothing, and a dry run."""
    rig.world.tenants.clear()
    rig.world.providers = dict.fromkeys(rig.world.providers, (0.0, 0.0))
    rig.pass_time(30.0)
    rig.incident("provider", "b")
    rig.incident("tenant", "t1")
    assert not granted(rig)


# --- the broken variants --------------------------------------------------------------------------------------------------


class WithoutReleases(Executor):
    """Takes nobody's word while anything is stopped."""

    def feed(self, items: Sequence[Any], estate: Any, now: float) -> Any:
        kept = [i for i in items if not (isinstance(i, Release) and self.stops.live)]
        return super().feed(kept, estate, now)


class TakesStalePlans(Executor):
    def feed(self, items: Sequence[Any], estate: Any, now: float) -> Any:
        fresh = [msgspec.structs.replace(i, at=now) if isinstance(i, Plan) else i for i in items]
        return super().feed(fresh, estate, now)


class DeafToEnds(Executor):
    def feed(self, items: Sequence[Any], estate: Any, now: float) -> Any:
        return super().feed([i for i in items if not isinstance(i, IncidentChange)], estate, now)


class PlansForAll(Planner):
    """An empty scope, as if it meant everything."""

    def feed(self, items: Sequence[Any], estate: Any, now: float) -> Any:
        return [(d, _with_steps(p, scope={})) for d, p in super().feed(items, estate, now)]


def _with_steps(plan: Plan | None, **changes: Any) -> Plan | None:
    if plan is None:
        return None
    steps = tuple(msgspec.structs.replace(s, **changes) for s in plan.steps)
    return msgspec.structs.replace(plan, steps=steps)


def lax(old: str, new: str) -> Callable[[RunbookSet, str], Planner]:
    """A planner that reads other limits than those that were written."""
    texts = {path: text.replace(old, new) for path, text in TEXTS.items()}
    assert texts != dict(TEXTS)
    return lambda _books, ceiling: Planner(runbooks(texts), ceiling)


class RepeatsWhatIsAmbiguous(Executor):
    def feed(self, items: Sequence[Any], estate: Any, now: float) -> Any:
        items = [
            msgspec.structs.replace(i, status="not_reached") if isinstance(i, OperationReport) and i.status == "ambiguous" else i
            for i in items
        ]  # fmt: skip
        return super().feed(items, estate, now)


class ForgetsToLookBack(Executor):
    """Begins, and never looks again."""

    def feed(self, items: Sequence[Any], estate: Any, now: float) -> Any:
        plans = [i for i in items if isinstance(i, Plan)]
        return super().feed(plans, estate, now) if plans else []

    def tick(self, now: float, estate: Any) -> Any:
        return []


class TwoMinds(Planner):
    """Two planners that do not hear of each other, and plans that lock nothing."""

    def __init__(self, books: RunbookSet, ceiling: str) -> None:
        super().__init__(RunbookSet((books.by_name["failover"],)), ceiling)
        self._other = Planner(RunbookSet((books.by_name["rival"],)), ceiling)

    def feed(self, items: Sequence[Any], estate: Any, now: float) -> Any:
        both = super().feed(items, estate, now) + self._other.feed(items, estate, now)
        return [(d, None if p is None else msgspec.structs.replace(p, locks=())) for d, p in both]


class Patient(Planner):
    """Takes silence for health."""

    def __init__(self, books: RunbookSet, ceiling: str) -> None:
        super().__init__(books, ceiling, PlannerSettings(silent_after_s=1e9))


class ForgetsWhoChanged(Planner):
    def feed(self, items: Sequence[Any], estate: Any, now: float) -> Any:
        return super().feed([_nameless(i) for i in items], estate, now)


def _nameless(item: Any) -> Any:
    if not isinstance(item, IncidentChange):
        return item
    return msgspec.structs.replace(item, incident=msgspec.structs.replace(item.incident, changes=()))


class AlwaysApproved(Planner):
    """Approves by itself what a person should."""

    def feed(self, items: Sequence[Any], estate: Any, now: float) -> Any:
        return [
            (d, p if p is None else msgspec.structs.replace(p, approved_by="flyball"))
            for d, p in super().feed(items, estate, now)
        ]


class DeafPlanner(Planner):
    def feed(self, items: Sequence[Any], estate: Any, now: float) -> Any:
        return super().feed([i for i in items if not isinstance(i, StopChange)], estate, now)


class DeafExecutor(Executor):
    def feed(self, items: Sequence[Any], estate: Any, now: float) -> Any:
        return super().feed([i for i in items if not isinstance(i, StopChange)], estate, now)


class Talkative(Planner):
    """Writes the name of the root into the parameters."""

    def feed(self, items: Sequence[Any], estate: Any, now: float) -> Any:
        out = []
        for decision, plan in super().feed(items, estate, now):
            if plan is not None:
                steps = tuple(
                    msgspec.structs.replace(s, stages=tuple({**stage, "note": plan.root.name} for stage in s.stages)) for s in plan.steps
                )  # fmt: skip
                plan = msgspec.structs.replace(plan, steps=steps)
            out.append((decision, plan))
        return out


class ActsInDryRuns(Planner):
    """Says that it only rehearses, and its executor does not listen."""

    def feed(self, items: Sequence[Any], estate: Any, now: float) -> Any:
        return [
            (d, p if p is None else msgspec.structs.replace(p, dry_run=True))
            for d, p in super().feed(items, estate, now)
        ]


class HearsNoDryRun(Executor):
    def feed(self, items: Sequence[Any], estate: Any, now: float) -> Any:
        return super().feed(
            [msgspec.structs.replace(i, dry_run=False) if isinstance(i, Plan) else i for i in items],
            estate,
            now,
        )


def patient_executor() -> Executor:
    return Executor(ExecutorSettings(silent_after_s=1e9))


SCENES: dict[str, tuple[int, Scene]] = {
    "recovery is never blocked": (1, recovery_is_never_blocked),
    "recovery under the kill switch": (1, a_recovered_source_is_gone_back_to_under_the_kill_switch),
    "fresh at execution": (2, what_is_executed_is_fresh),
    "cancel wins": (3, cancel_wins),
    "target exists and is frozen": (4, targets_exist_and_are_frozen),
    "denominator known": (5, the_denominator_is_known),
    "attempts finite": (6, attempts_are_finite),
    "ambiguous is not repeated": (7, what_is_ambiguous_is_never_repeated),
    "nothing stranded": (8, nothing_is_stranded),
    "unverified is failed": (9, unverified_counts_as_failed),
    "one lock a target": (10, one_lock_for_each_target),
    "silence is no health": (12, silence_is_no_health),
    "not one's own change": (13, nobody_approves_their_own_change),
    "approval once and in time": (13, an_approval_is_used_once_and_in_time),
    "kill switch": (14, the_kill_switch_stops_every_effect),
    "untrusted text": (15, text_of_events_reaches_no_parameter),
    "actions fail closed": (16, what_nobody_knows_moves_nothing),
}
BROKEN: dict[str, tuple[int, Scene, dict[str, Any]]] = {
    "recovery is never blocked": (1, recovery_is_never_blocked, {"executor": WithoutReleases}),
    "fresh at execution": (2, what_is_executed_is_fresh, {"executor": TakesStalePlans}),
    "cancel wins": (3, cancel_wins, {"executor": DeafToEnds}),
    "target exists and is frozen": (4, targets_exist_and_are_frozen, {"planner": PlansForAll}),
    "denominator known": (5, the_denominator_is_known, {"planner": lax("traffic: 45%", "traffic: 100%")}),
    "attempts finite": (6, attempts_are_finite, {"planner": lax("attempts: 2", "attempts: 9")}),
    "ambiguous is not repeated": (
        7,
        what_is_ambiguous_is_never_repeated,
        {"executor": RepeatsWhatIsAmbiguous},
    ),
    "nothing stranded": (8, nothing_is_stranded, {"executor": ForgetsToLookBack}),
    "unverified is failed": (
        9,
        unverified_counts_as_failed,
        {"planner": lax("breaker: 3/1h", "breaker: 99/1h")},
    ),
    "one lock a target": (10, one_lock_for_each_target, {"planner": TwoMinds}),
    "silence is no health": (12, silence_is_no_health, {"planner": Patient, "executor": patient_executor}),
    "not one's own change": (13, nobody_approves_their_own_change, {"planner": ForgetsWhoChanged}),
    "approval once and in time": (13, an_approval_is_used_once_and_in_time, {"planner": AlwaysApproved}),
    "kill switch": (
        14,
        the_kill_switch_stops_every_effect,
        {"planner": DeafPlanner, "executor": DeafExecutor},
    ),
    "untrusted text": (15, text_of_events_reaches_no_parameter, {"planner": Talkative}),
    "actions fail closed": (
        16,
        one_lock_for_each_target,
        {"planner": ActsInDryRuns, "executor": HearsNoDryRun},
    ),
}


@pytest.mark.parametrize("name", SCENES)
def test_the_invariant_holds(name: str) -> None:
    number, scene = SCENES[name]
    assert 1 <= number <= 16
    rig = Rig()
    scene(rig)
    rig.crash()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_variant_is_found(name: str) -> None:
    number, scene, parts = BROKEN[name]
    with pytest.raises(Violation) as found:
        scene(Rig(**parts))
    assert found.value.number == number


def test_a_crash_between_any_two_records_changes_nothing() -> None:
    rig = Rig()
    outage(rig)
    rig.crash()
    rig.incident("gpu", "n1/g0")
    rig.crash()
    rig.deliver("accepted")
    rig.save()
    rig.obey(60.0)
    rig.crash()
    rig.rest()
