"""Token buckets: how one process keeps the limits of its directives. Standard library only; safe from any thread.

Requests are taken when a call is let through. Tokens and dollars are known only afterwards: they are charged then, and until then
each open call counts with what those before it cost on average (before the first one of the scope: calls of this process), so that a
hundred calls at once do not pass a limit that none of them has been charged to yet. What was spent beyond the limit is owed, and paid
back before the next call goes through.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from flyball.remediation.points.matching import LIMITS, DirectiveLike, limits_of

BURST_S: Final = 10.0
"""What may go through at once after a pause, in seconds of the rate; of requests at least one."""
OPEN_S: Final = 120.0
"""After this long a call that was never charged gives back what it was let through with: it failed, or nobody charges."""
MOST_OWED_S: Final = 600.0
"""What one huge call costs beyond its limit keeps others of the scope waiting for at most this long."""
_PER_S: Final = {"requests_per_min": 1 / 60.0, "tokens_per_min": 1 / 60.0, "usd_per_hour": 1 / 3600.0}


@dataclass(slots=True)
class _Bucket:
    """One limit of one directive. `level`: what may go now; below zero it is owed."""

    rate: float
    level: float
    at: float
    cost: float = 0.0
    """Mean cost of a call, of the newest ones; 0 while nobody knows."""
    open: deque[tuple[float, float]] = field(default_factory=deque)
    """(since, taken for it) of the calls that are under way."""

    def fill(self, now: float, most: float) -> None:
        while self.open and self.open[0][0] <= now - OPEN_S:
            self.level += self.open.popleft()[1]
        self.level = min(most, self.level + max(0.0, now - self.at) * self.rate)
        self.at = now


class Buckets:
    """The counters of all limits that are held. `share`: what part of every limit is this process's own.

    Args:
        clock: seconds that never go back; only differences count.
        share: in (0, 1]; with three equal gateways behind one balancer, a third each.
    """

    def __init__(self, clock: Callable[[], float], share: float = 1.0) -> None:
        self._clock = clock
        self._share = share
        self._lock = threading.Lock()
        self._buckets: dict[str, dict[str, _Bucket]] = {}
        self._typical = {"tokens_per_min": 0.0, "usd_per_hour": 0.0}
        """Mean cost of any call of this process, of the newest ones."""

    def keep(self, directives: Iterable[DirectiveLike]) -> None:
        """Takes the set that is held now. A limit that got tighter keeps what was spent; one that is gone is forgotten."""
        now = self._clock()
        with self._lock:
            kept: dict[str, dict[str, _Bucket]] = {}
            for d in directives:
                limits = limits_of(d.params) if d.kind == "limit" else {}
                if limits:
                    old = self._buckets.get(d.id, {})
                    kept[d.id] = {name: self._bucket(name, value, old, now) for name, value in limits.items()}
            self._buckets = kept

    def _bucket(self, name: str, limit: float, old: dict[str, _Bucket], now: float) -> _Bucket:
        rate = limit * _PER_S[name] * self._share
        known = old.get(name)
        if known is None:
            return _Bucket(rate, _most(name, rate), now, self._typical.get(name, 0.0))
        known.fill(now, _most(name, known.rate))
        known.rate = rate
        known.level = min(known.level, _most(name, rate))
        return known

    def admit(self, directives: Sequence[DirectiveLike]) -> tuple[str, str, float] | None:
        """Takes one call out of all of them, or out of none: a call that one limit refuses costs nothing at the others."""
        now = self._clock()
        with self._lock:
            mine = [(d.id, self._buckets[d.id]) for d in directives if d.id in self._buckets]
            worst: tuple[str, str, float] | None = None
            for identity, by_name in mine:
                for name in LIMITS:
                    bucket = by_name.get(name)
                    wait_s = 0.0 if bucket is None else _wait_s(name, bucket, now)
                    if wait_s > 0.0 and (worst is None or wait_s > worst[2]):
                        worst = (identity, name, wait_s)
            if worst is None:
                for _, by_name in mine:
                    for name, bucket in by_name.items():
                        if name == "requests_per_min":
                            bucket.level -= 1.0
                        else:
                            bucket.level -= bucket.cost
                            bucket.open.append((now, bucket.cost))
            return worst

    def charge(self, identities: Iterable[str], tokens: float | None, usd: float | None) -> None:
        """What a call that went through has cost, also one that no limit let through; None where nobody knows."""
        now = self._clock()
        spent = {"tokens_per_min": _known(tokens), "usd_per_hour": _known(usd)}
        with self._lock:
            for name, cost in spent.items():
                if cost:
                    self._typical[name] = _mean(self._typical[name], cost)
            for identity in identities:
                for name, bucket in self._buckets.get(identity, {}).items():
                    if name == "requests_per_min":
                        continue
                    bucket.fill(now, _most(name, bucket.rate))
                    taken = bucket.open.popleft()[1] if bucket.open else 0.0
                    cost = spent[name]
                    if cost is None:
                        cost = taken  # nobody knows: it keeps what calls cost on average
                    elif cost > 0.0:  # a call that failed for nothing says nothing about the others
                        bucket.cost = _mean(bucket.cost, cost)
                    bucket.level = max(bucket.level + taken - cost, -MOST_OWED_S * bucket.rate)


def _known(cost: float | None) -> float | None:
    return cost if cost is not None and 0.0 <= cost < 1e15 else None


def _mean(mean: float, cost: float) -> float:
    return 0.8 * mean + 0.2 * cost if mean else cost


def _most(name: str, rate: float) -> float:
    return max(1.0, rate * BURST_S) if name == "requests_per_min" else rate * BURST_S


def _wait_s(name: str, bucket: _Bucket, now: float) -> float:
    """Seconds until a call may go; 0 when it may go now."""
    bucket.fill(now, _most(name, bucket.rate))
    if name == "requests_per_min":
        return max(0.0, 1.0 - bucket.level) / bucket.rate if bucket.level < 1.0 - 1e-9 else 0.0
    return 0.0 if bucket.level > 0.0 else max(-bucket.level / bucket.rate, 1.0)
