"""The wall clock, and a faster one; the only place of the product that reads it."""

from __future__ import annotations

import time


class SystemClock:
    def now(self) -> float:
        return time.time()


class FastClock:
    """Runs `speed` times as fast as life, for the demo. Stands still at `begin` until `go`."""

    def __init__(self, speed: float, begin: float) -> None:
        self.speed = speed
        self._begin = begin
        self._started: float | None = None

    def go(self) -> None:
        self._started = time.perf_counter()

    def now(self) -> float:
        if self._started is None:
            return self._begin
        return self._begin + (time.perf_counter() - self._started) * self.speed


monotonic = time.perf_counter
"""For durations in metrics."""
