"""From a runbook and an incident to a plan: every target resolved once, against live traffic, and frozen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from flyball.core.estate import Estate
from flyball.core.ids import short_id
from flyball.core.incident import Incident
from flyball.core.plans import Candidate, Frozen, Mode, Plan, PlanContext, PlanStep, Refusal, plan_hash
from flyball.runbooks.candidates import best_healthy
from flyball.runbooks.loader import Runbook, RunbookStep
from flyball.runbooks.standing import Case, PlannerSettings, Standing, move_of

CLOSE_RATIO: Final = 0.25
"""A figure that was resolved from live traffic (75 % of what flows now) may differ by this much when it is resolved again."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A plan, with what each of its steps was resolved to."""

    plan: Plan
    frozen: tuple[Frozen, ...]
    must_ask: str = ""
    """Why a person has to approve it whatever the mode."""
    back_until: float | None = None
    """It would send traffic back where it just came from; until when it may not."""
    back: str = ""


def resolve(
    runbook: Runbook, incident: Incident, case: Case, s: Standing, estate: Estate, mode: Mode, now: float, settings: PlannerSettings, *, dry_run: bool = False,
) -> Resolved | Refusal:  # fmt: skip
    """The plan of a runbook for an incident, now.

    Providers that a live redirect leads away from are no candidates. Where the best candidate is one that traffic was moved away
    from lately, the next best is taken; without one, the plan says until when it may not go (`back_until`).

    Returns: Refusal where a step finds no target; an empty one is never read as all.
    """
    left = {
        d.scope["provider"]
        for d in s.live.values()
        if d.kind == "redirect" and d.expires_at > now and "provider" in d.scope
    }
    first = _try(runbook, incident, case, estate, mode, now, settings, left, dry_run)
    if isinstance(first, Refusal):
        return first
    until, back = _back(first.plan, s, now, settings)
    if until is None:
        return first
    avoid = {step.target.get("provider", "") for step in first.plan.steps if move_of(step) is not None}
    second = _try(runbook, incident, case, estate, mode, now, settings, left | avoid, dry_run)
    if isinstance(second, Resolved) and _back(second.plan, s, now, settings)[0] is None:
        return second
    return Resolved(first.plan, first.frozen, first.must_ask, until, back)


def _back(plan: Plan, s: Standing, now: float, settings: PlannerSettings) -> tuple[float | None, str]:
    for step in plan.steps:
        there = move_of(step, back=True)
        last = s.moved.get(there) if there else None
        if last is not None and now - last < settings.hysteresis_s:
            return last + settings.hysteresis_s, str(there)
    return None, ""


def _try(
    runbook: Runbook, incident: Incident, case: Case, estate: Estate, mode: Mode, now: float, settings: PlannerSettings, avoid: Collection[str], dry_run: bool,
) -> Resolved | Refusal:  # fmt: skip
    excluded = sorted(avoid)

    def candidates(source: Mapping[str, str]) -> Sequence[Candidate]:
        return best_healthy(estate, source, exclude=excluded, settings=settings.candidates)

    context = PlanContext(incident, estate, candidates)
    steps: list[PlanStep] = []
    found: list[Frozen] = []
    must_ask = ""
    for step in runbook.steps:
        frozen = step.implementation.freeze(step.params, context)
        if isinstance(frozen, Refusal):
            return frozen
        if not _has_target(frozen):
            return Refusal("no_target", f"step {step.id} selects nothing; an empty target is never all", {})
        found.append(frozen)
        steps.append(_step(runbook, step, frozen))
        if step.approval is None:  # else the step itself asks, when it is its turn
            must_ask = must_ask or frozen.must_ask or ("irreversible" if step.undo == "none" else "")
    attempt = case.attempts + 1
    plan = Plan(
        at=now,
        incident=incident.id,
        runbook=runbook.name,
        mode=mode,
        steps=tuple(steps),
        root=incident.root,
        attempt=attempt,
        locks=tuple(dict.fromkeys(lock for f in found for lock in f.locks)),
        max_age_s=runbook.model.max_age,
        dry_run=dry_run,
        on_failure=runbook.model.on_failure,
    )
    plan = msgspec.structs.replace(plan, plan_hash=hash_of(plan, case.offers))
    return Resolved(plan, tuple(found), must_ask)


def hash_of(plan: Plan, offers: int = 0) -> str:
    """What an answer to the plan is bound to; of another offer of the same plan it is another one."""
    first = plan_hash(plan.incident, plan.runbook, plan.attempt, plan.steps)
    return short_id("PLAN", first, offers, length=10) if offers else first


def _has_target(frozen: Frozen) -> bool:
    if frozen.hook is not None and not (frozen.hook.targets and all(frozen.hook.targets)):
        return False
    return bool(frozen.scope) and all(frozen.scope.values()) and bool(frozen.stages)


def _step(runbook: Runbook, step: RunbookStep, f: Frozen) -> PlanStep:
    hook = f.hook
    if hook is not None and step.undo == "none":
        hook = msgspec.structs.replace(hook, undoable=False)
    return PlanStep(
        id=step.id,
        action=step.action,
        kind=step.implementation.effect,
        scope=dict(f.scope),
        stages=f.stages,
        source=dict(f.source),
        target=dict(f.target),
        hold_s=f.hold_s,
        lease_s=f.lease_s,
        timeout_s=step.timeout_s or len(f.stages) * step.verify.within_s,
        verify=step.verify,
        progress="ladder" if runbook.model.ladder else f.progress,
        release=step.release or f.release,
        retry=step.retry,
        approval=step.approval,
        hook=hook,
        baseline=dict(f.baseline),
    )


def same_effect(read: Plan, now: Plan) -> bool:
    """Whether what a person read is still what would be done: the same targets, steps and parameters.

    Figures of a stage that were resolved from live traffic may have moved a little (`CLOSE_RATIO`); what is carried out is what
    was read. What recovery is judged by (`baseline`) is no part of it.
    """
    if read.locks != now.locks or len(read.steps) != len(now.steps):
        return False
    pairs = list(zip(read.steps, now.steps, strict=True))
    if any(_frame(a) != _frame(b) for a, b in pairs):
        return False
    return all(_alike(a.stages, b.stages) for a, b in pairs)


def _frame(step: PlanStep) -> PlanStep:
    return msgspec.structs.replace(step, baseline={}, stages=())


def _alike(a: Any, b: Any, name: str = "") -> bool:
    """Equal, but for numbers that are no share: those may differ by CLOSE_RATIO."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[k], b[k], k) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_alike(x, y, name) for x, y in zip(a, b, strict=True))
    if name == "share" or not (_is_number(a) and _is_number(b)):
        return bool(a == b)
    return bool(abs(a - b) <= CLOSE_RATIO * max(abs(a), abs(b)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
