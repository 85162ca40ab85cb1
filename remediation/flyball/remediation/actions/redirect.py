"""`redirect`: moves a share of the calls to one provider over to another, in steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from pydantic import BaseModel, Field, field_validator, model_validator

from flyball.core.plans import DurationS, Effect, Frozen, PlanContext, Refusal
from flyball.remediation.actions._action import PROBE_SHARE, ROOT_REFERENCE, LeaseParams, Shares, root_scope

BEST_HEALTHY = "best_healthy"
_SPEED_S: Final = 30.0


class Redirect:
    """Redirects calls of one provider. Never all of them: 5 % stay with it, or its recovery could not be seen.

    Which calls go is decided by a stable hash at the enforcement point, so that one session does not jump back and forth.
    """

    kind: ClassVar[str] = "redirect"
    effect: ClassVar[Effect] = "redirect"
    references: ClassVar[frozenset[str]] = frozenset({ROOT_REFERENCE, BEST_HEALTHY})

    class Params(LeaseParams):
        """Written `redirect: {from: $incident.root, to: best_healthy, share: [25%, 100%], for: 1h}`."""

        source: str = Field(
            ROOT_REFERENCE, alias="from", description="`$incident.root`, or the name of a provider"
        )
        to: str = Field(BEST_HEALTHY, description="`best_healthy`, or the name of a provider")
        share: Shares = Field((0.25, 1.0), description="steps of the ramp, rising; each is verified first")
        hold: DurationS = Field(3600.0, alias="for", description="how long it may last in all")

        @field_validator("source", "to")
        @classmethod
        def _known_reference(cls, value: str) -> str:
            if not value.strip():
                raise ValueError("an empty target is refused, never read as all")
            if value.startswith("$") and value != ROOT_REFERENCE:
                raise ValueError(
                    f"unknown reference {value}; write {ROOT_REFERENCE} or the name of a provider"
                )
            return value

        @model_validator(mode="after")
        def _in_order(self) -> Redirect.Params:
            if not 1 <= len(self.share) <= 10:
                raise ValueError("share takes one to ten steps")
            if list(self.share) != sorted(set(self.share)):
                raise ValueError("share must rise from step to step")
            if self.to == self.source:
                raise ValueError("from and to are the same")
            return self

    @classmethod
    def freeze(cls, params: BaseModel, context: PlanContext) -> Frozen | Refusal:
        """Resolves who is left and who takes over.

        Returns: Refusal `no_target` when the root is no provider or has no traffic, `no_candidate` when nobody healthy can take over.
        """
        if not isinstance(params, cls.Params):
            return Refusal("bad_params", f"{type(params).__name__} is not a redirect's", {})
        scope = (
            root_scope(context.incident) if params.source == ROOT_REFERENCE else {"provider": params.source}
        )
        if "provider" not in scope:
            root = context.incident.root
            return Refusal(
                "no_target", f"redirect leaves a provider; the root is {root}", {"root": str(root)}
            )
        source = scope["provider"]
        if source == "other":
            return Refusal(
                "no_target", "`other` stands for many providers that have no cell of their own", {}
            )
        if source not in context.estate.values("provider", {}, 300.0):
            return Refusal(
                "no_target", f"no traffic of provider {source} in the last 5 min", {"from": source}
            )
        candidates = context.best_healthy(scope)
        if params.to != BEST_HEALTHY:
            candidates = [c for c in candidates if c.scope.get("provider") == params.to]
        if not candidates:
            wanted = "no other provider" if params.to == BEST_HEALTHY else f"provider {params.to} is not"
            return Refusal("no_candidate", f"{wanted} seen healthy with enough calls", {"from": source})
        target = candidates[0].scope
        shares: list[float] = []
        for share in params.share:
            kept = round(min(share, 1.0 - PROBE_SHARE), 6)
            if kept not in shares:
                shares.append(kept)
        return Frozen(
            scope=scope,
            stages=tuple({"to": dict(target), "share": share} for share in shares),
            source=scope,
            target=dict(target),
            hold_s=params.hold,
            lease_s=params.lease_s,
            locks=(f"provider:{source}", f"provider:{target['provider']}"),
            max_share=shares[-1],
            baseline=_speed_of(context, scope),
        )


def _speed_of(context: PlanContext, scope: Mapping[str, str]) -> dict[str, float]:
    """How fast the source was when it was well, of an incident about its latency; empty when it cannot be told.

    Detectors judge the mean of the logarithm, recovery the plain mean: so the mean of now is divided by how many times slower it is.
    """
    evidence = context.incident.evidence
    observed, expected = evidence.get("observed"), evidence.get("expected")
    if context.incident.signal != "llm.latency" or not (
        isinstance(observed, int | float) and isinstance(expected, int | float) and observed > expected > 0
    ):
        return {}
    now = context.estate.latency_s(scope, _SPEED_S)
    return {} if now is None else {"latency_s": now * expected / observed}
