"""The role `windows`: raw records of the source topics in, portions to `flyball.windows` out.

    getmany → decode (poison → dead letters) → Front of the partition → every `cut_s` a portion → every few seconds a snapshot, then a commit

What keeps it exact: a portion is acknowledged before the snapshot that is ahead of it, and a snapshot before the commit. After a crash the
newest snapshot is restored and its partition read again from there; what is told once more for that, the merger behind knows already. The
committed offset is never past the first record of an open window, so it will do where a snapshot is gone, copies of calls across it aside.

A snapshot is some records of `flyball.state`, in one of two slots in turn, and a mark that names the slot: a mark never points at
half of a snapshot, also when compaction runs meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np
import structlog

from flyball.core.codec import SnapshotError
from flyball.core.errors import ConfigError, FlyballError
from flyball.core.events import Batch, Event
from flyball.core.ports import Decoded
from flyball.streams.front import Front
from flyball.streams.kafka.client import GroupReader, Place, Record, Writer, read_all
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.dead_letters import KafkaLetter, to_headers
from flyball.streams.kafka.topics import TAKEN_IN
from flyball.streams.portion import encode_portion
from flyball.streams.windows import WindowSettings

ROLE: Final = "windows"
_CHUNK: Final = 4 << 20
_SNAPSHOT_BYTES_A_S: Final = 4 << 20
"""A large state is stored less often, so that storing it never takes more than this."""
_STEP_S: Final = 2.0
_SLICE_S: Final = 0.5
_log = structlog.get_logger(__name__)

Decode = Callable[[str, bytes, Mapping[str, bytes]], Decoded]
"""(topic without prefix, value, headers) → events and what could not be taken. Raises nothing about the bytes."""


class Stuck(FlyballError):
    """Lag grows and nothing moves, or the group cannot be joined: the process should end, and be started again."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class RoleSettings:
    """Args:
    cut_s: how often a portion is sent.
    snapshot_s: how often changed state is stored, at most.
    quiet_s: a partition read to its end that had nothing for so long is told to be idle.
    stuck_s: without progress for so long while there is something to read, the role ends.
    most: records read at once.
    """

    cut_s: float = 0.5
    snapshot_s: float = 5.0
    quiet_s: float = 2.0
    stuck_s: float = 60.0
    most: int = 5000


class _Mark(msgspec.Struct, array_like=True):
    """Where the newest whole snapshot is, and which record it follows."""

    slot: int
    chunks: int
    last: int


@dataclass(slots=True)
class _Owned:
    """A partition of ours."""

    place: Place
    front: Front
    slot: int = 0
    saved: int = -2
    """Newest record in the stored snapshot."""
    saved_at: float = 0.0
    pause_s: float = 0.0
    committed: int = -1
    heard_at: float = 0.0
    confirmed_at: float | None = None
    """When a broker last said that there is nothing more."""
    quiet_s: float = 0.0
    """For how long the partition has been known to be read to its end."""
    received_at: float | None = None


@dataclass(slots=True)
class _Read:
    """The events of one sender among some records."""

    events: list[Event] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    received_at: float | None = None


class WindowsRole:
    """One process's share of the window stage.

    Args:
        decode: bytes to events.
        clock: wall time, in seconds since the epoch; only tells ages of records that say no arrival.
    """

    def __init__(
        self,
        config: KafkaConfig,
        decode: Decode,
        windows: WindowSettings,
        settings: RoleSettings | None = None,
    ) -> None:
        self._config, self._decode, self._windows = config, decode, windows
        self._settings = settings or RoleSettings()
        self._reader = GroupReader(config, ROLE, TAKEN_IN, self._assigned, self._revoked)
        self._writer = Writer(config)
        self._owned: dict[Place, _Owned] = {}
        self._busy = asyncio.Lock()
        """Held while fronts are fed, cut or stored, so that a partition is not given away in the middle."""
        self._state_partitions = 1
        self._moved_at = 0.0
        self.rejected = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set. Leaves the group at once, with everything told and stored.

        Raises: Stuck; KafkaError.
        """
        await self._writer.start()
        try:
            self._state_partitions = await self._writer.partitions("state")
            await self._reader.start()
            self._moved_at = time.monotonic()
            cut_at = 0.0
            while not stop.is_set():
                found = await self._reader.read(self._settings.most, 0.1)
                async with self._busy:
                    await self._take(found)
                    now = time.monotonic()
                    if now - cut_at >= self._settings.cut_s:
                        cut_at = now
                        await self._tell()
                await self._watch()
            async with self._busy:
                await self._hand_over(list(self._owned))
        finally:
            await self._reader.stop()
            await self._writer.stop()

    # --- partitions come and go -------------------------------------------------------------------------------------

    async def _assigned(self, places: list[Place]) -> None:
        async with self._busy:
            self._moved_at = time.monotonic()
            begins = await self._reader.begins(places) if places else {}
            states: dict[int, list[Record]] = {}
            for place in places:
                which = place.partition % self._state_partitions
                if which not in states:
                    states[which] = await read_all(self._config, Place(self._config.topic("state"), which))
                owned = await self._restored(place, states[which], begins[place])
                self._reader.seek(place, max(owned.front.last + 1, begins[place]))
                owned.heard_at = time.monotonic()
                self._owned[place] = owned
            for place in places:
                await self._send(self._owned[place], sources=[str(p) for p in self._reader.sources()])
            _log.info("partitions.taken", partitions=[str(p) for p in places])

    async def _restored(self, place: Place, records: Sequence[Record], begin: int) -> _Owned:
        newest = {r.key: r.value for r in records if r.key is not None}
        raw = newest.get(str(place).encode())
        if raw is not None:
            mark = msgspec.msgpack.decode(raw, type=_Mark)
            parts = [newest.get(f"{place}#{mark.slot}.{k}".encode()) for k in range(mark.chunks)]
            front = Front(str(place), self._windows)
            try:
                front.restore(b"".join(p or b"" for p in parts))
            except (SnapshotError, ConfigError) as e:
                _log.warning("state.unreadable", partition=str(place), why=str(e))
            else:
                return _Owned(place, front, mark.slot, front.last, time.monotonic())
        committed = await self._reader.committed(place)
        return _Owned(place, Front(str(place), self._windows, origin=max(committed or 0, begin)))

    async def _revoked(self, places: list[Place]) -> None:
        async with self._busy:
            await self._hand_over([p for p in places if p in self._owned])

    async def _hand_over(self, places: Sequence[Place]) -> None:
        for place in places:
            await self._send(self._owned[place])
            await self._save(self._owned[place])
        await self._commit()
        for place in places:
            del self._owned[place]

    # --- records ----------------------------------------------------------------------------------------------------

    async def _take(self, found: Mapping[Place, Sequence[Record]]) -> None:
        letters: list[KafkaLetter] = []
        for place, records in found.items():
            owned = self._owned.get(place)
            # Between an assignment and its seek the client may hand out what stands elsewhere.
            fresh = [r for r in records if owned is not None and r.offset > owned.front.last]
            if owned is None or not fresh:
                continue
            for some in _slices(fresh):
                for sender, read in self._read(place, some, letters).items():
                    batch = Batch(events=read.events, sender=sender, received_at=read.received_at)
                    owned.front.feed(batch, np.array(read.offsets, np.int64), some[-1].offset)
                    if read.received_at is not None:
                        owned.received_at = max(owned.received_at or 0.0, read.received_at)
            owned.front.feed(Batch(events=[]), np.empty(0, np.int64), fresh[-1].offset)
            owned.heard_at = self._moved_at = time.monotonic()
            owned.confirmed_at, owned.quiet_s = None, 0.0
        acknowledged = [
            await self._writer.send("dead-letters", x.body, key=x.key, headers=to_headers(x)) for x in letters
        ]
        for sent in acknowledged:
            await sent

    def _read(self, place: Place, records: Sequence[Record], letters: list[KafkaLetter]) -> dict[str, _Read]:
        topic = place.topic.removeprefix(self._config.prefix)
        by_sender: dict[str, _Read] = {}
        for r in records:
            headers = dict(r.headers)
            decoded = self._decode(topic, r.value or b"", headers)
            read = by_sender.setdefault(headers.get("sender", b"").decode("utf-8", "replace"), _Read())
            read.events += decoded.events
            read.offsets += [r.offset] * len(decoded.events)
            at = _received_at(headers, r.timestamp)
            read.received_at = at if read.received_at is None else max(read.received_at, at)
            for bad in decoded.rejected:
                self.rejected += 1
                letters.append(
                    KafkaLetter(
                        topic=place.topic, partition=place.partition, offset=r.offset, reason=bad.reason, detail=bad.detail, at=at,
                        size=len(bad.data), body=bad.data, index=bad.index, headers=tuple(r.headers),
                    )
                )  # fmt: skip
        return by_sender

    # --- what is told -----------------------------------------------------------------------------------------------

    async def _tell(self) -> None:
        await self._let_time_pass()
        for owned in self._owned.values():
            await self._send(owned)
        now = time.monotonic()
        for owned in self._owned.values():
            due = owned.front.last != owned.saved and now - owned.saved_at >= owned.pause_s
            if due:
                await self._save(owned)
        await self._commit()

    async def _let_time_pass(self) -> None:
        """Partitions without news: a broker has to say that they are read to the end before time may pass in them."""
        asked_at = time.monotonic()
        silent = [o for o in self._owned.values() if asked_at - o.heard_at >= self._settings.cut_s]
        if not silent:
            return
        ends = await self._reader.ends([o.place for o in silent])
        for owned in silent:
            if ends[owned.place] > owned.front.last + 1:
                owned.confirmed_at, owned.quiet_s = None, 0.0
                continue
            if owned.confirmed_at is not None:
                # A broker that did not answer for half a minute says nothing about that half minute.
                owned.quiet_s += min(asked_at - owned.confirmed_at, _STEP_S)
            owned.confirmed_at = asked_at
            if owned.received_at is not None:
                owned.front.tick(owned.received_at + owned.quiet_s)

    async def _send(self, owned: _Owned, sources: Sequence[str] = ()) -> None:
        portion = owned.front.cut(quiet=owned.quiet_s >= self._settings.quiet_s, sources=sources)
        if portion is not None:
            sent = await self._writer.send("windows", encode_portion(portion), key=portion.source.encode())
            await sent

    async def _save(self, owned: _Owned) -> None:
        state, slot, which = (
            owned.front.snapshot(), 1 - owned.slot, owned.place.partition % self._state_partitions,
        )  # fmt: skip
        chunks = [state[i : i + _CHUNK] for i in range(0, len(state), _CHUNK)]
        sent: list[Any] = [
            await self._writer.send("state", chunk, key=f"{owned.place}#{slot}.{k}".encode(), partition=which)
            for k, chunk in enumerate(chunks)
        ]
        for one in sent:
            await one
        mark = msgspec.msgpack.encode(_Mark(slot, len(chunks), owned.front.last))
        await (await self._writer.send("state", mark, key=str(owned.place).encode(), partition=which))
        owned.slot, owned.saved, owned.saved_at = slot, owned.front.last, time.monotonic()
        owned.pause_s = max(self._settings.snapshot_s, len(state) / _SNAPSHOT_BYTES_A_S)

    async def _commit(self) -> None:
        """Up to the first record of the oldest open window, and never past what is stored."""
        due = {
            place: n
            for place, owned in self._owned.items()
            if (n := min(owned.front.needed_from, owned.saved + 1)) > owned.committed and owned.saved >= 0
        }
        if due and await self._reader.commit(due):
            for place, n in due.items():
                self._owned[place].committed = n

    # --- watchdog ---------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        still_s = time.monotonic() - self._moved_at
        if still_s < self._settings.stuck_s:
            return
        if not self._owned:
            # Others may have all partitions; then the group at least answers.
            self._moved_at = time.monotonic()
            return
        ends = await asyncio.wait_for(self._reader.ends(list(self._owned)), self._settings.stuck_s)
        behind = {str(p): ends[p] - o.front.last - 1 for p, o in self._owned.items()}
        if any(n > 0 for n in behind.values()):
            raise Stuck(f"nothing was read for {still_s:.0f} s, but there is more: {behind}")
        self._moved_at = time.monotonic()


def _slices(records: Sequence[Record]) -> Iterator[list[Record]]:
    """Records that came within `_SLICE_S` of each other: senders are told apart within these only, so that going through a backlog
    takes nobody's time far ahead of the others'."""
    some: list[Record] = []
    begun = 0.0
    for r in records:
        at = _received_at(dict(r.headers), r.timestamp)
        if some and abs(at - begun) > _SLICE_S:
            yield some
            some = []
        if not some:
            begun = at
        some.append(r)
    if some:
        yield some


def _received_at(headers: Mapping[str, bytes], timestamp_ms: int) -> float:
    """When the record's events arrived: as our ingest says, else when the record was made."""
    try:
        return float(headers["received_at"])
    except (KeyError, ValueError):
        return timestamp_ms / 1000.0


__all__ = ["Decode", "RoleSettings", "Stuck", "WindowsRole"]
