"""Recovery: is what an effect protects from over? And evidence: who says that it is in force, that it helps.

Recovery means something else for each kind, because each hides the trouble in its own way:

- `redirect`, `operation`: the source is healthy on the traffic that was left with it.
- `limit`: it no longer binds: points report it and refuse nothing, and what is asked for lies under it.
- `cap`: what the traffic would cost without it is near its baseline again.
- `block`: nobody knocks any more.

Where the figures cannot tell, because the trouble shows elsewhere (a fault of a GPU, a loop) or no baseline is known, it is over when the
incident is resolved. Blindness is never recovery: the caller asks only while telemetry comes in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from flyball.core.estate import Estate
from flyball.core.plans import Measure, PlanStep
from flyball.remediation.runs import Stage
from flyball.remediation.verify import (
    Answer,
    Judgement,
    VerifySettings,
    judge,
    measure,
    shifted,
    source_health,
    stood_still,
    whole,
)

_ERROR_SIGNALS: Final = ("", "llm.errors", "llm.retries")
"""Trouble that shows as failing calls; `""` where the incident is not known."""
_REFUSALS: Final = ("rate_limited", "quota_exhausted", "auth", "not_found")
"""Classes of failures that do not count against a provider's health: its error share says nothing about them."""
_SLOW_SIGNALS: Final = ("llm.latency", "llm.ttft")
_COST_SIGNALS: Final = (
    "",
    "llm.cost",
    "llm.tokens",
    "llm.input_tokens",
    "llm.output_tokens",
    "llm.cache",
    "llm.calls",
    "llm.volume",
    "agent.spend",
    "agent.context",
)
_LIMITED: Final[dict[str, Measure]] = {
    "requests_per_min": "calls_per_min",
    "tokens_per_min": "tokens_per_min",
    "usd_per_hour": "usd_per_hour",
}
"""Parameters of a limit, and the measure each bounds."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is known of the incident: its signal and class, empty where they are not known, and whether it is resolved."""

    signal: str = ""
    resolved: bool = False
    klass: str = ""

    @property
    def over(self) -> Answer:
        return "yes" if self.resolved else "no"


class Evidence(Protocol):
    """What the executor goes by. A replay has another than a live estate."""

    def in_force(self, stage: Stage, step: PlanStep, estate: Estate) -> Answer: ...
    def judged(self, stage: Stage, step: PlanStep, estate: Estate, in_force: Answer) -> Judgement | None: ...
    def recovered(
        self, stage: Stage, step: PlanStep, estate: Estate, trouble: Trouble, now: float
    ) -> Answer: ...
    def assumes(self, stage: Stage) -> bool:
        """Whether an operation is taken to have succeeded, because nobody can be asked."""
        ...


class Measured:
    """Live traffic, and the reports of enforcement points and hooks."""

    def __init__(self, settings: VerifySettings) -> None:
        self.settings = settings

    def in_force(self, stage: Stage, step: PlanStep, estate: Estate) -> Answer:
        """By the report of an enforcement point, else by the shift of traffic that a redirect makes. Of a limit, a cap or a
        block only a report tells: traffic may fall by itself. An operation is as its hook says."""
        before = stage.before.get("share", 0.0)
        if step.kind == "redirect" and stood_still(
            step, stage.index, before, estate, stage.stage_at, self.settings
        ):
            return "no"  # a point that reports and does nothing is no proof
        if stage.in_force or stage.reported_at is not None or step.kind == "operation":
            return "yes"
        if step.kind != "redirect":
            return "unknown"
        return shifted(step, stage.index, before, estate, stage.stage_at, self.settings)

    def judged(self, stage: Stage, step: PlanStep, estate: Estate, in_force: Answer) -> Judgement | None:
        return judge(step, estate, stage.stage_at, in_force, self.settings, stage.before)

    def recovered(self, stage: Stage, step: PlanStep, estate: Estate, trouble: Trouble, now: float) -> Answer:
        if step.kind == "limit":
            return all_of(
                [_unrefused(stage, now, self.settings), under_limit(step, stage.index, estate, self.settings)]
            )
        if step.kind == "cap":
            return uncapped(stage, step, estate, trouble, self.settings)
        if step.kind == "block":
            return _nobody_knocks(stage, step, estate, now, self.settings)
        return source_over(stage, step, estate, trouble, self.settings)

    def assumes(self, stage: Stage) -> bool:
        return False


def all_of(answers: Iterable[Answer]) -> Answer:
    """`no` if any is, else `unknown` if any is.

    >>> all_of(["yes", "unknown"]), all_of(["unknown", "no"])
    ('unknown', 'no')
    """
    found = list(answers)
    if "no" in found:
        return "no"
    return "unknown" if "unknown" in found else "yes"


def source_over(
    stage: Stage | None, step: PlanStep, estate: Estate, trouble: Trouble, settings: VerifySettings
) -> Answer:
    """Whether the source is well again, by what was wrong with it. Each relapse doubles for how long it must be well."""
    span = settings.recover_over_s * 2.0 ** (stage.relapses if stage is not None else 0)
    span = min(span, settings.recover_within_s)
    if trouble.klass in _REFUSALS:
        return trouble.over
    if trouble.signal in _ERROR_SIGNALS:
        return source_health(step.source, estate, settings, span)
    if trouble.signal in _SLOW_SIGNALS:
        bound = _latency_bound(stage, step, settings)
        if bound is None:
            return trouble.over
        latency = estate.latency_s(step.source, span)
        if latency is None or estate.attempts(step.source, span) < settings.min_probe:
            return "unknown"
        fast: Answer = "yes" if latency <= bound else "no"
        return all_of([fast, source_health(step.source, estate, settings, span)])
    return trouble.over


def _latency_bound(stage: Stage | None, step: PlanStep, settings: VerifySettings) -> float | None:
    """How fast the source must be: near its baseline, else as fast as the step expects of the target."""
    if "latency_s" in step.baseline:
        return settings.recovered_times * step.baseline["latency_s"]
    before = stage.before if stage is not None else {}
    bounds: list[float] = []
    for term in step.verify.expect:
        if term.measure == "latency_s" and term.op in ("<", "<="):
            reference = before.get(f"{term.of}_latency_s") if term.times_before else 1.0
            if reference is not None:
                bounds.append(term.bound * reference)
    return min(bounds, default=None)


def _unrefused(stage: Stage, now: float, settings: VerifySettings) -> Answer:
    """Whether points hold the limit and had nothing to refuse."""
    span, applied, reported = settings.recover_over_s, stage.applied_at, stage.reported_at
    if applied is not None and now - applied < span:
        return "no"
    if reported is None or now - reported > span or now - stage.stage_at < span:
        return "unknown"
    return "yes" if applied is None or reported > applied else "unknown"


def under_limit(step: PlanStep, index: int, estate: Estate, settings: VerifySettings) -> Answer:
    """Whether what is asked for, refusals included, lies under the limit. Nobody asking counts only while others do."""
    span = whole(settings.recover_over_s, settings)
    calls, tried = estate.calls(step.scope, span), estate.attempts(step.scope, span)
    if not calls:
        return "yes" if estate.calls({}, span) else "unknown"
    if not tried:
        return "no"
    params = step.stages[index]
    answers: list[Answer] = []
    for name, what in _LIMITED.items():
        bound = params.get(name)
        if isinstance(bound, int | float):
            let_through = measure(what, step.scope, estate, span)
            # What was refused would have cost as much as what was let through.
            asked = None if let_through is None else let_through * calls / tried
            answers.append("unknown" if asked is None else "yes" if asked < bound else "no")
    return all_of(answers) if answers else "unknown"


def uncapped(
    stage: Stage, step: PlanStep, estate: Estate, trouble: Trouble, settings: VerifySettings
) -> Answer:
    """What the calls of now would cost, or take in tokens, at the price and length they had before the cap.

    Whether calls have become cheaper by themselves is hidden by the cap: then this waits for their number to fall, for the
    incident to be resolved, or for the cap's time to be up.
    """
    normal = {
        "usd_per_hour": step.baseline.get("usd_per_hour", 60.0 * step.baseline.get("usd_per_min", 0.0)),
        "tokens_per_min": step.baseline.get("tokens_per_min", 0.0),
    }
    known = {what: value for what, value in normal.items() if value > 0.0}
    if not estate.calls(step.source, settings.recover_within_s) and estate.calls({}, settings.recover_over_s):
        return "yes"  # nobody asks any more: a prompt version that was rolled back, a tenant that went home
    if not known or trouble.resolved or trouble.signal not in _COST_SIGNALS:
        return trouble.over
    span = whole(settings.recover_over_s, settings)
    while estate.calls(step.source, span) < settings.min_probe and span * 2.0 <= settings.recover_within_s:
        span *= 2.0
    calls = estate.calls(step.source, span)
    if not calls:
        return "unknown"
    answers: list[Answer] = []
    for what, value in known.items():
        then, per_min = stage.before.get(f"from_{what}"), stage.before.get("from_calls_per_min", 0.0)
        if then is None or per_min <= 0.0:
            answers.append("unknown")
        else:
            would_be = then / per_min * calls * 60.0 / span
            answers.append("yes" if would_be < settings.recovered_times * value else "no")
    return all_of(answers)


def _nobody_knocks(
    stage: Stage, step: PlanStep, estate: Estate, now: float, settings: VerifySettings
) -> Answer:
    span = settings.quiet_s
    if stage.applied_at is not None and now - stage.applied_at < span:
        return "no"
    if estate.calls(step.scope, span):
        return "no"
    if now - stage.granted_at < span or not ("run" in step.scope or estate.calls({}, span)):
        return "unknown"
    return "yes"
