"""How bad, and why: the worst of the rules that apply, each with its figure and the setting it met."""

from __future__ import annotations

from math import sqrt
from typing import Final

from flyball.core.anomaly import Anomaly
from flyball.core.incident import Severity
from flyball.incidents.case import Case
from flyball.incidents.settings import SeveritySettings
from flyball.incidents.signals import EGRESS, group_of
from flyball.incidents.text import count, factor, percent, usd

Verdict = tuple[Severity, str]

_WEAK_LOOPS: Final = frozenset({"failing", "no_progress"})
"""Patterns that good runs show for a while: a test that fails until the fix is right."""
_Z: Final = 2.33
"""Normal quantile of 99 %, one-sided."""


def judge(case: Case, settings: SeveritySettings, run_usd_per_min: float) -> Verdict:
    """The severity of a case as it stands, with one sentence of reason.

    Args:
        run_usd_per_min: spend velocity of the runs at the root, 0.0 where it is not about runs.
    """
    verdicts = [_of_anomaly(a, case, settings, run_usd_per_min) for a in case.active() or [case.lead]]
    if case.incident.root.name == EGRESS and case.incident.root.kind == "stream":
        verdicts.append((Severity.CRITICAL, "every provider fails: nothing that calls a model works"))
    if case.group == "errors":
        verdicts.append(_estate(case, settings))
    return max(verdicts, key=lambda v: v[0])


def _estate(case: Case, s: SeveritySettings) -> Verdict:
    ratio = case.tally.estate_ratio_now
    wide = len(case.tally.tenants) != 1 and case.tally.failed >= 10 * s.failed_calls_high
    if ratio >= s.failed_estate_critical and wide:
        return (
            Severity.CRITICAL,
            f"{percent(ratio)} of all calls fail (critical from {percent(s.failed_estate_critical)})",
        )
    return Severity.LOW, "small share of all calls"


def _of_anomaly(a: Anomaly, case: Case, s: SeveritySettings, run_usd_per_min: float) -> Verdict:
    group = group_of(a.signal)
    if group == "errors":
        return _errors(a, case, s)
    if group == "slow":
        return _multiple(a, case, s.slow_factor_high, s.slow_calls_high, "time per call")
    if group == "tokens":
        return _tokens(a, case, s)
    if group == "retries":
        return _multiple(a, case, s.retry_factor_high, s.failed_calls_high, "calls")
    if group == "cost":
        return _cost(a, case, s)
    if group == "agent":
        return _agent(a, s, run_usd_per_min)
    if group == "gpu":
        return _gpu(a, s)
    if group == "serving":
        if a.impact >= s.serving_impact_high:
            return (
                Severity.HIGH,
                f"{percent(min(a.impact, 1.0))} of it affected (high from {percent(s.serving_impact_high)})",
            )
        return Severity.MEDIUM, "an inference server is saturated; no call is known to suffer"
    if a.signal == "stream.silent":
        return Severity.MEDIUM, "a sender stopped: Flyball is partly blind"
    if a.signal == "stream.poison" and a.klass == "stands":
        return Severity.MEDIUM, "a source stands over bad input: Flyball is partly blind"
    return Severity.LOW, f"{a.signal} by itself harms nobody at once"


def _errors(a: Anomaly, case: Case, s: SeveritySettings) -> Verdict:
    t = case.tally
    shares: list[tuple[float, int]] = [(t.failed_now, t.calls_now), (t.failed, t.calls)]
    failed = t.failed
    if not t.calls:
        ratio = a.observed if 0.0 <= a.observed <= 1.0 else a.impact
        shares, failed = [(ratio * a.n, a.n)], round(a.n * min(max(a.impact, 0.0), 1.0))
    ratio = max(k / n if n else 0.0 for k, n in shares)
    high = s.rate_limited_ratio_high if a.klass == "rate_limited" else s.failed_ratio_high
    if ratio >= high and failed >= s.failed_calls_high:
        lasted_s = a.at - a.since
        if lasted_s < s.failed_lasts_s and max(_surely(k, n) for k, n in shares) < s.failed_at_once_ratio:
            return (
                Severity.MEDIUM,
                f"{percent(ratio)} of its calls fail, {count(failed, 'call')} in {lasted_s:.0f} s: it may be a blip "
                f"(high from {s.failed_lasts_s:.0f} s)",
            )
        return (
            Severity.HIGH,
            f"{percent(ratio)} of its calls fail (high from {percent(high)} and {s.failed_calls_high} calls)",
        )
    if ratio >= s.failed_ratio_medium:
        return Severity.MEDIUM, f"{percent(ratio)} of its calls fail, {count(failed, 'call')} so far"
    return Severity.LOW, f"{percent(ratio)} of its calls fail"


def _surely(k: float, n: float) -> float:
    """The least share that k failures of n calls speak for, with 99 % confidence (Wilson, 1927).

    >>> round(_surely(10, 40), 2), round(_surely(10, 10), 2)
    (0.12, 0.65)
    """
    if n <= 0:
        return 0.0
    p, z2 = k / n, _Z * _Z / n
    return max(0.0, p + z2 / 2 - sqrt(z2 * (p * (1.0 - p) + z2 / 4))) / (1.0 + z2)


def _factor(a: Anomaly, case: Case) -> float:
    """How many times the expected: by the anomaly itself, or by the root's calls. Of times the smallest of what is told: means
    of few calls are moved by a single long one, and the level of the moment passes any threshold once, if one waits."""
    own = a.observed / a.expected if a.expected > 0 else 1.0
    if group_of(a.signal) == "slow":
        since = a.evidence.get("multiple_since")
        own = min(own, since) if isinstance(since, int | float) else own
        return min(own, case.factor) if a.signal == case.incident.signal and case.factor > 1.0 else own
    return max(own, case.factor if a.signal == case.incident.signal else 1.0)


def _multiple(a: Anomaly, case: Case, high: float, calls: int, what: str) -> Verdict:
    value = _factor(a, case)
    if group_of(a.signal) == "slow" and case.incident.root.kind == "tenant":
        return Severity.MEDIUM, f"{what} {factor(value)}, of one tenant: what it asks for may be the reason"
    if value >= high and max(a.n, case.tally.calls) >= calls:
        return Severity.HIGH, f"{what} {factor(value)} (high from {factor(high)} over {calls} calls)"
    return (Severity.MEDIUM if value >= 1.3 else Severity.LOW), f"{what} {factor(value)}"


def _excess_usd_per_min(case: Case) -> float:
    """Now, and on average since the start: one dear window is no velocity."""
    if case.factor <= 1.0:
        return 0.0
    t = case.tally
    velocity = min(t.usd_per_min_now, t.usd / t.minutes if t.minutes > 0 else 0.0)
    return velocity * (1.0 - 1.0 / case.factor)


def _tokens(a: Anomaly, case: Case, s: SeveritySettings) -> Verdict:
    value, extra = _factor(a, case), _excess_usd_per_min(case)
    if value >= s.token_factor_high and max(a.n, case.tally.calls) >= s.token_calls_high:
        return Severity.HIGH, f"tokens per call {factor(value)} (high from {factor(s.token_factor_high)})"
    if extra >= s.excess_usd_per_min_high:
        return (
            Severity.HIGH,
            f"{usd(extra)}/min more than expected (high from {usd(s.excess_usd_per_min_high)}/min)",
        )
    if value >= s.token_factor_medium:
        return Severity.MEDIUM, f"tokens per call {factor(value)}"
    return Severity.LOW, f"tokens per call {factor(value)}"


def _cost(a: Anomaly, case: Case, s: SeveritySettings) -> Verdict:
    extra = _excess_usd_per_min(case)
    total = extra * case.tally.minutes
    if extra >= s.excess_usd_per_min_high and total >= s.excess_usd_high:
        return (
            Severity.HIGH,
            f"{usd(extra)}/min more than expected, {usd(total)} so far (high from {usd(s.excess_usd_per_min_high)}/min and "
            f"{usd(s.excess_usd_high)})",
        )
    value = _factor(a, case)
    return (
        Severity.MEDIUM if value >= 1.5 else Severity.LOW
    ), f"cost {factor(value)}, {usd(extra)}/min more than expected"


def _agent(a: Anomaly, s: SeveritySettings, velocity: float) -> Verdict:
    told = a.evidence.get("usd_per_min")
    velocity = max(velocity, float(told) if isinstance(told, int | float) else 0.0)
    if a.signal == "agent.loop":
        lasted_s = a.at - a.since
        if a.klass in _WEAK_LOOPS and lasted_s < s.weak_loop_s and velocity < s.spend_usd_per_min_high:
            return (
                Severity.MEDIUM,
                f"{a.klass} for {lasted_s:.0f} s (high from {s.weak_loop_s:.0f} s): it may yet recover",
            )
        if velocity >= s.loop_usd_per_min_high:
            return (
                Severity.HIGH,
                f"a confirmed loop at {usd(velocity)}/min (high from {usd(s.loop_usd_per_min_high)}/min)",
            )
        return Severity.MEDIUM, f"a confirmed loop, but only {usd(velocity)}/min"
    if velocity >= s.spend_usd_per_min_high and a.signal == "agent.spend":
        return (
            Severity.HIGH,
            f"{usd(velocity)}/min in one run (high from {usd(s.spend_usd_per_min_high)}/min)",
        )
    return Severity.MEDIUM, f"an agent run departs from others ({a.signal.removeprefix('agent.')})"


def _gpu(a: Anomaly, s: SeveritySettings) -> Verdict:
    if a.signal != "gpu.fault":
        return Severity.MEDIUM, "the GPU is slower than it should be"
    if a.impact < s.gpu_impact_high:
        return (
            Severity.MEDIUM,
            f"a GPU error that needs the application restarted at most ({a.klass or 'fault'})",
        )
    return Severity.HIGH, "a GPU failed: what runs on it is lost or wrong"
