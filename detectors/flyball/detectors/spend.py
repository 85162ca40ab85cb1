"""Money: who spends a multiple of their usual rate, and whether by more calls or dearer ones."""

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
    Level,
    LevelDetector,
    LevelParams,
    Reading,
    Watch,
    judge_parts,
)
from flyball.detectors._mix import CellCodes, CellRows, by_row
from flyball.detectors._state import Column, Floats, Ints, Table

_SCOPES: Final[tuple[tuple[str, ...], ...]] = (("tenant",), ("app",), ("team",), ("app", "agent"))
_ADDED: Final = ("usd", "usd2", "calls", "calls2")
"""What is added up over a block: USD and calls, and the squares of what came together."""


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
    """USD per minute are at least three times what is normal for a tenant, app, team or agent, for three minutes: signal `llm.cost`.

    Spend follows volume, and volume is wild: the scatter between blocks is learned per series, and evidence must last. Calls that
    came together (of one window's cell) are no independent witnesses, and few dear ones say little: a block weighs as much as
    (sum of USD)² / sum of squared USD equal calls would. The number of calls is a steadier witness than what they
    cost: the evidence is a mixture of both, and what must be three times the normal is USD. The calls of agents are judged
    by agent alone: one run of a small tenant is a hundred times its usual spend, and right.

    A block is judged when the next data of its series arrives; two without data end a run of high ones. Impact is low (0.3 of the
    share in excess): spend alone is seldom a reason to wake someone.

    When it misleads: on traffic that comes in rare bursts (a nightly batch) until the scatter has been learned; where cost is
    not told there is nothing to judge; a tenant that starts many runs of an agent shows as that agent.

    Source: Kish (1965), "Survey Sampling", for the effective number of calls.
    """

    kind: ClassVar[str] = "spend"
    klass: ClassVar[str] = "velocity"
    unit: ClassVar[str] = "usd/min"
    version: ClassVar[int] = 4

    def __init__(self, params: Params | None = None, budget: PageBudget | None = None) -> None:
        self.params = params if params is not None else Params()
        super().__init__([Watch("llm.cost", by) for by in _SCOPES], self.params, budget)
        columns = {"block": Column("<f8", fresh=-1.0), "before": Column("<f8", fresh=-1.0)}
        self._blocks = {by: Table(columns | {name: Column() for name in _ADDED}) for by in _SCOPES}
        self._numbers = {by: Level(by, self.params) for by in _SCOPES}
        """ln(calls per block); it opens no episodes."""
        self._cell_rows = {by: CellRows() for by in _SCOPES}
        self._agent = CellCodes(("agent",))
        self._last: dict[tuple[str, ...], tuple[Ints, Floats, Floats]] = {}
        """Slots, USD and calls of the blocks that were judged last."""

    def period_s(self, window: Window) -> float:
        return max(self.params.block_s, window.end - window.start)

    def observed(self, level_log: float) -> float:
        return super().observed(level_log) * 60.0 / self.params.block_s

    def impact(self, watch: Watch, above_log: float) -> float:
        return 0.3 * super().impact(watch, above_log)

    def read(self, watch: Watch, rollup: Rollup, window: Window) -> Reading | None:
        table, number = self._blocks[watch.by], self._numbers[watch.by]
        table.align(rollup)
        number.align(rollup)
        ids, block = rollup.ids, np.floor(window.start / self.params.block_s)
        done = (table["block"][ids] >= 0) & (table["block"][ids] < block)
        rows = np.flatnonzero(done & (table["usd"][ids] > 0))
        judged = ids[rows]
        # A minute without calls is a minute without spend: what began before it is over.
        paused = judged[table["block"][judged] - table["before"][judged] > 2]
        if len(paused):
            self.levels[watch].begin_anew(paused)
            number.begin_anew(paused)
        table["before"][judged] = table["block"][judged]
        usd, usd2, calls, calls2 = (table[name][judged].astype(np.float64) for name in _ADDED)
        self._last[watch.by] = (judged, usd, calls)
        for name, new in zip(_ADDED, self._added(watch.by, rollup, window), strict=True):
            table[name][ids[done]] = 0.0
            table[name][ids] += new.astype(np.float32)
        table["block"][ids] = block
        return Reading(
            rows, np.log(usd), _worth(usd, usd2, calls), np.ones(len(rows)),
            may_alarm=usd * 60.0 / self.params.block_s >= self.params.min_usd_per_min,
            other_nats=self._more_calls(watch, rows, judged, calls, calls2, window),
        )  # fmt: skip

    def _added(self, by: tuple[str, ...], rollup: Rollup, window: Window) -> list[Floats]:
        """float64[n] each, for `_ADDED`: of the calls that this scope judges; squares are of what came together."""
        cells = window.cells
        if not len(cells) or not set(by) <= set(cells.by):
            usd, calls = rollup.sums["cost_usd"], rollup.counts["cost_usd"].astype(np.float64)
            return [usd, usd**2 / np.maximum(calls, 1), calls, calls]
        row = self._cell_rows[by].of(window, rollup)
        if "agent" in cells.by:
            row = np.where((self._agent.of(window) > 0) == ("agent" in by), row, -1)
        usd, calls = cells.sums["cost_usd"], cells.counts["cost_usd"].astype(np.float64)
        return by_row(row, len(rollup), usd, usd**2, calls, calls**2)

    def _more_calls(
        self, watch: Watch, rows: Ints, judged: Ints, calls: Floats, calls2: Floats, window: Window
    ) -> Floats:
        """float64[rows]: what the number of calls says; it learns nothing from blocks of an episode."""
        nats = np.zeros(len(rows))
        calm = np.flatnonzero(~self.levels[watch].episodes.active(judged))
        if len(calm):
            n = calls[calm]
            reading = Reading(
                rows[calm], np.log(n), _worth(n, calls2[calm], n), np.ones(len(calm)), may_alarm=np.zeros(len(calm), np.bool_)
            )  # fmt: skip
            period = self.period_s(window)
            part = (self._numbers[watch.by], judged[calm], reading)
            found = judge_parts(
                [part], self.params, window.end - period, window.end, self.budget.nats(period)
            )
            nats[calm] = found[0].score
        return nats

    def facts(self, watch: Watch, rollup: Rollup, row: int, window: Window, phase: Phase) -> Evidence:
        judged, *columns = self._last[watch.by]
        slot = rollup.ids[row : row + 1]
        at = int(np.flatnonzero(judged == slot[0])[0])
        usd, calls = (float(column[at]) for column in columns)
        per_minute = 60.0 / self.params.block_s
        expected = float(np.exp(self.levels[watch].mean(slot)[0]))
        normal_calls = float(np.exp(self._numbers[watch.by].mean(slot)[0]))
        facts: Evidence = {
            "usd_per_min": round(usd * per_minute, 6),
            "baseline_usd_per_min": round(expected * per_minute, 6),
            "calls_per_min": round(calls * per_minute, 3),
            "usd_per_call": round(usd / max(calls, 1.0), 8),
        }
        change = np.log(usd / expected) if expected > 0 else 0.0
        if phase == "on" and calls > 0 and abs(change) > 1e-6:
            share = float(np.log(calls / normal_calls) / change)
            facts |= {"split_calls": round(share, 6), "split_usd_per_call": round(1 - share, 6)}
        return facts

    def pack_more(self) -> Any:
        return [
            [list(by), table.pack(), number.pack()]
            for (by, table), number in zip(self._blocks.items(), self._numbers.values(), strict=True)
        ]

    def load_more(self, state: Any) -> None:
        for by, packed, number in state:
            self._blocks[tuple(by)].load(packed)
            self._numbers[tuple(by)].load(number)
        self._cell_rows = {by: CellRows() for by in _SCOPES}
        self._agent = CellCodes(("agent",))


def _worth(mass: Floats, squares: Floats, calls: Floats) -> Floats:
    """How many equal calls scatter as much as these; at least one, at most as many as there were."""
    worth: Floats = np.clip(mass**2 / np.maximum(squares, 1e-30), 1.0, np.maximum(calls, 1.0))
    return worth
