"""Whatever happens in whatever order: a restart changes nothing, the same input says the same, and no promise is broken."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.directives import Approval, Decision, Outcome, StopChange, Verdict
from flyball.core.incident import Severity, State
from flyball.core.plans import Plan
from flyball.runbooks.planner import Planned, Planner
from flyball.runbooks.standing import PlannerSettings
from tests.remediation._estate import World, change, incident
from tests.runbooks._desk import TOUCH, YAML, book, books

SETTINGS = PlannerSettings(looks_per_tick=2, relook_s=20.0)
SET = books(
    book(YAML, ("mode: auto", "mode: auto\nhold: 10s\nmax_age: 2m"), ("cooldown: 30m, runs: 3/1h", "cooldown: 1m, runs: 3/5m")),
    book(
        TOUCH, ("mode: auto", "mode: approve\napproval: 40s"), ("cooldown: 30m", "cooldown: 30s"),
        ("when: incident.severity >= HIGH", "when: incident.severity >= HIGH && incident.age_s < 200.0"),
        ("steps:", "preconditions: [{id: p, check: 'errors(incident.scope, duration(\"20s\")) > 0.1'}]\nsteps:"),
    ),
    book(TOUCH, ("name: touch", "name: careful"), ("touch: {}", "touch: {of_now: 0.5, must_ask: irreversible}")),
)  # fmt: skip
OTHER = books(book(TOUCH, ("attempts: 2", "attempts: 1, breaker: 1/1h")))

INCIDENTS = st.sampled_from(["INC-1", "INC-2", "INC-3"])
TROUBLE = st.sampled_from(
    [("window", "b", 0.6), ("news", "INC-1", "b", Severity.HIGH), ("news", "INC-2", "a", Severity.HIGH)]
)
ANSWER = st.tuples(st.just("answer"), st.integers(0, 2), st.booleans(), st.sampled_from(["ana", "bo"]))
STEP = st.one_of(
    TROUBLE,
    TROUBLE,
    ANSWER,
    st.tuples(st.just("news"), INCIDENTS, st.sampled_from("ab"), st.sampled_from([Severity.LOW, Severity.HIGH])),
    st.tuples(st.just("over"), INCIDENTS),
    st.tuples(st.just("window"), st.sampled_from("abc"), st.sampled_from([0.0, 0.6])),
    st.tuples(st.just("tick"), st.sampled_from([1.0, 10.0, 45.0])),
    st.tuples(st.just("back"), st.sampled_from([1.0, 30.0])),
    ANSWER,
    st.tuples(st.just("again"), st.integers(0, 9)),
    st.tuples(
        st.just("outcome"), st.integers(0, 3), st.booleans(),
        st.sampled_from(["applied", "verified", "failed", "unverified", "ambiguous", "cancelled", "released", "undone"]),
    ),
    st.tuples(
        st.just("stop"), st.sampled_from(["stop", "resume", "reset"]), st.sampled_from(["all", "runbook:failover", "action:touch"])
    ),
    st.tuples(st.just("reload"), st.booleans()),
)  # fmt: skip
STEPS = st.lists(STEP, max_size=60)


class Play:
    """One run of a list of steps, with a restart before every step whose number `restart` divides (0: none)."""

    def __init__(self, restart: int = 0) -> None:
        self.world = World({"a": 100, "b": 100, "c": 50})
        self.world.advance(windows=12)
        self.running: list[Plan] = []
        self.offered: list[Plan] = []
        self.said: list[Planned] = []
        self.set = SET
        self.planner = Planner(SET, "auto", SETTINGS)
        self.restart = restart
        self.runs: Counter[tuple[str, str]] = Counter()

    def all(self, steps: list[tuple[Any, ...]]) -> Play:
        for i, step in enumerate(steps):
            if self.restart and i % self.restart == 0:
                fresh = Planner(self.set, "auto", SETTINGS)
                fresh.restore(self.planner.snapshot())
                self.planner = fresh
            heard = getattr(self, f"_{step[0]}")(*step[1:])
            self._hear(heard)
        return self

    def _hear(self, planned: list[Planned]) -> None:
        self.said += planned
        for decision, plan in planned:
            if plan is not None and decision.decision is Verdict.RUN:
                self._begins(decision, plan)
            elif plan is not None:
                assert decision.decision is Verdict.SUGGEST
                assert not plan.may_act
                self.offered.append(plan)

    def _begins(self, decision: Decision, plan: Plan) -> None:
        assert plan.may_act
        assert not any(set(plan.locks) & set(p.locks) for p in self.running), "two plans hold one lock"
        actions = [s.action for s in plan.steps]
        assert self.planner.stops.against(plan.runbook, actions) is None, "it runs though it is stopped"
        assert abs(decision.at - self.world.estate.now()) <= 60.0, "it runs blind"
        self.runs[plan.incident, plan.runbook] += 1
        assert self.runs[plan.incident, plan.runbook] <= 2, "more attempts than allowed"
        self.running.append(plan)

    def _feed(self, *items: Any) -> list[Planned]:
        return self.planner.feed(items, self.world.estate, self.world.now)

    def _news(self, id: str, provider: str, severity: Severity) -> list[Planned]:
        return self._feed(change(incident(provider, id=id, at=self.world.now, severity=severity)))

    def _over(self, id: str) -> list[Planned]:
        return self._feed(change(incident(id=id, at=self.world.now, state=State.RESOLVED)))

    def _window(self, provider: str, fails: float) -> list[Planned]:
        self.world.fails[provider] = fails
        self.world.advance()
        return self.planner.tick(self.world.now, self.world.estate)

    def _tick(self, seconds: float) -> list[Planned]:
        self.world.now += seconds
        return self.planner.tick(self.world.now, self.world.estate)

    def _back(self, seconds: float) -> list[Planned]:
        self.world.now -= seconds
        return self.planner.tick(self.world.now, self.world.estate)

    def _answer(self, i: int, approve: bool, by: str) -> list[Planned]:
        waiting = self.planner.waiting(self.world.now)
        if i >= len(waiting):
            return []
        return self._feed(Approval(waiting=waiting[i].hash, approve=approve, by=by, at=self.world.now))

    def _again(self, i: int) -> list[Planned]:
        """An answer to whatever was ever offered: it counts only while that waits."""
        if i >= len(self.offered):
            return []
        hash_ = self.offered[-1 - i].plan_hash
        waits = any(w.hash == hash_ for w in self.planner.waiting(self.world.now))
        said = self._feed(Approval(waiting=hash_, approve=True, by="ana", at=self.world.now))
        assert waits or said[0][0].decision is Verdict.REFUSE
        return said

    def _outcome(self, i: int, ended: bool, result: Any) -> list[Planned]:
        if i >= len(self.running):
            return []
        plan = self.running.pop(i) if ended else self.running[i]
        values = {"plan": plan.plan_hash, "plan_ended": ended}
        return self._feed(
            Outcome(
                at=self.world.now, incident=plan.incident, runbook=plan.runbook, step=plan.steps[0].id,
                action=plan.steps[0].action, result=result, values=values,
            )
        )  # fmt: skip

    def _stop(self, what: Any, scope: str) -> list[Planned]:
        return self._feed(StopChange(change=what, scope=scope, by="ana", at=self.world.now))

    def _reload(self, other: bool) -> list[Planned]:
        self.set = OTHER if other else SET
        self.planner.reload(self.set)
        return []


def words(play: Play) -> list[bytes]:
    return [msgspec.json.encode(one) for one in play.said]


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_a_restart_at_any_point_changes_nothing_after(steps: list[tuple[Any, ...]]) -> None:
    straight, restarted = Play().all(steps), Play(restart=1).all(steps)
    assert words(restarted) == words(straight)
    assert restarted.planner.snapshot() == straight.planner.snapshot()


@given(STEPS, st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_the_same_input_says_the_same_however_often_it_restarts(
    steps: list[tuple[Any, ...]], every: int
) -> None:
    assert words(Play(restart=every).all(steps)) == words(Play().all(steps))


@given(STEPS)
@settings(max_examples=100, deadline=None)
def test_nothing_is_stranded(steps: list[tuple[Any, ...]]) -> None:
    """Once all is well again, a fresh incident is answered: whatever came before left no lock, wait or mark behind."""
    play = Play().all(steps)
    for plan in list(play.running):
        play._hear(play._outcome(play.running.index(plan), True, "released"))
    for name in ("INC-1", "INC-2", "INC-3"):
        play._hear(play._over(name))
    for scope in ("all", "runbook:failover", "action:touch"):
        play._hear(play._stop("resume", scope))
        play._hear(play._stop("reset", scope))
    play._hear(play._stop("reset", "runbook:touch"))
    play._reload(False)
    play.world.fails.update(a=0.0, b=0.0, c=0.0)
    play.world.advance(windows=70)
    play.world.now = max(play.world.now, play.world.estate.now())
    play.world.fails["b"] = 0.6
    play.world.advance(windows=2)
    assert play.planner.waiting(play.world.now) == []
    before = len(play.said)
    play._hear(play._news("INC-9", "b", Severity.HIGH))
    for _ in range(3):
        play.world.advance()
        play._hear(play.planner.tick(play.world.now, play.world.estate))
    reasons = {(d.runbook, d.reason) for d, _ in play.said[before:] if d.incident == "INC-9"}
    assert ("failover", "when_matched") in reasons
