"""A small world for tests: providers with steady traffic, faults by time, and gateways that obey directives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flyball.core.columns import BASE_LABELS, COUNTED, SUMS, Rollup, Window
from flyball.core.directives import Directive
from flyball.core.entities import Entity
from flyball.core.errorclass import CLASS_INDEX, CLASSES
from flyball.core.incident import Incident, IncidentChange, Severity, State
from flyball.runbooks.estate import LiveEstate

T0 = 1_700_000_000.0


@dataclass(frozen=True)
class Row:
    """Calls of one cell in one window."""

    calls: int
    bad: int = 0
    local: int = 0
    usd: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    tokens: float | None = None
    latency_s: float | None = None
    """Of all calls together."""


def window(start: float, rows: Iterable[Row], length: float = 10.0) -> Window:
    kept = [r for r in rows if r.calls]
    n = len(kept)
    labels = [tuple(r.labels.get(name, "") for name in BASE_LABELS) for r in kept]
    by_class = np.zeros((n, len(CLASSES)), np.int64)
    for i, row in enumerate(kept):
        by_class[i, CLASS_INDEX["overloaded"]] = row.bad
        by_class[i, CLASS_INDEX["gateway_local"]] = row.local
        by_class[i, 0] = row.calls - row.bad - row.local
    sums = {name: np.zeros(n) for name in SUMS}
    counts = {name: np.zeros(n, np.int64) for name in set(COUNTED.values())}
    sums["cost_usd"] = np.array([r.usd or 0.0 for r in kept])
    for name, told in (("input_tokens", "tokens"), ("latency_s", "latency_s")):
        sums[name] = np.array([getattr(r, told) or 0.0 for r in kept])
        counts[name] = np.array([0 if getattr(r, told) is None else r.calls for r in kept], np.int64)
    counts["cost_usd"] = np.array([0 if r.usd is None else r.calls for r in kept], np.int64)
    cells = Rollup(
        by=BASE_LABELS,
        ids=np.arange(n, dtype=np.int64),
        capacity=max(n, 1),
        born=np.full(n, start),  # every slot means something new in every window: the hardest case for caches
        labels=labels,
        calls=np.array([r.calls for r in kept], np.int64),
        by_class=by_class,
        tenants=np.ones(n, np.int64),
        failing_tenants=np.zeros((n, len(CLASSES)), np.int64),
        sums=sums,
        counts=counts,
        histograms={},
    )
    return Window(start, start + length, cells, {}, {})


class World:
    """Providers with `calls` per window each; `fails[provider]` is its share of failures, changed at will.

    `advance` makes one window of traffic under the given directives, feeds the estate and moves the clock.
    """

    def __init__(self, calls: Mapping[str, int], *, obeys: bool = True, length: float = 10.0) -> None:
        self.calls = dict(calls)
        self.fails: dict[str, float] = {}
        self.overload_above: dict[str, int] = {}
        self.obeys = obeys
        self.length = length
        self.now = T0
        self.estate = LiveEstate()

    def advance(self, directives: Sequence[Directive] = (), windows: int = 1) -> float:
        for _ in range(windows):
            volume = {p: float(n) for p, n in self.calls.items()}
            for d in directives if self.obeys else ():
                if d.expires_at > self.now:
                    moved = self.calls[d.scope["provider"]] * d.params["share"]
                    volume[d.scope["provider"]] -= moved
                    volume[d.params["to"]["provider"]] += moved
            rows = []
            for provider, n in volume.items():
                calls = round(n)
                share = self.fails.get(provider, 0.0)
                if calls > self.overload_above.get(provider, 10**9):
                    share = 0.5
                bad = round(calls * share)
                labels = {"provider": provider, "model": "m", "app": "shop", "tenant": "t1"}
                rows.append(Row(calls, bad, labels=labels, usd=0.01 * calls))
            self.estate.feed([window(self.now, rows, self.length)])
            self.now += self.length
        return self.now


def incident(
    provider: str = "b",
    *,
    at: float = T0,
    updated_at: float | None = None,
    state: State = State.OPEN,
    severity: Severity = Severity.HIGH,
    id: str = "INC-1",
    signal: str = "llm.errors",
    kind: str = "provider",
) -> Incident:
    return Incident(
        id=id,
        at=at,
        since=at,
        updated_at=at if updated_at is None else updated_at,
        root=Entity(kind, provider),
        signal=signal,
        klass="overloaded",
        severity=severity,
        state=state,
        scope={"provider": provider},
    )


def change(i: Incident, at: float | None = None) -> IncidentChange:
    return IncidentChange(
        incident=i, at=i.updated_at if at is None else at, old="open", new=i.state.value, reason="test"
    )
