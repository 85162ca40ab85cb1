"""The page budget: how often Flyball may wake people in error, turned into the evidence an alarm must reach."""

from __future__ import annotations

import math
from typing import Final

from flyball.core.errors import ConfigError

WEEK_S: Final = 604_800.0


class PageBudget:
    """Shares one promise, "at most so many false pages a week", over every series that every detector judges.

    Detectors accumulate evidence per series as an e-CUSUM, M = max(M, 1) * e, where e is an e-value of the newest window: its
    mean is at most 1 while the series is normal. Then the mean number of windows until M first reaches A is at least A, and a
    series that is judged every window alarms falsely at most once in A windows. With N series, W windows a week and P
    pages allowed, A = N * W / P keeps the sum within P. `nats` is ln(A).

    What it promises: an upper bound on the mean number of false *episodes* a week, over all detectors that share this object,
    however the series depend on each other. Pages are fewer, because incidents join episodes.
    When it misleads: the bound is as good as the model of "normal". A level that wanders more than its learned variance, a
    baseline learned during trouble, or windows that depend on each other more than was measured make e-values with
    a mean above 1. Detectors therefore judge against over-dispersed models and ask for a practical effect besides.
    Rules without probability (an XID, a repeated call) spend nothing of it.

    The count of series is rounded up to a power of ten and never below `floor_series`: the threshold moves by 2.3 nats a step
    and does not depend on small changes, nor on how series are spread over processes while each holds fewer than the floor.

    Args:
        false_pages_per_week: > 0.
        floor_series: series assumed even where there are fewer; >= 1.

    Raises: ConfigError for values out of range.
    Source: Shin, Ramdas & Rinaldo (2022), "E-detectors: a nonparametric framework for sequential change detection".

    >>> round(PageBudget(2.0).threshold(n_series=10_000, window_s=10.0), 2)
    19.53
    """

    def __init__(self, false_pages_per_week: float = 2.0, floor_series: int = 10_000) -> None:
        if not false_pages_per_week > 0:
            raise ConfigError(f"false_pages_per_week must be above 0, not {false_pages_per_week}")
        if floor_series < 1:
            raise ConfigError(f"floor_series must be at least 1, not {floor_series}")
        self.false_pages_per_week = float(false_pages_per_week)
        self.floor_series = int(floor_series)
        self._series: dict[str, int] = {}

    def register(self, detector: str, n_series: int) -> None:
        """Says how many series `detector` (a name unique among those that share this budget) judges now.

        Never lowers: a threshold that falls while series come and go would depend on when one looks.
        """
        if n_series > self._series.get(detector, 0):
            self._series[detector] = int(n_series)

    @property
    def n_series(self) -> int:
        """Series over all detectors, as registered."""
        return sum(self._series.values())

    def threshold(self, n_series: int, window_s: float) -> float:
        """Nats that the evidence of one of `n_series` series must reach, judged once per `window_s`."""
        if not window_s > 0:
            raise ConfigError(f"window_s must be above 0, not {window_s}")
        return max(0.0, math.log(max(n_series, 1) * (WEEK_S / window_s) / self.false_pages_per_week))

    def nats(self, window_s: float) -> float:
        """The threshold in force: over all registered series, rounded up as the class says."""
        n = max(self.n_series, self.floor_series)
        rounded = 10 ** math.ceil(math.log10(n) - 1e-9)
        return self.threshold(rounded, window_s)
