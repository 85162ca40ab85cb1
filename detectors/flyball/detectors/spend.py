"""Money: who spends a multiple of their usual rate, and whether by more calls or dearer ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from flyball.core.anomaly import Phase
from flyball.core.columns import Rollup, Window
from flyball.core.errors import ConfigError
from flyball.detectors._budget import PageBudget
from flyball.detectors._level import Evidence, LevelDetector, LevelParams, Reading, Watch
from flyball.detectors._state import Column, Floats, Ints, Table, half_life_weight

_SCOPES: Final[tuple[tuple[str, ...], ...]] = (("tenant",), ("app",), ("team",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(LevelParams):
    """See `LevelParams`; the level is ln(USD per block), and a window of its terms is a block here.

    Args:
        block_s: spend is added up over blocks of event time of this length before it is judged, seconds.
        min_usd_per_min: below this rate nothing is said, whatever the multiple.
    """

    shifts_log: tuple[float, float] = (1.1, 2.1)
    effect_log: float = 1.1
    floor_sd_log: float = 0.35
    min_calls: int = 1
    min_windows: int = 3
    half_life_s: float = 7_200.0
    blend_calls: float = 0.0
    patience_windows: int = 6
    calm_halves: bool = True
    off_calls: float = 0.0
    block_s: float = 60.0
    min_usd_per_min: float = 0.05

    def __post_init__(self) -> None:
        LevelParams.__post_init__(self)
        if not self.block_s > 0 or self.min_usd_per_min < 0:
            raise ConfigError("spend needs block_s > 0 and min_usd_per_min >= 0")


class Spend(LevelDetector):
    """USD per minute are at least three times what is normal for a tenant, app or team, for three minutes: signal `llm.cost`.

    Spend follows volume, and volume is wild: the scatter between blocks is learned per series, and evidence must last. A block is
    judged when the next data of its series arrives; two without data end a run of high ones. Impact is low (0.3 of the share in excess): spend alone is seldom a
    reason to wake someone.

    When it misleads: on traffic that comes in rare bursts (a nightly batch) until the scatter has been learned; where cost is
    not told there is nothing to judge.
    """

    kind: ClassVar[str] = "spend"
    klass: ClassVar[str] = "velocity"
    unit: ClassVar[str] = "usd/min"

    def __init__(self, params: Params | None = None, budget: PageBudget | None = None) -> None:
        self.params = params if params is not None else Params()
        super().__init__([Watch("llm.cost", by) for by in _SCOPES], self.params, budget)
        columns = {
            "block": Column("<f8", fresh=-1.0),
            "before": Column("<f8", fresh=-1.0),
            "usd": Column(),
            "calls": Column(),
            "normal_calls": Column(),
        }
        self._blocks = {by: Table(columns) for by in _SCOPES}
        self._last: dict[tuple[str, ...], tuple[Ints, Floats, Floats, Floats]] = {}

    def period_s(self, window: Window) -> float:
        return max(self.params.block_s, window.end - window.start)

    def observed(self, level_log: float) -> float:
        return super().observed(level_log) * 60.0 / self.params.block_s

    def impact(self, watch: Watch, above_log: float) -> float:
        return 0.3 * super().impact(watch, above_log)

    def read(self, watch: Watch, rollup: Rollup, window: Window) -> Reading | None:
        table = self._blocks[watch.by]
        table.align(rollup)
        ids, block = rollup.ids, np.floor(window.start / self.params.block_s)
        done = (table["block"][ids] >= 0) & (table["block"][ids] < block)
        rows = np.flatnonzero(done & (table["usd"][ids] > 0))
        judged = ids[rows]
        # A minute without calls is a minute without spend: what began before it is over.
        paused = judged[table["block"][judged] - table["before"][judged] > 2]
        if len(paused):
            self.levels[watch].begin_anew(paused)
        table["before"][judged] = table["block"][judged]
        usd = table["usd"][judged].astype(np.float64)
        calls = table["calls"][judged].astype(np.float64)
        # How many calls were normal, for the split of a rise; learned where no episode is open.
        normal = table["normal_calls"][judged]
        self._last[watch.by] = (judged, usd, calls, normal.astype(np.float64))
        teaches = ~self.levels[watch].episodes.active(judged)
        gain = np.where(normal == 0, 1.0, 1 - half_life_weight(self.params.block_s, self.params.half_life_s))
        table["normal_calls"][judged] = normal + (gain * teaches).astype(np.float32) * (
            calls.astype(np.float32) - normal
        )

        table["usd"][ids[done]] = 0.0
        table["calls"][ids[done]] = 0.0
        table["block"][ids] = block
        table["usd"][ids] += rollup.sums["cost_usd"].astype(np.float32)
        table["calls"][ids] += rollup.counts["cost_usd"].astype(np.float32)
        may = usd * 60.0 / self.params.block_s >= self.params.min_usd_per_min
        return Reading(rows, np.log(usd), np.maximum(calls, 1.0), may_alarm=may)

    def facts(self, watch: Watch, rollup: Rollup, row: int, window: Window, phase: Phase) -> Evidence:
        judged, *columns = self._last[watch.by]
        at = int(np.flatnonzero(judged == rollup.ids[row])[0])
        usd, calls, normal_calls = (float(column[at]) for column in columns)
        per_minute = 60.0 / self.params.block_s
        level = self.levels[watch]
        expected = float(np.exp(level.mean(rollup.ids[row : row + 1])[0]))
        facts: Evidence = {
            "usd_per_min": round(usd * per_minute, 6),
            "baseline_usd_per_min": round(expected * per_minute, 6),
            "calls_per_min": round(calls * per_minute, 3),
            "usd_per_call": round(usd / max(calls, 1.0), 8),
        }
        change = np.log(usd / expected) if expected > 0 else 0.0
        if phase == "on" and normal_calls > 0 and calls > 0 and abs(change) > 1e-6:
            share = float(np.log(calls / normal_calls) / change)
            facts |= {"split_calls": round(share, 6), "split_usd_per_call": round(1 - share, 6)}
        return facts

    def pack_more(self) -> Any:
        return [[list(by), table.pack()] for by, table in self._blocks.items()]

    def load_more(self, state: Any) -> None:
        for by, packed in state:
            self._blocks[tuple(by)].load(packed)
