"""What the planner remembers: incidents, how each runbook stands towards each, locks, cooldowns, what waits for a person."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from flyball.core.directives import Directive
from flyball.core.incident import Incident
from flyball.core.plans import Plan, PlanStep, Waiting
from flyball.core.stops import Stops
from flyball.runbooks.breaker import Breaker
from flyball.runbooks.candidates import CandidateSettings

REMEMBER_S: Final = 7 * 86400.0
"""How long runs, cooldowns and attempts of incidents that are gone are remembered; longer than any sane limit's span."""
NEVER: Final = math.inf


@dataclass(frozen=True, slots=True)
class PlannerSettings:
    """What guards are judged by where the runbook does not say.

    silent_after_s: without a closed window for this long, telemetry is down and nothing may act.
    measure_s: span over which traffic, cost and tokens in scope are measured; gpu_span_s: within which a GPU must have reported.
    settle_s: for this long after a condition became true, a precondition that is not met is waited for and not refused: the
        windows that it reads may not have closed yet.
    hysteresis_s: after traffic went from one place to another, it does not go the other way before this has passed.
    relook_s: what waits or is held for something that gives no sign is looked at again this often.
    looks_per_tick: at most so many pairs of incident and runbook have their guards asked in one call, those that waited longest
        first; the rest follows in the next ticks.
    """

    silent_after_s: float = 60.0
    measure_s: float = 120.0
    gpu_span_s: float = 300.0
    settle_s: float = 30.0
    hysteresis_s: float = 600.0
    relook_s: float = 60.0
    looks_per_tick: int = 100
    candidates: CandidateSettings = field(default_factory=CandidateSettings)


class Case(msgspec.Struct):
    """One runbook's standing towards one incident."""

    true_since: float | None = None
    said: tuple[str, str] | None = None
    attempts: int = 0
    running: str = ""
    """Hash of the plan that is being carried out."""
    waiting: str = ""
    """Hash of the plan that waits for a person."""
    offers: int = 0
    """Offers that came to nothing: the next one gets a hash of its own, so that an answer to the last does not fit it."""
    book: str = ""
    """Digest of the runbook that the last offer was made by."""
    lapsed: Waiting | None = None
    """An offer that a guard took back: the same again, should the guard let it while its time lasts."""
    denied_until: float = 0.0
    denied_by: str = ""
    rests_until: float = 0.0
    """After a run that did what it should: until then, that it may not run again is no news."""
    look_at: float = 0.0
    """When time alone may change the verdict."""
    windowed: bool = False
    """Whether another closed window may."""
    window_at: float = 0.0
    """End of the newest window when it was last looked at."""

    def wake(self, now: float) -> None:
        self.look_at = min(self.look_at, now)


class Known(msgspec.Struct):
    """An open incident, with the time of its last news."""

    incident: Incident
    news_at: float


class Running(msgspec.Struct):
    """A plan that is being carried out, with the limit that its failure counts towards."""

    plan: Plan
    at: float
    breaker_count: int
    breaker_per_s: float
    cooldown_s: float = 0.0
    verified: bool = False
    failed: bool = False
    """Whether it has been counted as failed."""
    doubtful: bool = False
    """A rung of a ladder was not verified, and none after it yet: failed, if it ends so."""


class Answered(msgspec.Struct, frozen=True):
    """A plan that waits no more, and why: a late or repeated answer to it is refused by that reason."""

    at: float
    incident: str
    runbook: str
    how: Literal["approved", "denied", "expired", "withdrawn"]


class Standing(msgspec.Struct):
    """All state of the planner; what is not in here is no part of any decision."""

    incidents: dict[str, Known] = {}
    cases: dict[str, dict[str, Case]] = {}
    """incident → runbook → case."""
    efforts: dict[str, dict[str, int]] = {}
    """incident → `action target` → runs, of whatever runbook."""
    locks: dict[str, str] = {}
    """entity → plan hash."""
    plans: dict[str, Running] = {}
    waiting: dict[str, Waiting] = {}
    answered: dict[str, Answered] = {}
    ended: dict[str, float] = {}
    """target → when the last run about it began or ended."""
    moved: dict[str, float] = {}
    """`from>to` → when traffic was last sent that way."""
    runs: dict[str, list[float]] = {}
    live: dict[str, Directive] = {}
    gone: dict[str, float] = {}
    """incident → when it was resolved."""
    stops: Stops = msgspec.field(default_factory=Stops)
    breaker: Breaker = msgspec.field(default_factory=Breaker)
    now: float = 0.0
    """Time of the last tick."""
    tidied_at: float = 0.0
    window_at: float = 0.0
    """End of the newest closed window at the last tick."""
    runbooks: str = ""
    """Which set of runbooks the cases were last judged by."""

    def holder(self, lock: str) -> Plan | None:
        running = self.plans.get(self.locks.get(lock, ""))
        return running.plan if running else None

    def wake_all(self, now: float) -> None:
        for cases in self.cases.values():
            for case in cases.values():
                if not case.running and case.true_since is not None:
                    case.wake(now)

    def tidy(self, now: float) -> None:
        """Forgets what no limit can ask about any more."""
        for incident, at in list(self.gone.items()):
            if now - at > REMEMBER_S:
                del self.gone[incident]
                self.cases.pop(incident, None)
                self.efforts.pop(incident, None)
        self.ended = {k: at for k, at in self.ended.items() if now - at <= REMEMBER_S}
        self.moved = {k: at for k, at in self.moved.items() if now - at <= REMEMBER_S}
        self.answered = {k: a for k, a in self.answered.items() if now - a.at <= REMEMBER_S}
        self.live = {k: d for k, d in self.live.items() if d.expires_at > now}
        self.runs = {
            k: kept for k, ats in self.runs.items() if (kept := [t for t in ats if now - t <= REMEMBER_S])
        }
        self.tidied_at = now


def key_of(scope: Mapping[str, str]) -> str:
    """A scope as one word, e.g. `provider=b`."""
    return ",".join(f"{k}={v}" for k, v in sorted(scope.items()))


def cooldown_keys(plan: Plan) -> list[str]:
    """Targets that cool down after a run: what was acted on, whoever did."""
    return list(dict.fromkeys(key_of(step.scope) for step in plan.steps))


def effort_keys(plan: Plan) -> list[str]:
    """What counts as the same attempt again, whichever runbook makes it: the same kind of action on the same target."""
    return list(dict.fromkeys(f"{step.action} {key_of(step.scope)}" for step in plan.steps))


def move_of(step: PlanStep, *, back: bool = False) -> str | None:
    """Where a step sends traffic, as `from>to`; None where none is sent anywhere."""
    if step.kind != "redirect" or not step.target or step.target == step.source:
        return None
    a, b = key_of(step.source), key_of(step.target)
    return f"{b}>{a}" if back else f"{a}>{b}"
