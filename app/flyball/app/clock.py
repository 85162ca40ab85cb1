"""The wall clock; the only place of the product that reads it."""

from __future__ import annotations

import time


class SystemClock:
    def now(self) -> float:
        return time.time()


monotonic = time.perf_counter
"""For durations in metrics."""
