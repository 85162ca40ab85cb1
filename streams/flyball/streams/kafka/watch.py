"""Whether a role that reads a group's partitions still gets on; and if not for too long, why its process should end."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from flyball.core.errors import FlyballError
from flyball.streams.kafka.client import KafkaError, Place

_ASK_S: Final = 2.0


class Stuck(FlyballError):
    """Lag grows and nothing moves, or the group cannot be joined: the process should end, and be started again."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class End:
    """What a broker said of a partition."""

    asked_at: float
    """Monotonic seconds, just before it was asked: all before that is in `offset`."""
    offset: int
    """That the next record will have."""
    wall: float = -math.inf
    """Seconds since the epoch when it was asked."""


class Asked(Protocol):
    """What is wanted of a `GroupReader`."""

    def sources(self) -> list[Place]: ...
    async def ends(self, places: Iterable[Place]) -> dict[Place, int]: ...


@dataclass(slots=True)
class _Seen:
    next: int = -1
    moved_at: float = 0.0


@dataclass(slots=True)
class Watch:
    """Asks the brokers how far each partition goes, and compares it with how far the role is.

    Times are counted while this process runs: one that was suspended finds everything as it left it.

    Args:
        stuck_s: without progress for so long while there is something to read, `run` raises.
        every_s: how often the brokers are asked.
        at: what is owned, and the offset that each goes on with.
        standing: those of them that stand on purpose.
        doing: what the role is at, for the message.
        step_s: most that one turn counts for. A longer one means that this process stood still, not that the brokers did.
        clock: wall time, the same as that of arrivals.
    """

    reader: Asked
    group: str
    stuck_s: float
    every_s: float
    at: Callable[[], Mapping[Place, int]]
    standing: Callable[[], Collection[Place]]
    doing: Callable[[], str]
    step_s: float = 5.0
    clock: Callable[[], float] = time.time
    ends: dict[Place, End] = field(default_factory=dict)
    _now: float = 0.0
    _answered_at: float = 0.0
    _waits_for: str = "the group could not be joined"
    """What has to come about before anything can be read; empty once it has."""
    _moved_at: float = 0.0
    """When something of that last happened."""
    _seen: dict[Place, _Seen] = field(default_factory=dict)

    def waits(self, why_not: str) -> None:
        """Nothing is to be read before `reads`. `why_not`: what to say when that takes too long."""
        self._waits_for = why_not
        self.moved()

    def reads(self) -> None:
        self._waits_for = ""

    def moved(self) -> None:
        """What is waited for came nearer."""
        self._moved_at = self._now

    def at_work(self) -> None:
        """Something other than reading got on, such as storing a large state: nothing counts as left lying meanwhile."""
        for seen in self._seen.values():
            seen.moved_at = self._now

    def lag(self) -> dict[Place, int]:
        """Records that wait in each partition, as far as that is known."""
        return {
            p: max(0, self.ends[p].offset - following) for p, following in self.at().items() if p in self.ends
        }

    async def run(self) -> None:
        """Raises: Stuck, once nothing has moved for too long."""
        before = time.monotonic()
        while True:
            await asyncio.sleep(self.every_s)
            await self._ask()
            now = time.monotonic()
            self._now += min(now - before, self.step_s)
            before = now
            if why := self._stuck():
                raise Stuck(why)

    async def _ask(self) -> None:
        # Where nothing is our own, whether anybody answers is still worth knowing.
        places = list(self.at()) or self.reader.sources()
        for some in ([places], [[p] for p in places]) if places else ():
            found = await asyncio.gather(*(self._ends(s) for s in some))
            known = {place: end for ends in found for place, end in ends.items()}
            if known:
                self._answered_at = self._now
                self.ends = {p: e for p, e in (self.ends | known).items() if p in places}
                return
            # A partition without a leader makes all of them wait: one by one, the others answer.

    async def _ends(self, places: Sequence[Place]) -> dict[Place, End]:
        asked_at, wall = time.monotonic(), self.clock()
        try:
            found = await asyncio.wait_for(self.reader.ends(places), _ASK_S)
        except (KafkaError, TimeoutError):
            return {}
        return {p: End(asked_at, offset, wall) for p, offset in found.items()}

    def _stuck(self) -> str:
        """Why the process should end; empty while it should not."""
        mute_s = self._now - self._answered_at
        if mute_s > self.stuck_s:
            return f"no broker has answered for {mute_s:.0f} s; at {self.doing()}"
        if self._waits_for:
            waited_s = self._now - self._moved_at
            if waited_s > self.stuck_s:
                return f"{self._waits_for} for {waited_s:.0f} s (group {self.group}), although brokers answer"
            return ""
        following = self.at()
        standing = self.standing()
        self._seen = {
            p: self._seen.get(p) or _Seen(moved_at=self._now) for p in following if p not in standing
        }
        for place, seen in self._seen.items():
            end = self.ends.get(place)
            if following[place] != seen.next or end is None or end.offset <= seen.next:
                seen.next, seen.moved_at = following[place], self._now
            elif self._now - seen.moved_at > self.stuck_s:
                return (
                    f"nothing of {place} was taken for {self._now - seen.moved_at:.0f} s, but {end.offset - seen.next} records wait "
                    f"there; at {self.doing()}"
                )
        return ""


__all__ = ["End", "Stuck", "Watch"]
