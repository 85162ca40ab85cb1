"""The breaker: a runbook, or a kind of action, whose runs keep failing stays off until a person has looked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

_MOST: Final = 1000


class Failure(msgspec.Struct, frozen=True):
    at: float
    runbook: str
    actions: tuple[str, ...]


class Trip(msgspec.Struct, frozen=True):
    """One breaker that is open. `key` is `runbook:NAME` or `action:KIND`."""

    key: str
    at: float
    count: int
    per_s: float
    runbooks: tuple[str, ...]
    """Whose failures opened it."""


class Breaker(msgspec.Struct):
    """Counts runs that failed, were not verified or came to an unknown end: for all limits the three are the same.

    Opens at a number of them in a span and never closes by itself: neither time nor a good run resets it.

    >>> b = Breaker()
    >>> for at in (0.0, 60.0, 120.0):
    ...     b.failed("failover", ["redirect"], at, count=3, per_s=3600.0)
    >>> b.against("another", ["redirect"]).key
    'action:redirect'
    >>> b.reset("runbook:failover")
    >>> b.against("failover", ["redirect"]) is None
    True
    """

    failures: list[Failure] = []
    trips: dict[str, Trip] = {}

    def failed(self, runbook: str, actions: Iterable[str], at: float, *, count: int, per_s: float) -> None:
        """One run that did not do what it should. `count` in `per_s` seconds is the limit of the runbook that failed."""
        kinds = tuple(dict.fromkeys(actions))
        self.failures.append(Failure(at, runbook, kinds))
        del self.failures[: max(0, len(self.failures) - _MOST)]
        lately = [f for f in self.failures if at - f.at < per_s]
        self._count(f"runbook:{runbook}", [f for f in lately if f.runbook == runbook], at, count, per_s)
        for kind in kinds:
            self._count(f"action:{kind}", [f for f in lately if kind in f.actions], at, count, per_s)

    def _count(self, key: str, found: Sequence[Failure], at: float, count: int, per_s: float) -> None:
        if len(found) >= count and key not in self.trips:
            runbooks = tuple(dict.fromkeys(f.runbook for f in found))
            self.trips[key] = Trip(key, at, len(found), per_s, runbooks)

    def against(self, runbook: str, actions: Iterable[str]) -> Trip | None:
        """The open breaker that forbids this runbook to act; None when none does."""
        keys = [f"runbook:{runbook}", *(f"action:{kind}" for kind in actions)]
        return next((self.trips[key] for key in keys if key in self.trips), None)

    def reset(self, scope: str) -> None:
        """A person's hand. `runbook:NAME` also closes the breakers of actions that its failures helped to open;
        `action:KIND` closes one, `all` every one."""
        kind, _, name = scope.partition(":")
        if scope == "all":
            self.failures, self.trips = [], {}
        elif kind == "runbook":
            self.failures = [f for f in self.failures if f.runbook != name]
            self.trips = {k: t for k, t in self.trips.items() if k != scope and name not in t.runbooks}
        elif kind == "action":
            self.failures = [f for f in self.failures if name not in f.actions]
            self.trips.pop(scope, None)
