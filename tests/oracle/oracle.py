"""The sixteen invariants of automatic remediation, as a judge over what the planner and the executor were told and said.

The judge keeps its own books: it reads inputs and outputs only, never the state of what it judges. Each broken promise raises
`Violation` with the number of the invariant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flyball.core.directives import (
    Approval,
    Decision,
    Directive,
    DirectiveChange,
    Operation,
    OperationReport,
    Outcome,
    Release,
    StopChange,
    Verdict,
)
from flyball.core.estate import Estate
from flyball.core.incident import IncidentChange, State
from flyball.core.plans import Plan, Waiting
from flyball.core.stops import Stops
from flyball.remediation.leases import directive_id
from flyball.runbooks.loader import RunbookSet

Said = Decision | Plan | DirectiveChange | Operation | Outcome
FAILED = ("failed", "unverified", "ambiguous")
SILENT_AFTER_S = 60.0


class Violation(AssertionError):
    """An invariant was broken. `number` is its place in the list of sixteen."""

    def __init__(self, number: int, what: str) -> None:
        self.number = number
        super().__init__(f"invariant {number}: {what}")


@dataclass
class _PlanBook:
    plan: Plan
    at: float
    granted: bool = False
    ended: bool = False
    cancelled: bool = False
    results: list[str] = field(default_factory=list)


@dataclass
class _OperationBook:
    operation: Operation
    attempts: int = 0
    ambiguous: bool = False
    undo_asked: int = 0
    verbs: Counter[str] = field(default_factory=Counter)


class Oracle:
    """Hears every input before it is handled, and everything that is said about it afterwards."""

    def __init__(self, runbooks: RunbookSet, hostile: Sequence[str] = ()) -> None:
        self._runbooks = runbooks
        self._hostile = hostile
        self.states: dict[str, State] = {}
        self.plans: dict[str, _PlanBook] = {}
        self.plan_of: dict[str, _PlanBook] = {}
        """Directive id → its plan."""
        self.live: dict[str, Directive] = {}
        self.last_epoch: dict[str, int] = {}
        self.operations: dict[str, _OperationBook] = {}
        self.stops = Stops()
        self.approvals: dict[str, Approval] = {}
        self.waiting: dict[str, Waiting] = {}
        self.used: set[str] = set()
        self.attempts: Counter[tuple[str, str]] = Counter()
        self.failures: dict[str, list[float]] = {}
        self.actors: dict[str, set[str]] = {}
        self.acted: dict[tuple[str, str], float] = {}
        self.seen: Counter[str] = Counter()

    # --- inputs -----------------------------------------------------------------------------------------------------

    def told(self, item: Any, waiting: Sequence[Waiting], now: float) -> None:
        if isinstance(item, IncidentChange):
            self.states[item.incident.id] = item.incident.state
            self.actors[item.incident.id] = {c.actor for c in item.incident.changes if c.actor}
        elif isinstance(item, StopChange):
            self.stops.take(item)
            if item.change == "reset":
                self.failures.pop(item.scope.partition(":")[2], None)
        elif isinstance(item, Approval):
            self.waiting = {w.hash: w for w in waiting}
            self.approvals[item.waiting] = item
        elif isinstance(item, OperationReport):
            book = self.operations.get(item.id)
            if book is not None and item.verb == "start" and item.status == "ambiguous":
                book.ambiguous = True

    # --- outputs ----------------------------------------------------------------------------------------------------

    def said(
        self, item: Any, said: Sequence[Said], directives: Sequence[Directive], estate: Estate, now: float
    ) -> None:
        """Everything that one input (None: time passed) led to, and the leases in force after it."""
        for one in said:
            if isinstance(one, Decision):
                self._decision(one, estate, now)
            elif isinstance(one, Plan):
                self._plan(one, item, now)
            elif isinstance(one, DirectiveChange):
                self._directive(one, estate, now)
            elif isinstance(one, Operation):
                self._operation(one, estate, now)
            elif isinstance(one, Outcome):
                self._outcome(one)
        if isinstance(item, Release):
            self._released(item, said, directives)
        self._standing(directives, now)

    def _decision(self, decision: Decision, estate: Estate, now: float) -> None:
        self.seen[f"{decision.decision.value}:{decision.reason}"] += 1
        if decision.decision is not Verdict.RUN:
            return
        runbook = self._runbooks.by_name[decision.runbook]
        if now - estate.now() > SILENT_AFTER_S:
            raise Violation(
                12, f"{decision.runbook} runs though telemetry has been silent for {now - estate.now():.0f} s"
            )
        if self.states.get(decision.incident) is State.RESOLVED:
            raise Violation(2, f"{decision.runbook} runs for {decision.incident}, which is resolved")
        limit = runbook.model.limits.attempts
        self.attempts[decision.incident, decision.runbook] += 1
        if self.attempts[decision.incident, decision.runbook] > limit:
            raise Violation(6, f"more than {limit} attempts of {decision.runbook} for {decision.incident}")
        breaker = runbook.model.limits.breaker
        lately = [at for at in self.failures.get(decision.runbook, []) if now - at < breaker.per_s]
        if len(lately) >= breaker.count:
            raise Violation(9, f"{decision.runbook} runs after {len(lately)} failed or unverified runs")
        self._blast(decision)

    def _blast(self, decision: Decision) -> None:
        limit = self._runbooks.by_name[decision.runbook].model.limits.blast
        if limit.gpus is not None and "blast_gpus" in decision.values:
            gpus, fleet = decision.values["blast_gpus"], decision.values.get("blast_fleet")
            if not isinstance(gpus, int) or not 0 < gpus <= limit.gpus or not fleet:
                raise Violation(
                    5, f"{decision.runbook} runs with {gpus!r} of {fleet!r} GPUs; the limit is {limit.gpus}"
                )
            return
        traffic = decision.values.get("blast_traffic")
        if not isinstance(traffic, float | int) or not 0.0 <= traffic <= limit.traffic:
            raise Violation(
                5, f"{decision.runbook} runs with {traffic!r} of the traffic; the limit is {limit.traffic}"
            )
        tenants = decision.values.get("blast_tenants")
        if limit.tenants is not None and (not isinstance(tenants, int) or tenants > limit.tenants):
            raise Violation(
                5, f"{decision.runbook} runs with {tenants!r} tenants; the limit is {limit.tenants}"
            )

    def _plan(self, plan: Plan, item: Any, now: float) -> None:
        if not plan.steps or not all(
            self._has_target(s.scope, s.hook.targets if s.hook else None) for s in plan.steps
        ):
            raise Violation(4, f"plan of {plan.runbook} has a step without a target")
        known = self.plans.get(plan.plan_hash)
        if known is not None and known.plan.steps != plan.steps:
            raise Violation(13, f"plan {plan.plan_hash} came to mean something else")
        if plan.approved_by:
            self._approved(plan.plan_hash, plan, item, now)
        self.plan_of.update(
            {
                directive_id(plan, s): self.plans.setdefault(plan.plan_hash, _PlanBook(plan, now))
                for s in plan.steps
            }
        )
        if known is None or plan.may_act:
            self.plans[plan.plan_hash].plan = plan

    @staticmethod
    def _has_target(scope: dict[str, str], targets: Sequence[str] | None) -> bool:
        return bool(scope) and all(scope.values()) and (targets is None or (bool(targets) and all(targets)))

    def _approved(self, hash_: str, plan: Plan, item: Any, now: float) -> None:
        answer = self.approvals.get(hash_)
        waiting = self.waiting.get(hash_)
        if not isinstance(item, Approval) or answer is None or not answer.approve or waiting is None:
            raise Violation(13, f"{hash_} counts as approved, and nobody approved it")
        if hash_ in self.used:
            raise Violation(13, f"the approval of {hash_} was used twice")
        if now > waiting.until:
            raise Violation(
                13, f"the approval of {hash_} came {now - waiting.until:.0f} s too late and counted"
            )
        if answer.by in self.actors.get(plan.incident, ()):
            raise Violation(13, f"{answer.by} approved what answers a change of their own")
        self.used.add(hash_)

    def _directive(self, change: DirectiveChange, estate: Estate, now: float) -> None:
        d = change.directive
        self.seen[change.change] += 1
        if change.change in ("released", "expired"):
            self.live.pop(d.id, None)
            return
        plan = self.plan_of.get(d.id)
        if plan is None:
            raise Violation(7, f"{d.id} was {change.change} without a plan")
        old = self.live.get(d.id)
        if not self._has_target(d.scope, None):
            raise Violation(4, f"{d.id} has an empty scope")
        if old is not None and old.scope != d.scope:
            raise Violation(4, f"{d.id} changed its target from {old.scope} to {d.scope}")
        if change.change == "granted":
            self._begins(plan, d.id, now)
            for other in self.live.values():
                self._collide(other, d)
            if d.id in self.last_epoch:
                raise Violation(7, f"{d.id} was granted twice")
        # A redirect that takes less than before is on its way back, which nothing may block.
        back = old is not None and d.params.get("share", 1.0) < old.params.get("share", 1.0)
        widened = change.change == "granted" or (old is not None and old.params != d.params and not back)
        prolonged = old is not None and d.expires_at > old.expires_at
        if widened or prolonged:
            self._effect(plan.plan, d.kind, [d.scope], estate, now, d.id)
        if d.epoch <= self.last_epoch.get(d.id, 0):
            raise Violation(7, f"{d.id} has epoch {d.epoch} after {self.last_epoch[d.id]}")
        self.last_epoch[d.id] = d.epoch
        for text in self._hostile:
            if text in str(d.params):
                raise Violation(15, f"text of an event reached the parameters of {d.id}")
        self.live[d.id] = d

    def _begins(self, book: _PlanBook, what: str, now: float) -> None:
        """The first effect of a plan."""
        plan = book.plan
        if not plan.may_act:
            raise Violation(13, f"{what} begins a plan of mode {plan.mode} that nobody approved")
        if self.states.get(plan.incident) is State.RESOLVED:
            raise Violation(3, f"{what} begins though {plan.incident} is resolved")
        if not book.granted and now - plan.at > plan.max_age_s:
            raise Violation(2, f"{what} begins a plan that is {now - plan.at:.0f} s old")
        if not book.granted and book.ended:
            raise Violation(7, f"{what} begins a plan that had ended")
        book.granted = True

    def _effect(
        self, plan: Plan, kind: str, scopes: list[dict[str, str]], estate: Estate, now: float, what: str
    ) -> None:
        """Anything new, wider or longer in the world."""
        action = next((s.action for s in plan.steps if s.kind == kind), kind)
        stop = self.stops.against(plan.runbook, [action], scopes)
        if stop is not None:
            raise Violation(14, f"{what} takes effect while {stop.scope} is stopped")
        if now - estate.now() > SILENT_AFTER_S:
            raise Violation(
                12, f"{what} takes effect though telemetry has been silent for {now - estate.now():.0f} s"
            )
        if plan.dry_run:
            raise Violation(16, f"{what} takes effect in a dry run")

    @staticmethod
    def _collide(a: Directive, b: Directive) -> None:
        if (a.incident, a.runbook) != (b.incident, b.runbook) and a.scope == b.scope:
            raise Violation(10, f"{a.id} and {b.id} act on {a.scope} at once")
        if a.kind == b.kind == "redirect" and a.scope == b.params.get("to") and b.scope == a.params.get("to"):
            raise Violation(10, f"{a.id} and {b.id} send traffic in a circle")

    def _operation(self, op: Operation, estate: Estate, now: float) -> None:
        self.seen[f"operation:{op.verb}"] += 1
        book = self.operations.setdefault(op.id, _OperationBook(op))
        if not op.targets or not all(op.targets):
            raise Violation(4, f"operation {op.id} has no target")
        if op.targets != book.operation.targets or op.plan != book.operation.plan:
            raise Violation(4, f"operation {op.id} changed its targets")
        for text in self._hostile:
            if text in str(op.params):
                raise Violation(15, f"text of an event reached the parameters of {op.id}")
        book.verbs[op.verb] += 1
        if op.verb != "start" or op.dry_run:
            return
        plan = self.plans.get(op.plan)
        if plan is None:
            raise Violation(7, f"operation {op.id} without a plan")
        if book.ambiguous:
            raise Violation(7, f"operation {op.id} is repeated though nobody knows whether it was done")
        step = next(s for s in plan.plan.steps if s.id == op.step)
        book.attempts += 1
        if book.attempts > 1 + step.retry.count:
            raise Violation(6, f"operation {op.id} is tried {book.attempts} times")
        if op.attempt != book.attempts:
            raise Violation(7, f"operation {op.id} has attempt {op.attempt}; it is the {book.attempts}.")
        self._begins(plan, op.id, now)
        self._effect(plan.plan, "operation", [step.scope], estate, now, op.id)

    def _outcome(self, outcome: Outcome) -> None:
        self.seen[f"outcome:{outcome.result}"] += 1
        book = self.plans.get(str(outcome.values.get("plan", "")))
        if book is None:
            raise Violation(7, f"outcome {outcome.result} of no plan")
        if outcome.result in ("verified", "applied") and book.cancelled:
            raise Violation(3, f"a cancelled plan of {outcome.runbook} reads as {outcome.result}")
        book.cancelled = book.cancelled or outcome.result == "cancelled"
        book.results.append(outcome.result)
        if outcome.result in FAILED and book.granted:
            lately = self.failures.setdefault(outcome.runbook, [])
            if not any(r in FAILED for r in book.results[:-1]):
                lately.append(outcome.at)
        if outcome.values.get("plan_ended"):
            if book.ended:
                raise Violation(7, f"plan {book.plan.plan_hash} ended twice")
            book.ended = True

    def _released(self, release: Release, said: Sequence[Said], directives: Sequence[Directive]) -> None:
        still = [d.id for d in directives if release.subject in ("", d.id)]
        if still:
            raise Violation(
                1, f"a person let go of {release.subject or 'everything'}, and {still} are in force"
            )

    def _standing(self, directives: Sequence[Directive], now: float) -> None:
        for d in directives:
            if d.expires_at <= now:
                raise Violation(1, f"{d.id} is in force {now - d.expires_at:.0f} s past its expiry")
            if d.id not in self.live:
                raise Violation(7, f"{d.id} is in force and was never granted")

    # --- the end ----------------------------------------------------------------------------------------------------

    def at_rest(self, directives: Sequence[Directive], waiting: Sequence[Waiting], now: float) -> None:
        """Long after every incident was resolved: nothing may be left."""
        if directives:
            raise Violation(8, f"{[d.id for d in directives]} are still in force")
        if waiting:
            raise Violation(8, f"{[w.hash for w in waiting]} still wait for an answer")
        for hash_, book in self.plans.items():
            if (book.granted or book.plan.may_act) and not book.ended:
                raise Violation(8, f"plan {hash_} of {book.plan.runbook} never ended: {book.results}")


__all__ = ["Oracle", "Violation"]
