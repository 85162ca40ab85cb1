"""Portions from `flyball.windows` into the runtime's log, each with the offset that comes next, in one transaction."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog

from flyball.app.embedded import Embedded
from flyball.app.orders import Fault
from flyball.app.pipeline import Pipeline
from flyball.app.store import store
from flyball.core.errors import FlyballError
from flyball.streams.kafka.client import KafkaError, Place, Record, TopicReader, Writer
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.dead_letters import KafkaLetter, to_headers
from flyball.streams.portion import Portion, PortionError, decode_portion

TOPIC: Final = "windows"
ROLE: Final = "control"
_MOST: Final = 500
_READ_S: Final = 0.2
_AHEAD_BYTES: Final = 64 << 20
"""Portions that the stages have not read yet: more of them wait at the brokers."""
_COMMIT_S: Final = 5.0
_ENDS_S: Final = 5.0
_TURN_S: Final = 10.0
"""More than one turn takes."""
_LATE_S: Final = 5.0
"""A partition that has more to read, and whose newest portion tells of older arrivals, is behind its topic."""
_log = structlog.get_logger(__name__)


class Stalled(FlyballError):
    """There are portions to read, and for long none came: the process should end, and be started again."""

    exit_code = 1


@dataclass(slots=True)
class _Source:
    """What the newest portion of a source partition said."""

    idle: bool
    received_at: float
    moved_at: float
    """When that last grew."""


class Times:
    """What time it is for the stages.

    The clock's, as long as portions are read as they come. Behind a backlog, be it of portions here or of events before the window stage, it is
    that of the backlog: going through yesterday's again must not close, resolve and forget as if nothing had come since.

    Args:
        fresh: nothing was ever read: before the first portion there is nothing that time could do.
        sources: those that were known before a restart, with their newest event times; None of idle ones.
        now: when this begins, by the clock.
        stall_s: a source behind its topic that does not get on for so long holds nothing back any more.
    """

    def __init__(self, fresh: bool, sources: Mapping[str, float | None], now: float, stall_s: float) -> None:
        self._fresh, self._stall_s = fresh, stall_s
        self._sources = {name: _Source(at is None, at or 0.0, now) for name, at in sources.items()}
        self._written_at = 0.0
        self._told = 0.0

    def heard(self, portion: Portion, written_at: float) -> None:
        """Args:
        written_at: when the window stage sent it.
        """
        self._fresh = False
        self._written_at = max(self._written_at, written_at)
        known = self._sources.setdefault(portion.source, _Source(True, 0.0, self._written_at))
        known.idle = portion.idle
        if portion.received_at is not None and portion.received_at > known.received_at:
            known.received_at, known.moved_at = portion.received_at, self._written_at

    def now(self, clock: float, behind: bool) -> float | None:
        """None where time should stand still.

        Args:
            behind: there are portions that were not read.
        """
        if self._fresh or (behind and not self._written_at):
            return None
        base = min(self._written_at, clock) if behind else clock
        late = [
            s.received_at
            for s in self._sources.values()
            if not s.idle and 0.0 < s.received_at < base - _LATE_S and base < s.moved_at + self._stall_s
        ]
        self._told = max(self._told, min(late, default=base))
        return self._told


class PortionFeed:
    """Reads portions for as long as this process owns the database.

    Args:
        config: of the cluster.
        stuck_s: without a portion for so long although a broker says that there are some, the process should end.
    """

    def __init__(self, runtime: Embedded, config: KafkaConfig, stuck_s: float = 60.0) -> None:
        self._runtime, self._config, self._stuck_s = runtime, config, stuck_s
        self._topic = config.topic(TOPIC)
        self.reading = False
        """Whether it is known how much there is to read."""
        self._times = Times(True, {}, 0.0, 0.0)
        self._next: dict[Place, int] = {}
        self._ends: dict[Place, int] = {}
        self._committed: dict[Place, int] = {}
        self._still_s = 0.0
        self._answered = True
        self.taken = 0
        """Portions since the start."""
        self.unreadable = 0
        """Records since the start that are no portions; they are in the dead letters."""

    def now(self) -> float | None:
        """What time it is for the stages; None where it should stand still."""
        return self._times.now(self._runtime.clock.now(), self.lag > 0) if self.reading else None

    @property
    def lag(self) -> int:
        """Portions at the brokers that were not read, as far as is known."""
        return sum(max(0, end - self._next.get(place, 0)) for place, end in self._ends.items())

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set. A broker that is away is waited for.

        Raises: Stopped when the runtime has ended; Stalled.
        """
        loop = asyncio.get_running_loop()
        consumed = self._runtime.consumed(self._topic)
        known = await asyncio.wrap_future(self._runtime.ask(_sources_of))
        stall_s = self._runtime.pipeline.config.stall_s
        self._times = Times(not consumed, known, self._runtime.clock.now(), stall_s)
        self._next = {Place(self._topic, p): n for p, n in consumed.items()}
        self._committed = dict(self._next)
        reader = await self._started(consumed, stop)
        if reader is None:
            return
        turned_at = asked_at = committed_at = loop.time()
        try:
            while not stop.is_set():
                if self._runtime.lag()[1] > _AHEAD_BYTES:
                    await asyncio.sleep(_READ_S)
                    continue
                found = await reader.read(_MOST, _READ_S)
                if found:
                    self._still_s = 0.0
                    await self._take(found, stop)
                for place in self._ends:
                    self._ends[place] = max(self._ends[place], reader.end_seen(place))
                if loop.time() - asked_at >= _ENDS_S:
                    await self._ask(reader)
                    asked_at = loop.time()
                if loop.time() - committed_at >= _COMMIT_S:
                    await self._commit(reader)
                    committed_at = loop.time()
                now, before, turned_at = loop.time(), turned_at, loop.time()
                self._watch(min(now - before, _TURN_S))
        finally:
            await self._commit(reader)
            await reader.stop()

    async def _started(self, consumed: Mapping[int, int], stop: asyncio.Event) -> TopicReader | None:
        told = False
        while not stop.is_set():
            reader = TopicReader(self._config, TOPIC, ROLE)
            try:
                await reader.start(consumed)
                self._ends = await reader.ends()
            except KafkaError as e:
                await reader.stop()
                if not told:
                    _log.warning("portions.waiting", why=f"{type(e).__name__}: {e}")
                told = True
                await asyncio.sleep(1.0)
                continue
            self.reading = True
            return reader
        return None

    async def _take(self, found: Mapping[Place, Sequence[Record]], stop: asyncio.Event) -> None:
        for place, records in found.items():
            done: Future[int] | None = None
            for record in records:
                try:
                    portion = decode_portion(record.value or b"")
                except PortionError as e:
                    done = await self._put_aside(place, record, str(e), stop)
                    if done is None:
                        return
                else:
                    self._times.heard(portion, record.timestamp / 1000.0)
                    done = self._runtime.take_portion(record.value or b"", portion, _behind(place, record))
                    self.taken += 1
                self._next[place] = record.offset + 1
            if done is not None:
                # Not read further before this is durable: what waits in memory stays small.
                await asyncio.wrap_future(done)

    async def _put_aside(
        self, place: Place, record: Record, why: str, stop: asyncio.Event
    ) -> Future[int] | None:
        """To the dead letters, and a word about it to people. None where it could not be, because `stop` came."""
        _log.error("portion.unreadable", place=str(place), offset=record.offset, why=why)
        at, body = self._runtime.clock.now(), record.value or b""
        letter = KafkaLetter(
            topic=place.topic, partition=place.partition, offset=record.offset, reason="portion", detail=why, at=at, size=len(body),
            body=body, headers=tuple(record.headers),
        )  # fmt: skip
        while not await self._sent(letter):
            if stop.is_set():
                return None
            await asyncio.sleep(1.0)
        self.unreadable += 1
        fault = Fault(
            at=at, position=record.offset, kind="portion", reason=f"{place} at {record.offset}: {why}"
        )
        return self._runtime.order(fault, also=partial(store.put_offsets, consumed=_behind(place, record)))

    async def _sent(self, letter: KafkaLetter) -> bool:
        writer = Writer(self._config)
        try:
            await writer.start()
            await (await writer.send("dead-letters", letter.body, key=letter.key, headers=to_headers(letter)))
        except KafkaError as e:
            _log.warning("portions.waiting", why=f"{type(e).__name__}: {e}")
            return False
        finally:
            await writer.stop()
        return True

    def _watch(self, passed_s: float) -> None:
        """Counts while this process runs and a broker answers: one that was suspended finds everything as it left it."""
        if not self.lag:
            self._still_s = 0.0
        elif self._answered:
            self._still_s += passed_s
        if self._still_s > self._stuck_s:
            raise Stalled(
                f"{self._topic} has {self.lag} portions that do not come, for {self._still_s:.0f} s now"
            )

    async def _ask(self, reader: TopicReader) -> None:
        """The ends, as a broker says now; as they were where none answers."""
        try:
            async with asyncio.timeout(_ENDS_S):
                self._ends = await reader.ends()
            self._answered = True
        except (KafkaError, TimeoutError) as e:
            if self._answered:
                _log.info("portions.ends_unknown", why=f"{type(e).__name__}: {e}")
            self._answered = False

    async def _commit(self, reader: TopicReader) -> None:
        """For those who look at lag; where to go on stands in the database."""
        due = {place: n for place, n in self._next.items() if n != self._committed.get(place)}
        if not due:
            return
        try:
            async with asyncio.timeout(_ENDS_S):
                await reader.commit(due)
        except (KafkaError, TimeoutError) as e:
            _log.info("portions.lag_not_told", why=f"{type(e).__name__}: {e}")
            return
        self._committed |= due


def _behind(place: Place, record: Record) -> dict[tuple[str, int], int]:
    """The offset that comes next."""
    return {(place.topic, place.partition): record.offset + 1}


def _sources_of(pipeline: Pipeline) -> dict[str, float | None]:
    """Newest event times; None of idle sources and of those that had no event yet."""
    return {
        name: newest if not idle and math.isfinite(newest) else None
        for name, (_, newest, idle) in pipeline.sources.items()
    }


__all__ = ["ROLE", "TOPIC", "PortionFeed", "Stalled", "Times"]
