"""Any interleaving of events, recoveries, crashes, duplicates, delays, answers, kill switches and clock jumps keeps the sixteen invariants.

10,000 steps in CI, 100,000 with `make soak`.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from flyball.core.incident import State
from tests.oracle.world import HOSTILE, Rig

_STEPS = 50
_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "stateful_step_count": _STEPS}

PROVIDERS = st.sampled_from(["a", "b", "c"])
TENANTS = st.sampled_from(["t1", "t2", HOSTILE[3]])
RUNS = st.sampled_from(["r1", "r2", HOSTILE[0], HOSTILE[1]])
GPUS = st.sampled_from(["n1/g0", "n2/g1"])
STATUSES = st.sampled_from(
    ["accepted", "rejected", "not_reached", "unsupported", "succeeded", "failed_not_applied", "failed_applied", "ambiguous", "superseded", "cancelled"]
)  # fmt: skip
SCOPES = st.sampled_from(
    ["all", "tenant:t1", "runbook:failover", "action:block", "action:hook", "action:redirect"]
)


SEEN: Counter[str] = Counter()
WORTH_SEEING = (
    "granted", "renewed", "released", "expired", "operation:start", "operation:cancel", "operation:undo", "outcome:verified", "outcome:unverified",
    "outcome:ambiguous", "outcome:cancelled", "run:approved", "hold:stopped", "hold:lock", "hold:cooldown", "refuse:attempts",
)  # fmt: skip


class Interleavings(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig()

    # --- the world

    @rule(provider=PROVIDERS, share=st.sampled_from([0.0, 0.3, 0.6, 1.0]))
    def provider_fails(self, provider: str, share: float) -> None:
        rate, _ = self.rig.world.providers[provider]
        self.rig.world.providers[provider] = (rate, share)

    @rule(provider=PROVIDERS)
    def outage(self, provider: str) -> None:
        rate, _ = self.rig.world.providers[provider]
        self.rig.world.providers[provider] = (rate, 0.6)
        self.rig.pass_time(20.0)
        self.rig.incident("provider", provider)

    @rule(tenant=TENANTS, actor=st.sampled_from(["", "kim", "lee"]))
    def burn(self, tenant: str, actor: str) -> None:
        self.rig.incident("tenant", tenant, actor=actor)

    @rule(tenant=TENANTS, by=st.sampled_from(["kim", "lee"]))
    def burn_that_is_answered_at_once(self, tenant: str, by: str) -> None:
        self.rig.incident("tenant", tenant)
        for waiting in self.rig.waiting():
            self.rig.answer(waiting.hash, True, by)

    @rule(run=RUNS)
    def loop(self, run: str) -> None:
        self.rig.world.runs[run] = 30.0
        self.rig.incident("run", run)

    @rule(gpu=GPUS)
    def gpu_breaks(self, gpu: str) -> None:
        self.rig.incident("gpu", gpu)

    @rule(silent=st.booleans())
    def telemetry(self, silent: bool) -> None:
        self.rig.silent = silent

    # --- time

    @rule(seconds=st.sampled_from([1.0, 10.0, 30.0, 90.0]))
    def time_passes(self, seconds: float) -> None:
        self.rig.pass_time(seconds)

    @rule(seconds=st.sampled_from([20.0, 60.0, 180.0]))
    def time_passes_at_a_point_that_obeys(self, seconds: float) -> None:
        self.rig.obey(seconds)

    @rule(seconds=st.sampled_from([600.0, 3_600.0, 86_400.0]))
    def clock_jumps(self, seconds: float) -> None:
        self.rig.pass_time(seconds, step=seconds)

    # --- news, twice where it likes

    @precondition(lambda self: self.rig.incidents)
    @rule(data=st.data(), twice=st.booleans())
    def news(self, data: st.DataObject, twice: bool) -> None:
        identity = data.draw(st.sampled_from(sorted(self.rig.incidents)))
        if self.rig.incidents[identity].state is not State.RESOLVED:
            self.rig.update(identity)
            if twice:
                self.rig.update(identity)

    @precondition(lambda self: self.rig.incidents)
    @rule(data=st.data())
    def recovery(self, data: st.DataObject) -> None:
        identity = data.draw(st.sampled_from(sorted(self.rig.incidents)))
        root = self.rig.incidents[identity].root
        if root.kind == "provider":
            self.rig.world.providers[root.name] = (self.rig.world.providers[root.name][0], 0.0)
        self.rig.resolve(identity)

    @rule()
    def the_point_hears(self) -> None:
        self.rig.hear()

    @rule()
    def the_point_reports(self) -> None:
        self.rig.report()

    @rule(delayed=st.booleans())
    def plans_are_held_up(self, delayed: bool) -> None:
        self.rig.delayed = delayed
        if not delayed:
            self.rig.hand_over()

    # --- the hook

    @precondition(lambda self: self.rig.queue)
    @rule(status=STATUSES, transient=st.booleans())
    def deliver(self, status: str, transient: bool) -> None:
        self.rig.deliver(status, transient=transient)

    @precondition(lambda self: self.rig.oracle.operations)
    @rule(data=st.data(), status=STATUSES)
    def a_late_or_repeated_report(self, data: st.DataObject, status: str) -> None:
        book = self.rig.oracle.operations[data.draw(st.sampled_from(sorted(self.rig.oracle.operations)))]
        self.rig.late(book.operation, status)

    # --- people

    @precondition(lambda self: self.rig.waiting())
    @rule(data=st.data(), approve=st.booleans(), by=st.sampled_from(["kim", "lee"]), twice=st.booleans())
    def answer(self, data: st.DataObject, approve: bool, by: str, twice: bool) -> None:
        hash_ = data.draw(st.sampled_from([w.hash for w in self.rig.waiting()]))
        self.rig.answer(hash_, approve, by)
        if twice:
            self.rig.answer(hash_, approve, by)

    @rule(hash_=st.sampled_from(["PLAN-XXXXXXXXXX", ""]))
    def answer_to_nothing(self, hash_: str) -> None:
        assert not [
            s for s in self.rig.answer(hash_, True) if type(s).__name__ in ("DirectiveChange", "Operation")
        ]

    @rule(scope=SCOPES)
    def stop(self, scope: str) -> None:
        self.rig.stop(scope)

    @precondition(lambda self: self.rig.oracle.stops.live)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        self.rig.stop(data.draw(st.sampled_from(sorted(self.rig.oracle.stops.live))), "resume")

    @rule(runbook=st.sampled_from(["failover", "rival", "drain", "stopper"]))
    def reset_the_breaker(self, runbook: str) -> None:
        self.rig.stop(f"runbook:{runbook}", "reset")

    @rule(everything=st.booleans())
    def release(self, everything: bool) -> None:
        live = [d.id for d in self.rig.executor.directives(self.rig.now)]
        if everything or live:
            self.rig.release("" if everything else live[0])

    # --- crashes

    @rule()
    def save(self) -> None:
        self.rig.save()

    @rule()
    def crash(self) -> None:
        self.rig.crash()

    def teardown(self) -> None:
        self.rig.rest()
        SEEN.update(self.rig.oracle.seen)


def test_ten_thousand_steps_keep_every_invariant() -> None:
    SEEN.clear()
    run_state_machine_as_test(Interleavings, settings=settings(max_examples=200, **_COMMON))  # type: ignore[arg-type]
    never = [what for what in WORTH_SEEING if not SEEN[what]]
    assert not never, f"the steps never led to {never}: they prove nothing about it"


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_steps_keep_every_invariant() -> None:
    run_state_machine_as_test(Interleavings, settings=settings(max_examples=2_000, **_COMMON))  # type: ignore[arg-type]
