"""Letting go: how a plan's effects end, one by one or all together. The half of the executor that nothing may block.

A lease is released or expires. An operation is cancelled while it is not done, and undone when it is; what nobody
knows of is left to a person, and its targets stay locked meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from flyball.core.directives import DirectiveChange, Operation, Outcome
from flyball.core.estate import Estate
from flyball.core.plans import Plan, PlanStep
from flyball.remediation.recovery import Evidence, Measured, Trouble, source_over
from flyball.remediation.runs import Result, Run, Stage, State, mark_end, outcome, pack, unpack, waiting_hash
from flyball.remediation.verify import Answer, VerifySettings, source_health, target_is_harmed

Moved = DirectiveChange | Outcome | Operation
"""What the executor says."""

HARM: Final = ("target_harmed", "half_done")
"""Failures that are taken back also where the runbook would only page: to leave them would be to do harm."""


@dataclass(frozen=True, slots=True)
class ExecutorSettings:
    """baseline_s: span before the grant that a shift of traffic, and `* before`, is compared with.
    silent_after_s: without a closed window for this long nothing is widened or renewed.
    ease_share: on recovery a wider redirect first goes back to this share, for one span of `recover_over_s`.
    unclear_s: how long an operation whose undo failed keeps its targets locked.
    """

    verify: VerifySettings = field(default_factory=VerifySettings)
    baseline_s: float = 60.0
    silent_after_s: float = 60.0
    ease_share: float = 0.25
    unclear_s: float = 3600.0


class Endings:
    """State, the questions asked of it and of the estate, and every way in which something ends.

    Args:
        evidence: what it goes by; the live estate and reports unless given.
    """

    def __init__(
        self, settings: ExecutorSettings = ExecutorSettings(), evidence: Evidence | None = None
    ) -> None:
        self._settings = settings
        self._evidence = evidence if evidence is not None else Measured(settings.verify)
        self._s = State()

    # --- questions ------------------------------------------------------------------------------------------------

    def _silent(self, estate: Estate, now: float) -> bool:
        return estate.now() <= 0.0 or now - estate.now() > self._settings.silent_after_s

    def _stopped(self, plan: Plan, steps: Sequence[PlanStep]) -> bool:
        actions = [word for step in steps for word in (step.action, step.kind)]
        scopes: list[Mapping[str, str]] = [scope for s in steps for scope in (s.scope, s.source)]
        return self._s.stops.against(plan.runbook, actions, scopes) is not None

    def _trouble(self, plan: Plan) -> Trouble:
        news = self._s.incidents.get(plan.incident)
        return Trouble() if news is None else Trouble(news.signal, news.resolved_at is not None, news.klass)

    def _well(self, plan: Plan, step: PlanStep, estate: Estate) -> bool:
        """Whether there is nothing to act on any more, as far as it can be seen before acting."""
        if step.kind not in ("redirect", "operation"):
            return False
        return source_over(None, step, estate, self._trouble(plan), self._settings.verify) == "yes"

    def _obstacle(self, plan: Plan, step: PlanStep, estate: Estate, now: float) -> str:
        """What stands against a further effect of a running plan, looked at right before it; empty when nothing does."""
        if self._trouble(plan).resolved:
            return "cancelled"
        if self._stopped(plan, [step]):
            return "stopped"
        if self._silent(estate, now):
            return "no_telemetry"
        return "recovered" if self._well(plan, step, estate) else ""

    def _recovered(self, run: Run, stage: Stage, step: PlanStep, estate: Estate, now: float) -> Answer:
        # Not before a whole span lies behind the grant: health from before the outage is no recovery.
        waited = estate.now() - stage.granted_at >= self._settings.verify.recover_over_s
        if step.release != "recovered" or not waited or self._silent(estate, now):
            return "unknown"
        return self._evidence.recovered(stage, step, estate, self._trouble(run.plan), now)

    def _figures(self, step: PlanStep, estate: Estate) -> dict[str, Any]:
        span = self._settings.verify.recover_over_s
        source, target = estate.errors(step.source, span), estate.errors(step.target, span)
        figures: dict[str, Any] = {"from_calls": source.n, "to_calls": target.n}
        if source.n:
            figures["from_errors"] = round(source.value, 4)
        if target.n:
            figures["to_errors"] = round(target.value, 4)
        return figures

    # --- one step -------------------------------------------------------------------------------------------------

    def _let_go(
        self, run: Run, stage: Stage, step: PlanStep, now: float, result: Result, reason: str, values: dict[str, Any],
        *, person: bool = False,
    ) -> list[Moved]:  # fmt: skip
        """Ends one step, whatever it is at; the plan goes no further. What never began is `cancelled`."""
        run.going = False
        stage.more = False
        if stage.phase == "over":
            return []
        if stage.work is not None:
            return self._let_go_of_operation(run, stage, step, now, result, reason, values, person=person)
        out: list[Moved] = []
        if stage.phase == "asking":
            result = "cancelled"
            values = {**values, "waiting": waiting_hash(run.plan, step)}
        elif stage.directive in self._s.leases.live:
            out.append(self._s.leases.release(stage.directive, now, reason))
        stage.phase = "over"
        return [*out, outcome(run.plan, step, now, result, reason, values, stage)]

    def _let_go_of_operation(
        self, run: Run, stage: Stage, step: PlanStep, now: float, result: Result, reason: str, values: dict[str, Any],
        *, person: bool,
    ) -> list[Moved]:  # fmt: skip
        work = stage.work
        if work is None or stage.phase == "undoing" or (stage.phase == "unclear" and not person):
            return []
        if stage.phase == "sending":
            stage.ends = ("cancelled", reason)
            turned = work.cancel(now)
            if turned.turn == "cancelled":
                stage.phase = "over"
                return [outcome(run.plan, step, now, "cancelled", reason, values, stage)]
            return [turned.send] if turned.send is not None else []
        stage.ends = (result, reason)
        return self._undo(run, stage, step, now, values)

    def _undo(
        self, run: Run, stage: Stage, step: PlanStep, now: float, values: dict[str, Any]
    ) -> list[Moved]:
        """Asks the hook to take it back. What cannot be taken back is said to stay, and is never called undone."""
        result, reason = stage.ends
        if stage.work is not None and step.hook is not None and step.hook.undoable:
            stage.phase = "undoing"
            return [stage.work.undo(now)]
        stage.phase = "over"
        values = {**values, "stays": "irreversible"}
        if result == "undone":
            result = "failed"
        return [outcome(run.plan, step, now, result, reason, values, stage)]

    # --- a whole plan ---------------------------------------------------------------------------------------------

    def _end(self, run: Run, now: float, result: Result, reason: str) -> list[Moved]:
        """Lets go of every step of the plan, the last begun first."""
        run.going = False
        out: list[Moved] = []
        for stage, step in reversed(run.pairs()):
            out += self._let_go(run, stage, step, now, result, reason, {})
        return out

    def _fail(
        self, run: Run, stage: Stage, step: PlanStep, now: float, result: Result, reason: str, values: dict[str, Any]
    ) -> list[Moved]:  # fmt: skip
        """Not proved or harmful: everything the plan holds is taken back.

        With `on_failure: page` what was only not proved is left in force until it expires, and that is said.
        """
        run.going = False
        values = {**values, "on_failure": run.plan.on_failure}
        if run.plan.on_failure != "page" or reason in HARM:
            said: list[Moved] = [outcome(run.plan, step, now, result, reason, values, stage)]
            return said + self._end(run, now, "undone", reason)
        out: list[Moved] = []
        left: list[Stage] = []
        for other, its_step in reversed(run.pairs()):
            if other.phase in ("acting", "held", "easing"):
                other.phase, other.more = "left", False
                left.append(other)
            elif other.phase in ("asking", "sending"):
                out += self._let_go(run, other, its_step, now, "cancelled", reason, {})
        if left:
            values["left"] = [s.directive for s in left]
            values["left_until"] = max(self._until(run, s) for s in left)
        return [outcome(run.plan, step, now, result, reason, values, stage), *out]

    def _until(self, run: Run, stage: Stage) -> float:
        lease = self._s.leases.live.get(stage.directive)
        hold_s = run.plan.steps[run.stages.index(stage)].hold_s
        return lease.expires_at if lease is not None else stage.granted_at + hold_s

    def _not_approved(
        self, run: Run, stage: Stage, step: PlanStep, now: float, reason: str, values: dict[str, Any]
    ) -> list[Moved]:
        """A no, or no answer in time: the rest of the plan is undone, or stays without going further."""
        out = self._let_go(run, stage, step, now, "cancelled", reason, values)
        if step.approval is not None and step.approval.on_expire == "undo":
            out += self._end(run, now, "undone", reason)
        return out

    def _expire(self, now: float) -> list[Moved]:
        out: list[Moved] = []
        for change in self._s.leases.expire(now):
            out.append(change)
            for run, stage, step in self._everything():
                if stage.directive == change.directive.id and stage.phase != "over":
                    stage.phase, stage.more, run.going = "over", False, False
                    out.append(outcome(run.plan, step, change.at, "expired", "time_up", {}, stage))
        for run, stage, step in self._everything():
            over = now >= stage.granted_at + step.hold_s
            if stage.work is not None and stage.phase in ("acting", "held", "left") and over:
                out += self._let_go(run, stage, step, now, "expired", "time_up", {})
        return out

    def _everything(self) -> Iterable[tuple[Run, Stage, PlanStep]]:
        return [(run, *pair) for run in self._s.runs.values() for pair in run.pairs()]

    def _closed(self, out: list[Moved], now: float) -> list[Moved]:
        """Plans of which nothing is left are done; the last that was said of each says so."""
        for run in [run for run in self._s.runs.values() if run.over]:
            mark_end(out, run.plan)
            del self._s.runs[run.plan.plan_hash]
            self._s.done[run.plan.plan_hash] = now
        return out

    # --- on recovery ----------------------------------------------------------------------------------------------

    def _recover(self, run: Run, stage: Stage, step: PlanStep, estate: Estate, now: float) -> list[Moved]:
        """What it protected from is over. A wide redirect goes back in two steps: the source is to show that it bears its load."""
        run.going = False
        stage.more = False
        lease = self._s.leases.live.get(stage.directive)
        share = lease.params.get("share") if lease is not None else None
        long_well = source_health(step.source, estate, self._settings.verify, float("inf")) == "yes"
        if (
            lease is None
            or step.kind != "redirect"
            or not isinstance(share, float)
            or share <= self._settings.ease_share
            or long_well
        ):
            return self._let_go(run, stage, step, now, "released", "recovered", self._figures(step, estate))
        stage.phase, stage.stage_at = "easing", now
        params = {**lease.params, "share": self._settings.ease_share}
        reason = f"recovered; easing: share={self._settings.ease_share:g}"
        return [self._s.leases.renew(stage.directive, now, lease.expires_at, reason, params)]

    def _ease_further(
        self, run: Run, stage: Stage, step: PlanStep, estate: Estate, now: float
    ) -> list[Moved]:
        if estate.now() <= stage.checked_at or self._silent(estate, now):
            return []
        stage.checked_at = estate.now()
        verify = self._settings.verify
        if target_is_harmed(step, estate, verify.recover_over_s, verify, stage.before):
            return self._fail(run, stage, step, now, "failed", "target_harmed", self._figures(step, estate))
        span = estate.now() - stage.stage_at
        well = self._recovered(run, stage, step, estate, now)
        if well == "yes" and span >= verify.recover_over_s:
            return self._let_go(run, stage, step, now, "released", "recovered", self._figures(step, estate))
        if well == "no" and span >= verify.window_s:
            return self._relapse(run, stage, step, estate, now)
        return []

    def _relapse(self, run: Run, stage: Stage, step: PlanStep, estate: Estate, now: float) -> list[Moved]:
        """The source does not bear what came back. Widening again is a further effect, and is looked at like one."""
        stage.phase = "held"
        stage.relapses += 1
        lease = self._s.leases.live.get(stage.directive)
        if lease is None or self._obstacle(run.plan, step, estate, now):
            return []
        params = step.stages[stage.index]
        return [self._s.leases.renew(stage.directive, now, lease.expires_at, "relapsed", params)]

    # --- state ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        return pack(self._s)

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError when the bytes are of another stage or version, damaged or contradictory; nothing is
        begun anew from less than was known."""
        self._s = unpack(state)
