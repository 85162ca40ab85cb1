"""What correlation knows about signals: how each is measured in cells, what it can cause, and whom it usually blames."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from flyball.core.anomaly import Anomaly
from flyball.core.errorclass import CLASS_INDEX, CLASSES, NOT_ATTEMPTS, PROVIDER_HEALTH, SCOPE_OF

GATEWAY_LOCAL: Final = "gateway_local"
EGRESS: Final = "egress"
"""Name of the `stream` entity that stands for our own way out: when every provider fails, it is not the providers."""

ERROR_FAMILIES: Final[tuple[tuple[str, frozenset[str]], ...]] = (
    ("health", PROVIDER_HEALTH | {"unknown"}),
    ("rate_limited", frozenset({"rate_limited"})),
    ("quota_exhausted", frozenset({"quota_exhausted"})),
    ("auth", frozenset({"auth"})),
    ("not_found", frozenset({"not_found"})),
    ("context_too_long", frozenset({"context_too_long"})),
    ("content_filter", frozenset({"content_filter"})),
    ("bad_request", frozenset({"bad_request"})),
    ("gateway_local", frozenset({GATEWAY_LOCAL})),
)
"""Classes that one fault can mix are counted together: an outage answers 529, 503 and nothing at all."""

FAMILY_NAMES: Final[tuple[str, ...]] = tuple(name for name, _ in ERROR_FAMILIES)
FAMILY_OF_CLASS: Final[dict[str, str]] = {c: name for name, classes in ERROR_FAMILIES for c in classes}
FAMILY_OF_INDEX: Final[tuple[int, ...]] = tuple(
    FAMILY_NAMES.index(FAMILY_OF_CLASS[c]) if c in FAMILY_OF_CLASS else -1 for c in CLASSES
)
"""Class index → family index; -1 for success and for `cancelled`."""
FAILED_FAMILIES: Final[tuple[int, ...]] = tuple(i for i, n in enumerate(FAMILY_NAMES) if n != "gateway_local")

_COMPATIBLE: Final[dict[str, frozenset[str]]] = {
    "health": frozenset({"health", "rate_limited", "any"}),
    "rate_limited": frozenset({"rate_limited", "health", "quota_exhausted", "any"}),
    "quota_exhausted": frozenset({"quota_exhausted", "rate_limited", "any"}),
}
"""Error families that may belong to one fault. The 401s of a tenant are never part of a provider's outage."""

LEFT_OUT: Final[tuple[int, ...]] = tuple(sorted(CLASS_INDEX[c] for c in NOT_ATTEMPTS))
"""Indexes of the classes of calls that never tested a provider."""

GROUP_OF: Final[dict[str, str]] = {
    "llm.errors": "errors",
    "llm.latency": "slow",
    "llm.ttft": "slow",
    "llm.input_tokens": "tokens",
    "llm.output_tokens": "tokens",
    "llm.tokens": "tokens",
    "llm.retries": "retries",
    "llm.calls": "retries",
    "llm.volume": "retries",
    "llm.cost": "cost",
    "llm.cache": "cache",
}

AFTERMATH: Final = frozenset({"retries", "cost", "cache"})
"""Groups that calm down after their cause is gone, and whose detectors judge slowly: they alone keep no incident open."""

NAMED_ONLY: Final = frozenset({"agent", "gpu", "serving", "stream"})
"""Groups that cells do not show: what joins them is a label in common, said or implied."""

EXPLAINS: Final[dict[str, frozenset[str]]] = {
    "errors": frozenset({"errors", "slow", "retries", "cost", "cache", "tokens"}),
    "slow": frozenset({"slow", "errors", "retries", "serving", "tokens", "cost"}),
    "tokens": frozenset({"tokens", "cost", "cache", "slow", "errors"}),
    "retries": frozenset({"retries", "errors", "cost", "tokens", "slow", "cache"}),
    "cost": frozenset({"cost", "cache", "tokens"}),
    "cache": frozenset({"cache", "cost"}),
    "agent": frozenset({"agent", "cost", "tokens", "retries", "cache"}),
    "gpu": frozenset({"gpu", "serving", "slow", "errors", "retries"}),
    "serving": frozenset({"serving", "slow", "errors", "gpu", "retries"}),
    "stream": frozenset({"stream"}),
}
"""Group of a cause → groups it can show up as."""

_RANK: Final[dict[str, int]] = {
    "gpu.fault": 0, "agent.loop": 1, "llm.errors": 3, "llm.input_tokens": 4, "llm.tokens": 4, "serving.queue": 5,
    "serving.kv_cache": 5, "serving.preemptions": 5, "serving.ttft": 5, "llm.retries": 6, "llm.calls": 6, "llm.volume": 6,
    "llm.output_tokens": 5, "llm.latency": 7, "llm.ttft": 7, "agent.spend": 8, "agent.context": 8, "agent.fan_out": 8,
    "gpu.throttle": 4, "llm.cost": 9, "llm.cache": 10, "stream.silent": 11, "stream.poison": 11,
}  # fmt: skip
"""Nearness to a cause: the lowest leads an incident, names its signal and chooses how roots are measured."""

_LATE_CLASSES: Final = frozenset({"rate_limited", "context_too_long"})
"""Errors that are more often the consequence of retries or of longer prompts than the beginning."""

_PROVIDER_PRIOR: Final = {
    "provider": 1.0, "region": 0.6, "model": 0.6, "deployment": 0.5, "app": 0.1, "prompt_version": 0.1, "tenant": 0.1,
    "agent": 0.08, "team": 0.05,
}  # fmt: skip
_PRIORS: Final[dict[str, dict[str, float]]] = {
    "provider": _PROVIDER_PRIOR,
    "model": {
        "model": 1.0, "deployment": 0.8, "provider": 0.8, "region": 0.5, "prompt_version": 0.3, "app": 0.25, "agent": 0.2,
        "tenant": 0.15, "team": 0.1,
    },
    "credential": {
        "tenant": 1.0, "team": 0.6, "app": 0.5, "provider": 0.4, "deployment": 0.3, "model": 0.15, "region": 0.1,
        "agent": 0.1, "prompt_version": 0.05,
    },
    "account": {
        "provider": 1.0, "deployment": 0.5, "team": 0.4, "tenant": 0.4, "app": 0.3, "model": 0.3, "region": 0.2,
        "agent": 0.1, "prompt_version": 0.05,
    },
    "key": {
        "provider": 0.8, "model": 0.8, "app": 0.8, "tenant": 0.8, "deployment": 0.7, "team": 0.5, "agent": 0.5,
        "prompt_version": 0.4, "region": 0.4,
    },
    "app": {
        "prompt_version": 1.0, "app": 0.9, "agent": 0.7, "tenant": 0.5, "team": 0.3, "model": 0.3, "deployment": 0.2,
        "provider": 0.15, "region": 0.1,
    },
    "tokens": {
        "prompt_version": 1.0, "agent": 0.8, "app": 0.8, "tenant": 0.5, "model": 0.5, "team": 0.3, "deployment": 0.3,
        "provider": 0.3, "region": 0.1,
    },
    "slow": {
        "provider": 1.0, "model": 0.9, "deployment": 0.9, "region": 0.7, "app": 0.15, "prompt_version": 0.15, "agent": 0.1,
        "tenant": 0.1, "team": 0.05,
    },
    "retries": {
        "app": 1.0, "agent": 0.8, "tenant": 0.4, "prompt_version": 0.3, "team": 0.3, "deployment": 0.05, "model": 0.05,
        "provider": 0.05, "region": 0.05,
    },
    "unknown": {
        "provider": 0.8, "model": 0.8, "app": 0.8, "prompt_version": 0.7, "tenant": 0.6, "deployment": 0.6, "region": 0.5,
        "agent": 0.5, "team": 0.3,
    },
}  # fmt: skip
"""How often each kind of entity turns out to be the root, by where the fault usually lies. Decides only between
explanations that the counts cannot tell apart."""


@dataclass(frozen=True, slots=True)
class Spec:
    """How a signal is read off cells: a mass, what it is divided by, and what is expected from where.

    kind: `errors` (families of failed calls over attempts), `mean` (a sum over its count) or `volume` (a sum over windows).
    hierarchy: label sets whose own past says what is expected; the first with enough data wins.
    """

    kind: str
    column: str = "calls"
    per: str = "attempts"
    families: tuple[int, ...] = ()
    hierarchy: tuple[tuple[str, ...], ...] = ((),)


_BY_PROVIDER: Final = (("provider", "model", "app"), ("provider", "model"), ("provider",), ())
_BY_APP: Final = (("app", "prompt", "model"), ("app", "model"), ("app",), ())
_COLUMNS: Final[dict[str, tuple[str, str, tuple[tuple[str, ...], ...]]]] = {
    "llm.latency": ("latency_s", "n_latency", _BY_PROVIDER),
    "llm.ttft": ("ttft_s", "n_ttft", _BY_PROVIDER),
    "llm.input_tokens": ("input_tokens", "n_input", _BY_APP),
    "llm.tokens": ("input_tokens", "n_input", _BY_APP),
    "llm.output_tokens": ("output_tokens", "n_output", _BY_APP),
}


def group_of(signal: str) -> str:
    """Coarse kind of a signal: `errors`, `slow`, `tokens`, `agent`, `gpu`, …; the prefix for signals not known here."""
    return GROUP_OF.get(signal) or signal.partition(".")[0]


def error_family(klass: str) -> str:
    """Which error classes are counted together with this one; `any` for an anomaly over all classes."""
    return FAMILY_OF_CLASS.get(klass, "any")


def spec_of(signal: str, klass: str) -> Spec | None:
    """How to measure a signal in cells; None for signals that cells do not show (runs, GPUs, servers, senders)."""
    group = group_of(signal)
    if group == "errors":
        family = error_family(klass)
        families = FAILED_FAMILIES if family == "any" else (FAMILY_NAMES.index(family),)
        return Spec(
            "errors",
            "failed",
            "attempts",
            families,
            (("provider", "model", "app"), ("provider", "model"), ()),
        )
    if group == "retries":
        return Spec("volume", "calls", "windows")
    if signal == "llm.cost":
        return Spec("volume", "cost_usd", "windows")
    if signal in _COLUMNS:
        column, per, hierarchy = _COLUMNS[signal]
        return Spec("mean", column, per, (), hierarchy)
    return None


def rank_of(anomaly: Anomaly) -> int:
    if anomaly.signal == "llm.errors" and anomaly.klass in _LATE_CLASSES:
        return 6
    return _RANK.get(anomaly.signal, 12)


def leading_order(anomaly: Anomaly) -> tuple[int, float, list[tuple[str, str]], str]:
    """Sort key: nearest to a cause first, then the larger, then by labels and id, so that arrival order cannot show."""
    return (rank_of(anomaly), -anomaly.impact * max(anomaly.n, 1), sorted(anomaly.labels.items()), anomaly.id)


def related(cause: Anomaly, signal: str, klass: str) -> bool:
    """Whether two departures can be one fault: either can cause the other, and error classes do not speak against it."""
    return _related(cause.signal, cause.klass, signal, klass)


@lru_cache(maxsize=4096)
def _related(cause: str, cause_klass: str, signal: str, klass: str) -> bool:
    a, b = group_of(cause), group_of(signal)
    if a == b == "errors":
        f, g = error_family(cause_klass), error_family(klass)
        return f == g or "any" in (f, g) or g in _COMPATIBLE.get(f, ()) or f in _COMPATIBLE.get(g, ())
    return a == b or b in EXPLAINS.get(a, ()) or a in EXPLAINS.get(b, ())


def priors_of(signal: str, klass: str) -> dict[str, float]:
    group = group_of(signal)
    if group == "errors":
        return _PRIORS.get(SCOPE_OF.get(klass, "unknown"), _PRIORS["unknown"])
    if group in ("cost", "cache"):
        return _PRIORS["tokens"]
    return _PRIORS.get(group, _PRIORS["unknown"])


def may_be_ours(signal: str, klass: str) -> bool:
    """Whether "every provider at once" would speak for our own egress: not for what applications or keys do wrong."""
    group = group_of(signal)
    return group == "errors" and SCOPE_OF.get(klass, "provider") in ("provider", "model", "unknown")
