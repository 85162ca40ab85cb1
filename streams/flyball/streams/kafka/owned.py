"""A partition that is this process's own, and how far it is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from flyball.streams.front import Front
from flyball.streams.kafka.breaker import Breaker
from flyball.streams.kafka.client import Place
from flyball.streams.kafka.watch import End
from flyball.streams.portion import Halt

_STEP_S: Final = 2.0


@dataclass(slots=True)
class Owned:
    """A partition of ours."""

    place: Place
    front: Front
    breaker: Breaker
    saved: tuple[int, Halt | None] | None = None
    """Newest record and halt in the stored snapshot."""
    saved_at: float = 0.0
    state_bytes: int = 0
    committed: int = -1
    heard_at: float = 0.0
    confirmed_at: float | None = None
    """When a broker last said that there is nothing more."""
    empty_until: float = -math.inf
    """The same in wall time."""
    quiet_s: float = 0.0
    """For how long the partition has been known to be read to its end."""
    received_at: float | None = None
    stands_until: float | None = None
    """Not read before then: too much was bad."""
    resumed_at: float = 0.0

    @property
    def following(self) -> int:
        return self.front.last + 1

    @property
    def at_its_end_s(self) -> float:
        """How long after it was last resumed a broker said that it is read to its end; 0 where none has since its newest record."""
        return 0.0 if self.confirmed_at is None else max(0.0, self.confirmed_at - self.resumed_at)

    @property
    def used(self) -> bool:
        """Whether there is anything to store or to go on from."""
        return self.saved is not None or self.front.last >= 0

    @property
    def changed(self) -> bool:
        """Whether a stored snapshot would say something new."""
        return self.used and self.saved != (self.front.last, self.front.halt)

    @property
    def safe(self) -> int:
        """Offset to commit: the first record of the oldest open window, and never past what is stored; 0 where nothing is."""
        return 0 if self.saved is None else min(self.front.needed_from, self.saved[0] + 1)

    def pass_time(self, end: End | None, after_s: float) -> None:
        """Without news: a broker has to say that the partition is read to its end before time may pass in it.

        Args:
            end: the newest word of a broker.
            after_s: how much later than the newest record it has to be.
        """
        if end is None or end.asked_at - self.heard_at < after_s:
            return
        if end.offset > self.following:
            self.confirmed_at, self.quiet_s = None, 0.0
        elif self.confirmed_at is None or end.asked_at > self.confirmed_at:
            if self.confirmed_at is not None:
                # A broker that did not answer for half a minute says nothing about that half minute.
                self.quiet_s += min(end.asked_at - self.confirmed_at, _STEP_S)
            self.confirmed_at, self.empty_until = end.asked_at, end.wall
            if self.received_at is not None:
                self.front.tick(self.received_at + self.quiet_s)


__all__ = ["Owned"]
