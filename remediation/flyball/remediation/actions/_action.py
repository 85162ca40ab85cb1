"""What the actions share: how scopes, amounts and leases are written, and how a scope is resolved."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from flyball.core.columns import BASE_LABELS
from flyball.core.entities import entities_of
from flyball.core.errors import did_you_mean
from flyball.core.incident import Incident
from flyball.core.plans import DurationS, PlanContext, Refusal, Share, parse_share

PROBE_SHARE: Final = 0.05
"""Share of the traffic that is always left in place: without it nobody could see that the primary has recovered."""

ROOT_REFERENCE: Final = "$incident.root"
CALL_LABELS: Final = (*BASE_LABELS, "run", "key")
"""Labels that a call can be selected by."""
REST: Final = "other"
"""The cell that takes what has none of its own: many of a kind, so never one to act on."""
SEEN_S: Final = 300.0
"""How far back traffic is looked for: what had none has nothing to act on."""
MEASURE_S: Final = 60.0
"""What "now" is in `50%` of what flows now."""
MAX_STAGES: Final = 10
MIN_LEASE_S: Final = 30.0
MAX_LEASE_S: Final = 86400.0
_MAX_NAME: Final = 512


class ActionParams(BaseModel):
    """Base of every action's `Params`: unknown fields are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LeaseParams(ActionParams):
    """Params of an action that grants a lease."""

    hold: DurationS = Field(1800.0, alias="for", description="how long it may last in all")
    lease: DurationS = Field(
        300.0,
        description="how long it lasts by itself, should Flyball be dead; renewed; at most `for`, and a day",
    )

    @model_validator(mode="after")
    def _lease_within_hold(self) -> LeaseParams:
        if self.hold < MIN_LEASE_S:
            raise ValueError("`for` must be at least 30s: points hear of a lease within seconds, not at once")
        if "lease" in self.model_fields_set and not MIN_LEASE_S <= self.lease <= self.hold:
            raise ValueError("lease must be at least 30s and at most as long as `for`")
        if self.lease > MAX_LEASE_S:
            raise ValueError("lease must be at most 24h: it is what stays in force when Flyball is dead")
        return self

    @property
    def lease_s(self) -> float:
        """The lease as granted: where only `for` is written, no longer than that."""
        return min(self.lease, self.hold)


# --- one or many -------------------------------------------------------------------------------------------------


def _listed(value: object) -> object:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


@dataclass(frozen=True, slots=True)
class OfNow:
    """A part of what flows now, resolved when the plan is made: `50%`."""

    share: float

    def __str__(self) -> str:
        return f"{self.share * 100:g}%"


def parse_amount(value: object) -> float | OfNow:
    """A number over zero, or a percentage of what flows now.

    Raises: ValueError, with what would be right.

    >>> parse_amount(40), parse_amount("50%")
    (40.0, OfNow(share=0.5))
    """
    if isinstance(value, OfNow):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0.0 < value < 1e15:
        return float(value)
    if isinstance(value, str) and value.endswith("%"):
        return OfNow(parse_share(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"{value} is no limit; write a number over 0 (to stop all calls there is `block`)")
    raise ValueError(f"{str(value)[:60]!r} is no amount; write a number, or a part of what flows now: 50%")


_Written = Annotated[float, Field(gt=0)] | Annotated[str, Field(pattern=r"^[0-9]{1,3}(\.[0-9]{1,4})?%$")]
Amount = Annotated[float | OfNow, BeforeValidator(parse_amount, json_schema_input_type=_Written)]
"""Absolute, or a part of what flows now."""
Amounts = Annotated[
    tuple[Amount, ...], BeforeValidator(_listed, json_schema_input_type=_Written | list[_Written])
]
"""One amount, or one per stage."""
_Shares = Annotated[str, Field(pattern=r"^[0-9]{1,3}(\.[0-9]{1,4})?%$")]
Shares = Annotated[
    tuple[Share, ...], BeforeValidator(_listed, json_schema_input_type=_Shares | list[_Shares])
]
"""One share, or one per stage."""
Whole = Annotated[int, Field(ge=1, le=10_000_000, strict=True)]
Wholes = Annotated[tuple[Whole, ...], BeforeValidator(_listed, json_schema_input_type=Whole | list[Whole])]
"""One whole number, or one per stage."""


def check_stages(name: str, values: Sequence[float | OfNow]) -> None:
    """Refuses stages that do not tighten.

    Raises: ValueError, with what would be right.
    """
    if not 1 <= len(values) <= MAX_STAGES:
        raise ValueError(f"{name} takes one to {MAX_STAGES} stages")
    if len({isinstance(v, OfNow) for v in values}) > 1:
        raise ValueError(f"{name} mixes numbers and percentages; which is tighter would depend on the day")
    plain = [v.share if isinstance(v, OfNow) else v for v in values]
    if plain != sorted(set(plain), reverse=True):
        raise ValueError(f"{name} must fall from stage to stage")


# --- scopes ------------------------------------------------------------------------------------------------------


def check_scope(value: object) -> str | dict[str, str]:
    """`$incident.root`, or labels that select calls: `{tenant: t3}`.

    Raises: ValueError, with what would be right.
    """
    if isinstance(value, str):
        if value == ROOT_REFERENCE:
            return value
        known = f"write {ROOT_REFERENCE}, or labels such as {{tenant: t3}}"
        raise ValueError(f"{value[:60]!r} is no scope; {known}")
    if not isinstance(value, Mapping):
        raise ValueError(f"a scope is {ROOT_REFERENCE} or labels such as {{tenant: t3}}")
    if not value:
        raise ValueError("an empty scope is refused, never read as all")
    for name, one in value.items():
        if name not in CALL_LABELS:
            raise ValueError(f"unknown label {str(name)[:60]!r}{did_you_mean(str(name), CALL_LABELS)}")
        if not isinstance(one, str):
            raise ValueError(
                f"label {name} is {str(one)[:60]!r}, not text; write it in quotes, exactly as events name it"
            )
        check_name(one, f"label {name}")
    return {str(k): str(v) for k, v in value.items()}


def check_name(value: str, what: str) -> str:
    """A literal name: not empty, no reference, no template.

    Raises: ValueError, with what would be right.
    """
    if not value.strip():
        raise ValueError(f"{what} is empty; an empty target is refused, never read as all")
    if value.startswith("$"):
        raise ValueError(f"unknown reference {value[:60]!r} in {what}; write the name itself")
    if len(value) > _MAX_NAME or re.search(r"[\x00-\x1f]", value):
        raise ValueError(f"{what} is no name: too long, or with control characters")
    return value


Scope = Annotated[
    str | dict[str, str],
    BeforeValidator(
        check_scope,
        json_schema_input_type=Annotated[str, Field(pattern=r"^\$incident\.root$")]
        | Annotated[
            dict[str, str],
            Field(min_length=1, json_schema_extra={"propertyNames": {"enum": list(CALL_LABELS)}}),
        ],
    ),
]
"""What calls a directive applies to."""


def root_scope(incident: Incident) -> dict[str, str]:
    """The labels that select the traffic of the incident's root."""
    return {incident.root.label: incident.root.name} if incident.root.name else {}


def traffic_scope(incident: Incident) -> dict[str, str]:
    """As `root_scope`, for what calls carry: of a GPU or node the inference server on it, where the incident names one."""
    scope = root_scope(incident)
    if incident.root.kind in ("gpu", "node") and incident.scope.get("deployment"):
        return {"deployment": incident.scope["deployment"]}
    return scope if incident.root.label in CALL_LABELS else {}


def resolve(scope: str | Mapping[str, str], context: PlanContext) -> dict[str, str] | Refusal:
    """The labels that a step acts on, checked against live traffic.

    Returns: Refusal `no_target` when the root is nothing that calls carry, stands for many, or has no traffic.
    """
    incident = context.incident
    found = traffic_scope(incident) if isinstance(scope, str) else dict(scope)
    text = ",".join(f"{k}={v}" for k, v in sorted(found.items()))
    values: dict[str, Any] = {"root": str(incident.root), "scope": text}
    if not found:
        return Refusal("no_target", f"no call carries the root {incident.root}: nothing to act on", values)
    if any(not v for v in found.values()):
        return Refusal("no_target", f"{text} selects nothing; an empty target is never all", values)
    if REST in found.values():
        return Refusal("no_target", "`other` stands for many that have no cell of their own", values)
    if "key" in found:
        # Windows do not carry keys: that there is one is known only from an incident about it.
        about = {**incident.scope, **root_scope(incident)}
        if about.get("key") != found["key"]:
            return Refusal("no_target", f"nothing is known of {text}: the incident is not about it", values)
        found_calls = {k: v for k, v in found.items() if k != "key"}
    else:
        found_calls = found
    if found_calls and not context.estate.calls(found_calls, SEEN_S):
        return Refusal("no_target", f"no traffic of {text} in the last 5 min", values)
    return found


def lock_of(scope: Mapping[str, str]) -> str:
    """The entity that a scope acts on: the finest that it names.

    >>> lock_of({"provider": "b", "tenant": "t3"})
    'tenant:t3'
    """
    return str(entities_of(scope)[-1])


def baseline_of(incident: Incident) -> dict[str, float]:
    """What the traffic cost when it was well, as far as the incident tells."""
    usd = incident.impact.usd_per_min_baseline
    return {"usd_per_min": usd} if usd > 0.0 else {}
