"""Operations: what a remediation hook is asked to do, as a state machine. Pure; it sends nothing itself.

What cannot be a lease is reserved first, in the ledger, and then sent by the dispatcher; what became of it comes back as
reports. Each request carries the operation's id, which never changes, and an epoch, which rises with every new request.

What it never does: send a start again after anything but a certain "not received" or "not now"; take a report of an
older attempt, of another operation or of one that is over; take a cancelled start for a success.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from flyball.core.directives import Operation, OperationReport
from flyball.core.ids import short_id
from flyball.core.plans import Plan, PlanStep, Retry

Turn = Literal[
    "",
    "tried",
    "due",
    "applied",
    "not_accepted",
    "failed",
    "failed_applied",
    "ambiguous",
    "superseded",
    "cancelled",
    "late",
    "undone",
    "undo_failed",
]
"""What a report or the time made of an operation. `tried`: the dry run went well. `due`: may be sent again after a look.
`late`: done although it was cancelled or unclear. `cancelled`: certainly not done."""

RECOVERY_DEADLINE_S: Final = 3600.0
"""For how long a cancel or an undo is tried."""
_BACKOFF_S: Final = 5.0
_LONGEST_BACKOFF_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Turned:
    """`send` is what to hand to the dispatcher; `turn` what the executor has to act on, `reason` why."""

    turn: Turn = ""
    reason: str = ""
    send: Operation | None = None


_NOTHING: Final = Turned()


class Work(msgspec.Struct):
    """One operation. `order` is its newest request, `starts` the attempts at its start so far.

    state: `trying` the dry run · `reserved` start emitted · `backoff` certainly not received, to be sent again at
    `retry_at` · `accepted` · `applied` · `cancelling` · `undoing` · `unclear` nobody knows · `done`.
    """

    order: Operation
    retry: Retry
    state: Literal[
        "trying", "reserved", "backoff", "accepted", "applied", "cancelling", "undoing", "unclear", "done"
    ] = "reserved"
    starts: int = 1
    retry_at: float | None = None
    undo_ref: str = ""
    predicted: dict[str, Any] = {}
    start_deadline: float = 0.0

    @property
    def unsent(self) -> bool:
        """Nothing of it was taken by the hook, as far as is known."""
        return self.state in ("trying", "reserved", "backoff")

    @property
    def open(self) -> bool:
        return self.state in ("trying", "reserved", "backoff", "accepted", "cancelling")

    def wanted(self, operation_id: str, verb: str, now: float, stopped: bool) -> bool:
        """Whether the dispatcher should still send this. Cancel and undo are asked nothing but whether they are current."""
        if operation_id != self.order.id or verb != self.order.verb or now >= self.order.deadline:
            return False
        if verb == "start":
            return self.state in ("trying", "reserved") and not stopped
        return self.state in ("cancelling", "undoing", "unclear") and self.retry_at is None

    # --- ours -----------------------------------------------------------------------------------------------------

    def start(self, plan: Plan, step: PlanStep, now: float) -> Operation:
        """The real request after a dry run that went well."""
        self.state = "reserved"
        self.starts = 1
        self.retry_at = None
        return self._send(
            msgspec.structs.replace(
                self.order, id=operation_id(plan, step), attempt=1, dry_run=False, at=now, epoch=1
            )
        )

    def resend(self, now: float) -> Operation:
        """The same start once more, after a certain "not received"."""
        self.state = "trying" if self.order.dry_run else "reserved"
        self.starts += 1
        self.retry_at = None
        return self._next("start", now, self.starts, self.start_deadline)

    def cancel(self, now: float) -> Turned:
        """What was certainly not received is over; of the rest the hook is told."""
        if self.state in ("backoff", "trying"):
            self.state = "done"
            return Turned("cancelled")
        if self.state in ("reserved", "accepted"):
            self.state = "cancelling"
            return Turned(send=self._next("cancel", now, 1, now + RECOVERY_DEADLINE_S))
        return _NOTHING

    def undo(self, now: float) -> Operation:
        self.state = "undoing"
        self.retry_at = None
        return self._next("undo", now, 1, now + RECOVERY_DEADLINE_S)

    def tick(self, now: float) -> Turned:
        if self.retry_at is not None and self.retry_at <= now < self.order.deadline:
            if self.state == "backoff":
                return Turned("due")
            self.retry_at = None
            return Turned(send=self._next(self.order.verb, now, self.order.attempt + 1, self.order.deadline))
        if now < self.order.deadline:
            return _NOTHING
        if self.state in ("trying", "backoff"):
            self.state = "done"
            return Turned("not_accepted", "no_answer")
        if self.state in ("reserved", "accepted"):
            # It may have been sent, and be done: nobody knows. To be told to stop harms nobody.
            self.state = "unclear"
            send = self._next("cancel", now, 1, now + RECOVERY_DEADLINE_S)
            return Turned("ambiguous", "no_answer", send)
        if self.state == "cancelling":
            self.state = "unclear"
            return Turned("ambiguous", "cancel_not_answered")
        if self.state == "undoing":
            self.state = "unclear"
            return Turned("undo_failed", "no_answer")
        return _NOTHING

    def assume(self) -> Turned:
        """As if the hook had done what it was asked: for a replay, which asks nobody."""
        if self.state == "trying":
            return Turned("tried")
        if self.state in ("reserved", "accepted"):
            self.state = "applied"
            return Turned("applied", "assumed")
        if self.state in ("cancelling", "undoing"):
            was, self.state = self.state, "done"
            return Turned("undone" if was == "undoing" else "cancelled")
        return _NOTHING

    # --- theirs ---------------------------------------------------------------------------------------------------

    def take(self, report: OperationReport, now: float) -> Turned:
        """What a report means; one that is not for the newest request of its verb means nothing."""
        if report.id != self.order.id or self.state == "done":
            return _NOTHING
        if report.verb == "start":
            if report.attempt != self.starts or report.dry_run != (self.state == "trying"):
                return _NOTHING
            return self._tried(report, now) if self.state == "trying" else self._started(report, now)
        if report.verb != self.order.verb or report.attempt != self.order.attempt:
            return _NOTHING
        if report.verb == "cancel" and self.state in ("cancelling", "unclear"):
            return self._cancelled(report, now)
        if report.verb == "undo" and self.state in ("undoing", "unclear"):
            return self._undone(report, now)
        return _NOTHING

    def _tried(self, report: OperationReport, now: float) -> Turned:
        if report.status in ("accepted", "succeeded"):
            if set(report.targets) - set(self.order.targets):
                self.state = "done"
                return Turned("not_accepted", "other_targets")
            self.undo_ref, self.predicted = report.undo_ref, report.predicted
            return Turned("tried")
        if _not_now(report):
            return self._again(report, now)
        self.state = "done"
        return Turned("not_accepted", f"dry_run_{_word(report)}")

    def _started(self, report: OperationReport, now: float) -> Turned:
        # Whoever says of an attempt that was to be repeated what came of it did receive it: it is not repeated.
        status, live = report.status, self.state in ("reserved", "backoff", "accepted")
        if self.state == "applied" or self.order.verb == "undo":
            return _NOTHING
        if self.state == "backoff" and _not_now(report):
            return _NOTHING
        if status == "not_reached" and self.state == "accepted":
            return _NOTHING  # it was received: the two crossed
        self.retry_at = None if self.state == "backoff" else self.retry_at
        if status == "accepted":
            if self.state in ("reserved", "backoff"):
                self.state = "accepted"
            return _NOTHING
        if status == "ambiguous":
            if not live:
                return _NOTHING
            self.state = "unclear"
            return Turned("ambiguous", _word(report))
        self.undo_ref = report.undo_ref or self.undo_ref
        if status in ("succeeded", "failed_applied"):
            if not live:
                return Turned("late", status)
            self.state = "applied"
            return Turned("applied") if status == "succeeded" else Turned("failed_applied", _word(report))
        if live and self.state == "reserved" and _not_now(report):
            return self._again(report, now)
        self.state = "done"
        if not live or status == "cancelled":
            return Turned("cancelled", _word(report))
        if status == "superseded":
            return Turned("superseded", report.superseded_by)
        return Turned("failed" if status == "failed_not_applied" else "not_accepted", _word(report))

    def _cancelled(self, report: OperationReport, now: float) -> Turned:
        if report.status in ("cancelled", "failed_not_applied", "superseded"):
            self.state = "done"
            return Turned("cancelled", _word(report))
        if report.status in ("succeeded", "failed_applied"):
            return Turned("late", report.status)
        if report.status == "accepted":
            return _NOTHING
        if _not_now(report):
            return self._later(report, now)
        was, self.state = self.state, "unclear"
        return _NOTHING if was == "unclear" else Turned("ambiguous", f"cancel_{_word(report)}")

    def _undone(self, report: OperationReport, now: float) -> Turned:
        if report.status in ("succeeded", "cancelled"):
            self.state = "done"
            return Turned("undone")
        if report.status == "accepted":
            return _NOTHING
        if _not_now(report):
            return self._later(report, now)
        was, self.state = self.state, "unclear"
        return _NOTHING if was == "unclear" else Turned("undo_failed", _word(report))

    # --- inside ---------------------------------------------------------------------------------------------------

    def _again(self, report: OperationReport, now: float) -> Turned:
        """A start that was certainly not received, or not taken for now: as often as the runbook says."""
        wait = self.retry.backoff_s * 2.0 ** (self.starts - 1)
        at = now + max(wait, report.retry_after_s or 0.0)
        if self.starts > self.retry.count or at >= self.start_deadline:
            self.state = "done"
            return Turned("not_accepted", _word(report))
        self.state = "backoff"
        self.retry_at = at
        return _NOTHING

    def _later(self, report: OperationReport, now: float) -> Turned:
        """A cancel or an undo that was not received: until its deadline, ever more seldom."""
        wait = min(_BACKOFF_S * 2.0 ** min(self.order.attempt - 1, 10), _LONGEST_BACKOFF_S)
        self.retry_at = now + min(max(wait, report.retry_after_s or 0.0), _LONGEST_BACKOFF_S)
        return _NOTHING

    def _next(
        self, verb: Literal["start", "cancel", "undo"], now: float, attempt: int, deadline: float
    ) -> Operation:
        return self._send(
            msgspec.structs.replace(
                self.order,
                verb=verb,
                at=now,
                attempt=attempt,
                deadline=deadline,
                epoch=self.order.epoch + 1,
                undo_ref=self.undo_ref if verb == "undo" else "",
            )
        )

    def _send(self, order: Operation) -> Operation:
        self.order = order
        return order


def reserve(plan: Plan, step: PlanStep, now: float, deadline: float) -> Work:
    """An operation to be started, by a dry run first where the step wants one.

    Raises: ValueError for a step that is no operation, or that names no target.
    """
    call = step.hook
    if step.kind != "operation" or call is None:
        raise ValueError(f"step {step.id} is no operation of a hook")
    if not call.targets or not all(call.targets):
        raise ValueError(f"step {step.id} names no target; an empty set is never all")
    order = Operation(
        id=operation_id(plan, step, dry_run=call.dry_run_first),
        verb="start",
        hook=call.hook,
        action=call.action,
        plan=plan.plan_hash,
        incident=plan.incident,
        runbook=plan.runbook,
        step=step.id,
        targets=call.targets,
        params=dict(call.params),
        at=now,
        deadline=deadline,
        dry_run=call.dry_run_first,
    )
    state: Literal["trying", "reserved"] = "trying" if call.dry_run_first else "reserved"
    return Work(order=order, retry=step.retry, state=state, start_deadline=deadline)


def operation_id(plan: Plan, step: PlanStep, *, dry_run: bool = False) -> str:
    """Depends on plan and step only, so that the same order is the same operation. A dry run has an id of its own: a
    hook does each id once, and the real request must not count as a repetition."""
    return short_id("OP", plan.plan_hash, step.id, *(("dry_run",) if dry_run else ()), length=10)


def _not_now(report: OperationReport) -> bool:
    return report.status == "not_reached" or (report.status == "rejected" and report.transient)


def _word(report: OperationReport) -> str:
    return report.code or report.status
