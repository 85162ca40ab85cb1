"""Dwell and hysteresis in event time, and a learned level of one number: for detectors that read samples one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from flyball.core.anomaly import Phase
from flyball.core.errors import ConfigError

_NEVER = -math.inf


class Dwell(msgspec.Struct, frozen=True):
    """How long something must hold before it is told, and how long it must be gone.

    Args:
        dwell_s, samples: over for so long and in so many samples in a row before `on`.
        recover_s: calm for so long before `off`.
        gap_s: samples further apart than this do not add up: nobody knows what was between them.
        still_every_s: the least time between two `still`.

    Raises: ConfigError for values out of range.
    """

    dwell_s: float = 60.0
    samples: int = 3
    recover_s: float = 60.0
    gap_s: float = 180.0
    still_every_s: float = 30.0

    def __post_init__(self) -> None:
        if (
            self.samples < 1
            or self.dwell_s < 0
            or self.recover_s < 0
            or self.gap_s <= 0
            or self.still_every_s < 0
        ):
            raise ConfigError(f"dwell out of range: {self}; samples >= 1, gap_s > 0, the others >= 0")


class Gate(msgspec.Struct):
    """One condition of one series.

    >>> g, d = Gate(), Dwell(dwell_s=20, samples=2, recover_s=20)
    >>> [g.step(at, over, not over, d) for at, over in ((0, True), (10, True), (20, True), (30, False), (50, False))]
    [None, None, 'on', None, 'off']
    """

    over_from: float = _NEVER
    over_samples: int = 0
    calm_from: float = _NEVER
    since: float = _NEVER
    """When the open episode began; -inf while none is open."""
    last_at: float = _NEVER
    said_at: float = _NEVER

    @property
    def is_open(self) -> bool:
        return self.since > _NEVER

    def step(self, at: float, over: bool, calm: bool, rule: Dwell) -> Phase | None:
        """`over` and `calm` may both be False: between the two thresholds nothing changes."""
        if at < self.last_at:
            return None  # a late sample says nothing about now
        broken = at - self.last_at > rule.gap_s
        self.last_at = at
        if over:
            if broken or self.over_samples == 0:
                self.over_from, self.over_samples = at, 0
            self.over_samples += 1
        elif calm or broken:
            self.over_samples = 0
        if not calm or broken:
            self.calm_from = _NEVER
        if calm and self.calm_from == _NEVER:
            self.calm_from = at
        if not self.is_open:
            if over and self.over_samples >= rule.samples and at - self.over_from >= rule.dwell_s:
                self.since, self.said_at = self.over_from, at
                return "on"
            return None
        if calm and at - self.calm_from >= rule.recover_s:
            return "off"
        if over and at - self.said_at >= rule.still_every_s:
            self.said_at = at
            return "still"
        return None

    def close(self) -> None:
        """After `off` was told (which still needs `since`)."""
        self.since = self.calm_from = _NEVER
        self.over_samples = 0

    def pack(self) -> list[float]:
        return [self.over_from, self.over_samples, self.calm_from, self.since, self.last_at, self.said_at]

    @classmethod
    def load(cls, s: Sequence[Any]) -> Gate:
        return cls(float(s[0]), int(s[1]), float(s[2]), float(s[3]), float(s[4]), float(s[5]))


class Level(msgspec.Struct):
    """Exponentially weighted mean and variance of one number; an ordinary mean until `memory` values were seen.

    Finch (2009), "Incremental calculation of weighted mean and variance".

    >>> level = Level()
    >>> for x in (1.0, 2.0, 3.0):
    ...     level.learn(x)
    >>> round(level.mean, 3), round(level.sd(0.0), 3)
    (2.0, 0.816)
    """

    n: int = 0
    mean: float = 0.0
    var: float = 0.0

    def learn(self, x: float, memory: int = 200) -> None:
        self.n = min(self.n + 1, 1_000_000)
        weight = 1.0 / min(self.n, memory)
        delta = x - self.mean
        self.mean += weight * delta
        self.var = (1.0 - weight) * (self.var + weight * delta * delta)

    def sd(self, floor: float) -> float:
        return max(floor, math.sqrt(self.var))

    def z(self, x: float, floor: float) -> float:
        return (x - self.mean) / self.sd(floor)

    def pack(self) -> list[float]:
        return [self.n, self.mean, self.var]

    @classmethod
    def load(cls, s: Sequence[Any]) -> Level:
        return cls(int(s[0]), float(s[1]), float(s[2]))


class Counter(msgspec.Struct):
    """A cumulative counter as a rate. A fall means that the exporter began anew: what it counted since is the increase."""

    value: float = math.nan
    at: float = _NEVER

    def step(self, value: float, at: float) -> tuple[float, float] | None:
        """(increase, seconds) since the sample before; None for the first one and for samples out of order."""
        if math.isnan(self.value):
            self.value, self.at = value, at
            return None
        seconds = at - self.at
        if seconds <= 0:
            return None
        increase = value - self.value if value >= self.value else value
        self.value, self.at = value, at
        return increase, seconds

    def pack(self) -> list[float]:
        return [self.value, self.at]

    @classmethod
    def load(cls, s: Sequence[Any]) -> Counter:
        return cls(float(s[0]), float(s[1]))
