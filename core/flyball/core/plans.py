"""Plans: what a runbook wants done, resolved and frozen; the seam between the part that decides and the part that acts.

`runbooks` makes a `Plan`, `remediation` carries it out; neither imports the other. What both must agree on stands here:
the plan, the protocol of an action, and how people write durations and shares.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Protocol

import msgspec
from pydantic import BaseModel, BeforeValidator, Field

from flyball.core.entities import Entity
from flyball.core.ids import short_id

if TYPE_CHECKING:
    from flyball.core.estate import Estate
    from flyball.core.incident import Incident

Mode = Literal["observe", "suggest", "approve", "auto"]
MODES: Final[tuple[Mode, ...]] = ("observe", "suggest", "approve", "auto")
"""From the least to the most that may be done without a person."""


def lower_mode(a: Mode, b: Mode) -> Mode:
    """The more careful of two modes: a runbook's own and the environment's ceiling must both allow.

    >>> lower_mode("auto", "suggest")
    'suggest'
    """
    return a if MODES.index(a) <= MODES.index(b) else b


_UNIT_S: Final[dict[str, float]] = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+", re.ASCII)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)
MAX_DURATION_S: Final = 366 * 86400.0


def parse_duration(value: object) -> float:
    """Seconds of a duration as people write it: `30s`, `5m`, `1h30m`. A bare number is refused: its unit is a guess.

    Raises: ValueError, with what would be right.

    >>> parse_duration("1h30m")
    5400.0
    """
    if isinstance(value, str) and len(value) <= 40 and _DURATION.fullmatch(value):
        seconds = sum(float(n) * _UNIT_S[unit] for n, unit in _DURATION_PART.findall(value))
        if seconds <= MAX_DURATION_S:
            return seconds
        raise ValueError(f"{value} is longer than a year; write at most 366d")
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"{value} has no unit; write for example {value}s or {value}m")
    raise ValueError(f"{str(value)[:60]!r} is not a duration; write for example 30s, 5m or 1h")


def format_duration(seconds: float) -> str:
    """The shortest exact way to write whole seconds: `90s` is `1m30s`.

    >>> format_duration(5400)
    '1h30m'
    """
    rest, out = round(seconds), ""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        out += f"{count}{unit}" if count else ""
    return out or "0s"


def parse_share(value: object) -> float:
    """A share in (0, 1] from `25%`; a bare number is refused, because 1 could mean all or one percent.

    Raises: ValueError, with what would be right.

    >>> parse_share("25%")
    0.25
    """
    if isinstance(value, str) and re.fullmatch(r"\d{1,3}(?:\.\d{1,4})?%", value, re.ASCII):
        share = float(value[:-1]) / 100.0
        if 0.0 < share <= 1.0:
            return share
        raise ValueError(f"{value} is not a share; it lies over 0% and up to 100%")
    raise ValueError(f"{str(value)[:60]!r} is not a share; write a percentage, for example 25%")


DURATION_PATTERN: Final = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h|d))+$"
SHARE_PATTERN: Final = r"^[0-9]{1,3}(\.[0-9]{1,4})?%$"
"""For JSON Schemas; `parse_duration` and `parse_share` decide."""
_Duration = Annotated[str, Field(pattern=DURATION_PATTERN)]
_Share = Annotated[str, Field(pattern=SHARE_PATTERN)]
DurationS = Annotated[float, BeforeValidator(parse_duration, json_schema_input_type=_Duration)]
"""Seconds; written `30s`, `5m`, `1h`."""
Share = Annotated[float, BeforeValidator(parse_share, json_schema_input_type=_Share)]
"""In (0, 1]; written `25%`."""


Measure = Literal["errors", "calls", "calls_per_min", "tokens_per_min", "usd_per_hour", "latency_s"]


class Term(msgspec.Struct, frozen=True):
    """One comparison of a verification, such as `errors("to") < 0.02`. Without enough data it is neither true nor false.

    times_before: `bound` is then a multiple of the same measure just before the step acted:
    `usd_per_hour("from") < 0.6 * before`.
    """

    measure: Measure
    of: Literal["to", "from"]
    op: Literal["<", "<=", ">", ">="]
    bound: float
    times_before: bool = False

    def __str__(self) -> str:
        return (
            f'{self.measure}("{self.of}") {self.op} {self.bound:g}{" * before" if self.times_before else ""}'
        )

    def holds(self, value: float, before: float = 1.0) -> bool:
        bound = self.bound * before if self.times_before else self.bound
        if self.op == "<":
            return value < bound
        if self.op == "<=":
            return value <= bound
        return value > bound if self.op == ">" else value >= bound


class Verify(msgspec.Struct, frozen=True, kw_only=True):
    """How an effect is proved. Not proved within `within_s` is failed: no data is never success."""

    within_s: float = 180.0
    expect: tuple[Term, ...] = (Term("errors", "to", "<", 0.02),)
    against: Literal["untouched", "nothing"] = "untouched"
    """`untouched`: the benefit must show against the part of the traffic that was left in place."""
    min_calls: int = 20


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """How often a step that was certainly not accepted is tried again. Ambiguous is never retried."""

    count: int = 0
    backoff_s: float = 5.0


class StepApproval(msgspec.Struct, frozen=True, kw_only=True):
    """The step asks a person first, also in mode `auto`. Not answered within `expires_s` is a no: what is in force is undone
    (`undo`) or kept without going further (`hold`)."""

    expires_s: float = 600.0
    on_expire: Literal["undo", "hold"] = "hold"


class HookCall(msgspec.Struct, frozen=True, kw_only=True):
    """What a step asks of a remediation hook: which one (by its name in the settings), what, of what, with what."""

    hook: str
    action: str
    targets: tuple[str, ...]
    params: dict[str, Any] = {}
    dry_run_first: bool = True
    undoable: bool = True


Effect = Literal["redirect", "limit", "cap", "block", "operation"]


class PlanStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step with its targets and parameters resolved: nothing in it is looked up again later.

    kind: the directive that it grants, or `operation` for what a hook does (`hook` is then set).
    stages: params of the directive, one per stage; of an operation one empty mapping.
    source, target: where the effect is measured: the traffic acted on, and where it went (the same, where nothing moves).
    baseline: figures of the source when it was well, as far as the incident tells: what recovery is judged by.
    """

    id: str
    action: str
    kind: Effect
    scope: dict[str, str]
    stages: tuple[dict[str, Any], ...]
    source: dict[str, str]
    target: dict[str, str]
    hold_s: float
    """How long the effect may last in all, renewals included."""
    lease_s: float
    """How long it lasts by itself when Flyball is dead."""
    timeout_s: float
    """By when the last stage must be verified, else everything is undone."""
    verify: Verify = Verify()
    progress: Literal["ramp", "ladder"] = "ramp"
    """`ramp`: the next stage, then the next step, when this one is verified. `ladder`: verified is enough and stays; not
    verified in time goes one rung on, to the next stage or step, with what is in force left in place."""
    release: Literal["recovered", "resolved", "expiry"] = "recovered"
    """When the effect is let go: when what it protects from is over, when the incident is resolved, or only by time."""
    retry: Retry = Retry()
    approval: StepApproval | None = None
    hook: HookCall | None = None
    baseline: dict[str, float] = {}


class Plan(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="plan"):
    """What one runbook wants done about one incident. `plan_hash` binds targets, params and attempt: approvals refer to it.

    locks: entities that no other plan may touch while this one is in force.
    """

    at: float
    incident: str
    runbook: str
    mode: Mode
    steps: tuple[PlanStep, ...]
    root: Entity
    attempt: int = 1
    locks: tuple[str, ...] = ()
    max_age_s: float = 300.0
    approved_by: str = ""
    dry_run: bool = False
    """Everything is decided and recorded, nothing takes effect."""
    on_failure: Literal["undo_and_page", "undo", "page"] = "undo_and_page"
    plan_hash: str = ""

    @property
    def may_act(self) -> bool:
        """Whether it may be carried out as it stands: planned in `auto`, or in `approve` and approved by a person."""
        return self.mode == "auto" or (self.mode in ("approve", "suggest") and bool(self.approved_by))


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """Something that only a person can start: a plan, or a step of a running plan that asks first. `hash` binds the answer."""

    hash: str
    plan: Plan
    since: float
    until: float
    step: str = ""
    values: dict[str, Any] = {}


def plan_hash(incident: str, runbook: str, attempt: int, steps: Sequence[PlanStep]) -> str:
    """`PLAN-…`: depends on who, what, where and which attempt, and not on when it was computed."""
    return short_id(
        "PLAN", incident, runbook, attempt, msgspec.json.encode(steps, order="deterministic"), length=10
    )


@dataclass(frozen=True, slots=True)
class Candidate:
    """Somewhere traffic could go, with the figures it was chosen on."""

    scope: dict[str, str]
    errors: float
    calls: int
    shared_models: int
    shared_apps: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a step cannot be resolved. `reason` is a stable word: `no_candidate`, `no_target`, `bad_params`, …"""

    reason: str
    detail: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PlanContext:
    """What an action may look at while it resolves its targets.

    best_healthy: candidates to take over the traffic of a scope, best first; empty when there is none.
    """

    incident: Incident
    estate: Estate
    best_healthy: Callable[[Mapping[str, str]], Sequence[Candidate]]


@dataclass(frozen=True, slots=True)
class Frozen:
    """A step's parameters after resolution; becomes a `PlanStep`."""

    scope: dict[str, str]
    stages: tuple[dict[str, Any], ...]
    source: dict[str, str]
    target: dict[str, str]
    hold_s: float
    lease_s: float
    locks: tuple[str, ...]
    max_share: float
    """Share of the calls in scope that the step touches at most: what the blast radius is computed from."""
    progress: Literal["ramp", "ladder"] = "ramp"
    release: Literal["recovered", "resolved", "expiry"] = "recovered"
    hook: HookCall | None = None
    baseline: Mapping[str, float] = field(default_factory=dict)
    gpus: int | None = None
    """GPUs that it takes out of service at most; None for what touches none."""
    must_ask: str = ""
    """Why a person has to approve it whatever the mode, e.g. `irreversible`; empty when not."""


class Action(Protocol):
    """What a step of a runbook can do. One file in `remediation/actions`, named by its kind."""

    kind: ClassVar[str]
    effect: ClassVar[Effect]
    Params: ClassVar[type[BaseModel]]
    references: ClassVar[frozenset[str]]
    """Words with a `$` or names such as `best_healthy` that `freeze` resolves; anything else in params is literal."""

    @classmethod
    def freeze(cls, params: BaseModel, context: PlanContext) -> Frozen | Refusal:
        """Targets resolved once, against the live estate; pure. An empty target set is a refusal, never "all"."""
        ...


class Actions(Protocol):
    """The actions there are; `core.plugins.Registry` is one."""

    def kinds(self) -> list[str]: ...
    def get(self, kind: str) -> Any: ...
