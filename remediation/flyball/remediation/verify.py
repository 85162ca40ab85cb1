"""Verification: is a directive in force, does it help, has the primary recovered? Asked of live traffic only.

Every answer has three values. Not enough calls is never success: it is `unknown`, and what stays unknown until the
time limit is treated as failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flyball.core.estate import Estate
from flyball.core.plans import PlanStep, Term

Answer = Literal["yes", "no", "unknown"]


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """window_s: length of a base window; a span shorter than one cannot be told apart from before.
    settle_s: after a grant, how long enforcement points may take to hear of it.
    min_untouched: attempts in the slice that was left in place, for a comparison.
    recovered_below: error share at which the primary counts as healthy.
    recover_over_s: for how long it must have been.
    min_probe: attempts that recovery must rest on; the span is widened up to `recover_within_s` to find them.
    harm_ratio, harm_times: the target counts as harmed above either share or multiple of the expected bound.
    """

    window_s: float = 10.0
    settle_s: float = 2.0
    min_untouched: int = 5
    recovered_below: float = 0.05
    recover_over_s: float = 30.0
    recover_within_s: float = 120.0
    min_probe: int = 10
    harm_ratio: float = 0.10
    harm_times: float = 5.0


@dataclass(frozen=True, slots=True)
class Judgement:
    """good: everything that must be shown is shown. harmed: the target suffers clearly, waiting would be wrong."""

    good: bool
    harmed: bool
    reason: str
    values: dict[str, Any]


def judge(
    step: PlanStep, estate: Estate, since: float, in_force: Answer, settings: VerifySettings
) -> Judgement | None:
    """What the traffic since `since` says about one stage; None while there is no whole window of it."""
    span = estate.now() - since - settings.settle_s
    if span < settings.window_s:
        return None
    values: dict[str, Any] = {"in_force": in_force, "span_s": round(span, 3)}
    expected = [_term(term, step, estate, span, values) for term in step.verify.expect]
    harmed = target_is_harmed(step, estate, span, settings)
    benefit: Answer = "yes"
    if step.verify.against == "untouched":
        benefit = _benefit(step, estate, span, settings, values)
    if in_force != "yes":
        return Judgement(False, harmed, "not_in_force", values)
    if "no" in expected:
        return Judgement(False, harmed, "not_as_expected", values)
    if "unknown" in expected:
        return Judgement(False, harmed, "too_few_calls", values)
    if benefit != "yes":
        return Judgement(False, harmed, "no_comparison" if benefit == "unknown" else "no_benefit", values)
    return Judgement(True, False, "as_expected", values)


def _term(term: Term, step: PlanStep, estate: Estate, span: float, values: dict[str, Any]) -> Answer:
    scope = step.target if term.of == "to" else step.source
    seen = estate.errors(scope, span)
    values[f"{term.of}_calls"] = seen.n
    if term.measure == "calls":
        return "yes" if term.holds(seen.n) else "no"
    if seen.n < step.verify.min_calls:
        return "unknown"
    if term.measure == "usd_per_hour":
        usd = estate.usd_per_hour(scope, span)
        if usd is None:
            return "unknown"
        values[f"{term.of}_usd_per_hour"] = round(usd, 4)
        return "yes" if term.holds(usd) else "no"
    values[f"{term.of}_errors"] = round(seen.value, 4)
    return "yes" if term.holds(seen.value) else "no"


def _benefit(
    step: PlanStep, estate: Estate, span: float, settings: VerifySettings, values: dict[str, Any]
) -> Answer:
    """Better than what was left in place? An untouched slice that does as well means that it was not us."""
    left = estate.errors(step.source, span)
    values["untouched_calls"] = left.n
    if left.n < settings.min_untouched:
        return "unknown"
    values["untouched_errors"] = round(left.value, 4)
    moved = estate.errors(step.target, span)
    if moved.n < settings.min_untouched:
        return "unknown"
    return "yes" if left.value > moved.value else "no"


def target_is_harmed(step: PlanStep, estate: Estate, span: float, settings: VerifySettings) -> bool:
    """Whether the target fails so clearly that the change must go back at once."""
    bounds = [
        t.bound for t in step.verify.expect if t.measure == "errors" and t.of == "to" and t.op in ("<", "<=")
    ]
    if not bounds:
        return False
    seen = estate.errors(step.target, span)
    return seen.n >= step.verify.min_calls and seen.value > max(
        settings.harm_ratio, settings.harm_times * min(bounds)
    )


def source_health(scope: Mapping[str, str], estate: Estate, settings: VerifySettings) -> Answer:
    """Has the primary recovered, judged on the slice that was left with it? `unknown` with too few calls.

    The span is widened until it holds enough calls, so thin slices take longer to be believed, never less.
    """
    span = settings.recover_over_s
    while span <= settings.recover_within_s:
        seen = estate.errors(scope, span)
        if seen.n >= settings.min_probe:
            return "yes" if seen.value <= settings.recovered_below else "no"
        span *= 2.0
    return "unknown"


def share_at(step: PlanStep, estate: Estate, span: float) -> tuple[float, int]:
    """Share of the source in the calls of source and target together, and how many these are."""
    source, target = estate.calls(step.source, span), estate.calls(step.target, span)
    return (source / (source + target) if source + target else 0.0), source + target


def shifted(
    step: PlanStep, stage: int, before: float, estate: Estate, since: float, settings: VerifySettings
) -> Answer:
    """Whether calls moved as a redirect should move them, when no enforcement point reports: weak evidence for small shares.

    Shares of source and target are compared, not volumes, so that a general rise or fall of traffic does not count.
    """
    span = estate.now() - since - settings.settle_s
    wanted = step.stages[stage].get("share")
    if span < settings.window_s or not isinstance(wanted, float) or before <= 0.0:
        return "unknown"
    now_share, calls = share_at(step, estate, span)
    if calls < step.verify.min_calls:
        return "unknown"
    return "yes" if now_share <= before * (1.0 - wanted / 2.0) else "no"
