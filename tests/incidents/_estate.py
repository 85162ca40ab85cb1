"""A small estate made by hand: windows whose every call is written in the test, and anomalies as detectors would state them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from flyball.core.anomaly import Anomaly, Phase, anomaly_id
from flyball.core.columns import BASE_LABELS, COUNTED, SUMS, Rollup, Window
from flyball.core.errorclass import CLASS_INDEX, CLASSES
from flyball.core.incident import Incident, IncidentChange
from flyball.incidents.correlator import Correlator, Item
from flyball.incidents.settings import IncidentSettings

T0 = 1_700_000_000.0
W = 10.0


@dataclass
class Calls:
    """Calls of one cell in one window. Tokens, seconds and dollars are per call."""

    n: int = 10
    fails: dict[str, int] = field(default_factory=dict)
    input_tokens: float = 1000.0
    output_tokens: float = 200.0
    latency_s: float = 2.0
    usd: float = 0.01
    labels: dict[str, str] = field(default_factory=dict)


def calls(
    n: int = 10,
    fails: dict[str, int] | None = None,
    *,
    input_tokens: float = 1000.0,
    latency_s: float = 2.0,
    usd: float = 0.01,
    **labels: str,
) -> Calls:
    return Calls(n, fails or {}, input_tokens, 200.0, latency_s, usd, labels)


class Slots:
    """Stable slots of cells across windows, as the window stage keeps them."""

    def __init__(self) -> None:
        self.labels: list[tuple[str, ...]] = []
        self._of: dict[tuple[str, ...], int] = {}

    def of(self, labels: tuple[str, ...]) -> int:
        if labels not in self._of:
            self._of[labels] = len(self.labels)
            self.labels.append(labels)
        return self._of[labels]


def window(slots: Slots, start: float, cells: Iterable[Calls], *, live: bool = True) -> Window:
    rows: dict[int, Calls] = {}
    for c in cells:
        rows[slots.of(tuple(c.labels.get(k, "") for k in BASE_LABELS))] = c
    ids = np.array(sorted(rows), dtype=np.int64)
    ordered = [rows[int(i)] for i in ids]
    by_class = np.zeros((len(ids), len(CLASSES)), dtype=np.int64)
    for r, c in enumerate(ordered):
        for klass, n in c.fails.items():
            by_class[r, CLASS_INDEX[klass]] = n
        by_class[r, 0] = c.n - sum(c.fails.values())
    n_calls = np.array([c.n for c in ordered], dtype=np.int64)
    ok = by_class[:, 0] if len(ids) else n_calls
    told = {"input_tokens": n_calls, "output_tokens": ok, "cost_usd": n_calls, "latency_s": ok}
    per_call = {
        "input_tokens": [c.input_tokens for c in ordered],
        "output_tokens": [c.output_tokens for c in ordered],
        "cost_usd": [c.usd for c in ordered],
        "latency_s": [c.latency_s for c in ordered],
    }
    zero_f, zero_i = np.zeros(len(ids)), np.zeros(len(ids), dtype=np.int64)
    sums = {s: np.array(per_call[s], dtype=np.float64) * told[s] if s in per_call else zero_f for s in SUMS}
    counts = {name: told.get(name, zero_i) for name in dict.fromkeys(COUNTED.values())}
    samples = {
        (int(ids[r]), CLASS_INDEX[k]): (f"call-{int(ids[r])}-{k}",)
        for r, c in enumerate(ordered)
        for k in c.fails
    }
    rollup = Rollup(
        by=BASE_LABELS, ids=ids, capacity=max(len(slots.labels), 1), born=np.zeros(len(ids)), labels=slots.labels,
        calls=n_calls, by_class=by_class, tenants=zero_i, failing_tenants=by_class * 0, sums=sums, counts=counts,
        histograms={},
    )  # fmt: skip
    return Window(start, start + W, rollup, {}, samples, live)


PROVIDERS = ("a", "b")
MODELS = ("large", "mid", "small")
REGIONS = ("eu", "us")
APPS = ("bot", "search", "batch")
TENANTS = ("t1", "t2", "t3", "t4", "t5", "t6")


def traffic(
    *,
    fails: float = 0.0,
    klass: str = "overloaded",
    where: dict[str, str] | None = None,
    n: int = 4,
    times: float = 1.0,
    tokens: float = 1.0,
    slow: float = 1.0,
    without: dict[str, str] | None = None,
) -> list[Calls]:
    """Every app, tenant, provider, model and region, evenly; `where` says whose calls fail, multiply, grow or slow down."""
    found = []
    for p in PROVIDERS:
        for m in MODELS:
            for r in REGIONS:
                for a in APPS:
                    for t in TENANTS:
                        labels = {
                            "provider": p,
                            "model": f"{p}-{m}",
                            "region": r,
                            "app": a,
                            "prompt": f"{a}@v1",
                            "tenant": t,
                            "team": f"team-{a}",
                        }
                        if without is not None and all(labels.get(k) == v for k, v in without.items()):
                            continue
                        hit = where is not None and all(labels.get(k) == v for k, v in where.items())
                        count = round(n * times) if hit else n
                        bad = round(count * fails) if hit else 0
                        found.append(
                            Calls(
                                count,
                                {klass: bad} if bad else {},
                                1000.0 * (tokens if hit else 1.0),
                                200.0,
                                2.0 * (slow if hit else 1.0),
                                0.01 * (tokens if hit else 1.0),
                                labels,
                            )
                        )
    return found


def anomaly(
    signal: str,
    labels: dict[str, str],
    since: float,
    at: float | None = None,
    *,
    klass: str = "",
    phase: Phase = "on",
    observed: float = 0.6,
    expected: float = 0.01,
    impact: float = 0.6,
    n: int = 200,
    evidence: dict[str, float | int | str | list[str]] | None = None,
) -> Anomaly:
    detector = signal.replace(".", "_")
    return Anomaly(
        id=anomaly_id(detector, signal, klass, labels, since), detector=detector, signal=signal, labels=labels,
        at=since + W if at is None else at, since=since, phase=phase, klass=klass, observed=observed, expected=expected,
        unit="ratio", score=30.0, threshold=12.0, n=n, impact=impact, evidence=evidence or {}, samples=("s1",),
    )  # fmt: skip


class Lab:
    """Drives a correlator window by window, as the pipeline does: window, its anomalies, tick."""

    def __init__(
        self, settings: IncidentSettings | None = None, correlator: Correlator | None = None
    ) -> None:
        self.correlator = correlator or Correlator(settings)
        self.slots = Slots()
        self.now = T0
        self.changes: list[IncidentChange] = []
        self.open_anomalies: dict[str, Anomaly] = {}

    def step(
        self,
        cells: Sequence[Calls] | None = None,
        *anomalies: Anomaly,
        live: bool = True,
        others: Sequence[Item] = (),
    ) -> list[IncidentChange]:
        """One window of traffic (healthy when not said), then the anomalies about it."""
        made = window(self.slots, self.now, traffic() if cells is None else cells, live=live)
        self.now += W
        out = self.correlator.feed([made, *anomalies, *others])
        out += self.correlator.tick(self.now)
        self.changes += out
        return out

    def quiet(self, windows: int, cells: Sequence[Calls] | None = None) -> list[IncidentChange]:
        out: list[IncidentChange] = []
        for _ in range(windows):
            out += self.step(cells)
        return out

    def on(self, signal: str, klass: str = "", **labels: str) -> Anomaly:
        """An anomaly that begins with the window that the next step feeds."""
        return anomaly(signal, labels, self.now, klass=klass)

    def again(self, a: Anomaly, phase: Phase = "still") -> Anomaly:
        """The same episode, one window on."""
        return anomaly(
            a.signal,
            a.labels,
            a.since,
            self.now + W,
            klass=a.klass,
            phase=phase,
            observed=a.observed,
            expected=a.expected,
            impact=a.impact,
            n=a.n,
        )

    def feed(self, *items: Item) -> list[IncidentChange]:
        out = self.correlator.feed(items)
        self.changes += out
        return out

    @property
    def open(self) -> list[Incident]:
        return self.correlator.open_incidents()

    def only(self) -> Incident:
        found = self.open
        assert len(found) == 1, [(str(i.root), i.signal) for i in found]
        return found[0]

    @property
    def paged(self) -> list[str]:
        """Ids of incidents that woke somebody, in order."""
        return list(dict.fromkeys(c.incident.id for c in self.changes if c.incident.page))

    @property
    def opened(self) -> list[str]:
        return [c.incident.id for c in self.changes if c.old == ""]
