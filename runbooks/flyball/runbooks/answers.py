"""A person's answer to a plan: what must hold before it counts. Bound to the hash, used once, in time, not by who made the change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flyball.core.directives import Approval
from flyball.core.incident import Incident
from flyball.core.plans import Plan, Waiting, format_duration
from flyball.runbooks.guards import Question
from flyball.runbooks.resolve import same_effect
from flyball.runbooks.standing import Answered, Case, Standing


@dataclass(frozen=True, slots=True)
class Refused:
    """Why an answer leads to nothing."""

    reason: str
    detail: str
    until: float | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


_OVER: dict[str, Refused] = {
    "approved": Refused("approval_used", "it was approved already; an answer counts once"),
    "denied": Refused("approval_used", "it was denied already; an answer counts once"),
    "expired": Refused("approval_expired", "nobody answered in time; what is right now is offered again"),
    "withdrawn": Refused("approval_withdrawn", "it no longer waits: its incident or a guard changed"),
}


def withdraw(
    s: Standing, case: Case, how: Literal["approved", "denied", "expired", "withdrawn"], now: float
) -> None:
    """What waited in this case waits no more; an answer to it is refused from now on. The next offer is another one."""
    case.lapsed = None
    waiting = s.waiting.pop(case.waiting, None)
    if waiting is not None:
        s.answered[waiting.hash] = Answered(now, waiting.plan.incident, waiting.plan.runbook, how)
        case.offers += how != "approved"
    case.waiting = ""


def lapse(s: Standing, case: Case, now: float) -> None:
    """As `withdraw`, because of a guard that may change its mind; see `revive`."""
    lapsed = s.waiting.get(case.waiting) or case.lapsed
    withdraw(s, case, "withdrawn", now)
    case.lapsed = lapsed


def revive(s: Standing, case: Case, plan: Plan, book: str, now: float) -> Waiting | None:
    """The offer that lapsed, if the same would be offered now and its time is not up: what a person has before them stays right.

    Not after an answer: one that a guard refused must not come to count later.
    """
    lapsed, case.lapsed = case.lapsed, None
    if lapsed is None or now > lapsed.until or case.book != book or not same_effect(lapsed.plan, plan):
        return None
    s.answered.pop(lapsed.hash, None)
    s.waiting[lapsed.hash] = lapsed
    case.waiting = lapsed.hash
    return lapsed


def refusal(s: Standing, approval: Approval, waiting: Waiting | None, now: float) -> Refused | None:
    """Why an answer does not count whatever it says; None when it does."""
    if waiting is None:
        over = s.answered.get(approval.waiting)
        return _OVER[over.how] if over else Refused("approval_unknown", "nothing with this hash waits here")
    if not approval.by.strip():
        return Refused("approval_unsigned", "nobody's name is on it")
    if now > waiting.until:
        late = format_duration(max(1.0, now - waiting.until))
        return Refused("approval_expired", f"the answer came {late} too late", None, {"until": waiting.until})
    if approval.at < waiting.since:
        return Refused(
            "approval_expired", "the answer is older than the offer", None, {"since": waiting.since}
        )
    return None


def own_change(approval: Approval, incident: Incident) -> Refused | None:
    """Who made a change that belongs to the incident does not approve what answers it."""
    name = approval.by.strip().casefold()
    for change in incident.changes:
        if change.actor.strip().casefold() == name:
            text = f"{approval.by} made a change that belongs to the incident ({change.kind}); another person has to approve"
            return Refused("own_change", text, None, {"actor": change.actor, "change": change.summary})
    return None


def plan_changed(waiting: Waiting, q: Question, book: str) -> Refused | None:
    """What would be done now must be what was read, by the same runbook."""
    if q.case.book == book and same_effect(waiting.plan, q.plan):
        return None
    values = {"offered": waiting.hash, "now": q.plan.plan_hash}
    return Refused(
        "plan_changed", "what would be done now is something else; that is offered instead", None, values
    )
