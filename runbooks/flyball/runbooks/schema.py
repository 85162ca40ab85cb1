"""What a runbook may say: one model per mapping of the YAML. Unknown fields are errors."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from flyball.core.plans import DurationS, Mode, Share

_NAME: Final = r"^[a-z][a-z0-9]*(?:-[a-z0-9]+)*$"
_RATE = re.compile(r"([1-9]\d{0,3})/(\S+)", re.ASCII)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, strict=True)


class Rate(_Strict):
    """At most `count` in any span of `per_s` seconds; written `3/1h`."""

    count: int
    per_s: DurationS


def _rate(value: object) -> object:
    if isinstance(value, Rate | dict):
        return value
    found = _RATE.fullmatch(value) if isinstance(value, str) else None
    if not found:
        raise ValueError(f"{str(value)[:40]!r} is not a rate; write for example 3/1h")
    return {"count": int(found[1]), "per_s": found[2]}


class Blast(_Strict):
    """The widest effect allowed, measured on live traffic before acting; not measurable means refused.

    traffic: share of all calls that would be touched. tenants: how many. usd_per_hour, tokens_per_min: what the touched
    traffic costs and uses now. gpus, gpu_share: those that are taken out of service, also as a share of all that report.
    """

    traffic: Share = Field(0.25, description="share of all calls that may be touched")
    tenants: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None, description="tenants that may be touched"
    )
    usd_per_hour: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="cost of the touched traffic"
    )
    tokens_per_min: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="input and output tokens of the touched traffic"
    )
    gpus: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None, description="GPUs that may be taken out of service"
    )
    gpu_share: Share | None = Field(
        None,
        description="the same as a share of all GPUs that report; the smaller of the two counts, rounded down",
    )


class Limits(_Strict):
    """Guards; all must pass at the moment of planning."""

    cooldown: DurationS = Field(
        1800.0, description="per target: after a run ended, none before this has passed"
    )
    runs: Annotated[Rate, BeforeValidator(_rate, json_schema_input_type=str)] = Field(
        Rate.model_validate({"count": 3, "per_s": "1h"}),
        description="runs of this runbook in a span, e.g. 3/1h",
    )
    attempts: Annotated[int, Field(ge=1, le=10)] = Field(
        2, description="runs for one incident; 0 does not mean unlimited"
    )
    breaker: Annotated[Rate, BeforeValidator(_rate, json_schema_input_type=str)] = Field(
        Rate.model_validate({"count": 3, "per_s": "1h"}),
        description="failed or unverified runs in a span after which it stays off until a person resets it",
    )
    blast: Blast = Blast()


class Precondition(_Strict):
    """A CEL condition over live traffic that must be true at the moment of planning; no data is not true."""

    id: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    check: str


class VerifyModel(_Strict):
    """How the effect is proved; not proved in time is failed."""

    within: DurationS = Field(180.0, description="time limit per step of the ramp")
    expect: str = Field('errors("to") < 0.02', description="comparisons joined by &&")
    against: Literal["untouched", "nothing"] = "untouched"
    min_calls: Annotated[int, Field(ge=1, le=1_000_000)] = 20


class RetryModel(_Strict):
    """When a step was certainly not accepted, it is tried again. What may have happened is never repeated."""

    count: Annotated[int, Field(ge=1, le=5)] = Field(2, description="tries after the first")
    backoff: Annotated[DurationS, Field(ge=1.0, le=600.0)] = Field(
        5.0, description="pause before the second try; doubled before each further one"
    )


class StepApprovalModel(_Strict):
    """The step asks a person first, also in mode `auto`; no answer is a no."""

    expires: Annotated[DurationS, Field(ge=30.0, le=86400.0)] = Field(
        600.0, description="how long it waits for the answer"
    )
    on_expire: Literal["undo", "hold"] = "hold"


class StepModel(_Strict):
    """One step, without its action (whose own `Params` are checked separately)."""

    id: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")] | None = None
    verify: VerifyModel = VerifyModel()
    timeout: DurationS | None = Field(
        None, description="by when the whole ramp must be verified; default: ramp × within"
    )
    retry: RetryModel | None = None
    approval: StepApprovalModel | None = None
    release: Literal["recovered", "resolved", "expiry"] | None = None
    undo: Literal["release", "hook", "none"] | None = None


class Rehearsal(_Strict):
    """One test of a runbook: a fault in the lab, and what must come of it."""

    name: str = ""
    lab: str
    expect: list[str] = Field(min_length=1)

    @field_validator("lab")
    @classmethod
    def _lab_call(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z_]+(\([^()\n]*\))?", value):
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


OUTCOMES: Final = (
    "nothing", "run", "suggest", "hold", "refuse", "granted", "in_force", "verified", "unverified", "failed", "undone",
    "released", "expired", "cancelled", "waiting", "ambiguous", "not_accepted",
)  # fmt: skip
EXPECTATION: Final = re.compile(rf"(?:{'|'.join(OUTCOMES)})|(?:hold|refuse)\([a-z_]+\)")


class RunbookModel(_Strict):
    """A runbook as written; see the fields' descriptions."""

    runbook: Literal["v1"]
    name: Annotated[str, Field(pattern=_NAME, max_length=64)]
    owner: Annotated[str, Field(min_length=1, max_length=128, description="who is asked about it")]
    description: Annotated[str, Field(max_length=2000)] = ""
    when: Annotated[str, Field(min_length=1, description="CEL condition on the incident")]
    hold: DurationS = Field(0.0, description="how long `when` must stay true first")
    max_age: DurationS = Field(
        300.0, description="an incident without news for this long is stale: dropped, never acted on"
    )
    mode: Mode = "suggest"
    approval: Annotated[DurationS, Field(ge=30.0, le=86400.0)] = Field(
        600.0, description="how long a plan that a person has to start waits for the answer"
    )
    ladder: bool = Field(
        False,
        description="steps are rungs: the next is taken when one does not verify, and verified is enough",
    )
    params: dict[str, str | int | float | bool] = {}
    preconditions: Annotated[list[Precondition], Field(max_length=20)] = []
    limits: Limits = Limits()
    steps: Annotated[list[StepModel], Field(min_length=1, max_length=10)]
    on_failure: Literal["undo_and_page", "undo", "page"] = "undo_and_page"
    tests: Annotated[list[Rehearsal], Field(max_length=50)] = []
