"""How far event time has come, and whose clock is wrong.

Every sender has a newest event time of its own; the watermark is the least of them less the allowed lateness, but never more
than `max_delay_s` behind the newest of all. Pure: the time of arrival comes in with the batch or the tick.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from flyball.core.columns import Floats

AHEAD_S: Final = 1.0
"""A clock that leads ours by more than this is measured and corrected."""
BEHIND_S: Final = 120.0
"""A sender whose newest event is steadily older than this has a slow clock; below it, it may just hold events back."""
FUTURE_S: Final = 2.0
"""An event later than its arrival by more than this is clamped to the arrival."""
MAX_SKEW_S: Final = 86_400.0
"""More than a day is no clock that is off: such times are clamped or late, not corrected."""
_REMEMBERED: Final = 9
_AGES: Final = 32
"""Bodies that a sender's habit of holding events back is read off."""
_ENOUGH: Final = 5
_STEADY_S: Final = 15.0
MAX_SENDERS: Final = 10_000


@dataclass(slots=True)
class Sender:
    """What is known of one sender. Times are corrected event time, except `delivered`, which is our clock's."""

    newest: float = -math.inf
    delivered: float = -math.inf
    holds: bool = False
    """Sends calls, so the watermark waits for it. One that only reports changes or GPU samples holds nobody back."""
    late: int = 0
    correction_s: float = 0.0
    """Added to the times of its events; the negative of its skew."""
    gaps_s: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    """Arrival less newest raw event time, of its last bodies."""
    queued: bool = False
    ages_s: deque[float] = field(default_factory=lambda: deque(maxlen=_AGES))
    """How old the oldest event of its last bodies was on arrival: how long it may hold an event back."""

    def frontier(self, now: float, max_delay_s: float) -> float:
        """Up to when its events can be expected to have arrived.

        A sender that says nothing is either idle or collecting. One whose last bodies never held an event back for longer than h seconds
        has, by `now`, told everything up to now - h; without this, every sender of sparse traffic would be waited for
        as long as a dead one.
        """
        if len(self.ages_s) < _ENOUGH:
            return self.newest
        held_s = max(self.ages_s)
        return max(self.newest, now - held_s) if held_s < max_delay_s else self.newest

    def measure(self, gap_s: float) -> None:
        """Take one body's gap and decide the correction anew.

        The median of several bodies decides, so that one held-back or one broken body changes nothing. A slow clock must
        also be steady: a sender that works off a backlog is late, not skewed.
        """
        self.gaps_s.append(gap_s)
        if not self.correction_s and -AHEAD_S <= gap_s <= BEHIND_S:
            return
        if len(self.gaps_s) < _ENOUGH:
            return
        middle = median(self.gaps_s)
        ahead = -MAX_SKEW_S <= middle < -AHEAD_S
        behind = BEHIND_S < middle <= MAX_SKEW_S and self._steady(middle)
        if not (ahead or behind):
            self.correction_s = 0.0
        elif abs(middle - self.correction_s) > AHEAD_S or not self.correction_s:
            self.correction_s = middle

    def _steady(self, middle: float) -> bool:
        return sum(abs(gap - middle) <= _STEADY_S for gap in self.gaps_s) * 4 >= 3 * len(self.gaps_s)


class Watermarks:
    """The watermark over all senders. Monotone.

    `delivered` of a batch is its `received_at`, or its newest event time in a replay. A sender counts while it has delivered within
    `max_delay_s`. Ticks say what time it is while nothing arrives; they must come from the clock that set `received_at`, and
    only once everything received before has been fed, else a backlog would be called late.
    """

    def __init__(self, lateness_s: float, max_delay_s: float, max_senders: int = MAX_SENDERS) -> None:
        self.lateness_s, self.max_delay_s, self.max_senders = lateness_s, max_delay_s, max_senders
        self.senders: dict[str, Sender] = {}
        self.value = -math.inf
        self.newest = -math.inf
        self.late = self.clamped_future = 0
        self._now = -math.inf
        self._lag_s = 0.0
        self._queue: list[tuple[float, str]] = []

    def sender(self, name: str) -> Sender:
        """The record of a sender; the one silent for longest is forgotten when there are too many."""
        found = self.senders.get(name)
        if found is None:
            if len(self.senders) >= self.max_senders:
                self._forget()
            found = self.senders[name] = Sender()
        return found

    def correct(self, sender: Sender, at: Floats, received_at: float | None) -> Floats:
        """Event times as windows shall see them: skew taken out, the future clamped to the arrival.

        Returns `at` itself when there is nothing to correct.
        """
        if received_at is None or not len(at):
            return at
        gap_s = received_at - float(at.max())
        if gap_s >= -self.max_delay_s or 2 * int((at > received_at + FUTURE_S).sum()) >= len(at):
            sender.measure(
                gap_s
            )  # else a few broken timestamps among good ones: they say nothing about the clock
        if sender.correction_s:
            at = at + sender.correction_s
            gap_s -= sender.correction_s
        age_s = received_at - float(at.min())
        if age_s <= self.max_delay_s:  # older ones are late whatever we wait
            sender.ages_s.append(age_s)
        if gap_s < -FUTURE_S:
            ahead = at > received_at + FUTURE_S
            self.clamped_future += int(ahead.sum())
            at = np.where(ahead, received_at, at)
        return at

    def observe(
        self, name: str, sender: Sender, newest: float, received_at: float | None, *, calls: bool
    ) -> float:
        """Take note of a delivery whose newest corrected event time is `newest`; returns the watermark."""
        sender.newest = max(sender.newest, newest)
        self.newest = max(self.newest, newest)
        delivered = newest if received_at is None else received_at
        sender.delivered = max(sender.delivered, delivered)
        sender.holds = sender.holds or calls
        if delivered >= self._now:
            self._now = delivered
        self._lag_s = max(0.0, self._now - self.newest)
        if sender.holds and not sender.queued:
            sender.queued = True
            heapq.heappush(self._queue, (sender.newest, name))
        return self._advance()

    def tick(self, now: float) -> float:
        """It is `now`, and nothing else has arrived; returns the watermark."""
        self._now = max(self._now, now)
        # A stream that runs further behind than we wait (an exporter with minutes of delay) keeps its distance while it
        # is silent; any other is waited for no longer than max_delay_s.
        behind_s = self._lag_s if self._lag_s > self.max_delay_s else 0.0
        if self.newest > -math.inf:
            self.value = max(self.value, now - behind_s - self.max_delay_s)
        return self._advance()

    def count_late(self, sender: Sender, n: int) -> None:
        sender.late += n
        self.late += n

    def _advance(self) -> float:
        least = self._least()
        self.value = max(self.value, least, self.newest - self.max_delay_s)
        return self.value

    def _least(self) -> float:
        """Least frontier over active senders, less lateness; the newest of all when none holds.

        Entries of the queue may be older than their sender's frontier: put right when they come to the top, so that a delivery costs O(log senders).
        """
        queue = self._queue
        while queue:
            newest, name = queue[0]
            sender = self.senders.get(name)
            if sender is None:
                heapq.heappop(queue)
            elif sender.delivered < self._now - self.max_delay_s:
                heapq.heappop(queue)
                sender.queued = False
            else:
                frontier = sender.frontier(self._now, self.max_delay_s)
                if frontier <= newest:
                    return newest - self.lateness_s
                heapq.heapreplace(queue, (frontier, name))
        return self.newest - self.lateness_s

    def _forget(self) -> None:
        """Drop the longest silent tenth, so that the search is paid for by many newcomers."""
        oldest = sorted(self.senders, key=lambda name: (self.senders[name].delivered, name))
        for name in oldest[: max(1, self.max_senders // 10)]:
            del self.senders[name]
        self._queue = sorted((s.newest, name) for name, s in self.senders.items() if s.queued)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as plain values."""
        return {
            "value": self.value, "newest": self.newest, "now": self._now, "lag_s": self._lag_s,
            "late": self.late, "clamped_future": self.clamped_future, "queue": self._queue,
            "senders": [
                (name, s.newest, s.delivered, s.holds, s.late, s.correction_s, list(s.gaps_s), s.queued, list(s.ages_s))
                for name, s in self.senders.items()
            ],
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        self.value, self.newest = state["value"], state["newest"]
        self._now, self._lag_s = state["now"], state["lag_s"]
        self.late, self.clamped_future = state["late"], state["clamped_future"]
        self.senders = {
            name: Sender(
                newest,
                delivered,
                holds,
                late,
                correction_s,
                deque(gaps_s, maxlen=_REMEMBERED),
                queued,
                deque(ages_s, maxlen=_AGES),
            )
            for name, newest, delivered, holds, late, correction_s, gaps_s, queued, ages_s in state["senders"]
        }
        self._queue = [(at, name) for at, name in state["queue"]]
