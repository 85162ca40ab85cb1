"""The blast radius: how much a plan would touch at most, measured on live traffic; what cannot be measured is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from flyball.core.columns import BASE_LABELS
from flyball.core.estate import Estate
from flyball.core.plans import Frozen
from flyball.runbooks.schema import Blast

DEFAULT_GPUS: Final = 8
DEFAULT_GPU_SHARE: Final = 0.25
"""Limits of a step that takes GPUs out of service where the runbook sets none: an absolute cap and a share, always both."""
REST: Final = "other"
"""The label of the cell that takes what no longer has a cell of its own: many, so uncountable."""
_SATURATED: Final = 32
_MANY_TIMES: Final = 100
_BUSIEST: Final = 1000

_Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a plan touches at most. None: nobody can say.

    traffic: share of all calls; also None where a plan touches GPUs only. fleet: GPUs that report.
    one_of: runs that are active, where the plan is aimed at one of them and at nothing else; else 0.
    """

    traffic: float | None
    tenants: int | None
    usd_per_hour: float | None
    tokens_per_min: float | None
    gpus: int = 0
    fleet: int = 0
    one_of: int = 0

    def figures(self) -> dict[str, Any]:
        """For people and the ledger, under stable names."""
        found: dict[str, Any] = {}
        if self.traffic is not None:
            found["blast_traffic"] = round(self.traffic, 4)
        if self.tenants is not None:
            found["blast_tenants"] = self.tenants
        if self.usd_per_hour is not None:
            found["blast_usd_per_hour"] = round(self.usd_per_hour, 2)
        if self.tokens_per_min is not None:
            found["blast_tokens_per_min"] = round(self.tokens_per_min)
        if self.gpus:
            found.update(blast_gpus=self.gpus, blast_fleet=self.fleet)
        if self.one_of:
            found["active_runs"] = self.one_of
        return found


@dataclass(frozen=True, slots=True)
class Judged:
    """Whether the radius is within its limits. `must_ask`: it is, but only a person may say so."""

    ok: bool
    detail: str
    must_ask: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def measure(
    frozen: Sequence[Frozen], around: Mapping[str, str], estate: Estate, span_s: float, gpu_span_s: float
) -> Measured:
    """Over all steps together, each target at its widest stage.

    Args:
        around: labels that all members of the incident share: what bounds a target (a run, a key) that windows do not tell apart.
    """
    shares, gpu_only, gpus = _targets(frozen)
    total = float(estate.calls({}, span_s))
    touched = 0.0
    costs: list[float | None] = []
    used: list[float | None] = []
    tenants: dict[str, None] = {}
    runs = 0
    for key, share in shares.items():
        scope = dict(key)
        bound = _bound(scope, around)
        if key in gpu_only and not (bound and share):
            continue  # no call is touched; its GPUs are counted instead
        touched += _calls(scope, bound, estate, span_s) * share
        cost, tokens_now = estate.usd_per_hour(bound, span_s), estate.tokens_per_min(bound, span_s)
        costs.append(None if cost is None else cost * share)
        used.append(None if tokens_now is None else tokens_now * share)
        if "run" in scope:
            runs += 1  # a run is one tenant's
        else:
            tenants.update(dict.fromkeys(estate.values("tenant", bound, span_s)))
    usd = sum(c for c in costs if c is not None)
    tokens = sum(u for u in used if u is not None)
    active = estate.values("run", {}, span_s) if runs else ()
    if runs and total < _MANY_TIMES * touched:
        # Little or nothing but runs: what they do together is the traffic. The busiest suffice, the rest makes the share smaller.
        total = max(total, float(sum(estate.calls({"run": run}, span_s) for run in active[:_BUSIEST])))
    traffic = touched / max(total, touched) if touched > 0 else None
    return Measured(
        traffic=traffic,
        tenants=None if REST in tenants else len(tenants) + runs,
        usd_per_hour=usd if costs and None not in costs else None,
        tokens_per_min=tokens if used and None not in used else None,
        gpus=gpus,
        fleet=len(estate.gpus({}, gpu_span_s)) if gpus else 0,
        one_of=len(active) if runs == 1 and len(shares) == 1 and not gpus else 0,
    )


def _targets(frozen: Sequence[Frozen]) -> tuple[dict[_Key, float], set[_Key], int]:
    """Each distinct target with its widest share; those that are measured in GPUs; and how many GPUs in all."""
    shares: dict[_Key, float] = {}
    gpus: dict[_Key, int] = {}
    for f in frozen:
        key = tuple(sorted(f.scope.items()))
        shares[key] = max(shares.get(key, 0.0), f.max_share)
        if f.gpus is not None:
            gpus[key] = max(gpus.get(key, 0), f.gpus)
    whole = {
        key: share
        for key, share in shares.items()
        if not any(
            set(other) < set(key) and shares[other] >= share for other in shares
        )  # counted there already
    }
    return whole, set(gpus), sum(gpus.values())


def _bound(scope: Mapping[str, str], around: Mapping[str, str]) -> dict[str, str]:
    """The part of a scope that windows tell apart; where they do not tell all of it, with what the incident adds: an upper bound."""
    told = {k: v for k, v in scope.items() if k in BASE_LABELS}
    if len(told) == len(scope):
        return told
    return {**{k: v for k, v in around.items() if k in BASE_LABELS and v}, **told}


def _calls(scope: Mapping[str, str], bound: Mapping[str, str], estate: Estate, span_s: float) -> float:
    """Calls in scope over the span; of a run its steps, since windows do not know runs."""
    around = float(estate.calls(bound, span_s))
    if "run" not in scope:
        return around
    steps = _run_steps(scope["run"], estate, span_s)
    return min(steps, around) if around else steps


def _run_steps(run: str, estate: Estate, span_s: float) -> float:
    """Only the newest steps of a run are known: of a busy one, the pace of the last moments stands for the span."""
    within = span_s
    while within > 1.0:
        steps = estate.calls({"run": run}, within)
        if steps < _SATURATED:
            break
        within /= 2.0
    steps = estate.calls({"run": run}, within) or _SATURATED * int(within < span_s)
    return steps * span_s / within


def judge(limit: Blast, seen: Measured) -> Judged:
    """Every limit must hold, the absolute ones and the shares: so the smaller wins. Unknown is over the limit.

    A share that rounds down to none of few would forbid small estates everything: there one is a person's decision.
    """
    if seen.traffic is None and not seen.gpus:
        return Judged(False, "unknown: no traffic in scope to measure it on")
    over = _over(limit, seen) if seen.traffic is not None else ""
    if over:
        return Judged(False, over)
    must_ask = ""
    if seen.traffic is not None and seen.traffic > limit.traffic:
        if not seen.one_of or _share_of(limit.traffic, seen.one_of):
            return Judged(False, f"{seen.traffic:.0%} of the traffic; the limit is {limit.traffic:.0%}")
        must_ask = "small_fleet"
    gpus = _gpus(limit, seen)
    return Judged(gpus.ok, gpus.detail, gpus.must_ask or must_ask, gpus.values)


def _over(limit: Blast, seen: Measured) -> str:
    """Which absolute limit on calls does not hold, or cannot be told."""
    if limit.tenants is not None:
        if seen.tenants is None:
            return "unknown: more tenants than are told apart"
        if seen.tenants > limit.tenants:
            return f"{seen.tenants} tenants; the limit is {limit.tenants}"
    if limit.usd_per_hour is not None:
        if seen.usd_per_hour is None:
            return "unknown: no call told what the touched traffic costs"
        if seen.usd_per_hour > limit.usd_per_hour:
            return f"${seen.usd_per_hour:.0f}/h; the limit is ${limit.usd_per_hour:.0f}/h"
    if limit.tokens_per_min is not None:
        if seen.tokens_per_min is None:
            return "unknown: no call told the tokens of the touched traffic"
        if seen.tokens_per_min > limit.tokens_per_min:
            return f"{seen.tokens_per_min:.0f} tokens/min; the limit is {limit.tokens_per_min:.0f}"
    return ""


def _share_of(share: float, n: int) -> int:
    """How many of n a share is, rounded down."""
    return int(share * n + 1e-9)


def _gpus(limit: Blast, seen: Measured) -> Judged:
    if not seen.gpus:
        return Judged(True, _summary(seen))
    if not seen.fleet:
        return Judged(False, "unknown: no GPU reports, so nobody knows how many there are")
    cap = limit.gpus if limit.gpus is not None else DEFAULT_GPUS
    share = limit.gpu_share if limit.gpu_share is not None else DEFAULT_GPU_SHARE
    of_fleet = _share_of(share, seen.fleet)
    allowed = min(cap, of_fleet)
    values = {"allowed_gpus": allowed}
    if seen.gpus <= allowed:
        return Judged(True, _summary(seen), values=values)
    if of_fleet == 0 and seen.gpus == 1:
        return Judged(True, _summary(seen), must_ask="small_fleet", values=values)
    text = (
        f"{seen.gpus} of {seen.fleet} GPUs; the limit is the smaller of {cap} and {share:.0%}, so {allowed}"
    )
    return Judged(False, text, values=values)


def _summary(seen: Measured) -> str:
    parts = [] if seen.traffic is None else [f"{seen.traffic:.1%} of the traffic"]
    if seen.tenants is not None and seen.traffic is not None:
        parts.append(f"{seen.tenants} tenants")
    if seen.usd_per_hour is not None:
        parts.append(f"${seen.usd_per_hour:.0f}/h")
    if seen.gpus:
        parts.append(f"{seen.gpus} of {seen.fleet} GPUs")
    return ", ".join(parts)
