"""What a runbook may say: one model per mapping of the YAML. Unknown fields are errors, and nothing may be left empty.

The descriptions are what the table of fields in the docs and the editors' JSON Schema show.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from flyball.core.plans import DurationS, Mode, Share, format_duration

NAME_PATTERN: Final = r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$"
MAX_NAME: Final = 64
_ID: Final = r"^[a-z][a-z0-9_]*$"
RATE_PATTERN: Final = r"^[1-9][0-9]{0,3}/([0-9]+(\.[0-9]+)?(ms|s|m|h|d))+$"
_RATE: Final = re.compile(r"([1-9]\d{0,3})/(\S+)", re.ASCII)
_LAB: Final = r"^[a-z_]+(\([^()\n]*\))?$"
DAY_S: Final = 86400.0


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, strict=True)


def _between(low_s: float, high_s: float) -> AfterValidator:
    """A duration within bounds, told in words that a person would write."""

    def check(value: float) -> float:
        if not low_s <= value <= high_s:
            span = f"{format_duration(low_s)} to {format_duration(high_s)}"
            raise ValueError(f"{format_duration(value)} is out of bounds; write {span}")
        return value

    return AfterValidator(check)


class Rate(_Strict):
    """At most `count` in any span of `per_s` seconds; written `3/1h`."""

    count: int
    per_s: Annotated[DurationS, _between(1.0, 7 * DAY_S)]


def _rate(value: object) -> object:
    if isinstance(value, Rate):
        return value
    found = _RATE.fullmatch(value) if isinstance(value, str) else None
    if not found:
        raise ValueError(f"{str(value)[:40]!r} is not a rate; write for example 3/1h")
    return {"count": int(found[1]), "per_s": found[2]}


RateText = Annotated[
    Rate,
    BeforeValidator(_rate, json_schema_input_type=Annotated[str, Field(pattern=RATE_PATTERN)]),
]


class Blast(_Strict):
    """The widest effect allowed, measured on live traffic before acting; not measurable means refused."""

    traffic: Share = Field(0.25, description="share of all calls that may be touched")
    tenants: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None, description="tenants that may be touched"
    )
    usd_per_hour: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="what the touched traffic may cost now"
    )
    tokens_per_min: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="input and output tokens that the touched traffic may use now"
    )
    gpus: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None, description="GPUs that may be taken out of service"
    )
    gpu_share: Share | None = Field(
        None,
        description="the same as a share of all GPUs that report, rounded down; where both are given the smaller counts",
    )


class Limits(_Strict):
    """Guards; all must pass at the moment of planning."""

    cooldown: DurationS = Field(
        1800.0, description="per target: after a run ended, none before this has passed"
    )
    runs: RateText = Field(
        Rate.model_validate({"count": 3, "per_s": "1h"}),
        description="runs of this runbook in a span, e.g. `3/1h`",
    )
    attempts: Annotated[int, Field(ge=1, le=10)] = Field(
        2, description="runs for one incident; there is no unlimited"
    )
    breaker: RateText = Field(
        Rate.model_validate({"count": 3, "per_s": "1h"}),
        description="failed, unverified or ambiguous runs in a span after which it stays off until a person resets it",
    )
    blast: Blast = Field(
        Blast(), description="widest effect allowed, measured on live traffic; not measurable means refused"
    )


class Precondition(_Strict):
    """A CEL condition over live traffic that must be true at the moment of planning; no data is not true."""

    id: Annotated[
        str, Field(pattern=_ID, max_length=64, description="name of the condition, as decisions tell it")
    ]
    check: Annotated[
        str, Field(min_length=1, description="CEL condition on live traffic; no data is not true")
    ]


class VerifyModel(_Strict):
    """How the effect is proved; not proved in time is failed."""

    within: Annotated[DurationS, _between(10.0, DAY_S)] = Field(
        180.0, description="time limit for each stage"
    )
    expect: Annotated[str, Field(max_length=1000)] = Field(
        'errors("to") < 0.02',
        description="comparisons joined by `&&`, each a number or a part of what was before: "
        '`usd_per_hour("from") < 0.7 * before`',
    )
    against: Literal["untouched", "nothing"] = Field(
        "untouched",
        description="`untouched`: also better than the slice that was left in place; `nothing`: there is no such slice",
    )
    min_calls: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        20, description="fewer calls prove nothing; 0 only where calls themselves are counted"
    )


class RetryModel(_Strict):
    """When a step was certainly not accepted, it is tried again. What may have happened is never repeated."""

    count: Annotated[int, Field(ge=1, le=5)] = Field(2, description="tries after the first")
    backoff: Annotated[DurationS, _between(1.0, 600.0)] = Field(
        5.0, description="pause before the next try, 1s to 10m"
    )


class StepApprovalModel(_Strict):
    """The step asks a person first, also in mode `auto`; no answer is a no."""

    expires: Annotated[DurationS, _between(30.0, DAY_S)] = Field(
        600.0, description="how long it waits for the answer, 30s to 1d"
    )
    on_expire: Literal["undo", "hold"] = Field(
        "hold",
        description="when nobody answers: `hold` keeps what is in force and goes no further, `undo` takes it back",
    )


class StepModel(_Strict):
    """One step, without its action (whose own `Params` are checked separately)."""

    id: Annotated[str, Field(pattern=_ID, max_length=64)] | None = Field(
        None, description="name of the step; the action and its number when not given"
    )
    verify: VerifyModel = Field(
        VerifyModel(), description="how the effect is proved; not proved in time is failed"
    )
    timeout: DurationS | None = Field(
        None, description="by when the last stage must be verified; when not given, stages × `within`"
    )
    retry: RetryModel | None = Field(
        None,
        description="tries again what was certainly not accepted; never what may have happened. Not given: no retry",
    )
    approval: StepApprovalModel | None = Field(
        None, description="asks a person before this step, also in mode `auto`"
    )
    release: Literal["recovered", "resolved", "expiry"] | None = Field(
        None,
        description="when the effect is let go: when what it protects from is over, when the incident is resolved, "
        "or only by time; not given: the action's own",
    )
    undo: Literal["release", "hook", "none"] | None = Field(
        None,
        description="how it is taken back: `release` lets a lease go, `hook` asks the hook to undo, `none`: not at all, "
        "which needs an `approval`",
    )


OUTCOMES: Final = (
    "nothing", "run", "suggest", "hold", "refuse", "granted", "in_force", "verified", "unverified", "failed", "undone",
    "released", "expired", "cancelled", "waiting", "ambiguous", "not_accepted",
)  # fmt: skip
EXPECTATION: Final = re.compile(rf"({'|'.join(OUTCOMES)})|(hold|refuse)\([a-z_]+\)")


class Rehearsal(_Strict):
    """One test of a runbook: a fault in the lab, and what must come of it."""

    name: str = Field("", max_length=200, description="what it shows")
    lab: Annotated[str, Field(max_length=300, json_schema_extra={"pattern": _LAB})] = Field(
        description='a fault of the lab, e.g. `outage(provider="b", fails=0.6)`'
    )
    expect: list[Annotated[str, Field(json_schema_extra={"pattern": f"^({EXPECTATION.pattern})$"})]] = Field(
        min_length=1,
        max_length=50,
        description="words of what must come, e.g. `[run, verified, released]` or `[refuse(no_candidate)]`",
    )

    @field_validator("lab")
    @classmethod
    def _lab_call(cls, value: str) -> str:
        if not re.fullmatch(_LAB, value) or "\n" in value:
            raise ValueError(
                f'{value[:60]!r} is no fault of the lab; write for example outage(provider="b", fails=0.6)'
            )
        return value

    @field_validator("expect")
    @classmethod
    def _known_words(cls, value: list[str]) -> list[str]:
        for word in value:
            if not EXPECTATION.fullmatch(word):
                raise ValueError(
                    f"{word[:40]!r} is no outcome; write one of {', '.join(OUTCOMES)}, or refuse(no_candidate)"
                )
        return value


def _constant(value: Any) -> Any:
    if isinstance(value, str | int | float | bool):
        return value
    raise ValueError("that is no constant; write a text, a number, true or false")


class RunbookModel(_Strict):
    """A runbook as written; see the fields' descriptions."""

    runbook: Literal["v1"] = Field(description="version of this format: `v1`")
    name: Annotated[str, Field(pattern=NAME_PATTERN, max_length=MAX_NAME)] = Field(
        description="name, each once; lower case words joined by `-`; a runbook named like a shipped one replaces it"
    )
    owner: Annotated[str, Field(min_length=1, max_length=128, description="who is asked about it")]
    description: Annotated[str, Field(max_length=2000)] = Field("", description="for people")
    when: Annotated[str, Field(min_length=1, description="CEL condition on the incident")]
    hold: DurationS = Field(0.0, description="how long `when` must stay true first")
    max_age: DurationS = Field(
        300.0, description="an incident without news for this long is stale: dropped, never acted on"
    )
    mode: Mode = Field(
        "suggest",
        description="`observe` only notes what it would do, `suggest` and `approve` leave it to a person, `auto` acts; "
        "the setting `mode` is a ceiling",
    )
    approval: Annotated[DurationS, _between(30.0, DAY_S)] = Field(
        600.0, description="how long a plan that a person has to start waits for the answer, 30s to 1d"
    )
    ladder: bool = Field(
        False,
        description="steps and their stages are rungs: the next is taken when one does not verify, and verified is enough",
    )
    params: dict[str, Annotated[str | int | float | bool, BeforeValidator(_constant)]] = Field(
        {},
        max_length=50,
        description="own constants: `params.NAME` in conditions, `$params.NAME` in an action's parameters",
    )
    preconditions: Annotated[list[Precondition], Field(max_length=20)] = Field(
        [], description="conditions on live traffic that must all hold at the moment of planning"
    )
    limits: Limits = Field(Limits(), description="guards; all must pass")
    steps: Annotated[list[StepModel], Field(min_length=1, max_length=10)] = Field(
        description="what to do, one after another; each names exactly one action"
    )
    on_failure: Literal["undo_and_page", "undo", "page"] = Field(
        "undo_and_page",
        description="when a step fails or cannot be verified: `undo` takes back what was done, `page` tells people and leaves "
        "what was only not proved until it expires, `undo_and_page` takes it back and tells people",
    )
    tests: Annotated[list[Rehearsal], Field(max_length=50)] = Field(
        [], description="faults of the lab and what must come of each; `flyball runbook test` plays them"
    )
