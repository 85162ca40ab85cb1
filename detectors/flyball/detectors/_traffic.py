"""Synthetic input for the conformance suite: quiet stretches, then every kind of trouble, then quiet again. No randomness."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from flyball.core.columns import BASE_LABELS, SUMS, Histogram, Rollup, Window
from flyball.core.errorclass import CLASS_INDEX, CLASSES
from flyball.core.events import AgentStep, Event, GpuSample, LlmCall

START: Final = 1_700_000_000.0
WINDOW_S: Final = 10.0
ROLLUPS: Final[tuple[tuple[str, ...], ...]] = (
    (), ("provider",), ("provider", "model"), ("provider", "region"), ("provider", "tenant"), ("deployment",), ("model",),
    ("app",), ("app", "provider"), ("app", "model"), ("app", "prompt"), ("app", "agent"), ("team",), ("tenant",),
)  # fmt: skip
_MEANS: Final = {
    "input_tokens": 1200.0, "output_tokens": 250.0, "cache_read_tokens": 300.0, "reasoning_tokens": 40.0, "cost_usd": 0.008,
    "latency_s": 2.0, "ttft_s": 0.4,
}  # fmt: skip
_SPREAD: Final = 0.4  # standard deviation of the logarithm of one call's value
_COLUMN: Final = {name: i for i, name in enumerate(SUMS)}
_QUANTILES: Final = (-1.64, -1.04, -0.67, -0.39, -0.13, 0.13, 0.39, 0.67, 1.04, 1.64)


@dataclass(frozen=True)
class Cell:
    """Calls of one cell in one window. `means` override the usual mean per call; `failed` counts by class."""

    labels: Mapping[str, str]
    n: int
    failed: Mapping[str, int] = field(default_factory=dict)
    means: Mapping[str, float] = field(default_factory=dict)


def noise(*parts: int) -> float:
    """A number in [-1, 1) that depends on nothing but its arguments (SplitMix64).

    >>> noise(1, 2) == noise(1, 2), -1 <= noise(3) < 1
    (True, True)
    """
    x = 0x9E3779B97F4A7C15
    for part in parts:
        x = (x ^ (part & 0xFFFF_FFFF_FFFF_FFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFF_FFFF_FFFF_FFFF
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFF_FFFF_FFFF_FFFF
        x ^= x >> 31
    return x / 2**63 - 1.0


class _Row:
    """What one cell, or the sum of several, comes to."""

    __slots__ = ("buckets", "by_class", "counts", "failing", "sums", "tenants")

    def __init__(self) -> None:
        self.by_class = np.zeros(len(CLASSES), np.int64)
        self.tenants: dict[str, None] = {}
        self.failing: dict[tuple[int, str], None] = {}
        self.sums = np.zeros(len(SUMS))
        self.counts = np.zeros(len(SUMS), np.int64)
        self.buckets: dict[tuple[str, int], int] = {}

    @classmethod
    def of(cls, cell: Cell) -> _Row:
        row = cls()
        ok = max(0, cell.n - sum(cell.failed.values()))
        tenant = cell.labels.get("tenant", "")
        if tenant:
            row.tenants[tenant] = None
        row.by_class[0] = ok
        for name, k in cell.failed.items():
            row.by_class[CLASS_INDEX[name]] += k
            if tenant and k:
                row.failing[CLASS_INDEX[name], tenant] = None
        for name, usual in _MEANS.items():
            if ok:
                row._report(name, cell.means.get(name, usual), ok)
        return row

    def _report(self, name: str, mean: float, n: int) -> None:
        mu = math.log(mean) - _SPREAD**2 / 2
        for column, value in ((name, mean), (f"log_{name}", mu), (f"log2_{name}", mu * mu + _SPREAD**2)):
            if column in _COLUMN:
                self.sums[_COLUMN[column]] = n * value
                self.counts[_COLUMN[column]] = n
        if name in ("latency_s", "ttft_s"):
            for i, q in enumerate(_QUANTILES):
                bucket = max(0, math.ceil((mu + _SPREAD * q - math.log(1e-3)) / math.log(Histogram.GROWTH)))
                k = n // len(_QUANTILES) + (i < n % len(_QUANTILES))
                if k:
                    self.buckets[name, bucket] = self.buckets.get((name, bucket), 0) + k

    def add(self, other: _Row) -> None:
        self.by_class += other.by_class
        self.sums += other.sums
        self.counts += other.counts
        self.tenants |= other.tenants
        self.failing |= other.failing
        for key, k in other.buckets.items():
            self.buckets[key] = self.buckets.get(key, 0) + k


class Windows:
    """Makes windows one after the other and remembers which slot is whose, as the real ones do."""

    def __init__(self, rollups: Sequence[tuple[str, ...]] = ROLLUPS, window_s: float = WINDOW_S) -> None:
        self.now = START
        self.window_s = window_s
        self._rollups = rollups
        self._slots: dict[tuple[str, ...], dict[tuple[str, ...], tuple[int, float]]] = {}
        self._labels: dict[tuple[str, ...], list[tuple[str, ...]]] = {}

    def next(self, cells: Sequence[Cell]) -> Window:
        start, self.now = self.now, self.now + self.window_s
        counted = [(cell, _Row.of(cell)) for cell in cells]
        base = self._roll(BASE_LABELS, counted, start, complete=False)
        samples: dict[tuple[int, int], tuple[str, ...]] = {}
        for i, slot in enumerate(base.ids):
            for k in np.flatnonzero(base.by_class[i][1:]):
                samples[int(slot), int(k) + 1] = (f"call-{int(start)}-{int(slot)}-{int(k) + 1}",)
        rolled = {by: self._roll(by, counted, start, complete=True) for by in self._rollups}
        return Window(start, self.now, base, rolled, samples)

    def recycle(self) -> None:
        """Every slot is free for another series from now on."""
        for by, slots in self._slots.items():
            slots.clear()
            self._labels[by] = []

    def _roll(
        self, by: tuple[str, ...], counted: Sequence[tuple[Cell, _Row]], start: float, *, complete: bool
    ) -> Rollup:
        slots, labels = self._slots.setdefault(by, {}), self._labels.setdefault(by, [])
        rows: dict[tuple[str, ...], _Row] = {}
        for cell, row in counted:
            key = tuple(cell.labels.get(name, "") for name in by)
            if complete and not all(key):
                continue
            if key not in slots:
                slots[key] = (len(labels), start)
                labels.append(key)
            rows.setdefault(key, _Row()).add(row)
        return _columns(by, list(rows.values()), [slots[key] for key in rows], list(labels))


def _columns(
    by: tuple[str, ...],
    rows: Sequence[_Row],
    slots: Sequence[tuple[int, float]],
    labels: Sequence[tuple[str, ...]],
) -> Rollup:
    by_class = _stacked([r.by_class for r in rows], len(CLASSES), np.int64)
    failing = np.zeros_like(by_class)
    for i, row in enumerate(rows):
        for index, _ in row.failing:
            failing[i, index] += 1
    sums = _stacked([r.sums for r in rows], len(SUMS), np.float64)
    counts = _stacked([r.counts for r in rows], len(SUMS), np.int64)
    return Rollup(
        by=by,
        ids=np.array([slot for slot, _ in slots], np.int64),
        capacity=max(8, len(labels)),
        born=np.array([born for _, born in slots], np.float64),
        labels=labels,
        calls=by_class.sum(axis=1),
        by_class=by_class,
        tenants=np.array([len(r.tenants) for r in rows], np.int64),
        failing_tenants=failing,
        sums={name: sums[:, i].copy() for i, name in enumerate(SUMS)},
        counts={name: counts[:, i].copy() for i, name in enumerate(SUMS)},
        histograms={name: _histogram(rows, name) for name in ("latency_s", "ttft_s")},
    )


def _stacked(arrays: Sequence[Any], width: int, dtype: Any) -> Any:
    return np.array(arrays, dtype).reshape((len(arrays), width))


def _histogram(rows: Sequence[_Row], name: str) -> Histogram:
    found = [
        (i, b, n) for i, row in enumerate(rows) for (of, b), n in sorted(row.buckets.items()) if of == name
    ]
    triple = np.array(found, np.int64).reshape((len(found), 3))
    return Histogram(triple[:, 0].copy(), triple[:, 1].copy(), triple[:, 2].copy())


def quiet_cells(i: int, *, suffix: str = "", tokens: float = 1.0, noisy: bool = True) -> list[Cell]:
    """Window `i` of an estate in which nothing is wrong: two providers, three applications, two tenants, 1 % failures."""
    cells = []
    for p, (provider, model) in enumerate((("alpha", "alpha-large"), ("beta", "beta-small"))):
        for a in range(3):
            for t in range(2):
                wobble = 0.06 * noise(i, p, a, t) if noisy else 0.0
                n = 60 + (round(8 * noise(i, p, a, t, 1)) if noisy else 0)
                failed = {"overloaded": 1} if (i * 12 + p * 6 + a * 2 + t) % 3 == 0 else {}
                scale = tokens * math.exp(wobble)
                means = {
                    name: mean * (scale if name != "ttft_s" else math.exp(wobble))
                    for name, mean in _MEANS.items()
                }
                means["latency_s"] = _MEANS["latency_s"] * math.exp(wobble)
                cells.append(
                    Cell(
                        {
                            "provider": provider + suffix, "model": model + suffix, "deployment": f"{provider}{suffix}-eu",
                            "region": "eu" + suffix, "app": f"app{a}{suffix}", "prompt": f"main@{a}{suffix}",
                            "team": f"team{a % 2}{suffix}", "tenant": f"tenant{t}{suffix}", "agent": f"agent{a}{suffix}" if a == 1 else "",
                        },
                        n, failed, means,
                    )
                )  # fmt: skip
    return cells


def troubled_cells(i: int) -> list[Cell]:
    """The same with an outage of alpha that app1 meets with five times its calls, app2 at 3.5 times its tokens and cost, beta
    six times as slow, and a cache that no longer hits."""
    cells = []
    for cell in quiet_cells(i):
        means = dict(cell.means)
        failed = dict(cell.failed)
        if cell.labels["app"] == "app1":
            cell = replace(cell, n=5 * cell.n)
        if cell.labels["provider"] == "alpha":
            failed = {"overloaded": int(0.7 * cell.n)}
        if cell.labels["app"] == "app2":
            means |= {k: 3.5 * means[k] for k in ("input_tokens", "output_tokens", "cost_usd")}
        if cell.labels["provider"] == "beta":
            means |= {"latency_s": 6 * means["latency_s"], "ttft_s": 6 * means["ttft_s"]}
        means["cache_read_tokens"] = 1.0
        cells.append(replace(cell, failed=failed, means=means))
    return cells


def windows(quiet: int = 220, trouble: int = 30, after: int = 40, window_s: float = WINDOW_S) -> list[Window]:
    """Quiet, trouble, quiet."""
    made = Windows(window_s=window_s)
    out = [made.next(quiet_cells(i)) for i in range(quiet)]
    out += [made.next(troubled_cells(i)) for i in range(quiet, quiet + trouble)]
    out += [made.next(quiet_cells(i)) for i in range(quiet + trouble, quiet + trouble + after)]
    return out


def agent_run(
    run: str,
    start: float,
    steps: int,
    *,
    app: str = "assistant",
    inflate: float = 1.0,
    usd: float = 0.01,
    loop_from: int | None = None,
    parent: str = "",
) -> Iterator[Event]:
    """One run: a call to the model, then a tool call with new arguments, every five seconds or so."""
    at = start
    seed = sum(map(ord, run))
    for k in range(steps):
        at += 5.0 + 2.0 * noise(seed, k)
        looping = loop_from is not None and k >= loop_from
        tokens = 2000.0 * (1 + 0.4 * k) * math.exp(0.15 * noise(seed, k, 1)) * (inflate if k >= 4 else 1.0)
        yield LlmCall(
            at=at, id=f"{run}-call-{k}", provider="alpha", model="alpha-large", app=app, agent="worker", run=run, tenant="tenant0",
            team="team0", input_tokens=int(tokens), output_tokens=200, cost_usd=usd * (inflate if k >= 4 else 1.0),
        )  # fmt: skip
        yield AgentStep(
            at=at + 0.5, run=run, app=app, agent="worker", tenant="tenant0", team="team0", tool="search" if k % 3 else "read",
            step=k, args_hash="same" if looping else f"a{k}", result_hash="same" if looping else f"r{k}-{seed}",
            result_bytes=500 + k, id=f"{run}-step-{k}", parent_run=parent,
        )  # fmt: skip


def gpu_samples(
    at: float,
    i: int,
    xid: int = 0,
    waiting: float = 0.0,
    kv: float = 0.4,
    ttft: float = 0.3,
    hot: bool = False,
) -> Iterator[Event]:
    """One scrape of two GPUs and the server on them. Counters are those of a process that started with the stream."""
    for g in range(2):
        yield GpuSample(
            at=at, node="node0", gpu=f"GPU-0000-000{g}", hardware="H100", pod="llm-0", namespace="serving", app="app0",
            values={
                "xid": float(xid if g == 0 else 0), "gpu_util_ratio": 0.8, "power_w": 500.0, "gpu_temp_c": 60.0,
                "ecc_dbe_total": 0.0, "pcie_replay_total": float(i // 10), "thermal_violation_s_total": 9.0 * i if hot and g else 0.0,
                "power_violation_s_total": 1.0 * i, "row_remap_failure": 0.0,
            },
        )  # fmt: skip
    yield GpuSample(
        at=at, node="node0", pod="llm-0", namespace="serving", deployment="vllm-0", model="llama", app="app0",
        values={
            "requests_running": 16.0, "requests_waiting": waiting, "kv_cache_ratio": kv, "preemptions_total": float(i // 20),
            "ttft_s_sum": ttft * 40.0, "ttft_s_count": 40.0,
        },
    )  # fmt: skip


def _cumulative(samples: Iterable[Event]) -> Iterator[Event]:
    """Sums and counts of the servers added up, as exporters show them."""
    sums: dict[str, float] = {}
    for event in samples:
        if isinstance(event, GpuSample) and event.deployment:
            for name in ("ttft_s_sum", "ttft_s_count"):
                sums[name] = sums.get(name, 0.0) + event.values[name]
            yield GpuSample(
                at=event.at, node=event.node, pod=event.pod, namespace=event.namespace, deployment=event.deployment,
                model=event.model, app=event.app, values={**event.values, **sums},
            )  # fmt: skip
        else:
            yield event


def quiet_events(runs: int = 40) -> list[Event]:
    """Runs that come to an end and GPUs without a fault."""
    out: list[Event] = []
    for r in range(runs):
        steps = 12 + round(6 * noise(r))
        parent = f"run-{r - r % 4}" if r % 4 else ""
        out += agent_run(f"run-{r}", START + 45.0 * r, steps, parent=parent)
    span = 45.0 * runs + 120.0
    for i in range(int(span / WINDOW_S)):
        wobble = math.exp(0.1 * noise(i))
        out += gpu_samples(START + WINDOW_S * i, i, ttft=0.3 * wobble, kv=0.4 + 0.1 * noise(i, 1))
    out.sort(key=lambda e: e.at)
    return list(_cumulative(out))


def events(runs: int = 40) -> list[Event]:
    """Quiet runs and samples, then a looping run, a bloated one, a fan-out, a fallen GPU and a full server, then quiet again."""
    out: list[Event] = []
    for r in range(runs):
        out += agent_run(
            f"run-{r}", START + 45.0 * r, 12 + round(6 * noise(r)), parent=f"run-{r - r % 4}" if r % 4 else ""
        )
    trouble = START + 45.0 * runs + 300.0
    out += agent_run("run-loop", trouble, 25, loop_from=8)
    out += agent_run("run-bloat", trouble, 40, inflate=12.0)
    for c in range(130):
        out.append(
            AgentStep(at=trouble + 1.0 + 0.5 * c, run=f"child-{c}", app="assistant", agent="worker", parent_run="run-wide", tool="read",
                      args_hash=f"c{c}", result_hash=f"d{c}")
        )  # fmt: skip
    for r in range(8):
        out += agent_run(f"run-after-{r}", trouble + 400.0 + 45.0 * r, 12)
    scrapes = int((trouble - START) / WINDOW_S)
    for i in range(scrapes + 200):
        bad = scrapes <= i < scrapes + 30
        wobble = math.exp(0.1 * noise(i))
        out += gpu_samples(
            START + WINDOW_S * i, i, xid=79 if bad else 0, waiting=12.0 if bad else 0.0, kv=0.97 if bad else 0.4 + 0.1 * noise(i, 1),
            ttft=(3.0 if bad else 0.3) * wobble,
        )  # fmt: skip
    out.sort(key=lambda e: e.at)
    return list(_cumulative(out))


def constant_events(n: int = 400) -> list[Event]:
    """The same samples again and again, and an XID from before the first of them."""
    made = (event for i in range(n) for event in gpu_samples(START + WINDOW_S * i, 0, xid=31))
    return list(_cumulative(made))
