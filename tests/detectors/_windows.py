"""Windows made by hand, so that a test reads like the traffic it tells of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyball.core.columns import BASE_LABELS, SUMS, Rollup, Window
from flyball.core.errorclass import CLASS_INDEX, CLASSES

START = 1_800_000_000.0
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

ROLLUPS: tuple[tuple[str, ...], ...] = (
    (), ("provider",), ("provider", "model"), ("provider", "region"), ("deployment",), ("model",), ("provider", "tenant"),
    ("provider", "app"), ("tenant",), ("team",), ("app",), ("app", "prompt"), ("app", "model"), ("app", "agent"),
)  # fmt: skip


@dataclass(frozen=True)
class Calls:
    """`n` calls of one kind in one window, spread evenly over `tenants` tenants (named t0, t1, … unless `tenant` is given).

    `values` are per call: mean of ln is ln(value), with `spread` as standard deviation of ln.
    """

    n: int
    failed: Mapping[str, int] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    tenants: int = 10
    values: Mapping[str, float] = field(default_factory=dict)
    spread: float = 0.5


def calls(
    n: int, failed: Mapping[str, int] | None = None, *, tenants: int = 10, spread: float = 0.5, **rest: Any
) -> Calls:
    """`calls(100, {"overloaded": 60}, provider="b", latency_s=2.0)`: labels and per-call values by their names."""
    values = {k: float(v) for k, v in rest.items() if k in SUMS}
    labels = {k: str(v) for k, v in rest.items() if k not in SUMS}
    return Calls(n, failed or {}, labels, 1 if "tenant" in labels else tenants, values, spread)


@dataclass
class _Row:
    by_class: Ints
    tenants: set[str]
    failing: list[set[str]]
    sums: dict[str, float]
    counts: dict[str, int]

    @classmethod
    def empty(cls) -> _Row:
        return cls(
            np.zeros(len(CLASSES), np.int64),
            set(),
            [set() for _ in CLASSES],
            dict.fromkeys(SUMS, 0.0),
            dict.fromkeys(SUMS, 0),
        )

    def add(self, c: Calls) -> None:
        names = [c.labels["tenant"]] if "tenant" in c.labels else [f"t{i}" for i in range(c.tenants)]
        self.tenants |= set(names)
        self.by_class[0] += c.n - sum(c.failed.values())
        for error, k in c.failed.items():
            self.by_class[CLASS_INDEX[error]] += k
            self.failing[CLASS_INDEX[error]] |= set(names[:k])
        for name, value in c.values.items():
            self.sums[name] += c.n * value
            self.counts[name] += c.n
            if f"log_{name}" in self.sums and value > 0:
                self.sums[f"log_{name}"] += c.n * math.log(value)
                self.counts[f"log_{name}"] += c.n
            if f"log2_{name}" in self.sums and value > 0:
                self.sums[f"log2_{name}"] += c.n * (math.log(value) ** 2 + c.spread**2)
                self.counts[f"log2_{name}"] += c.n


def rollup(
    by: Sequence[str],
    labels: Sequence[tuple[str, ...]],
    by_class: Ints,
    *,
    ids: Ints | None = None,
    capacity: int | None = None,
    born: Floats | None = None,
    tenants: Ints | None = None,
    failing: Ints | None = None,
    sums: Mapping[str, Floats] | None = None,
    counts: Mapping[str, Ints] | None = None,
) -> Rollup:
    """Columns made directly: for many series at once. What is not given is as if every call told nothing more."""
    n = len(by_class)
    zeros, none = np.zeros(n), np.zeros(n, np.int64)
    return Rollup(
        by=tuple(by),
        ids=np.arange(n, dtype=np.int64) if ids is None else ids,
        capacity=len(labels) if capacity is None else capacity,
        born=np.full(n, START) if born is None else born,
        labels=labels,
        calls=by_class.sum(axis=1),
        by_class=by_class,
        tenants=np.full(n, 10) if tenants is None else tenants,
        failing_tenants=np.minimum(by_class, 10) if failing is None else failing,
        sums={name: (sums or {}).get(name, zeros) for name in SUMS},
        counts={name: (counts or {}).get(name, none) for name in SUMS},
        histograms={},
    )


class Traffic:
    """Makes windows one after the other and remembers which slot is whose, as the real windows do."""

    def __init__(
        self, *, start: float = START, window_s: float = 10.0, rollups: Sequence[tuple[str, ...]] = ROLLUPS
    ) -> None:
        self.now = start
        self.window_s = window_s
        self._by = tuple(rollups)
        self._slots: dict[tuple[str, ...], dict[tuple[str, ...], tuple[int, float]]] = {}
        self._labels: dict[tuple[str, ...], list[tuple[str, ...]]] = {}

    def window(self, *parts: Calls) -> Window:
        start, self.now = self.now, self.now + self.window_s
        parts = tuple(one for part in parts for one in _spread(part))
        cells = self._roll(BASE_LABELS, parts, start, complete=False)
        samples = {
            (int(slot), index): tuple(f"call-{int(start)}-{slot}-{index}-{i}" for i in range(min(3, int(k))))
            for slot, row in zip(cells.ids, cells.by_class, strict=True)
            for index, k in enumerate(row)
            if index and k
        }
        rolled = {by: self._roll(by, parts, start, complete=True) for by in self._by}
        return Window(start, self.now, cells, {by: r for by, r in rolled.items() if len(r)}, samples)

    def windows(self, n: int, *parts: Calls) -> list[Window]:
        return [self.window(*parts) for _ in range(n)]

    def _roll(self, by: tuple[str, ...], parts: Sequence[Calls], start: float, *, complete: bool) -> Rollup:
        slots, labels = self._slots.setdefault(by, {}), self._labels.setdefault(by, [])
        rows: dict[tuple[str, ...], _Row] = {}
        for part in parts:
            key = tuple(part.labels.get(name, "") for name in by)
            if complete and not all(key):
                continue
            if key not in slots:
                slots[key] = (len(labels), start)
                labels.append(key)
            rows.setdefault(key, _Row.empty()).add(part)
        ids = np.array([slots[key][0] for key in rows], np.int64)
        shape = (len(rows), len(CLASSES))
        return rollup(
            by, labels, np.array([r.by_class for r in rows.values()], np.int64).reshape(shape),
            ids=ids, capacity=max(8, len(labels)), born=np.array([slots[key][1] for key in rows]),
            tenants=np.array([len(r.tenants - {""}) for r in rows.values()], np.int64),
            failing=np.array([[len(f - {""}) for f in r.failing] for r in rows.values()], np.int64).reshape(shape),
            sums={name: np.array([r.sums[name] for r in rows.values()]) for name in SUMS},
            counts={name: np.array([r.counts[name] for r in rows.values()], np.int64) for name in SUMS},
        )  # fmt: skip


def _spread(part: Calls) -> list[Calls]:
    """One entry per tenant, calls and failures dealt out in turn."""
    if "tenant" in part.labels:
        return [part]
    if part.tenants == 0:
        return [Calls(part.n, part.failed, {**part.labels, "tenant": ""}, 0, part.values, part.spread)]
    out = []
    for i in range(part.tenants):
        n = len(range(i, part.n, part.tenants))
        if n == 0:
            continue
        dealt, offset = {}, 0
        for error, k in part.failed.items():
            dealt[error] = len([j for j in range(offset, offset + k) if j % part.tenants == i])
            offset += k
        failed = {e: k for e, k in dealt.items() if k}
        out.append(Calls(n, failed, {**part.labels, "tenant": f"t{i}"}, 1, part.values, part.spread))
    return out
