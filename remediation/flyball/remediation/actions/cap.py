"""`cap`: lets every call through, but smaller: fewer output tokens, or another model."""

from __future__ import annotations

from typing import ClassVar, Final

from pydantic import BaseModel, Field, field_validator, model_validator

from flyball.core.plans import Effect, Frozen, PlanContext, Refusal
from flyball.remediation.actions._action import (
    ROOT_REFERENCE,
    LeaseParams,
    Scope,
    Wholes,
    baseline_of,
    check_name,
    check_stages,
    lock_of,
    resolve,
)

MODEL_SEEN_S: Final = 600.0
MODEL_ERRORS_S: Final = 120.0
MODEL_ERRORS: Final = 0.1
"""A model that fails more often than this takes nobody's calls over."""
_MIN_CALLS: Final = 20
CHEAPEST: Final = "cheapest"
CHEAPER_BY: Final = 0.25
"""A model that saves less of the cost of a token than this is not worth its worse answers."""


class Cap:
    """Caps what one call may cost: no call is refused, each is made smaller. The gentlest rung of a ladder.

    `model` must have been seen in live traffic within ten minutes: what nobody calls, nobody knows to work. `cheapest` is the one of least
    cost per token, as live traffic tells it, at the provider that most of the calls in scope go to.
    """

    kind: ClassVar[str] = "cap"
    effect: ClassVar[Effect] = "cap"
    references: ClassVar[frozenset[str]] = frozenset({ROOT_REFERENCE, CHEAPEST})

    class Params(LeaseParams):
        """Written `cap: {scope: $incident.root, model: small, output_tokens: 1024, for: 30m}`."""

        scope: Scope = Field(
            ROOT_REFERENCE,
            description="`$incident.root`, or labels such as `{tenant: t3}`",
            validate_default=True,
        )
        output_tokens: Wholes = Field(
            (), description="output tokens per call at most; several are stages, falling"
        )
        model: str = Field(
            "", description="the model that is used instead: `cheapest`, or its name as in events"
        )

        @field_validator("model")
        @classmethod
        def _a_name(cls, value: str) -> str:
            return check_name(value, "model")

        @model_validator(mode="after")
        def _something_that_tightens(self) -> Cap.Params:
            if not self.output_tokens and not self.model:
                raise ValueError("cap needs output_tokens, model or both")
            if "output_tokens" in self.model_fields_set:
                check_stages("output_tokens", self.output_tokens)
            if isinstance(self.scope, dict) and self.model and self.scope.get("model") == self.model:
                raise ValueError(f"the scope is model {self.model} already")
            return self

    @classmethod
    def freeze(cls, params: BaseModel, context: PlanContext) -> Frozen | Refusal:
        """Resolves the scope and looks whether the model can take the calls.

        Returns: Refusal `no_target` when nothing is there to act on, `no_candidate` when the model is not seen or fails.
        """
        if not isinstance(params, cls.Params):
            return Refusal("bad_params", f"{type(params).__name__} is not a cap's", {})
        scope = resolve(params.scope, context)
        if isinstance(scope, Refusal):
            return scope
        chosen = _cheapest(scope, context) if params.model == CHEAPEST else params.model
        if isinstance(chosen, Refusal):
            return chosen
        refusal = _unfit(chosen, scope, context) if chosen else None
        if refusal is not None:
            return refusal
        model = {"model": chosen} if chosen else {}
        return Frozen(
            scope=scope,
            stages=tuple({"output_tokens": n, **model} for n in params.output_tokens) or (model,),
            source=scope,
            target={**scope, **model},
            hold_s=params.hold,
            lease_s=params.lease_s,
            locks=(lock_of(scope),),
            max_share=1.0,
            release="recovered",
            baseline=baseline_of(context.incident),
        )


def _cheapest(scope: dict[str, str], context: PlanContext) -> str | Refusal:
    """The model of least cost per token where most of the scope's calls go; clearly cheaper than what they cost now."""
    now = _usd_per_token(scope, context)
    providers = context.estate.values("provider", scope, MODEL_SEEN_S)
    if now is None or not providers:
        return Refusal("unmeasured", "what a token costs in scope is not told", {})
    there = {"provider": providers[0]}
    prices = [
        (price, model)
        for model in context.estate.values("model", there, MODEL_SEEN_S)
        if (price := _usd_per_token({**there, "model": model}, context)) is not None
    ]
    price, model = min(prices, default=(now, ""))
    if not model or price > (1.0 - CHEAPER_BY) * now:
        return Refusal("no_candidate", f"no model at {providers[0]} costs clearly less a token", there)
    return model


def _usd_per_token(scope: dict[str, str], context: PlanContext) -> float | None:
    estate = context.estate
    usd, tokens = estate.usd_per_hour(scope, MODEL_SEEN_S), estate.tokens_per_min(scope, MODEL_SEEN_S)
    if usd is None or not tokens or estate.calls(scope, MODEL_SEEN_S) < _MIN_CALLS:
        return None
    return usd / (60.0 * tokens)


def _unfit(model: str, scope: dict[str, str], context: PlanContext) -> Refusal | None:
    values = {"model": model}
    if scope.get("model") == model:
        return Refusal("no_candidate", f"the calls go to {model} already", values)
    if model not in context.estate.values("model", {}, MODEL_SEEN_S):
        return Refusal(
            "no_candidate", f"model {model} had no call in 10 min: whether it works is not known", values
        )
    seen = context.estate.errors(values, MODEL_ERRORS_S)
    if seen.n >= _MIN_CALLS and seen.value >= MODEL_ERRORS:
        return Refusal(
            "no_candidate", f"{seen.value:.0%} of the calls of {model} fail", {**values, "errors": seen.value}
        )
    return None
