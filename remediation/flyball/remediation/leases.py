"""Leases: the live directives. Nothing here outlives its expiry, whatever else goes wrong."""

from __future__ import annotations

from typing import Any

import msgspec

from flyball.core.directives import Directive, DirectiveChange
from flyball.core.ids import short_id
from flyball.core.plans import Plan, PlanStep


class Leases(msgspec.Struct):
    """Live directives by id. Every change raises the epoch, so that an enforcement point never goes back to an older one."""

    live: dict[str, Directive] = {}

    def grant(self, plan: Plan, step: PlanStep, now: float, reason: str) -> DirectiveChange:
        """The first stage of a step. The id depends on plan and step only: granting twice is granting once."""
        if step.kind == "operation":
            raise ValueError(f"step {step.id} is an operation of a hook, which is no lease")
        directive = Directive(
            id=directive_id(plan, step),
            kind=step.kind,
            scope=dict(step.scope),
            params=dict(step.stages[0]),
            granted_at=now,
            expires_at=now + min(step.lease_s, step.hold_s),
            incident=plan.incident,
            runbook=plan.runbook,
            step=step.id,
        )
        self.live[directive.id] = directive
        return DirectiveChange(directive=directive, at=now, change="granted", reason=reason)

    def renew(
        self,
        directive_id: str,
        now: float,
        expires_at: float,
        reason: str,
        params: dict[str, Any] | None = None,
    ) -> DirectiveChange:
        """Another expiry, or another stage, of a live lease. Never an earlier expiry."""
        old = self.live[directive_id]
        directive = msgspec.structs.replace(
            old,
            expires_at=max(old.expires_at, expires_at),
            params=dict(params) if params is not None else old.params,
            epoch=old.epoch + 1,
        )
        self.live[directive_id] = directive
        return DirectiveChange(directive=directive, at=now, change="renewed", reason=reason)

    def release(self, directive_id: str, now: float, reason: str) -> DirectiveChange:
        old = self.live.pop(directive_id)
        directive = msgspec.structs.replace(old, expires_at=min(old.expires_at, now), epoch=old.epoch + 1)
        return DirectiveChange(directive=directive, at=now, change="released", reason=reason)

    def expire(self, now: float) -> list[DirectiveChange]:
        """Those whose time is up, in the order of their expiry."""
        over = sorted(
            (d for d in self.live.values() if d.expires_at <= now), key=lambda d: (d.expires_at, d.id)
        )
        for directive in over:
            del self.live[directive.id]
        return [
            DirectiveChange(directive=d, at=d.expires_at, change="expired", reason="time_up") for d in over
        ]


def directive_id(plan: Plan, step: PlanStep) -> str:
    return short_id("DIR", plan.plan_hash, step.id, length=10)
