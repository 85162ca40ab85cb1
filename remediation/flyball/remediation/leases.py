"""Leases: the live directives. Nothing here outlives its expiry, whatever else goes wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from flyball.core.directives import Directive, DirectiveChange
from flyball.core.ids import short_id
from flyball.core.plans import Plan, PlanStep

Exempt = tuple[dict[str, str], ...]


class Leases(msgspec.Struct):
    """Live directives by id. Every change raises the epoch, so that an enforcement point never goes back to an older one."""

    live: dict[str, Directive] = {}

    def grant(
        self, plan: Plan, step: PlanStep, now: float, reason: str, exempt: Exempt = ()
    ) -> DirectiveChange:
        """The first stage of a step. The id depends on plan and step only: granting twice is granting once.

        Raises: ValueError for an operation, which is no lease, and for an empty scope, which is never "all".
        """
        if step.kind == "operation":
            raise ValueError(f"step {step.id} is an operation of a hook, which is no lease")
        if not step.scope or not all(step.scope.values()):
            raise ValueError(f"step {step.id} selects nothing; an empty scope is never all")
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
            exempt=exempt,
        )
        self.live[directive.id] = directive
        return DirectiveChange(directive=directive, at=now, change="granted", reason=reason)

    def renew(
        self,
        directive_id: str,
        now: float,
        expires_at: float,
        reason: str,
        params: Mapping[str, Any] | None = None,
        exempt: Exempt | None = None,
    ) -> DirectiveChange:
        """Another expiry, another stage, or other exemptions, of a live lease. Never an earlier expiry."""
        old = self.live[directive_id]
        directive = msgspec.structs.replace(
            old,
            expires_at=max(old.expires_at, expires_at),
            params=dict(params) if params is not None else old.params,
            exempt=exempt if exempt is not None else old.exempt,
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
            DirectiveChange(
                directive=msgspec.structs.replace(d, epoch=d.epoch + 1),
                at=d.expires_at,
                change="expired",
                reason="time_up",
            )
            for d in over
        ]


def directive_id(plan: Plan, step: PlanStep) -> str:
    return short_id("DIR", plan.plan_hash, step.id, length=10)
