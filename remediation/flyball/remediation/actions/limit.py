"""`limit`: lets no more than so much through, of one tenant, app, run, model, …"""

from __future__ import annotations

from typing import Any, ClassVar, Final, Literal

from pydantic import BaseModel, Field, model_validator

from flyball.core.estate import Estate
from flyball.core.plans import Effect, Frozen, PlanContext, Refusal
from flyball.remediation.actions._action import (
    MEASURE_S,
    ROOT_REFERENCE,
    Amounts,
    LeaseParams,
    OfNow,
    Scope,
    baseline_of,
    check_stages,
    lock_of,
    resolve,
)

Kind = Literal["requests_per_min", "tokens_per_min", "usd_per_hour"]
KINDS: Final[tuple[Kind, ...]] = ("requests_per_min", "tokens_per_min", "usd_per_hour")
_LEAST: Final[dict[Kind, float]] = {"requests_per_min": 0.1, "tokens_per_min": 1.0, "usd_per_hour": 0.0001}
"""A percentage of very little is not rounded to nothing: that would be a block."""


class Limit:
    """Limits what flows: calls beyond it are refused with status 429 and a time to come back. Others are not touched.

    A percentage is of what flows when the plan is made. Several kinds in one step hold together.
    """

    kind: ClassVar[str] = "limit"
    effect: ClassVar[Effect] = "limit"
    references: ClassVar[frozenset[str]] = frozenset({ROOT_REFERENCE})

    class Params(LeaseParams):
        """Written `limit: {scope: $incident.root, usd_per_hour: [75%, 50%], for: 30m}`."""

        scope: Scope = Field(
            ROOT_REFERENCE,
            description="`$incident.root`, or labels such as `{tenant: t3}`",
            validate_default=True,
        )
        requests_per_min: Amounts = Field((), description="calls per minute, or a part of those of now")
        tokens_per_min: Amounts = Field(
            (), description="input and output tokens per minute, or a part of those of now"
        )
        usd_per_hour: Amounts = Field((), description="dollars per hour, or a part of what is spent now")

        @model_validator(mode="after")
        def _something_that_tightens(self) -> Limit.Params:
            given = {kind: getattr(self, kind) for kind in KINDS if kind in self.model_fields_set}
            if not given:
                raise ValueError(f"limit needs one of {', '.join(KINDS)}")
            for kind, values in given.items():
                check_stages(kind, values)
            if len({len(values) for values in given.values()} - {1}) > 1:
                raise ValueError("kinds of limits in one step must have the same number of stages, or one")
            return self

    @classmethod
    def freeze(cls, params: BaseModel, context: PlanContext) -> Frozen | Refusal:
        """Resolves the scope, and percentages into numbers.

        Returns: Refusal `no_target` when nothing is there to act on, `unmeasured` for a percentage of what nobody measured.
        """
        if not isinstance(params, cls.Params):
            return Refusal("bad_params", f"{type(params).__name__} is not a limit's", {})
        scope = resolve(params.scope, context)
        if isinstance(scope, Refusal):
            return scope
        columns: dict[str, list[float]] = {}
        for kind in KINDS:
            amounts: tuple[float | OfNow, ...] = getattr(params, kind)
            now = _now(kind, context.estate, scope) if any(isinstance(a, OfNow) for a in amounts) else None
            resolved = [_resolved(kind, amount, now) for amount in amounts]
            known = [value for value in resolved if value is not None]
            if len(known) < len(resolved):
                text = ",".join(f"{k}={v}" for k, v in sorted(scope.items()))
                return Refusal(
                    "unmeasured",
                    f"{kind} of {text} is not known: a part of it cannot be told",
                    {"kind": kind},
                )
            if known:
                columns[kind] = known
        n = max(map(len, columns.values()))
        stages: tuple[dict[str, Any], ...] = tuple(
            {kind: values[i if len(values) > 1 else 0] for kind, values in columns.items()} for i in range(n)
        )
        return Frozen(
            scope=scope,
            stages=stages,
            source=scope,
            target=scope,
            hold_s=params.hold,
            lease_s=params.lease_s,
            locks=(lock_of(scope),),
            max_share=1.0,
            release="recovered",
            baseline=baseline_of(context.incident),
        )


def _now(kind: Kind, estate: Estate, scope: dict[str, str]) -> float | None:
    if kind == "requests_per_min":
        return float(estate.attempts(scope, MEASURE_S)) * 60.0 / MEASURE_S or None
    if kind == "tokens_per_min":
        return estate.tokens_per_min(scope, MEASURE_S) or None
    return estate.usd_per_hour(scope, MEASURE_S) or None


def _resolved(kind: Kind, amount: float | OfNow, now: float | None) -> float | None:
    """Four significant digits: more would pretend to know."""
    if not isinstance(amount, OfNow):
        return amount
    return None if now is None else max(float(f"{amount.share * now:.4g}"), _LEAST[kind])
