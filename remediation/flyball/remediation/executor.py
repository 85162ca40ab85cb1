"""The executor: carries plans out as leases, proves each stage on live traffic, and lets go.

Level-triggered and pure in time: it looks at the estate at every tick and does what the state asks for. It reaches the
world only through the set of live directives, which enforcement points converge on.

What it never does: act on a plan that a person has yet to approve; act twice on one plan; widen a change that was
not verified; take missing data for success; block a release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from flyball.core.codec import pack_state, unpack_state
from flyball.core.directives import (
    Approval,
    Directive,
    DirectiveChange,
    Enforced,
    Operation,
    OperationReport,
    Outcome,
    Release,
    StopChange,
)
from flyball.core.estate import Estate
from flyball.core.incident import IncidentChange, State
from flyball.core.plans import Plan, PlanStep, Waiting
from flyball.core.stops import Stops
from flyball.remediation.leases import Leases, directive_id
from flyball.remediation.verify import (
    Answer,
    VerifySettings,
    judge,
    share_at,
    shifted,
    source_health,
    target_is_harmed,
)

Told = Plan | Enforced | IncidentChange | Approval | StopChange | Release | OperationReport
"""What the executor hears."""
Moved = DirectiveChange | Outcome | Operation
"""What it says."""
Result = Literal[
    "not_accepted",
    "applied",
    "failed",
    "ambiguous",
    "verified",
    "unverified",
    "undone",
    "released",
    "expired",
]

_REMEMBER_S: Final = 7 * 86400.0
"""How long a finished plan is known, so that a second copy of it does nothing."""


@dataclass(frozen=True, slots=True)
class ExecutorSettings:
    """baseline_s: span before the grant that a shift of traffic is compared with. silent_after_s: without a closed window for
    this long nothing is widened or renewed."""

    verify: VerifySettings = field(default_factory=VerifySettings)
    baseline_s: float = 60.0
    silent_after_s: float = 60.0


class _Stage(msgspec.Struct):
    """Where one step of a running plan stands."""

    directive: str
    index: int = 0
    stage_at: float = 0.0
    granted_at: float = 0.0
    before: float = 0.0
    phase: Literal["ramp", "held", "over"] = "ramp"
    in_force: bool = False
    reported_at: float | None = None
    checked_at: float = 0.0


class _Run(msgspec.Struct):
    plan: Plan
    stages: list[_Stage] = []


class _State(msgspec.Struct):
    runs: dict[str, _Run] = {}
    done: dict[str, float] = {}
    resolved: dict[str, float] = {}
    leases: Leases = msgspec.field(default_factory=Leases)
    stops: Stops = msgspec.field(default_factory=Stops)


class Executor:
    """Stage from plans to directive changes and outcomes.

    Every outcome carries `values["plan"]`; the last one of a plan also `values["plan_ended"] = True`.

    Misleads: `now` must be wall time while live (event time in a replay). With a `now` that lags behind, leases that
    it believes live may have run out at the enforcement points; that is the safe direction.
    """

    def __init__(self, settings: ExecutorSettings = ExecutorSettings()) -> None:
        self._settings = settings
        self._s = _State()

    # --- in -------------------------------------------------------------------------------------------------------

    def feed(self, items: Sequence[Told], estate: Estate, now: float) -> list[Moved]:
        """News. Ends of incidents, stops and releases are taken first: a healthy signal that came with the plan cancels it."""
        out = self._expire(now)
        for item in items:
            if isinstance(item, IncidentChange):
                self._incident(item)
            elif isinstance(item, StopChange):
                self._s.stops.take(item)
            elif isinstance(item, Release):
                out += self._release(item, now)
        for item in items:
            if isinstance(item, Enforced):
                self._enforced(item)
            elif isinstance(item, Plan):
                out += self._accept(item, estate, now)
        return out

    def tick(self, now: float, estate: Estate) -> list[Moved]:
        """Time passes: leases expire, stages are judged, leases are renewed or let go."""
        out = self._expire(now)
        for run in list(self._s.runs.values()):
            out += self._advance(run, estate, now)
        self._s.done = {k: at for k, at in self._s.done.items() if now - at <= _REMEMBER_S}
        self._s.resolved = {k: at for k, at in self._s.resolved.items() if now - at <= _REMEMBER_S}
        return out

    def directives(self, now: float | None = None) -> list[Directive]:
        """Leases in force, by id; those that are over at `now` are left out even before the next tick."""
        live = self._s.leases.live
        return [live[key] for key in sorted(live) if now is None or live[key].expires_at > now]

    def waiting(self, now: float) -> list[Waiting]:
        """Steps of running plans that ask a person first, oldest first."""
        return []

    def wanted(self, operation_id: str, verb: str = "start") -> bool:
        """Whether a request of this operation is still to be sent: not cancelled, not stopped, not past its deadline."""
        return False

    @property
    def stops(self) -> Stops:
        """What is stopped now."""
        return self._s.stops

    def _release(self, release: Release, now: float) -> list[Moved]:
        out: list[Moved] = []
        for run in list(self._s.runs.values()):
            held = [stage.directive for stage in run.stages if stage.phase != "over"]
            if release.subject in ("", run.plan.plan_hash, *held):
                out += self._end(run, now, "released", f"by {release.by}", {})
        return out

    def _stopped(self, plan: Plan, steps: Sequence[PlanStep]) -> bool:
        actions = [word for s in steps for word in (s.action, s.kind)]
        return self._s.stops.against(plan.runbook, actions, [s.scope for s in steps]) is not None

    def _incident(self, change: IncidentChange) -> None:
        if change.incident.state is State.RESOLVED:
            self._s.resolved[change.incident.id] = change.at
        else:
            self._s.resolved.pop(change.incident.id, None)

    def _enforced(self, report: Enforced) -> None:
        for run in self._s.runs.values():
            for stage in run.stages:
                if stage.directive in report.directives and report.at >= stage.stage_at:
                    stage.reported_at = report.at

    # --- beginning ------------------------------------------------------------------------------------------------

    def _accept(self, plan: Plan, estate: Estate, now: float) -> list[Moved]:
        """Looks again at everything that may have changed since the plan was made, then grants the first stage."""
        if not plan.may_act or plan.plan_hash in self._s.runs or plan.plan_hash in self._s.done:
            return []
        held = {lock for run in self._s.runs.values() for lock in run.plan.locks}
        reason = ""
        if self._stopped(plan, plan.steps):
            reason = "stopped"
        elif now - plan.at > plan.max_age_s:
            reason = "stale"
        elif plan.incident in self._s.resolved:
            reason = "cancelled"
        elif self._silent(estate, now):
            reason = "no_telemetry"
        elif held.intersection(plan.locks):
            reason = "lock"
        elif not plan.steps or any(not s.scope or not s.stages for s in plan.steps):
            reason = "no_target"
        elif all(self._source_health(step, estate) == "yes" for step in plan.steps):
            reason = "recovered"
        if reason:
            self._s.done[plan.plan_hash] = now
            return [
                self._say(
                    plan, plan.steps[0] if plan.steps else None, now, "not_accepted", reason, {}, ended=True
                )
            ]
        run = _Run(plan)
        self._s.runs[plan.plan_hash] = run
        return self._begin(run, estate, now)

    def _begin(self, run: _Run, estate: Estate, now: float) -> list[Moved]:
        step = run.plan.steps[len(run.stages)]
        before, _ = share_at(step, estate, self._settings.baseline_s)
        stage = _Stage(directive_id(run.plan, step), stage_at=now, granted_at=now, before=before)
        run.stages.append(stage)
        return [self._s.leases.grant(run.plan, step, now, _stage_text(step, 0))]

    # --- going on -------------------------------------------------------------------------------------------------

    def _advance(self, run: _Run, estate: Estate, now: float) -> list[Moved]:
        out: list[Moved] = []
        for stage, step in list(zip(run.stages, run.plan.steps, strict=False)):
            if run.plan.plan_hash not in self._s.runs:
                break
            if stage.phase == "over":
                continue
            if stage.phase == "ramp":
                out += self._ramp(run, stage, step, estate, now)
            else:
                out += self._hold(run, stage, step, estate, now)
        return out

    def _ramp(self, run: _Run, stage: _Stage, step: PlanStep, estate: Estate, now: float) -> list[Moved]:
        out: list[Moved] = []
        if estate.now() > stage.checked_at:
            stage.checked_at = estate.now()
            in_force = self._in_force(stage, step, estate)
            if in_force == "yes" and not stage.in_force:
                stage.in_force = True
                out.append(
                    self._say(run.plan, step, now, "applied", "in_force", {"stage": stage.index}, stage)
                )
            if self._has_recovered(stage, step, estate):
                return out + self._end(run, now, "released", "recovered", self._figures(step, estate))
            judged = judge(step, estate, stage.stage_at, in_force, self._settings.verify)
            if judged is not None and judged.harmed:
                return out + self._fail(run, stage, step, now, "failed", "target_harmed", judged.values)
            if judged is not None and judged.good:
                values = {**judged.values, **_params_of(step, stage.index), "stage": stage.index}
                out.append(self._say(run.plan, step, now, "verified", judged.reason, values, stage))
                return out + self._widen(run, stage, step, estate, now)
            out += self._out_of_time(
                run, stage, step, now, judged.reason if judged else "no_data", judged.values if judged else {}
            )
            return out
        return out + self._out_of_time(run, stage, step, now, "no_data", {})

    def _out_of_time(
        self, run: _Run, stage: _Stage, step: PlanStep, now: float, reason: str, values: dict[str, Any]
    ) -> list[Moved]:
        if now - stage.stage_at >= step.verify.within_s:
            return self._fail(run, stage, step, now, "unverified", reason, values)
        if now - stage.granted_at >= step.timeout_s:
            return self._fail(run, stage, step, now, "unverified", "timeout", values)
        return []

    def _widen(self, run: _Run, stage: _Stage, step: PlanStep, estate: Estate, now: float) -> list[Moved]:
        """The next stage, or the next step once the last stage is verified."""
        if stage.index + 1 < len(step.stages):
            if self._stopped(run.plan, [step]):  # what is in force stays as it is, and is judged again
                stage.stage_at = now
                return []
            stage.index += 1
            stage.stage_at = now
            stage.in_force = False
            stage.reported_at = None
            params = step.stages[stage.index]
            expires_at = self._next_expiry(stage, step, now)
            return [
                self._s.leases.renew(stage.directive, now, expires_at, _stage_text(step, stage.index), params)
            ]
        stage.phase = "held"
        if len(run.stages) < len(run.plan.steps) and not self._stopped(run.plan, run.plan.steps):
            return self._begin(run, estate, now)
        return []

    def _hold(self, run: _Run, stage: _Stage, step: PlanStep, estate: Estate, now: float) -> list[Moved]:
        if estate.now() > stage.checked_at:
            stage.checked_at = estate.now()
            if self._has_recovered(stage, step, estate):
                return self._end(run, now, "released", "recovered", self._figures(step, estate))
            span = self._settings.verify.recover_over_s
            if target_is_harmed(step, estate, span, self._settings.verify):
                return self._fail(
                    run, stage, step, now, "failed", "target_harmed", self._figures(step, estate)
                )
        return self._renew(run, stage, step, estate, now)

    def _renew(self, run: _Run, stage: _Stage, step: PlanStep, estate: Estate, now: float) -> list[Moved]:
        """Renews only on evidence that the primary still fails; without it the lease runs out by itself."""
        lease = self._s.leases.live[stage.directive]
        if (
            lease.expires_at - now > step.lease_s / 2.0
            or self._stopped(run.plan, [step])
            or run.plan.incident in self._s.resolved
            or self._silent(estate, now)
            or self._source_health(step, estate) != "no"
        ):
            return []
        expires_at = self._next_expiry(stage, step, now)
        if expires_at <= lease.expires_at:
            return []
        return [self._s.leases.renew(stage.directive, now, expires_at, "primary_still_failing")]

    def _next_expiry(self, stage: _Stage, step: PlanStep, now: float) -> float:
        return min(now + step.lease_s, stage.granted_at + step.hold_s)

    # --- what the estate says -------------------------------------------------------------------------------------

    def _silent(self, estate: Estate, now: float) -> bool:
        return estate.now() <= 0.0 or now - estate.now() > self._settings.silent_after_s

    def _source_health(self, step: PlanStep, estate: Estate) -> Answer:
        return source_health(step.source, estate, self._settings.verify)

    def _has_recovered(self, stage: _Stage, step: PlanStep, estate: Estate) -> bool:
        # Not before a whole span lies behind the grant: health from before the outage is no recovery.
        waited = estate.now() - stage.granted_at >= self._settings.verify.recover_over_s
        return waited and self._source_health(step, estate) == "yes"

    def _in_force(self, stage: _Stage, step: PlanStep, estate: Estate) -> Answer:
        """By the report of an enforcement point, else by the shift of traffic that a redirect makes."""
        if stage.in_force or stage.reported_at is not None:
            return "yes"
        if step.kind != "redirect":
            return "unknown"
        return shifted(step, stage.index, stage.before, estate, stage.stage_at, self._settings.verify)

    def _figures(self, step: PlanStep, estate: Estate) -> dict[str, Any]:
        span = self._settings.verify.recover_over_s
        source, target = estate.errors(step.source, span), estate.errors(step.target, span)
        figures: dict[str, Any] = {"from_calls": source.n, "to_calls": target.n}
        if source.n:
            figures["from_errors"] = round(source.value, 4)
        if target.n:
            figures["to_errors"] = round(target.value, 4)
        return figures

    # --- ending ---------------------------------------------------------------------------------------------------

    def _fail(
        self, run: _Run, stage: _Stage, step: PlanStep, now: float, result: Result, reason: str, values: dict[str, Any]
    ) -> list[Moved]:  # fmt: skip
        """Not proved or harmful: everything the plan holds is taken back."""
        said: list[Moved] = [self._say(run.plan, step, now, result, reason, values, stage)]
        return said + self._end(run, now, "undone", reason, {})

    def _end(self, run: _Run, now: float, result: Result, reason: str, values: dict[str, Any]) -> list[Moved]:
        """Lets go of every lease of the plan, the last granted first."""
        out: list[Moved] = []
        pairs = [(s, p) for s, p in zip(run.stages, run.plan.steps, strict=False) if s.phase != "over"]
        for i, (stage, step) in enumerate(reversed(pairs)):
            if stage.directive in self._s.leases.live:
                out.append(self._s.leases.release(stage.directive, now, reason))
            stage.phase = "over"
            last = i == len(pairs) - 1
            out.append(self._say(run.plan, step, now, result, reason, values, stage, ended=last))
        self._finish(run, now)
        return out

    def _expire(self, now: float) -> list[Moved]:
        out: list[Moved] = []
        for change in self._s.leases.expire(now):
            out.append(change)
            for run in list(self._s.runs.values()):
                for stage, step in zip(run.stages, run.plan.steps, strict=False):
                    if stage.directive == change.directive.id:
                        stage.phase = "over"
                        over = all(s.phase == "over" for s in run.stages)
                        out.append(
                            self._say(run.plan, step, change.at, "expired", "time_up", {}, stage, ended=over)
                        )
                        if over:
                            self._finish(run, now)
        return out

    def _finish(self, run: _Run, now: float) -> None:
        self._s.runs.pop(run.plan.plan_hash, None)
        self._s.done[run.plan.plan_hash] = now

    def _say(
        self, plan: Plan, step: PlanStep | None, now: float, result: Result, reason: str, values: dict[str, Any],
        stage: _Stage | None = None, *, ended: bool = False,
    ) -> Outcome:  # fmt: skip
        more: dict[str, Any] = {"plan": plan.plan_hash}
        if ended:
            more["plan_ended"] = True
        return Outcome(
            at=now,
            incident=plan.incident,
            runbook=plan.runbook,
            step=step.id if step else "",
            action=step.action if step else "",
            result=result,
            reason=reason,
            directive=stage.directive if stage else "",
            values={**values, **more},
        )

    # --- state ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        return pack_state("executor", 1, self._s)

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError when the bytes are of another stage or version."""
        self._s = unpack_state(state, "executor", 1, _State)


def _params_of(step: PlanStep, index: int) -> dict[str, Any]:
    return {k: v for k, v in step.stages[index].items() if isinstance(v, int | float | str)}


def _stage_text(step: PlanStep, index: int) -> str:
    """`stage 1/2: share=0.25`."""
    params = ", ".join(
        f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in _params_of(step, index).items()
    )
    return f"stage {index + 1}/{len(step.stages)}: {params}"
