"""Slow answers: latency and time to first token against each provider's own normal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from flyball.core.anomaly import Phase
from flyball.core.columns import Rollup, Window
from flyball.core.errors import ConfigError
from flyball.detectors._budget import PageBudget
from flyball.detectors._level import (
    Evidence,
    LevelDetector,
    LevelParams,
    Reading,
    Watch,
    mean_and_variance,
    variance_of,
)
from flyball.detectors._mix import CellCodes, CellRows, Kinds, by_row, tenant_scale
from flyball.detectors._state import Floats, Ints, find_rollup

_COLUMN: Final = {"llm.latency": "latency_s", "llm.ttft": "ttft_s"}
_KIND: Final = ("provider", "model", "app")
_SCOPES: Final[tuple[tuple[str, ...], ...]] = (("provider",), ("provider", "model"), ("deployment",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(LevelParams):
    """See `LevelParams`; half as slow again is the least that matters, and in the first hour, when nobody knows yet how a
    provider's speed wanders, up to 2.7 times as slow.

    Args:
        min_tenants: tenants that must be calling before a provider is blamed; waived where calls name no tenant.
        output_elasticity: how much of a change in output tokens per call explains a change in latency, in [0, 1]: answers
            twice as long take 2 ** 0.7 times as long.
    """

    young_effect_times: float = 3.0
    min_tenants: int = 2
    output_elasticity: float = 0.7

    def __post_init__(self) -> None:
        LevelParams.__post_init__(self)
        if self.min_tenants < 1 or not 0 <= self.output_elasticity <= 1:
            raise ConfigError("latency needs min_tenants >= 1 and output_elasticity in [0, 1]")


class Latency(LevelDetector):
    """Calls take longer than is normal for this provider, model or deployment: signals `llm.latency` and `llm.ttft`.

    Judges the mean of ln(latency) above what is normal for the kinds of calls (app and model) that a window happens to hold, so
    one hanging call weighs little and another mix of calls nothing; takes out what longer answers explain.

    When it misleads: calls that fail fast lower the mean, so a provider that is slow *and* failing may look quick (error_ratio
    says the other half). An app that is new says nothing for its first calls. A tenant counts for a third of a window at most.
    """

    kind: ClassVar[str] = "latency"
    klass: ClassVar[str] = "slow"
    unit: ClassVar[str] = "s"

    def __init__(self, params: Params | None = None, budget: PageBudget | None = None) -> None:
        self.params = params if params is not None else Params()
        super().__init__([Watch(signal, by) for signal in _COLUMN for by in _SCOPES], self.params, budget)
        self._kinds = {signal: Kinds(_KIND, self.params.half_life_s) for signal in _COLUMN}
        self._outputs = Kinds(_KIND, self.params.half_life_s)
        self._cell_rows = {by: CellRows() for by in _SCOPES}
        self._tenant = CellCodes(("tenant",))
        self._seen = -np.inf
        """Start of the window that `_tenants` and `_row` (roll-up → row of each cell) are of: caches."""
        self._tenants: Ints = np.zeros(0, np.int64)
        self._row: dict[tuple[str, ...], Ints] = {}

    def read(self, watch: Watch, rollup: Rollup, window: Window) -> Reading | None:
        tenants = rollup.tenants
        enough = (tenants >= self.params.min_tenants) | (tenants == 0)
        name = _COLUMN[watch.signal]
        cells = window.cells
        if not len(cells) or not {*watch.by, *_KIND, "tenant"} <= set(cells.by):
            rows = np.flatnonzero(rollup.counts[name] > 0)
            calls, x, within = mean_and_variance(rollup, name, rows)
            return Reading(rows, x, calls, within, may_alarm=enough[rows])
        if self._seen != window.start:
            self._seen, self._tenants = window.start, self._tenant.of(window)
            self._row = {}
        if watch.by not in self._row:
            self._row[watch.by] = self._cell_rows[watch.by].of(window, rollup)
        row = self._row[watch.by]
        normal, known = self._kinds[watch.signal].normal(window)
        n, logs, squares = (
            cells.counts[name].astype(np.float64), cells.sums[f"log_{name}"], cells.sums[f"log2_{name}"],
        )  # fmt: skip
        excess = self._excess(watch.signal, window, normal, n)
        scale = known * tenant_scale(row, self._tenants, n * known, len(rollup))
        calls, above, left, expected = by_row(
            row, len(rollup), scale * n, scale * excess, scale * (squares - 2 * normal * logs + n * normal**2),
            scale * n * normal,
        )  # fmt: skip
        rows = np.flatnonzero(calls > 0.5)
        n_row = calls[rows]
        x = above[rows] / n_row
        raw = by_row(row, len(rollup), scale * (logs - n * normal))[0][rows] / n_row
        within = variance_of(n_row, raw, left[rows])
        return Reading(rows, x, n_row, within, may_alarm=enough[rows], offset=expected[rows] / n_row)

    def _excess(self, signal: str, window: Window, normal: Floats, n: Floats) -> Floats:
        """float64[cells]: sum over calls of ln(value) above the normal of their kind, less what longer answers explain."""
        cells = window.cells
        excess: Floats = cells.sums[f"log_{_COLUMN[signal]}"] - n * normal
        if signal == "llm.ttft":
            return excess
        usual, known = self._outputs.normal(window)
        told = cells.counts["output_tokens"]
        # Only where nearly all calls tell their output: else the two means are of different calls.
        usable = (known > 0) & (told >= 0.9 * n) & (told > 0)
        longer = cells.sums["log_output_tokens"] / np.maximum(told, 1) - usual
        return excess - np.where(usable, self.params.output_elasticity * n * longer, 0.0)

    def learned(self, window: Window) -> None:
        cells = window.cells
        if self._seen != window.start:
            return
        for signal, kinds in self._kinds.items():
            teaches = np.ones(len(cells))
            for watch, level in self.levels.items():
                rollup = find_rollup(window, watch.by)
                if watch.signal != signal or rollup is None or watch.by not in self._row:
                    continue
                row = self._row[watch.by]
                suspect = level.suspect(rollup.ids)
                if suspect.any():
                    teaches[(row >= 0) & suspect[row]] = 0.1
            name = _COLUMN[signal]
            kinds.learn(window, cells.counts[name].astype(np.float64), cells.sums[f"log_{name}"], teaches)
        told = cells.counts["output_tokens"].astype(np.float64)
        self._outputs.learn(window, told, cells.sums["log_output_tokens"], np.ones(len(cells)))

    def pack_more(self) -> Any:
        return [self._outputs.pack(), *(kinds.pack() for kinds in self._kinds.values())]

    def load_more(self, state: Any) -> None:
        for kinds, packed in zip((self._outputs, *self._kinds.values()), state, strict=True):
            kinds.load(packed)
        self._cell_rows = {by: CellRows() for by in _SCOPES}
        self._tenant, self._seen = CellCodes(("tenant",)), -np.inf

    def facts(self, watch: Watch, rollup: Rollup, row: int, window: Window, phase: Phase) -> Evidence:
        name = _COLUMN[watch.signal]
        n = max(int(rollup.counts[name][row]), 1)
        return {
            "calls": int(rollup.calls[row]),
            "tenants": int(rollup.tenants[row]),
            f"mean_{name}": round(float(rollup.sums[name][row]) / n, 4),
        }
