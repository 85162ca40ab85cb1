"""The executor's promises, one by one, on a small world whose gateways obey."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.directives import (
    Directive,
    DirectiveChange,
    Enforced,
    Operation,
    Outcome,
    Release,
    StopChange,
)
from flyball.core.entities import Entity
from flyball.core.incident import State
from flyball.core.plans import Plan, PlanStep, Verify, plan_hash
from flyball.remediation.executor import Executor, ExecutorSettings, Moved
from flyball.remediation.scripted import ScriptedExecutor
from tests.remediation._estate import T0, World, change, incident


def plan(
    at: float, *, mode: str = "auto", attempt: int = 1, incident_id: str = "INC-1", source: str = "b", target: str = "a",
    hold_s: float = 3600.0, lease_s: float = 300.0, within_s: float = 180.0, approved_by: str = "",
    shares: tuple[float, ...] = (0.25, 0.95),
) -> Plan:  # fmt: skip
    steps = (
        PlanStep(
            id="redirect_1",
            action="redirect",
            kind="redirect",
            scope={"provider": source},
            stages=tuple({"to": {"provider": target}, "share": share} for share in shares),
            source={"provider": source},
            target={"provider": target},
            hold_s=hold_s,
            lease_s=lease_s,
            timeout_s=2 * within_s,
            verify=Verify(within_s=within_s),
        ),
    )
    return Plan(
        at=at,
        incident=incident_id,
        runbook="provider-failover",
        mode=mode,  # type: ignore[arg-type]
        steps=steps,
        root=Entity("provider", source),
        attempt=attempt,
        locks=(f"provider:{source}", f"provider:{target}"),
        approved_by=approved_by,
        plan_hash=plan_hash(incident_id, "provider-failover", attempt, steps),
    )


def outcomes(said: list[Moved]) -> list[Outcome]:
    return [m for m in said if isinstance(m, Outcome)]


class Drill:
    """An outage of provider b with an executor at work; `log` holds everything it said."""

    def __init__(self, executor: Executor | None = None, **world: object) -> None:
        self.world = World({"a": 200, "b": 200, "c": 100}, **world)  # type: ignore[arg-type]
        self.executor = executor or Executor()
        self.log: list[Moved] = []
        self.world.advance(windows=6)
        self.world.fails["b"] = 0.6
        self.world.advance(windows=2)

    def order(self, p: Plan | None = None) -> list[Moved]:
        said = self.executor.feed([p or plan(self.world.now)], self.world.estate, self.world.now)
        self.log += said
        return said

    def run(self, windows: int) -> list[Moved]:
        said: list[Moved] = []
        for _ in range(windows):
            self.world.advance(self.executor.directives())
            said += self.executor.tick(self.world.now, self.world.estate)
        self.log += said
        return said

    @property
    def results(self) -> list[str]:
        return [o.result for o in outcomes(self.log)]

    @property
    def changes(self) -> list[str]:
        return [d.change for d in self.log if isinstance(d, DirectiveChange)]


def stop(drill: Drill, scope: str = "all", change: str = "stop") -> list[Moved]:
    item = StopChange(change=change, scope=scope, by="ana", at=drill.world.now)  # type: ignore[arg-type]
    said = drill.executor.feed([item], drill.world.estate, drill.world.now)
    drill.log += said
    return said


def only(directives: list[Directive]) -> Directive:
    assert len(directives) == 1
    return directives[0]


def test_an_outage_is_left_step_by_step_verified_and_returned_from() -> None:
    drill = Drill()
    drill.order()
    assert only(drill.executor.directives()).params["share"] == 0.25
    drill.run(8)
    assert drill.results == ["applied", "verified", "applied", "verified"]
    assert only(drill.executor.directives()).params["share"] == 0.95
    drill.world.fails["b"] = 0.0
    drill.run(14)
    assert drill.results[-1] == "released"
    assert drill.changes == ["granted", "renewed", "renewed", "released"]
    assert drill.executor.directives() == []
    last = [o for o in drill.log if isinstance(o, Outcome)][-1]
    assert last.reason == "recovered"
    assert last.values["plan_ended"] is True


def test_the_wider_share_comes_only_after_the_narrow_one_was_verified() -> None:
    drill = Drill()
    drill.order()
    drill.run(12)
    kinds = [
        ("lease", m.directive.params["share"]) if isinstance(m, DirectiveChange) else ("outcome", m.result)
        for m in drill.log
        if not isinstance(m, Operation)
    ]
    assert kinds.index(("outcome", "verified")) < kinds.index(("lease", 0.95))


def test_a_directive_that_no_gateway_obeys_is_never_verified_and_is_undone() -> None:
    drill = Drill(obeys=False)
    drill.order()
    drill.run(20)
    assert drill.results == ["unverified", "undone"]
    assert drill.executor.directives() == []


def test_a_report_of_an_enforcement_point_counts_as_in_force() -> None:
    drill = Drill(obeys=False)
    drill.order()
    lease = only(drill.executor.directives())
    report = Enforced(point="gw", at=drill.world.now + 1, directives={lease.id: 12})
    drill.executor.feed([report], drill.world.estate, drill.world.now + 1)
    drill.run(2)
    assert "applied" in drill.results


def test_a_target_that_breaks_under_the_load_gives_it_back_at_once() -> None:
    drill = Drill()
    drill.world.overload_above["a"] = 220
    drill.order()
    drill.run(3)
    assert drill.results[-2:] == ["failed", "undone"]
    assert drill.executor.directives() == []


def test_a_target_that_breaks_later_while_the_lease_is_held_gives_it_back() -> None:
    drill = Drill()
    drill.order()
    drill.run(10)
    assert drill.results[-1] == "verified"
    drill.world.fails["a"] = 0.5
    drill.run(4)
    assert drill.results[-2:] == ["failed", "undone"]


def test_no_data_is_never_success() -> None:
    drill = Drill()
    drill.world.calls.update(a=1, b=1)
    drill.order()
    drill.run(20)
    assert "verified" not in drill.results
    assert drill.results[-2:] == ["unverified", "undone"]


def test_no_telemetry_at_all_undoes_what_was_not_verified() -> None:
    drill = Drill()
    drill.order()
    said = drill.executor.tick(drill.world.now + 180.0, drill.world.estate)
    assert [m.result for m in said if isinstance(m, Outcome)] == ["unverified", "undone"]


def test_without_evidence_that_the_primary_still_fails_the_lease_is_not_renewed() -> None:
    drill = Drill()
    drill.order()
    drill.run(10)
    drill.world.calls["b"] = 0
    drill.run(50)
    assert drill.changes[-1] == "expired"
    assert drill.results[-1] == "expired"


def test_a_lease_is_renewed_while_the_primary_fails_but_not_beyond_its_hold() -> None:
    drill = Drill()
    drill.order(plan(drill.world.now, hold_s=900.0))
    granted = only(drill.executor.directives()).granted_at
    drill.run(100)
    assert drill.changes.count("renewed") > 3
    assert drill.changes[-1] == "expired"
    ends = [d.directive.expires_at for d in drill.log if isinstance(d, DirectiveChange)]
    assert max(ends) == granted + 900.0


def test_an_equal_plan_given_twice_acts_once() -> None:
    drill = Drill()
    p = plan(drill.world.now)
    assert drill.order(p) != []
    assert drill.order(p) == []
    drill.world.fails["b"] = 0.0
    drill.run(12)
    assert drill.order(p) == []


def test_a_plan_that_waits_for_a_person_is_not_carried_out() -> None:
    drill = Drill()
    for mode in ("observe", "suggest", "approve"):
        assert drill.order(plan(drill.world.now, mode=mode, incident_id=f"INC-{mode}")) == []
    assert drill.order(plan(drill.world.now, mode="approve", approved_by="ana")) != []


Refuse = Callable[[Drill], Plan]


def _stale(drill: Drill) -> Plan:
    return plan(drill.world.now - 301.0)


def _cancelled(drill: Drill) -> Plan:
    over = incident(state=State.RESOLVED)
    drill.executor.feed([change(over, drill.world.now)], drill.world.estate, drill.world.now)
    return plan(drill.world.now)


def _stopped(drill: Drill) -> Plan:
    stop(drill)
    return plan(drill.world.now)


def _lock(drill: Drill) -> Plan:
    drill.order(plan(drill.world.now, incident_id="INC-2"))
    return plan(drill.world.now)


def _recovered(drill: Drill) -> Plan:
    drill.world.fails["b"] = 0.0
    drill.run(6)
    return plan(drill.world.now)


def _no_telemetry(drill: Drill) -> Plan:
    drill.world.now += 100.0
    return plan(drill.world.now)


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("stale", _stale),
        ("cancelled", _cancelled),
        ("stopped", _stopped),
        ("lock", _lock),
        ("recovered", _recovered),
        ("no_telemetry", _no_telemetry),
    ],
)
def test_what_changed_since_the_plan_was_made_is_looked_at_again(reason: str, make: Refuse) -> None:
    drill = Drill()
    said = drill.order(make(drill))
    assert [(m.result, m.reason) for m in said if isinstance(m, Outcome)] == [("not_accepted", reason)]
    assert said[0].values["plan_ended"] is True  # type: ignore[union-attr]


def test_a_healthy_signal_in_the_same_batch_cancels_the_plan() -> None:
    drill = Drill()
    over = change(incident(state=State.RESOLVED), drill.world.now)
    said = drill.executor.feed([plan(drill.world.now), over], drill.world.estate, drill.world.now)
    assert [m.reason for m in outcomes(said)] == ["cancelled"]


def test_the_kill_switch_stops_widening_and_renewal_but_never_a_release() -> None:
    drill = Drill()
    drill.order()
    stop(drill)
    drill.run(6)
    assert only(drill.executor.directives()).params["share"] == 0.25
    drill.world.fails["b"] = 0.0
    drill.run(12)
    assert drill.results[-1] == "released"


def test_a_square_wave_of_twenty_seconds_does_not_flap() -> None:
    drill = Drill()
    drill.order()
    for i in range(60):
        drill.world.fails["b"] = 0.6 if (i // 2) % 2 else 0.0
        drill.run(1)
    assert drill.changes.count("granted") == 1
    assert "released" not in drill.changes


def shares(said: list[Moved]) -> list[tuple[str, float]]:
    return [(m.change, m.directive.params["share"]) for m in said if isinstance(m, DirectiveChange)]


def eased(drill: Drill) -> None:
    """To the moment at which the wide redirect went back to a quarter."""
    drill.order()
    drill.run(8)
    drill.world.fails["b"] = 0.0
    while drill.executor.directives()[0].params["share"] > 0.25:
        drill.run(1)


def test_a_wide_redirect_goes_back_in_two_steps() -> None:
    drill = Drill()
    eased(drill)
    until = only(drill.executor.directives()).expires_at
    assert drill.run(2) == []  # a span of its own, though the source has been well for longer
    said = drill.run(2)
    assert shares(said) == [("released", 0.25)]
    assert outcomes(said)[-1].reason == "recovered"
    assert [e for e in drill.log if isinstance(e, DirectiveChange)][-1].directive.expires_at <= until


def test_a_narrow_redirect_goes_back_at_once() -> None:
    drill = Drill()
    drill.order(plan(drill.world.now, shares=(0.2,)))
    drill.run(4)
    drill.world.fails["b"] = 0.0
    assert shares(drill.run(14)) == [("released", 0.2)]


def test_a_source_that_has_been_well_for_long_gets_everything_at_once() -> None:
    drill = Drill()
    drill.order()
    drill.run(8)
    drill.world.fails["b"] = 0.0
    for _ in range(13):  # nobody looked meanwhile
        drill.world.advance(drill.executor.directives())
    assert shares(drill.run(1)) == [("released", 0.95)]


def test_a_source_that_does_not_bear_its_load_is_left_again_and_then_has_to_be_well_for_longer() -> None:
    drill = Drill()
    eased(drill)
    drill.world.fails["b"] = 0.6
    assert shares(drill.run(1)) == [("renewed", 0.95)]
    drill.world.fails["b"] = 0.0
    drill.run(5)
    assert only(drill.executor.directives()).params["share"] == 0.95
    while only(drill.executor.directives()).params["share"] == 0.95:
        drill.run(1)
    assert shares(drill.run(6)) == [("released", 0.25)]


def test_under_a_stop_a_source_that_fails_again_gets_no_wider_redirect() -> None:
    drill = Drill()
    eased(drill)
    stop(drill)
    drill.world.fails["b"] = 0.6
    assert shares(drill.run(3)) == []
    assert only(drill.executor.directives()).params["share"] == 0.25


def test_a_stop_does_not_hold_up_the_way_back() -> None:
    drill = Drill()
    drill.order()
    drill.run(8)
    stop(drill)
    drill.world.fails["b"] = 0.0
    assert shares(drill.run(14)) == [("renewed", 0.25), ("released", 0.25)]


def test_a_person_can_let_go_of_a_lease() -> None:
    drill = Drill()
    drill.order()
    lease = only(drill.executor.directives())
    let_go = Release(subject=lease.id, by="ana", at=drill.world.now)
    said = drill.executor.feed([let_go], drill.world.estate, drill.world.now)
    assert [m.reason for m in said if not isinstance(m, Operation)] == ["by ana", "by ana"]
    assert drill.executor.directives() == []
    assert drill.executor.feed([let_go], drill.world.estate, drill.world.now) == []


def test_a_replay_answers_as_if_directives_were_in_force() -> None:
    drill = Drill(ScriptedExecutor(), obeys=False)
    drill.order()
    drill.run(6)
    assert drill.results == ["applied", "verified", "applied", "verified"]
    drill.world.fails["b"] = 0.0
    drill.run(6)
    assert drill.results[-1] == "released"


def test_an_expired_lease_is_not_listed_even_before_the_next_tick() -> None:
    drill = Drill()
    drill.order()
    lease = only(drill.executor.directives())
    assert drill.executor.directives(lease.expires_at) == []


Steps = st.lists(
    st.tuples(st.sampled_from(["window", "silence", "fail", "heal", "harm", "plan", "freeze", "thaw"]), st.integers(1, 40)),
    max_size=40,
)  # fmt: skip


def _play(steps: list[tuple[str, int]], snapshot_every: int) -> tuple[list[bytes], Executor, World]:
    drill = Drill()
    said: list[bytes] = []
    executor, world = drill.executor, drill.world
    for i, (what, n) in enumerate(steps):
        moved: list[Moved] = []
        if what == "window":
            world.advance(executor.directives(world.now))
            moved += executor.tick(world.now, world.estate)
        elif what == "silence":
            world.now += n * 10.0
            moved += executor.tick(world.now, world.estate)
        elif what == "plan":
            p = plan(world.now, attempt=n, incident_id=f"INC-{n % 3}", source="b" if n % 2 else "c")
            moved += executor.feed([p], world.estate, world.now)
        elif what in ("freeze", "thaw"):
            change_ = StopChange(
                change="stop" if what == "freeze" else "resume", scope="all", by="ana", at=world.now
            )
            moved += executor.feed([change_], world.estate, world.now)
        else:
            provider, share = {"fail": ("b", 0.6), "heal": ("b", 0.0), "harm": ("a", 0.4)}[what]
            world.fails[provider] = share
        for m in moved:
            if isinstance(m, DirectiveChange) and m.change in ("granted", "renewed"):
                assert m.directive.expires_at > world.now
                assert m.directive.expires_at <= m.directive.granted_at + 3600.0
        for d in executor.directives():
            assert d.expires_at > world.now, "a directive outlived its expiry"
        said += [msgspec.json.encode(m) for m in moved]
        if snapshot_every and i % snapshot_every == 0:
            state = executor.snapshot()
            executor = Executor(ExecutorSettings())
            executor.restore(state)
    return said, executor, world


@given(Steps)
@settings(max_examples=60, deadline=None)
def test_no_directive_outlives_its_expiry_whatever_happens(steps: list[tuple[str, int]]) -> None:
    _, executor, world = _play(steps, 0)
    executor.tick(world.now + 3600.0, world.estate)
    assert executor.directives() == []


@given(Steps, st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_snapshot_and_restore_anywhere_change_nothing(steps: list[tuple[str, int]], every: int) -> None:
    assert _play(steps, 0)[0] == _play(steps, every)[0]


def test_time_in_the_drill_begins_where_the_world_does() -> None:
    assert Drill().world.now == T0 + 80.0
