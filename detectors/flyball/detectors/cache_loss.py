"""Prompt caches that went cold: the share of input tokens read from cache falls against its own normal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from flyball.core.anomaly import Phase
from flyball.core.columns import Rollup, Window
from flyball.core.errors import ConfigError
from flyball.detectors._budget import PageBudget
from flyball.detectors._level import Evidence, LevelDetector, LevelParams, Reading, Watch

_SCOPES: Final[tuple[tuple[str, ...], ...]] = (("app",), ("provider",))
_OFFSET: Final = 0.05
"""Added to the share before its logarithm: below this share, less or more is all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(LevelParams):
    """See `LevelParams`; the level is -ln(share + 0.05), so a rise of 0.69 is about half the share.

    Args:
        min_share: series whose normal share is lower have no cache to lose, in (0, 1).
    """

    shifts_log: tuple[float, float] = (0.4, 1.1)
    effect_log: float = 0.4
    floor_sd_log: float = 0.15
    min_windows: int = 3
    min_calls: int = 40
    patience_windows: int = 6
    min_share: float = 0.2

    def __post_init__(self) -> None:
        LevelParams.__post_init__(self)
        if not 0 < self.min_share < 1:
            raise ConfigError("cache_loss needs min_share in (0, 1)")


class CacheLoss(LevelDetector):
    """The share of input tokens that were read from the provider's cache fell by a third or more: signal `llm.cache`.

    A prompt whose beginning changed, or a failover to a cold provider, shows here before it shows on the bill.

    When it misleads: sources that stop telling cached tokens look like sources that stopped caching.
    """

    kind: ClassVar[str] = "cache_loss"
    klass: ClassVar[str] = "cold"
    unit: ClassVar[str] = "ratio"

    def __init__(self, params: Params | None = None, budget: PageBudget | None = None) -> None:
        self.params = params if params is not None else Params()
        super().__init__([Watch("llm.cache", by) for by in _SCOPES], self.params, budget)

    def observed(self, level_log: float) -> float:
        return float(max(np.exp(-level_log) - _OFFSET, 0.0))

    def impact(self, watch: Watch, above_log: float) -> float:
        return 0.3 * super().impact(watch, above_log)

    def read(self, watch: Watch, rollup: Rollup, window: Window) -> Reading | None:
        told = rollup.counts["cache_read_tokens"]
        inputs = rollup.sums["input_tokens"]
        rows = np.flatnonzero((told > 0) & (inputs > 0))
        share = np.clip(rollup.sums["cache_read_tokens"][rows] / inputs[rows], 0.0, 1.0)
        normal = np.exp(-self.levels[watch].mean(rollup.ids[rows])) - _OFFSET
        may = normal >= self.params.min_share
        return Reading(rows, -np.log(share + _OFFSET), told[rows].astype(np.float64), may_alarm=may)

    def facts(self, watch: Watch, rollup: Rollup, row: int, window: Window, phase: Phase) -> Evidence:
        return {
            "input_tokens": int(rollup.sums["input_tokens"][row]),
            "cache_read_tokens": int(rollup.sums["cache_read_tokens"][row]),
            "calls": int(rollup.calls[row]),
        }
