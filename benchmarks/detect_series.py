"""How long all window detectors take to judge one window of many series, and what a series costs in memory.

Run as a script, or through `make bench`, which calls `run()`.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyball.core.columns import BASE_LABELS, SUMS, Rollup, Window
from flyball.core.errorclass import CLASS_INDEX, CLASSES
from flyball.core.ports import WindowDetector
from flyball.detectors import PageBudget, registry

KINDS = ("error_ratio", "token_inflation", "latency", "retry_storm", "spend", "cache_loss")
SHARES: dict[tuple[str, ...], float] = {
    ("provider",): 0.0005, ("provider", "model"): 0.01, ("provider", "region"): 0.005, ("deployment",): 0.02, ("model",): 0.005,
    ("provider", "tenant"): 0.33, ("provider", "app"): 0.05, ("tenant",): 0.25, ("team",): 0.01, ("app",): 0.03,
    ("app", "prompt"): 0.23, ("app", "model"): 0.06,
}  # fmt: skip
"""How the series spread over the roll-ups: a large estate has many tenants and prompts and few providers."""
START, WINDOW_S = 1_800_000_000.0, 10.0


def _rollup(by: tuple[str, ...], n: int, rng: np.random.Generator) -> Rollup:
    calls: NDArray[np.int64] = 1 + rng.negative_binomial(1.0, 1 / 30, n)
    by_class = np.zeros((n, len(CLASSES)), np.int64)
    for name, ratio in (("server_error", 0.01), ("rate_limited", 0.01), ("bad_request", 0.005)):
        by_class[:, CLASS_INDEX[name]] = rng.binomial(calls, ratio / 2)
    by_class[:, 0] = calls - by_class.sum(axis=1)
    sums: dict[str, NDArray[np.float64]] = {}
    for name, level in (("input_tokens", 7.0), ("output_tokens", 5.0), ("latency_s", 1.0), ("ttft_s", -1.0)):
        mean = level + rng.normal(0, 0.3, n) + rng.normal(0, 1.0, n) / np.sqrt(calls)
        sums[name] = np.asarray(calls * np.exp(mean))
        sums[f"log_{name}"] = calls * mean
        sums[f"log2_{name}"] = calls * (mean**2 + 1.0)
    sums["cost_usd"] = sums["input_tokens"] * 2e-6
    sums["cache_read_tokens"] = sums["input_tokens"] * rng.uniform(0.4, 0.6, n)
    labels = [tuple(f"{name}{i}" for name in by) for i in range(n)]
    return Rollup(
        by=by, ids=np.arange(n), capacity=n, born=np.full(n, START), labels=labels, calls=calls, by_class=by_class,
        tenants=np.full(n, 5), failing_tenants=np.minimum(by_class, 5),
        sums={name: sums.get(name, np.zeros(n)) for name in SUMS}, counts=dict.fromkeys(SUMS, calls), histograms={},
    )  # fmt: skip


def _windows(n_series: int, n_windows: int, distinct: int) -> list[Window]:
    """Windows over the same series; the numbers repeat after `distinct` windows, to save making them."""
    rng = np.random.default_rng(1)
    cells = Rollup(
        BASE_LABELS, np.zeros(0, np.int64), 0, np.zeros(0), [], np.zeros(0, np.int64),
        np.zeros((0, len(CLASSES)), np.int64), np.zeros(0, np.int64), np.zeros((0, len(CLASSES)), np.int64), {}, {}, {},
    )  # fmt: skip
    sizes = {by: max(1, round(share * n_series)) for by, share in SHARES.items()}
    made = [{by: _rollup(by, n, rng) for by, n in sizes.items()} for _ in range(distinct)]
    return [
        Window(START + i * WINDOW_S, START + (i + 1) * WINDOW_S, cells, made[i % distinct], {})
        for i in range(n_windows)
    ]


def _measure(n_series: int, n_windows: int) -> tuple[float, float]:
    """Mean seconds of processor time a window over the last six (one of which ends a block of spend), and bytes a series.

    Processor time, because the bar is about one core and the machine may be busy with other things.
    """
    budget = PageBudget()
    known = registry()
    detectors: list[WindowDetector] = [known.get(kind)(budget=budget) for kind in KINDS]
    windows = _windows(n_series, n_windows, distinct=2)
    took = []
    for window in windows:
        begin = time.process_time()
        for detector in detectors:
            detector.feed([window])
        took.append(time.process_time() - begin)
    actual = sum(len(r) for r in windows[0].rollups.values())
    return float(np.mean(took[-6:])), sum(state_bytes(d) for d in detectors) / actual


def state_bytes(thing: Any, seen: set[int] | None = None) -> int:
    """Bytes of all numpy arrays that a detector holds, found by walking its attributes."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, np.ndarray):
        return int(thing.nbytes)
    if isinstance(thing, dict):
        return sum(state_bytes(v, seen) for v in thing.values())
    if isinstance(thing, list | tuple):
        return sum(state_bytes(v, seen) for v in thing if not isinstance(v, str | float | int))
    if type(thing).__module__.startswith("flyball.detectors"):
        return sum(state_bytes(v, seen) for v in getattr(thing, "__dict__", {}).values())
    return 0


def _row(name: str, value: float, unit: str, bar: float) -> dict[str, Any]:
    return {
        "name": name, "value": value, "unit": unit, "baseline": None, "ratio": None, "bar": f"<= {bar:g}", "holds": value <= bar,
    }  # fmt: skip


def run(large: bool = True) -> list[dict[str, Any]]:
    """Rows for build/bench.json. Without `large`, the million series are left out."""
    seconds, size = _measure(100_000, 14)
    rows = [
        _row("detect.window_100k_series", seconds, "s", 0.2),
        _row("detect.bytes_per_series", size, "bytes", 1000),
    ]
    if large:
        seconds, size = _measure(1_000_000, 8)
        rows += [
            _row("detect.window_1m_series", seconds, "s", 2.0),
            _row("detect.bytes_per_series_1m", size, "bytes", 1000),
        ]
    return rows


if __name__ == "__main__":
    for row in run():
        print(
            f"{row['name']:32} {row['value']:12.4f} {row['unit']:6} bar {row['bar']:8} {'ok' if row['holds'] else 'MISSED'}"
        )
