"""Where the traffic of a failing provider could go: other providers that are seen to be healthy, best first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from flyball.core.estate import Estate
from flyball.core.plans import Candidate

_REST: Final = "other"
"""The label of the cell that takes what no longer has a cell of its own: many providers, so never one to go to."""


@dataclass(frozen=True, slots=True)
class CandidateSettings:
    """span_s: how far back health is read; max_errors: share of failed attempts at most; min_calls: attempts at least."""

    span_s: float = 120.0
    max_errors: float = 0.02
    min_calls: int = 20


def best_healthy(
    estate: Estate,
    source: Mapping[str, str],
    *,
    exclude: Collection[str] = (),
    settings: CandidateSettings = CandidateSettings(),
) -> list[Candidate]:
    """Providers that could take over the traffic of `source`, best first; empty when none is seen to be healthy.

    A provider without enough calls of its own is no candidate: health that nobody measured is not health. When
    every other provider fails too, nothing is left, which is right: then the fault is likely ours.
    Preferred are those that serve most of the same models, then of the same apps; then fewer errors, more calls, name.

    Args:
        source: labels of the failing traffic; must name its `provider`.
        exclude: providers that may not be chosen, e.g. those that another redirect leads away from.
    """
    failing = source.get("provider", "")
    span = settings.span_s
    models = set(estate.values("model", source, span))
    apps = set(estate.values("app", source, span))
    ranked: list[tuple[tuple[int, int, float, int, str], Candidate]] = []
    for provider in estate.values("provider", {}, span):
        if not failing or provider in (failing, _REST) or provider in exclude:
            continue
        scope = {"provider": provider}
        seen = estate.errors(scope, span)
        if seen.n < settings.min_calls or seen.value >= settings.max_errors:
            continue
        shared_models = len(models.intersection(estate.values("model", scope, span)))
        shared_apps = len(apps.intersection(estate.values("app", scope, span)))
        candidate = Candidate(scope, seen.value, seen.n, shared_models, shared_apps)
        ranked.append(((-shared_models, -shared_apps, seen.value, -seen.n, provider), candidate))
    return [candidate for _, candidate in sorted(ranked, key=lambda pair: pair[0])]
