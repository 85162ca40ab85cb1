"""The executor: carries plans out as leases and operations, proves each stage on live traffic, and lets go.

Level-triggered and pure in time: it looks at the estate at every tick and does what the state asks for. It reaches the
world only through what it says: the set of live directives, which enforcement points converge on, and requests to hooks, which
a dispatcher sends.

What it never does: act on a plan that a person has yet to approve; act twice on one plan; widen a change that was
not verified; take missing data, or a cancelled step, for success; repeat what may have been done; block a release.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from flyball.core.directives import (
    Approval,
    Directive,
    DirectiveChange,
    Enforced,
    OperationReport,
    Release,
    StopChange,
)
from flyball.core.estate import Estate
from flyball.core.incident import IncidentChange
from flyball.core.incident import State as IncidentState
from flyball.core.plans import Plan, PlanStep, Waiting
from flyball.core.stops import Stops
from flyball.remediation.endings import Endings, ExecutorSettings, Moved
from flyball.remediation.leases import directive_id
from flyball.remediation.operations import Turned, reserve
from flyball.remediation.runs import (
    News,
    Result,
    Run,
    Stage,
    outcome,
    params_of,
    stage_text,
    waiting_hash,
)
from flyball.remediation.verify import Judgement, figures_before, target_is_harmed

__all__ = ["Executor", "ExecutorSettings", "Moved", "Told"]

Told = Plan | Enforced | IncidentChange | Approval | StopChange | Release | OperationReport
"""What the executor hears."""

_REMEMBER_S: Final = 7 * 86400.0
"""How long a finished plan is known, so that a second copy of it does nothing."""
_PASSING: Final = ("stopped", "no_telemetry")
"""Reasons not to act that may pass: what was begun waits."""


class Executor(Endings):
    """Stage from plans to directive changes, operations and outcomes.

    Every outcome carries `values["plan"]`; the last one of a plan also `values["plan_ended"] = True`.

    Misleads: `now` must be wall time while live (event time in a replay). With a `now` that lags behind, leases that
    it believes live may have run out at the enforcement points; that is the safe direction.

    Args:
        evidence: what it goes by; the live estate and reports unless given.
    """

    # --- in -------------------------------------------------------------------------------------------------------

    def feed(self, items: Sequence[Told], estate: Estate, now: float) -> list[Moved]:
        """News. Ends of incidents, stops and releases are taken first: a healthy signal that came with the plan cancels it."""
        self._s.now = now
        out = self._expire(now)
        for item in items:
            if isinstance(item, IncidentChange):
                out += self._incident(item, now)
            elif isinstance(item, StopChange):
                out += self._stop(item, now)
            elif isinstance(item, Release):
                out += self._release(item, now)
        for item in items:
            if isinstance(item, Enforced):
                self._enforced(item)
            elif isinstance(item, OperationReport):
                out += self._reported(item, estate, now)
            elif isinstance(item, Approval):
                out += self._answered(item, estate, now)
            elif isinstance(item, Plan):
                out += self._accept(item, estate, now)
        return self._closed(out, now)

    def tick(self, now: float, estate: Estate) -> list[Moved]:
        """Time passes: leases expire, stages are judged, leases are renewed or let go."""
        self._s.now = now
        out = self._expire(now)
        for run in list(self._s.runs.values()):
            out += self._advance(run, estate, now)
        out = self._closed(out, now)
        self._s.done = {k: at for k, at in self._s.done.items() if now - at <= _REMEMBER_S}
        acted_on = {run.plan.incident for run in self._s.runs.values()}
        self._s.incidents = {
            k: n for k, n in self._s.incidents.items() if now - n.at <= _REMEMBER_S or k in acted_on
        }
        return out

    # --- out ------------------------------------------------------------------------------------------------------

    def directives(self, now: float | None = None) -> list[Directive]:
        """Leases in force, by id; those that are over at `now` are left out even before the next tick."""
        live = self._s.leases.live
        return [live[key] for key in sorted(live) if now is None or live[key].expires_at > now]

    def waiting(self, now: float) -> list[Waiting]:
        """Steps of running plans that ask a person first, oldest first."""
        found = [
            Waiting(
                hash=waiting_hash(run.plan, step),
                plan=run.plan,
                since=stage.stage_at,
                until=stage.deadline_at,
                step=step.id,
                values={**params_of(step, 0), **_rounded(stage.before)},
            )
            for run in self._s.runs.values()
            for stage, step in run.pairs()
            if stage.phase == "asking" and now < stage.deadline_at
        ]
        return sorted(found, key=lambda w: (w.since, w.hash))

    def wanted(self, operation_id: str, verb: str = "start") -> bool:
        """Whether a request of this operation is still to be sent: not cancelled, not stopped, not past its deadline.

        A cancel and an undo are never stopped.
        """
        for run in self._s.runs.values():
            for stage, step in run.pairs():
                if stage.work is not None and stage.work.order.id == operation_id:
                    stopped = self._stopped(run.plan, [step])
                    return stage.work.wanted(operation_id, verb, self._s.now, stopped)
        return False

    @property
    def stops(self) -> Stops:
        """What is stopped now."""
        return self._s.stops

    # --- news -----------------------------------------------------------------------------------------------------

    def _incident(self, change: IncidentChange, now: float) -> list[Moved]:
        incident = change.incident
        resolved = incident.state is IncidentState.RESOLVED
        actors = tuple(sorted({c.actor for c in incident.changes if c.actor}))
        self._s.incidents[incident.id] = News(
            change.at, incident.signal, actors, change.at if resolved else None, incident.klass
        )
        out: list[Moved] = []
        for run in list(self._s.runs.values()) if resolved else ():
            if run.plan.incident == incident.id:
                run.going = False
                for stage, step in reversed(run.pairs()):
                    if stage.phase in ("asking", "sending"):
                        out += self._let_go(run, stage, step, now, "cancelled", "resolved", {})
                    elif step.release == "resolved" and stage.phase in ("acting", "held", "left"):
                        out += self._let_go(run, stage, step, now, "released", "resolved", {})
        return out

    def _stop(self, change: StopChange, now: float) -> list[Moved]:
        """No new effect, none wider, no renewal. What a hook has not taken yet is cancelled; the rest runs out or is proved.

        Leases that reach a stopped tenant are changed to leave it out at once, which only narrows them.
        """
        self._s.stops.take(change)
        out: list[Moved] = []
        for run in list(self._s.runs.values()):
            for stage, step in reversed(run.pairs()):
                stopped = self._stopped(run.plan, [step])
                if stopped and stage.phase == "sending" and stage.work is not None and stage.work.unsent:
                    run.going = False
                    out += self._let_go(run, stage, step, now, "cancelled", "stopped", {})
                lease = self._s.leases.live.get(stage.directive)
                exempt = self._exempt(step)
                if lease is None:
                    continue
                if stopped:  # who is left out stays so: to reach further would be a wider effect
                    exempt += tuple(e for e in lease.exempt if e not in exempt)
                if exempt != lease.exempt:
                    reason = f"{change.change} {change.scope} by {change.by}"
                    until = lease.expires_at
                    out.append(self._s.leases.renew(lease.id, now, until, reason, exempt=exempt))
        return out

    def _exempt(self, step: PlanStep) -> tuple[dict[str, str], ...]:
        """Who must be left out of a step's scope because somebody stopped Flyball for them."""
        return tuple(
            e for e in self._s.stops.exempt() if all(step.scope.get(k, v) == v for k, v in e.items())
        )

    def _release(self, release: Release, now: float) -> list[Moved]:
        """A person lets go of one lease or operation, of a plan, or of all. Asks nothing and is blocked by nothing.

        The plan goes no further; its other steps stay, where only one was named.
        """
        out: list[Moved] = []
        for run in list(self._s.runs.values()):
            whole = release.subject in ("", run.plan.plan_hash)
            for stage, step in reversed(run.pairs()):
                if stage.phase != "over" and (whole or release.subject == stage.directive):
                    run.going = False
                    out += self._let_go(
                        run, stage, step, now, "released", f"by {release.by}", {}, person=True
                    )
        return out

    def _enforced(self, report: Enforced) -> None:
        settle_s = self._settings.verify.settle_s
        for run in self._s.runs.values():
            for stage in run.stages:
                # A point that has not heard of the newest stage yet reports the one before under the same id.
                since = stage.stage_at + (settle_s if stage.index else 0.0)
                if stage.directive in report.directives and report.at >= since:
                    stage.reported_at = max(report.at, stage.reported_at or 0.0)
                    if report.directives[stage.directive] > 0:
                        stage.applied_at = max(report.at, stage.applied_at or 0.0)

    def _reported(self, report: OperationReport, estate: Estate, now: float) -> list[Moved]:
        for run in list(self._s.runs.values()):
            for stage, step in run.pairs():
                if stage.work is not None and stage.phase != "over" and stage.work.order.id == report.id:
                    return self._turned(run, stage, step, stage.work.take(report, now), estate, now)
        return []

    def _answered(self, answer: Approval, estate: Estate, now: float) -> list[Moved]:
        """A person's answer to a step. It is looked at again like everything; an answer that is not taken is not used up."""
        for run in list(self._s.runs.values()):
            for stage, step in run.pairs():
                if stage.phase != "asking" or waiting_hash(run.plan, step) != answer.waiting:
                    continue
                who: dict[str, Any] = {"waiting": answer.waiting, "by": answer.by}
                if now >= stage.deadline_at:
                    return self._not_approved(run, stage, step, now, "approval_expired", who)
                if not answer.approve:
                    return self._not_approved(run, stage, step, now, "denied", who)
                news = self._s.incidents.get(run.plan.incident)
                reason = self._obstacle(run.plan, step, estate, now)
                if news is not None and answer.by in news.actors:
                    reason = "own_change"  # whoever made the change does not judge its remedy alone
                if reason in (*_PASSING, "own_change"):
                    return [outcome(run.plan, step, now, "waiting", reason, who, stage)]
                if reason:
                    run.going = False
                    return self._let_go(run, stage, step, now, "cancelled", reason, who)
                run.stages.pop()
                return self._begin(run, estate, now, f"approved by {answer.by}; ")
        return []

    # --- beginning ------------------------------------------------------------------------------------------------

    def _accept(self, plan: Plan, estate: Estate, now: float) -> list[Moved]:
        """Looks again at everything that may have changed since the plan was made, then grants the first stage."""
        if not plan.may_act or plan.plan_hash in self._s.runs or plan.plan_hash in self._s.done:
            return []
        held = {lock for run in self._s.runs.values() for lock in run.plan.locks}
        first = plan.steps[0] if plan.steps else None
        reason = ""
        if first is None or any(not _aims(step) for step in plan.steps):
            reason = "no_target"
        elif self._stopped(plan, plan.steps):
            reason = "stopped"
        elif now - plan.at > plan.max_age_s:
            reason = "stale"
        elif self._trouble(plan).resolved:
            reason = "cancelled"
        elif self._silent(estate, now):
            reason = "no_telemetry"
        elif held.intersection(plan.locks):
            reason = "lock"
        elif all(self._well(plan, step, estate) for step in plan.steps):
            reason = "recovered"
        if reason or plan.dry_run:
            self._s.done[plan.plan_hash] = now
            result: Result = "not_accepted" if reason else "applied"
            values = (
                {"plan_ended": True, "stages": _all_stages(plan)} if plan.dry_run else {"plan_ended": True}
            )
            return [outcome(plan, first, now, result, reason or "dry_run", values)]
        run = Run(plan)
        self._s.runs[plan.plan_hash] = run
        return self._ask_or_begin(run, estate, now)

    def _ask_or_begin(self, run: Run, estate: Estate, now: float) -> list[Moved]:
        """A step that asks waits for a person; unless it is the first of a plan that one has just approved."""
        step = run.plan.steps[len(run.stages)]
        if step.approval is None or (not run.stages and run.plan.approved_by):
            return self._begin(run, estate, now)
        until = now + step.approval.expires_s
        stage = Stage(
            phase="asking",
            stage_at=now,
            deadline_at=until,
            before=figures_before(step, estate, self._settings.baseline_s, self._settings.verify),
        )
        run.stages.append(stage)
        values = {"waiting": waiting_hash(run.plan, step), "until": until, **params_of(step, 0)}
        return [outcome(run.plan, step, now, "waiting", "approval", values, stage)]

    def _begin(self, run: Run, estate: Estate, now: float, text: str = "") -> list[Moved]:
        """Reserves and acts: a lease is granted, an operation handed to the dispatcher."""
        step = run.plan.steps[len(run.stages)]
        stage = Stage(
            granted_at=now,
            stage_at=now,
            deadline_at=now + step.timeout_s,
            before=figures_before(step, estate, self._settings.baseline_s, self._settings.verify),
            checked_at=estate.now(),
        )
        run.stages.append(stage)
        if step.kind == "operation":
            stage.work = reserve(run.plan, step, now, now + min(step.timeout_s, step.hold_s))
            stage.directive, stage.phase = stage.work.order.id, "sending"
            return [stage.work.order]
        stage.directive = directive_id(run.plan, step)
        reason = text + stage_text(step, 0)
        return [self._s.leases.grant(run.plan, step, now, reason, self._exempt(step))]

    # --- going on -------------------------------------------------------------------------------------------------

    def _advance(self, run: Run, estate: Estate, now: float) -> list[Moved]:
        out: list[Moved] = []
        for stage, step in run.pairs():
            if stage.phase == "asking" and now >= stage.deadline_at:
                out += self._not_approved(run, stage, step, now, "approval_expired", {})
            elif stage.phase == "unclear" and now >= stage.deadline_at:
                out += self._give_up(run, stage, step, now)
            elif stage.phase in ("sending", "undoing", "unclear") and stage.work is not None:
                out += self._work(run, stage, step, estate, now)
            elif stage.phase == "acting":
                out += self._prove(run, stage, step, estate, now)
            elif stage.phase in ("held", "left"):
                out += self._hold(run, stage, step, estate, now)
            elif stage.phase == "easing":
                out += self._ease_further(run, stage, step, estate, now)
        return out

    def _prove(self, run: Run, stage: Stage, step: PlanStep, estate: Estate, now: float) -> list[Moved]:
        """One stage that is to show itself in force, good and harmless, before it goes on or its time is up."""
        out: list[Moved] = []
        judged: Judgement | None = None
        if estate.now() > stage.checked_at:
            stage.checked_at = estate.now()
            in_force = self._evidence.in_force(stage, step, estate)
            if in_force == "yes" and not stage.in_force:
                stage.in_force = True
                if step.kind != "operation":  # that it was done was said when its hook said so
                    values = {**params_of(step, stage.index), "stage": stage.index}
                    out.append(outcome(run.plan, step, now, "applied", "in_force", values, stage))
            if self._recovered(run, stage, step, estate, now) == "yes":
                return out + self._recover(run, stage, step, estate, now)
            judged = self._evidence.judged(stage, step, estate, in_force)
            if judged is not None and judged.harmed:
                return out + self._fail(run, stage, step, now, "failed", "target_harmed", judged.values)
            if judged is not None and judged.good:
                values = {**judged.values, **params_of(step, stage.index), "stage": stage.index}
                out.append(outcome(run.plan, step, now, "verified", judged.reason, values, stage))
                stage.phase, stage.proved_at = "held", now
                stage.more = step.progress == "ramp"
                return out + self._go_on(run, stage, step, estate, now)
        reason, values = (judged.reason, judged.values) if judged else ("no_data", {})
        if now - stage.stage_at >= step.verify.within_s or now >= stage.deadline_at:
            reason = reason if now - stage.stage_at >= step.verify.within_s else "timeout"
            return out + self._unproved(run, stage, step, estate, now, reason, values)
        return out

    def _unproved(
        self, run: Run, stage: Stage, step: PlanStep, estate: Estate, now: float, reason: str, values: dict[str, Any]
    ) -> list[Moved]:  # fmt: skip
        """A ladder goes a rung on, with this one left in place; everything else has failed."""
        index = stage.index
        if step.progress == "ladder" and run.going and stage is run.stages[-1]:
            stage.phase, stage.proved_at, stage.more = "held", now, True
            went_on = self._go_on(run, stage, step, estate, now, skip=now >= stage.deadline_at)
            if went_on:
                values = {**values, "stage": index, "next_rung": True}
                return [outcome(run.plan, step, now, "unverified", reason, values, stage), *went_on]
        return self._fail(run, stage, step, now, "unverified", reason, {**values, "stage": index})

    def _go_on(
        self, run: Run, stage: Stage, step: PlanStep, estate: Estate, now: float, *, skip: bool = False
    ) -> list[Moved]:
        """The next stage, or the next step after the last stage; nothing while something passing stands against it.

        Args:
            skip: the step's own time is up: straight to the next step.
        """
        if not stage.more or not run.going:
            stage.more = False
            return []
        last = stage.index + 1 >= len(step.stages) or skip
        if last and len(run.stages) == len(run.plan.steps):
            stage.more = False
            return []
        following = run.plan.steps[len(run.stages)] if last else step
        obstacle = self._obstacle(run.plan, following, estate, now)
        if obstacle in _PASSING:
            return []
        stage.more = False
        if obstacle:
            run.going = False
            return []
        if last:
            return self._ask_or_begin(run, estate, now)
        stage.deadline_at += max(0.0, now - stage.proved_at)  # time that it had to wait does not count
        return [self._set_stage(stage, step, now, stage.index + 1, stage_text(step, stage.index + 1))]

    def _set_stage(
        self, stage: Stage, step: PlanStep, now: float, index: int, reason: str
    ) -> DirectiveChange:
        """Other params of the same lease; what was reported of the former ones proves nothing of these."""
        stage.index, stage.stage_at, stage.phase = index, now, "acting"
        stage.in_force, stage.reported_at = False, None
        expires_at = self._next_expiry(stage, step, now)
        return self._s.leases.renew(stage.directive, now, expires_at, reason, step.stages[index])

    def _hold(self, run: Run, stage: Stage, step: PlanStep, estate: Estate, now: float) -> list[Moved]:
        if estate.now() > stage.checked_at:
            stage.checked_at = estate.now()
            if self._recovered(run, stage, step, estate, now) == "yes":
                return self._recover(run, stage, step, estate, now)
            span = self._settings.verify.recover_over_s
            if target_is_harmed(step, estate, span, self._settings.verify, stage.before):
                values = self._figures(step, estate)
                return self._fail(run, stage, step, now, "failed", "target_harmed", values)
        if stage.phase == "left":
            return []
        out = self._go_on(run, stage, step, estate, now) if stage.more else []
        return out or self._renew(run, stage, step, estate, now)

    def _renew(self, run: Run, stage: Stage, step: PlanStep, estate: Estate, now: float) -> list[Moved]:
        """Renews only on evidence that it is still needed; without it the lease runs out by itself."""
        lease = self._s.leases.live.get(stage.directive)
        if (
            lease is None
            or lease.expires_at - now > step.lease_s / 2.0
            or self._stopped(run.plan, [step])
            or self._silent(estate, now)
        ):
            return []
        reason = "for_its_time"
        if step.release != "expiry":
            if self._trouble(run.plan).resolved:
                return []
            reason = "incident_open"
        if step.release == "recovered":
            if self._evidence.recovered(stage, step, estate, self._trouble(run.plan), now) != "no":
                return []
            reason = "primary_still_failing" if step.kind == "redirect" else "still_needed"
        expires_at = self._next_expiry(stage, step, now)
        if expires_at <= lease.expires_at:
            return []
        return [self._s.leases.renew(stage.directive, now, expires_at, reason)]

    def _next_expiry(self, stage: Stage, step: PlanStep, now: float) -> float:
        return min(now + step.lease_s, stage.granted_at + step.hold_s)

    # --- operations -----------------------------------------------------------------------------------------------

    def _work(self, run: Run, stage: Stage, step: PlanStep, estate: Estate, now: float) -> list[Moved]:
        work = stage.work
        if work is None:
            return []
        if stage.phase == "sending" and work.unsent and self._well(run.plan, step, estate):
            return self._let_go(run, stage, step, now, "cancelled", "recovered", {})
        turned = work.assume() if self._evidence.assumes(stage) else work.tick(now)
        return self._turned(run, stage, step, turned, estate, now)

    def _turned(
        self, run: Run, stage: Stage, step: PlanStep, turned: Turned, estate: Estate, now: float
    ) -> list[Moved]:
        """What a report, or the time, made of an operation."""
        work, turn, reason = stage.work, turned.turn, turned.reason
        sent: list[Moved] = [turned.send] if turned.send is not None else []
        if work is None or not turn:
            return sent
        if turn in ("tried", "due"):
            obstacle = self._obstacle(run.plan, step, estate, now)
            if obstacle:
                return self._let_go(run, stage, step, now, "cancelled", obstacle, {})
            sent = [work.start(run.plan, step, now) if turn == "tried" else work.resend(now)]
            stage.directive = work.order.id
            return sent
        if turn == "applied":
            stage.phase, stage.stage_at, stage.in_force = "acting", now, True
            stage.deadline_at = now + step.verify.within_s
            values = {"attempt": work.starts, "targets": list(work.order.targets), **_told(work.predicted)}
            return [outcome(run.plan, step, now, "applied", "succeeded", values, stage)]
        if turn in ("not_accepted", "failed"):
            stage.phase = "over"
            return self._not_done(run, stage, step, estate, now, turn, reason)
        if turn == "failed_applied":
            stage.phase = "acting"
            return self._fail(run, stage, step, now, "failed", "half_done", {"detail": reason})
        if turn in ("ambiguous", "undo_failed"):
            return sent + self._nobody_knows(run, stage, step, now, turned)
        if turn == "late":
            stage.ends = ("undone", stage.ends[1] or "late")
            return self._undo(run, stage, step, now, {"late": reason})
        stage.phase = "over"
        if turn == "undone":
            return [outcome(run.plan, step, now, *stage.ends, {}, stage)]
        run.going = False
        return [outcome(run.plan, step, now, "cancelled", stage.ends[1] or turn, {"detail": reason}, stage)]

    def _not_done(
        self, run: Run, stage: Stage, step: PlanStep, estate: Estate, now: float, result: Result, reason: str
    ) -> list[Moved]:
        """Certainly without effect. A ladder tries its next step; everything else has failed."""
        attempts = {"attempts": stage.work.starts} if stage.work is not None else {}
        further = len(run.stages) < len(run.plan.steps) and run.going and step.progress == "ladder"
        if further and not self._obstacle(run.plan, run.plan.steps[len(run.stages)], estate, now):
            values = {**attempts, "next_rung": True}
            said = outcome(run.plan, step, now, result, reason, values, stage)
            return [said, *self._ask_or_begin(run, estate, now)]
        return self._fail(run, stage, step, now, result, reason, attempts)

    def _nobody_knows(
        self, run: Run, stage: Stage, step: PlanStep, now: float, turned: Turned
    ) -> list[Moved]:
        """It may or may not be in force, and is not repeated. The plan fails; its targets stay locked until the hook
        says what happened, a person lets go of it, or its time is up."""
        was_undo = turned.turn == "undo_failed"
        stage.phase = "unclear"
        stage.deadline_at = now + self._settings.unclear_s if was_undo else stage.granted_at + step.hold_s
        values = {"until": stage.deadline_at}
        result: Result = "failed" if was_undo else "ambiguous"
        reason = f"undo_{turned.reason}" if was_undo else turned.reason
        return self._fail(run, stage, step, now, result, reason, values)

    def _give_up(self, run: Run, stage: Stage, step: PlanStep, now: float) -> list[Moved]:
        """The time of what nobody knows of is up. An undo of what was never done does nothing, so it is asked for, once."""
        if stage.work is not None and stage.work.order.verb != "undo":
            stage.ends = ("undone", "time_up")
            return self._undo(run, stage, step, now, {})
        stage.phase = "over"
        return [outcome(run.plan, step, now, "ambiguous", "never_cleared", {}, stage)]


def _aims(step: PlanStep) -> bool:
    """Whether a step names what it acts on. Nothing is never everything."""
    if not step.scope or not all(step.scope.values()) or not step.stages:
        return False
    if step.kind == "operation":
        return step.hook is not None and bool(step.hook.targets) and all(step.hook.targets)
    return True


def _all_stages(plan: Plan) -> list[str]:
    """What a dry run would have done, step by step."""
    return [f"{s.id}: {s.action} {stage_text(s, i)}" for s in plan.steps for i in range(len(s.stages))]


def _told(predicted: dict[str, Any]) -> dict[str, Any]:
    """What the hook's dry run said would happen, for people to compare; figures and short words only."""
    kept = {
        k: v
        for k, v in predicted.items()
        if isinstance(v, int | float) or (isinstance(v, str) and len(v) <= 80)
    }
    return {"predicted": kept} if kept else {}


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}
