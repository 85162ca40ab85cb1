"""`block`: stops one run, key, agent or tenant."""

from __future__ import annotations

from typing import ClassVar, Final

from pydantic import BaseModel, Field, field_validator

from flyball.core.plans import DurationS, Effect, Frozen, PlanContext, Refusal
from flyball.remediation.actions._action import (
    ROOT_REFERENCE,
    LeaseParams,
    Scope,
    baseline_of,
    lock_of,
    resolve,
)

BLOCKABLE: Final = ("run", "key", "agent", "tenant")


class Block:
    """Blocks exactly one run, key, agent or tenant: its calls get status 403. Nothing wider can be blocked."""

    kind: ClassVar[str] = "block"
    effect: ClassVar[Effect] = "block"
    references: ClassVar[frozenset[str]] = frozenset({ROOT_REFERENCE})

    class Params(LeaseParams):
        """Written `block: {scope: $incident.root, for: 15m}`."""

        scope: Scope = Field(
            ROOT_REFERENCE,
            description="`$incident.root`, or one of run, key, agent, tenant: `{run: r-17}`",
            validate_default=True,
        )
        hold: DurationS = Field(900.0, alias="for", description="how long it may last in all")

        @field_validator("scope")
        @classmethod
        def _one_thing(cls, value: str | dict[str, str]) -> str | dict[str, str]:
            if isinstance(value, dict) and (len(value) != 1 or not set(value) <= set(BLOCKABLE)):
                raise ValueError(f"block stops one of {', '.join(BLOCKABLE)}, not {', '.join(sorted(value))}")
            return value

    @classmethod
    def freeze(cls, params: BaseModel, context: PlanContext) -> Frozen | Refusal:
        """Resolves whom to stop.

        Returns: Refusal `no_target` when the root is none of run, key, agent, tenant, or is not seen any more.
        """
        if not isinstance(params, cls.Params):
            return Refusal("bad_params", f"{type(params).__name__} is not a block's", {})
        root = context.incident.root
        if isinstance(params.scope, str) and root.kind not in BLOCKABLE:
            return Refusal(
                "no_target",
                f"block stops one of {', '.join(BLOCKABLE)}; the root is {root}",
                {"root": str(root)},
            )
        scope = resolve(params.scope, context)
        if isinstance(scope, Refusal):
            return scope
        return Frozen(
            scope=scope,
            stages=({"reason": _reason(context)},),
            source=scope,
            target=scope,
            hold_s=params.hold,
            lease_s=params.lease_s,
            locks=(lock_of(scope),),
            max_share=1.0,
            release="recovered",
            baseline=baseline_of(context.incident),
        )


def _reason(context: PlanContext) -> str:
    """For the caller: which incident, and nothing of what an event said."""
    return f"incident {context.incident.id} ({context.incident.signal})"
