"""The guards: everything that may speak against running a runbook for an incident now, in the order that they are asked.

Each says yes or no by name, with the values that it was asked on. The planner stops at the first no; `explain` asks them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from flyball.core.directives import StopChange
from flyball.core.estate import Estate
from flyball.core.incident import Incident
from flyball.core.plans import Mode, Plan, Refusal, format_duration, lower_mode
from flyball.runbooks.blast import judge, measure
from flyball.runbooks.loader import Runbook
from flyball.runbooks.resolve import Resolved, resolve
from flyball.runbooks.standing import (
    Case,
    Known,
    PlannerSettings,
    Standing,
    cooldown_keys,
    effort_keys,
    key_of,
)

ONE_SUBJECT: Final = ("run", "key")
"""Labels that windows do not carry: what is aimed at one of them is aimed at the tenant that the incident is about."""


@dataclass(frozen=True, slots=True)
class Check:
    """What one guard says.

    reason: word of the decision where it says no; the guard's name, unless it has several.
    hold: it may pass by itself; at `until`, where that is known. windowed: another closed window may change it.
    """

    name: str
    ok: bool
    detail: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    hold: bool = False
    until: float | None = None
    windowed: bool = False


@dataclass(slots=True)
class Question:
    """May this runbook run for this incident now? Guards read it; the last ones read what the first ones found out."""

    runbook: Runbook
    known: Known
    case: Case
    variables: Mapping[str, Any]
    estate: Estate
    now: float
    standing: Standing
    settings: PlannerSettings
    ceiling: Mode
    dry_run: bool = False
    resolved: Resolved | None = None
    must_ask: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def incident(self) -> Incident:
        return self.known.incident

    @property
    def plan(self) -> Plan:
        """Raises: ValueError before its targets are resolved."""
        if self.resolved is None:
            raise ValueError("no plan before its targets are resolved")
        return self.resolved.plan

    @property
    def mode(self) -> Mode:
        """The more careful of the runbook's and the environment's; what needs a person is never `auto`."""
        mode = lower_mode(self.runbook.mode, self.ceiling)
        return lower_mode(mode, "approve") if self.must_ask else mode


def checks(q: Question) -> Iterator[Check]:
    """Every guard in order, each asked when it is its turn. After one that finds no target the rest cannot be asked."""
    yield _stale(q)
    yield _held(q)
    yield _telemetry(q)
    yield _stopped(q)
    yield _breaker(q)
    yield _attempts(q)
    yield _denied(q)
    yield _runs(q)
    targets = _targets(q)
    yield targets
    if not targets.ok:
        return
    yield _stopped_here(q)
    yield _lock(q)
    yield _attempts_here(q)
    yield _hysteresis(q)
    yield _cooldown(q)
    # After what only takes time: right after a run that helped, that its trouble is no longer seen is nothing to report.
    yield from _preconditions(q)
    yield _blast(q)


def first_no(q: Question) -> Check | None:
    return next((check for check in checks(q) if not check.ok), None)


# --- asked before anything is resolved ----------------------------------------------------------------------------------


def _stale(q: Question) -> Check:
    age, limit = q.now - q.known.news_at, q.runbook.model.max_age
    text = f"news {format_duration(max(age, 0.0))} ago; max_age is {format_duration(limit)}"
    if age > limit:
        text = f"no news for {format_duration(age)}; max_age is {format_duration(limit)}"
    return Check("stale", age <= limit, text, {"age_s": round(age, 3), "max_age_s": limit})


def _held(q: Question) -> Check:
    hold = q.runbook.model.hold
    since = q.case.true_since if q.case.true_since is not None else q.now
    return Check(
        "hold", q.now - since >= hold, f"must stay true for {format_duration(hold)}", {"since": since}, hold=True, until=since + hold
    )  # fmt: skip


def _telemetry(q: Question) -> Check:
    """Windows from the future say as little about now as old ones: then one of the two clocks is wrong."""
    newest, limit = q.estate.now(), q.settings.silent_after_s
    silent = q.now - newest
    ok = newest > 0.0 and abs(silent) <= limit
    text = "the newest closed window is of now" if ok else "no closed window lately: blind, so nothing acts"
    return Check(
        "telemetry", ok, text, {"silent_s": round(silent, 3)}, reason="no_telemetry", hold=True, windowed=True
    )


def _stopped(q: Question) -> Check:
    stop = q.standing.stops.against(q.runbook.name, _actions(q))
    return Check("stopped", True, "nothing stops it") if stop is None else _stop_check("stopped", stop)


def _stop_check(name: str, stop: StopChange) -> Check:
    text = f"{stop.by} stopped {stop.scope}{f': {stop.reason}' if stop.reason else ''}"
    values = {"scope": stop.scope, "by": stop.by, "at": stop.at}
    return Check(name, False, text, values, reason="stopped", hold=True)


def _actions(q: Question) -> list[str]:
    return list(dict.fromkeys(step.action for step in q.runbook.steps))


def _breaker(q: Question) -> Check:
    trip = q.standing.breaker.against(q.runbook.name, _actions(q))
    if trip is None:
        return Check("breaker", True, "closed")
    text = (
        f"{trip.key} failed or was not verified {trip.count} times in {format_duration(trip.per_s)}; "
        f"a person has to look and reset it"
    )
    values = {"breaker": trip.key, "failures": trip.count, "tripped_at": trip.at}
    return Check("breaker", False, text, values)


def _attempts(q: Question) -> Check:
    limit, made, rests = q.runbook.model.limits.attempts, q.case.attempts, q.case.rests_until
    values = {"attempts": made, "max_attempts": limit}
    if made < limit:
        return Check("attempts", True, f"{made} of {limit} attempts for this incident", values)
    if q.now < rests:
        text = "its last attempt did what it should; if the trouble is not over by then, a person has to look"
        return Check("attempts", False, text, values, reason="cooldown", hold=True, until=rests)
    return Check("attempts", False, f"{made} attempts for this incident; a person has to look", values)


def _denied(q: Question) -> Check:
    case = q.case
    ok = q.now >= case.denied_until
    text = "not denied" if ok else f"{case.denied_by} denied it"
    values = {"by": case.denied_by} if not ok else {}
    return Check("denied", ok, text, values, until=None if ok else case.denied_until)


def _runs(q: Question) -> Check:
    rate = q.runbook.model.limits.runs
    recent = [at for at in q.standing.runs.get(q.runbook.name, []) if q.now - at < rate.per_s]
    text = f"{len(recent)} runs in {format_duration(rate.per_s)}; the limit is {rate.count}"
    full = len(recent) >= rate.count
    until = recent[-rate.count] + rate.per_s if full else None
    return Check(
        "runs", not full, text, {"runs": len(recent), "max_runs": rate.count}, hold=True, until=until
    )


# --- targets, and what is asked about them --------------------------------------------------------------------------------


def _targets(q: Question) -> Check:
    mode = lower_mode(q.runbook.mode, q.ceiling)
    found = resolve(
        q.runbook, q.incident, q.case, q.standing, q.estate, mode, q.now, q.settings, dry_run=q.dry_run
    )
    if isinstance(found, Refusal):
        return Check("targets", False, found.detail, dict(found.values), reason=found.reason, windowed=True)
    q.resolved, q.must_ask = found, found.must_ask
    q.figures.update(_figures(found.plan, q.estate, q.settings.measure_s))
    text = "; ".join(f"{step.action} {key_of(step.scope)}" for step in found.plan.steps)
    return Check("targets", True, text, {"locks": list(found.plan.locks)})


def _figures(plan: Plan, estate: Estate, span_s: float) -> dict[str, Any]:
    """What the decision was made on, for people and the ledger."""
    figures: dict[str, Any] = {"root": str(plan.root), "attempt": plan.attempt}
    for step in plan.steps:
        for name, scope in (("from", step.source), ("to", step.target)):
            seen = estate.errors(scope, span_s)
            figures[name] = key_of(scope)
            figures[f"{name}_calls"] = seen.n or estate.calls(scope, span_s)  # of a run, its steps
            if seen.n:
                figures[f"{name}_errors"] = round(seen.value, 4)
    return figures


def _stopped_here(q: Question) -> Check:
    """A stop for one tenant forbids what is aimed at it; what is aimed wider leaves it out, see `Directive.exempt`."""
    about = q.incident.scope.get("tenant", "")
    for step in q.plan.steps:
        aimed_at = about if any(k in step.scope for k in ONE_SUBJECT) else ""
        stop = q.standing.stops.live.get(f"tenant:{step.scope.get('tenant') or aimed_at}")
        if stop is not None:
            return _stop_check("stopped_tenant", stop)
    return Check("stopped_tenant", True, "no stopped tenant is aimed at")


def _attempts_here(q: Question) -> Check:
    """The same kind of action on the same target for the same incident is one more attempt, whichever runbook makes it."""
    limit = q.runbook.model.limits.attempts
    made = q.standing.efforts.get(q.incident.id, {})
    most = max(effort_keys(q.plan), key=lambda key: made.get(key, 0))
    n = made.get(most, 0)
    text = f"{n} attempts at {most} for this incident, by all runbooks; the limit is {limit}"
    return Check(
        "target_attempts", n < limit, text, {"target_attempts": n, "max_attempts": limit}, reason="attempts"
    )


def _lock(q: Question) -> Check:
    for lock in q.plan.locks:
        holder = q.standing.holder(lock)
        if holder is not None:
            text = f"{lock} is in the hands of {holder.runbook} for {holder.incident}"
            return Check("lock", False, text, {"lock": lock, "held_by": holder.plan_hash}, hold=True)
    return Check("lock", True, f"free: {', '.join(q.plan.locks)}", {"locks": list(q.plan.locks)})


def _hysteresis(q: Question) -> Check:
    resolved = q.resolved
    if resolved is None or resolved.back_until is None:
        return Check("hysteresis", True, "nothing went the opposite way lately")
    text = f"traffic went {resolved.back.replace('>', ' → ')} lately; the opposite way waits"
    values = {"opposite": resolved.back, "hysteresis_s": q.settings.hysteresis_s}
    return Check("hysteresis", False, text, values, hold=True, until=resolved.back_until, windowed=True)


def _cooldown(q: Question) -> Check:
    cooldown = q.runbook.model.limits.cooldown
    for key in cooldown_keys(q.plan):
        last = q.standing.ended.get(key)
        if last is not None and q.now - last < cooldown:
            ago = format_duration(max(q.now - last, 0.0))
            text = f"{key} was acted on {ago} ago; cooldown is {format_duration(cooldown)}"
            return Check("cooldown", False, text, {"last": last}, hold=True, until=last + cooldown)
    return Check("cooldown", True, f"none of its targets was acted on for {format_duration(cooldown)}")


def _preconditions(q: Question) -> Iterator[Check]:
    """One that is not met is waited for at first: right after the incident opened, what it reads has not closed yet."""
    since = q.case.true_since if q.case.true_since is not None else q.now
    settled = since + q.settings.settle_s
    for name, condition in q.runbook.preconditions:
        answer = condition.ask(q.variables, q.estate)
        early = not answer.true and q.now < settled
        why = f" ({answer.error})" if answer.error else ""
        text = f"{name} is met" if answer.true else f"{name} is not met{' yet' if early else ''}{why}"
        yield Check(
            "precondition", answer.true, text, {"precondition": name, "check": condition.source}, hold=early,
            until=settled if early else None, windowed=True,
        )  # fmt: skip


def _blast(q: Question) -> Check:
    frozen = q.resolved.frozen if q.resolved else ()
    seen = measure(frozen, q.incident.scope, q.estate, q.settings.measure_s, q.settings.gpu_span_s)
    judged = judge(q.runbook.model.limits.blast, seen)
    q.figures.update({**seen.figures(), **judged.values})
    q.must_ask = q.must_ask or judged.must_ask
    return Check(
        "blast",
        judged.ok,
        judged.detail,
        {**seen.figures(), **judged.values},
        reason="blast_radius",
        windowed=True,
    )
