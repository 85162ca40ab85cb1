"""Slow answers: latency and time to first token against each provider's own normal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from flyball.core.anomaly import Phase
from flyball.core.columns import Rollup, Window
from flyball.core.errors import ConfigError
from flyball.detectors._budget import PageBudget
from flyball.detectors._level import Evidence, LevelDetector, LevelParams, Reading, Watch, mean_and_variance

_COLUMN: Final = {"llm.latency": "latency_s", "llm.ttft": "ttft_s"}
_SCOPES: Final[tuple[tuple[str, ...], ...]] = (("provider",), ("provider", "model"), ("deployment",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(LevelParams):
    """See `LevelParams`; half as slow again is the least that matters.

    Args:
        min_tenants: tenants that must be calling before a provider is blamed; waived where calls name no tenant.
        output_elasticity: how much of a change in output tokens per call explains a change in latency, in [0, 1]: answers
            twice as long take 2 ** 0.7 times as long.
    """

    min_tenants: int = 2
    output_elasticity: float = 0.7

    def __post_init__(self) -> None:
        LevelParams.__post_init__(self)
        if self.min_tenants < 1 or not 0 <= self.output_elasticity <= 1:
            raise ConfigError("latency needs min_tenants >= 1 and output_elasticity in [0, 1]")


class Latency(LevelDetector):
    """Calls take longer than is normal for this provider, model or deployment: signals `llm.latency` and `llm.ttft`.

    Judges the mean of ln(latency), so one hanging call weighs little, and takes out what longer answers explain.

    When it misleads: calls that fail fast lower the mean, so a provider that is slow *and* failing may look quick (error_ratio
    says the other half); a move of traffic from a quick model to a slow one is seen as slowness of the provider.
    """

    kind: ClassVar[str] = "latency"
    klass: ClassVar[str] = "slow"
    unit: ClassVar[str] = "s"

    def __init__(self, params: Params | None = None, budget: PageBudget | None = None) -> None:
        self.params = params if params is not None else Params()
        super().__init__([Watch(signal, by) for signal in _COLUMN for by in _SCOPES], self.params, budget)

    def read(self, watch: Watch, rollup: Rollup, window: Window) -> Reading | None:
        name = _COLUMN[watch.signal]
        rows = np.flatnonzero(rollup.counts[name] > 0)
        calls, x, within = mean_and_variance(rollup, name, rows)
        tenants = rollup.tenants[rows]
        enough = (tenants >= self.params.min_tenants) | (tenants == 0)
        if watch.signal == "llm.ttft":
            return Reading(rows, x, calls, within, may_alarm=enough)
        told = rollup.counts["output_tokens"][rows]
        # Only where nearly all calls tell their output: else the two means are of different calls.
        usable = told >= 0.9 * calls
        cov = np.where(usable, rollup.sums["log_output_tokens"][rows] / np.maximum(told, 1), np.nan)
        elasticity = self.params.output_elasticity
        return Reading(rows, x, calls, within, cov=cov, elasticity=elasticity, may_alarm=enough)

    def facts(self, watch: Watch, rollup: Rollup, row: int, window: Window, phase: Phase) -> Evidence:
        name = _COLUMN[watch.signal]
        n = max(int(rollup.counts[name][row]), 1)
        return {
            "calls": int(rollup.calls[row]),
            "tenants": int(rollup.tenants[row]),
            f"mean_{name}": round(float(rollup.sums[name][row]) / n, 4),
        }
