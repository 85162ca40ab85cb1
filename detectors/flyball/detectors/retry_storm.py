"""Retries that multiply: an application sends many times its usual attempts while most of them fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from flyball.core.anomaly import Phase
from flyball.core.columns import Rollup, Window
from flyball.core.errorclass import CLASS_INDEX, CLASSES, NOT_ATTEMPTS
from flyball.core.errors import ConfigError
from flyball.detectors._budget import PageBudget
from flyball.detectors._level import Evidence, LevelDetector, LevelParams, Reading, Watch
from flyball.detectors._state import Column, Floats, Ints, Table, half_life_weight

_SCOPES: Final[tuple[tuple[str, ...], ...]] = (("app",), ("provider", "app"))
_LEFT_OUT: Final = [CLASS_INDEX[c] for c in sorted(NOT_ATTEMPTS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(LevelParams):
    """See `LevelParams`; the level is ln(attempts per window).

    Args:
        failing_ratio: share of attempts that must fail, in (0, 1).
        rho: correlation of calls within a window, as in error_ratio.
    """

    shifts_log: tuple[float, float] = (1.1, 2.1)
    effect_log: float = 1.1
    floor_sd_log: float = 0.35
    min_calls: int = 60
    blend_calls: float = 0.0
    patience_windows: int = 6
    calm_halves: bool = True
    failing_ratio: float = 0.5
    rho: float = 0.02

    def __post_init__(self) -> None:
        LevelParams.__post_init__(self)
        if not 0 < self.failing_ratio < 1 or not 0 <= self.rho < 1:
            raise ConfigError("retry_storm needs failing_ratio in (0, 1) and rho in [0, 1)")


class RetryStorm(LevelDetector):
    """Attempts are at least three times this application's own normal while at least half of them fail: signal `llm.retries`.

    Call counts are far from Poisson, so volume alone never alarms: the evidence is the sum of the log-likelihood ratios of the
    volume (in ln units, against its own scatter) and of the failures (binomial, against the learned ratio), and both must show.

    When it misleads: gateways that retry inside and report one event hide their storms; an outage met by real users
    pressing "again" looks the same, and is.
    """

    kind: ClassVar[str] = "retry_storm"
    klass: ClassVar[str] = "retry_storm"
    unit: ClassVar[str] = "attempts/window"

    def __init__(self, params: Params | None = None, budget: PageBudget | None = None) -> None:
        self.params = params if params is not None else Params()
        super().__init__([Watch("llm.retries", by) for by in _SCOPES], self.params, budget)
        self._failures = {by: Table({"n": Column(), "k": Column()}) for by in _SCOPES}

    def read(self, watch: Watch, rollup: Rollup, window: Window) -> Reading | None:
        attempts, failed = _attempts(rollup)
        rows = np.flatnonzero(attempts > 0)
        ids = rollup.ids[rows]
        n, k = attempts[rows], failed[rows]
        table = self._failures[watch.by]
        table.align(rollup)
        normal = np.clip((table["k"][ids] + 2.0) / (table["n"][ids] + 100.0), 0.005, 0.9).astype(np.float64)
        least = self.params.failing_ratio
        q = np.maximum(least + 0.1, np.minimum(1.5 * normal, 0.97))
        ratio = k / n
        effective = n / (1 + (n - 1) * self.params.rho)
        nats = effective * (ratio * np.log(q / normal) + (1 - ratio) * np.log((1 - q) / (1 - normal)))
        may = (ratio >= least) & (ratio >= 1.5 * normal)
        self._learn(watch, table, ids, n, k, window.end - window.start)
        return Reading(rows, np.log(n), n, may_alarm=may, extra_nats=nats)

    def _learn(self, watch: Watch, table: Table, ids: Ints, n: Floats, k: Floats, window_s: float) -> None:
        """What fails by half teaches nothing, whether it is called a storm or not."""
        teaches = (k < self.params.failing_ratio * n) & ~self.levels[watch].episodes.active(ids)
        at, keep = ids[teaches], np.float32(half_life_weight(window_s, self.params.half_life_s))
        table["n"][at] = table["n"][at] * keep + n[teaches].astype(np.float32)
        table["k"][at] = table["k"][at] * keep + k[teaches].astype(np.float32)

    def facts(self, watch: Watch, rollup: Rollup, row: int, window: Window, phase: Phase) -> Evidence:
        attempts, failed = _attempts(rollup)
        facts: Evidence = {
            "attempts": int(attempts[row]),
            "failed": int(failed[row]),
            "failing_ratio": round(float(failed[row] / max(attempts[row], 1.0)), 6),
            "tenants": int(rollup.tenants[row]),
        }
        for index in np.flatnonzero(rollup.by_class[row][1:]).tolist():
            facts[f"class_{CLASSES[index + 1]}"] = int(rollup.by_class[row][index + 1])
        return facts

    def pack_more(self) -> Any:
        return [[list(by), table.pack()] for by, table in self._failures.items()]

    def load_more(self, state: Any) -> None:
        for by, packed in state:
            self._failures[tuple(by)].load(packed)


def _attempts(rollup: Rollup) -> tuple[Floats, Floats]:
    """Attempts and failures of each row, less what never reached a provider."""
    attempts = (rollup.calls - rollup.by_class[:, _LEFT_OUT].sum(axis=1)).astype(np.float64)
    return attempts, attempts - rollup.by_class[:, 0]
