"""When so much of a partition is bad that it had better stand than be emptied into the dead letters. Pure."""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Final

from flyball.core.errors import ConfigError
from flyball.core.ports import Rejected
from flyball.streams.portion import Halt

_BUCKET_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class PoisonSettings:
    """Args:
    ratio: share of bad input over which a partition stands.
    least: of fewer lines than these nothing is concluded.
    window_s: the share is that of the newest so many seconds, by the records' times of arrival.
    retry_s: after standing for so long it goes on; it stands again as soon as `least` lines are as bad.

    Raises: ConfigError for a value without meaning.
    """

    ratio: float = 0.5
    least: int = 100
    window_s: float = 60.0
    retry_s: float = 20.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise ConfigError(f"{self.ratio!r} is no share; 0 to 1", where="poison_ratio")
        if self.least < 1:
            raise ConfigError(f"{self.least!r} lines; 1 or more", where="poison_least")
        for name in ("window_s", "retry_s"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{getattr(self, name)!r} is no length of time; more than 0 seconds",
                    where=f"poison_{name}",
                )


@dataclass(slots=True)
class _Bucket:
    at: float
    good: int = 0
    bad: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


class Breaker:
    """Good and bad lines of one partition over a sliding window.

    >>> b = Breaker(PoisonSettings(ratio=0.5, least=4))
    >>> b.take(10.0, 2, [Rejected("json", "", b"{")])
    >>> b.too_bad
    False
    >>> b.take(11.0, 0, [Rejected("json", "", b"{")] * 2)
    >>> b.too_bad, b.halt(17, 11.0).bad
    (True, 3)
    """

    def __init__(self, settings: PoisonSettings) -> None:
        self._settings = settings
        self._buckets: deque[_Bucket] = deque()
        self._good = self._bad = 0

    def take(self, at: float, good: int, rejected: list[Rejected]) -> None:
        """What a record, or several that came at about the same time, held."""
        if not self._buckets or at - self._buckets[-1].at >= _BUCKET_S:
            self._buckets.append(_Bucket(at))
            while at - self._buckets[0].at > self._settings.window_s:
                old = self._buckets.popleft()
                self._good -= old.good
                self._bad -= old.bad
        bucket = self._buckets[-1]  # also for what came out of order: only shares matter
        bucket.good += good
        self._good += good
        if rejected:
            bucket.bad += len(rejected)
            self._bad += len(rejected)
            bucket.reasons.update(r.reason for r in rejected)

    @property
    def too_bad(self) -> bool:
        n = self._good + self._bad
        return n >= self._settings.least and self._bad > self._settings.ratio * n

    @property
    def sure(self) -> bool:
        """Enough was seen since `forget`, and it was good enough."""
        return self._good + self._bad >= self._settings.least and not self.too_bad

    def forget(self) -> None:
        """Judges anew: what comes next decides."""
        self._buckets.clear()
        self._good = self._bad = 0

    def halt(self, offset: int, at: float) -> Halt:
        """Why to stand before the record `offset`, which came `at`."""
        reasons: Counter[str] = Counter()
        for bucket in self._buckets:
            reasons += bucket.reasons
        reason = min(reasons, key=lambda r: (-reasons[r], r), default="")
        return Halt(at, offset, reason, self._bad, self._good + self._bad, self._settings.ratio)


__all__ = ["Breaker", "PoisonSettings"]
