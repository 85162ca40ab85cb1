"""Verification: is an effect in force, does it help, does it harm? Asked of live traffic only.

Every answer has three values. Not enough calls is never success: it is `unknown`, and what stays unknown until the
time limit is treated as failed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from flyball.core.estate import Estate
from flyball.core.plans import Measure, PlanStep, Term

Answer = Literal["yes", "no", "unknown"]
Before = Mapping[str, float]
"""Figures of a step's source and target just before it acted, by `from_errors`, `to_usd_per_hour`, …; those not known are absent."""

_NO_FIGURES: Final[Before] = {}
_MEASURES: Final[tuple[Measure, ...]] = get_args(Measure)


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """window_s: length of a base window; a span shorter than one cannot be told apart from before.
    settle_s: after a grant, how long enforcement points may take to hear of it.
    min_untouched: attempts in the slice that was left in place, for a comparison.
    recovered_below: error share at which the primary counts as healthy.
    recover_over_s: for how long it must have been.
    min_probe: attempts that recovery must rest on; the span is widened up to `recover_within_s` to find them.
    harm_ratio, harm_times: the target counts as harmed above either share or multiple of the expected bound.
    harm_worse: and, where it is the traffic acted on itself, above this multiple of what it was before.
    recovered_times: a figure counts as back to normal below this multiple of its baseline.
    quiet_s: for how long nobody may knock before a block is no longer needed.
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
    harm_worse: float = 1.5
    recovered_times: float = 1.5
    quiet_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Judgement:
    """good: everything that must be shown is shown. harmed: the target suffers clearly, waiting would be wrong."""

    good: bool
    harmed: bool
    reason: str
    values: dict[str, Any]


def judge(
    step: PlanStep, estate: Estate, since: float, in_force: Answer, settings: VerifySettings, before: Before = _NO_FIGURES
) -> Judgement | None:  # fmt: skip
    """What the traffic since `since` says about one stage; None while there is no whole window of it."""
    span = estate.now() - since - settings.settle_s
    if span < settings.window_s:
        return None
    span = whole(span, settings)
    values: dict[str, Any] = {"in_force": in_force, "span_s": round(span, 3)}
    expected = [_term(term, step, estate, span, before, values) for term in step.verify.expect]
    harmed = target_is_harmed(step, estate, span, settings, before)
    benefit: Answer = "yes"
    if step.verify.against == "untouched" and moves(step):
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


def moves(step: PlanStep) -> bool:
    """Whether traffic goes elsewhere, so that what is left in place can be compared with what went."""
    return step.source != step.target


def whole(span_s: float, settings: VerifySettings) -> float:
    """A span in whole windows, at least one: what an estate answers for, and so what rates must be taken over."""
    return max(1.0, math.floor(span_s / settings.window_s + 1e-9)) * settings.window_s


def measure(what: Measure, scope: Mapping[str, str], estate: Estate, span_s: float) -> float | None:
    """One figure of the traffic in scope over a span of whole windows; None where no call told it.

    `calls` and `calls_per_min` count what got through: what an enforcement point refused is no load on anybody. For
    the same reason tokens and dollars are 0 where everything was refused.
    """
    if what == "errors":
        seen = estate.errors(scope, span_s)
        return seen.value if seen.n else None
    if what == "latency_s":
        return estate.latency_s(scope, span_s)
    tried = estate.attempts(scope, span_s)
    if what == "calls":
        return float(tried)
    if what == "calls_per_min":
        return tried * 60.0 / span_s
    told = (
        estate.usd_per_hour(scope, span_s) if what == "usd_per_hour" else estate.tokens_per_min(scope, span_s)
    )
    if told is None and not tried and estate.calls(scope, span_s):
        return 0.0
    return told


def enough(what: Measure, scope: Mapping[str, str], estate: Estate, span_s: float, min_calls: int) -> bool:
    """Whether a figure rests on enough calls. A count is its own evidence. A rate rests on calls and refusals together:
    where most are refused, few calls are the effect itself and no lack of data."""
    if what in ("calls", "calls_per_min"):
        return True
    if what in ("errors", "latency_s"):
        return estate.attempts(scope, span_s) >= min_calls
    return estate.calls(scope, span_s) >= min_calls


def figures_before(
    step: PlanStep, estate: Estate, span_s: float, settings: VerifySettings
) -> dict[str, float]:
    """Every measure of a step's source and target, for `* before`; and the source's share of both, for shifts."""
    found: dict[str, float] = {}
    span_s = whole(span_s, settings)
    for of, scope in (("from", step.source), ("to", step.target)):
        for what in _MEASURES:
            value = measure(what, scope, estate, span_s)
            if value is not None:
                found[f"{of}_{what}"] = value
    found["share"] = share_at(step, estate, span_s)[0]
    return found


def _term(
    term: Term, step: PlanStep, estate: Estate, span: float, before: Before, values: dict[str, Any]
) -> Answer:
    scope = step.target if term.of == "to" else step.source
    name = f"{term.of}_{term.measure}"
    values[f"{term.of}_calls"] = estate.attempts(scope, span)
    if not enough(term.measure, scope, estate, span, step.verify.min_calls):
        return "unknown"
    value = measure(term.measure, scope, estate, span)
    if value is None:
        return "unknown"
    values[name] = round(value, 4)
    reference = 1.0
    if term.times_before:
        # A count grows with the span it is taken over: the span before had its own length.
        known = before.get(f"{term.of}_calls_per_min" if term.measure == "calls" else name)
        if known is None:
            return "unknown"
        reference = known * span / 60.0 if term.measure == "calls" else known
        values[f"{name}_before"] = round(reference, 4)
    return "yes" if term.holds(value, reference) else "no"


def _benefit(
    step: PlanStep, estate: Estate, span: float, settings: VerifySettings, values: dict[str, Any]
) -> Answer:
    """Better than what was left in place? An untouched slice that does as well means that it was not us.

    Compared by what the step expects of the target: errors, latency, or either.
    """
    left, moved = estate.errors(step.source, span), estate.errors(step.target, span)
    values["untouched_calls"] = left.n
    if left.n < settings.min_untouched:
        return "unknown"
    values["untouched_errors"] = round(left.value, 4)
    if moved.n < settings.min_untouched:
        return "unknown"
    asked = {term.measure for term in step.verify.expect}
    if ("errors" in asked or "latency_s" not in asked) and left.value > moved.value:
        return "yes"
    if "latency_s" not in asked:
        return "no"
    slow, fast = estate.latency_s(step.source, span), estate.latency_s(step.target, span)
    if slow is None or fast is None:
        return "unknown"
    values["untouched_latency_s"] = round(slow, 4)
    return "yes" if slow > fast else "no"


def target_is_harmed(
    step: PlanStep, estate: Estate, span: float, settings: VerifySettings, before: Before = _NO_FIGURES
) -> bool:
    """Whether the target fails so clearly that the change must go back at once.

    Where nothing moves, the target failed before as well: only what is clearly worse than that is our harm.
    """
    bounds = [
        t.bound for t in step.verify.expect if t.measure == "errors" and t.of == "to" and t.op in ("<", "<=")
    ]
    if not bounds:
        return False
    seen = estate.errors(step.target, span)
    limit = max(settings.harm_ratio, settings.harm_times * min(bounds))
    if not moves(step):
        limit = max(limit, settings.harm_worse * before.get("to_errors", 0.0))
    return seen.n >= step.verify.min_calls and seen.value > limit


def source_health(
    scope: Mapping[str, str], estate: Estate, settings: VerifySettings, span_s: float | None = None
) -> Answer:
    """Has the primary recovered, judged on the slice that was left with it? `unknown` with too few calls.

    The span is widened until it holds enough calls, so thin slices take longer to be believed, never less.
    """
    span = settings.recover_over_s if span_s is None else min(span_s, settings.recover_within_s)
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


def stood_still(
    step: PlanStep, stage: int, before: float, estate: Estate, since: float, settings: VerifySettings
) -> bool:
    """Whether surely nothing moved, whatever a point reports: of a share of half or more, not even a fifth of it went.

    Of smaller shares traffic alone cannot tell: retries of a failing source raise its share while calls leave it.
    """
    span = estate.now() - since - settings.settle_s
    wanted = step.stages[stage].get("share")
    if span < settings.window_s or not isinstance(wanted, float) or wanted < 0.5 or before <= 0.0:
        return False
    now_share, calls = share_at(step, estate, span)
    if calls < max(step.verify.min_calls, 1):
        return False
    spread = math.sqrt(before * (1.0 - before) / calls)
    return now_share > before * (1.0 - wanted / 5.0) + 2.0 * spread
