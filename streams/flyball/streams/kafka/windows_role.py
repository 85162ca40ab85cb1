"""The role `windows`: raw records of the source topics in, portions to `flyball.windows` out.

    getmany → decode (poison → dead letters) → Front of the partition → every `cut_s` a portion → every few seconds a snapshot, then a commit
                                                   (late → flyball.late)

What keeps it exact: dead letters, late calls and portions are acknowledged before the snapshot that is ahead of them, and a snapshot before the commit.
After a crash the newest snapshot is restored and its partition read again from there; what is told once more for that, the merger
behind knows already, while a dead letter or a late call of these seconds stands there twice, with the same topic, partition, offset and index. The
committed offset is never past the first record of an open window, so it will do where a snapshot is gone, copies of calls across it aside.

A partition is registered only once its state is restored and its place sought, in a task beside the group's own, whose heartbeats go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import structlog

from flyball.core.codec import SnapshotError
from flyball.core.errors import ConfigError
from flyball.core.events import Batch
from flyball.streams.front import Front
from flyball.streams.kafka.breaker import Breaker
from flyball.streams.kafka.client import GroupReader, KafkaError, Place, Record, Writer
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.dead_letters import KafkaLetter, to_headers
from flyball.streams.kafka.intake import Decode, Intake, Kept, Lines, slices
from flyball.streams.kafka.late import TOPIC as LATE
from flyball.streams.kafka.late import late_record
from flyball.streams.kafka.owned import Owned
from flyball.streams.kafka.role import RoleFigures, RoleSettings
from flyball.streams.kafka.snapshots import Snapshots
from flyball.streams.kafka.topics import TAKEN_IN
from flyball.streams.kafka.watch import Stuck, Watch
from flyball.streams.portion import Halt, encode_in_pieces
from flyball.streams.windows import WindowSettings

ROLE: Final = "windows"
_SNAPSHOT_BYTES_A_S: Final = 8 << 20
"""Large states are stored less often, so that storing all of them never takes more than this."""
_BEAT_S: Final = 1.0
"""How often control hears of us, and of our idle partitions, at least."""
_ON_ITS_WAY_S: Final = 1.0
"""How long a record may take from its arrival at ingest to its partition."""
_PIECE: Final = 4 << 20
_FIRST_RECORDS: Final = 100
_TURN_EVENTS: Final = 20_000
"""Taken in a turn, about: some 50 ms of work, so that portions, snapshots and stops are never far, nor much is held at once."""
_AGAIN_S: Final = 0.5
_CLOSE_S: Final = 5.0
_NONE: Final = np.empty(0, np.int64)
_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Aside:
    """What goes to other topics than the portions', before the state that is ahead of it is stored."""

    letters: list[KafkaLetter] = field(default_factory=list)
    late: list[tuple[Place, bytes, list[tuple[str, bytes]]]] = field(default_factory=list)


class WindowsRole:
    """One process's share of the window stage.

    Args:
        decode: bytes to events.
        lines: whether values of a topic, with these headers, are lines of which any may be read together.
        kept: what of rejected bytes a dead letter keeps.
        clock: wall time, the same as that of arrivals; only says until when a partition is empty.
    """

    def __init__(
        self,
        config: KafkaConfig,
        decode: Decode,
        windows: WindowSettings,
        settings: RoleSettings | None = None,
        *,
        lines: Lines = lambda _topic, _headers: False,
        kept: Kept = bytes,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._windows = config, windows
        self._settings = settings or RoleSettings()
        self._intake = Intake(config.prefix, decode, lines, kept)
        self._reader = GroupReader(config, ROLE, TAKEN_IN, self._assigned, self._revoked)
        self._writer = Writer(config)
        self._snapshots = Snapshots(config, self._writer)
        self._owned: dict[Place, Owned] = {}
        self._busy = asyncio.Lock()
        """Held while fronts are fed, cut or stored, so that a partition is not given away in the middle."""
        self._coming: asyncio.Task[None] | None = None
        """Takes on what the group has just given to us."""
        self._failed: BaseException | None = None
        """What went wrong while partitions were given away: the client would only log it."""
        self._cut_at = self._beat_at = 0.0
        self._doing = "starting"
        self._most = min(self._settings.most, _FIRST_RECORDS)
        self._watch = Watch(
            self._reader, config.group(ROLE), self._settings.stuck_s, self._settings.cut_s,
            at=lambda: {p: o.following for p, o in self._owned.items()},
            standing=lambda: [p for p, o in self._owned.items() if o.stands_until is not None],
            doing=lambda: self._doing, clock=clock,
        )  # fmt: skip
        self._counts: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    # --- life -------------------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set. Leaves the group at once, with everything told and stored.

        Raises: Stuck.
        """
        work = asyncio.ensure_future(self._work(stop))
        watch = asyncio.ensure_future(self._watch.run())
        try:
            await asyncio.wait([work, watch], return_when=asyncio.FIRST_COMPLETED)
            ended = work if work.done() else watch
        finally:
            await _ended(watch, work)
            await self._close()
        ended.result()

    async def _work(self, stop: asyncio.Event) -> None:
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await self._writer.start()
            await self._snapshots.start()
            await self._reader.start()
            while not stop.is_set():
                self._doing = "reading"
                reading = asyncio.ensure_future(self._reader.read(self._most, 0.1))
                # While the group is shared out anew, `read` takes as long as that.
                await asyncio.wait([reading, stopping], return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    await _ended(reading)
                    break
                await self._turn(reading.result())
            async with self._busy:
                await self._hand_over()
        except KafkaError as e:
            raise Stuck(f"Kafka failed while {self._doing}: {type(e).__name__}: {e}") from e
        finally:
            await _ended(stopping, *filter(None, [self._coming]))

    async def _close(self) -> None:
        """Out of the group at once; a broker that does not answer is not waited for."""
        for stopping in self._reader.stop(), self._writer.stop():
            with contextlib.suppress(TimeoutError, KafkaError):
                await asyncio.wait_for(stopping, _CLOSE_S)

    async def _turn(self, found: Mapping[Place, Sequence[Record]]) -> None:
        if self._failed is not None:
            raise self._failed
        if self._coming is not None and self._coming.done():
            coming, self._coming = self._coming, None
            if not coming.cancelled():
                coming.result()
        async with self._busy:
            await self._take(found)
            now = time.monotonic()
            if now - self._cut_at >= self._settings.cut_s:
                self._cut_at = now
                await self._tell(now)

    # --- partitions come and go -------------------------------------------------------------------------------------

    async def _assigned(self, places: list[Place]) -> None:
        """Only begins: heartbeats wait until this returns, and reading large states takes longer than a session."""
        self._counts["rebalances"] += 1
        if not places:
            self._watch.reads()
            return
        self._watch.waits("the state of its partitions could not be read")
        self._reader.pause(places)
        self._coming = asyncio.ensure_future(self._take_on(places))

    async def _take_on(self, places: list[Place]) -> None:
        self._doing = "restoring"
        while True:
            try:
                begins = await self._reader.begins(places)
                states = await self._snapshots.load(places, self._watch.moved)
                owned = [await self._restored(p, states.get(p), begins[p]) for p in places]
                break
            except KafkaError as e:
                # A broker that is being restarted, most likely. The watchdog knows when this has gone on for too long.
                _log.warning("state.not_read", why=f"{type(e).__name__}: {e}")
                await asyncio.sleep(_AGAIN_S)
        async with self._busy:
            # From here to the end of `resume` nothing waits: partitions that are taken away meanwhile are taken away whole.
            for one in owned:
                self._reader.seek(one.place, max(one.following, begins[one.place]))
                one.heard_at = one.saved_at = one.resumed_at = time.monotonic()
                self._owned[one.place] = one
            self._reader.resume(places)
            self._watch.reads()
            sources = [str(p) for p in self._reader.sources()]
            await _all([sent for one in owned for sent in await self._send(one, sources)])
        _log.info("partitions.taken", partitions=[str(p) for p in places])

    async def _restored(self, place: Place, state: bytes | None, begin: int) -> Owned:
        breaker = Breaker(self._settings.poison)
        if state is not None:
            front = Front(str(place), self._windows)
            try:
                front.restore(state)
            except (SnapshotError, ConfigError) as e:
                _log.warning("state.unreadable", partition=str(place), why=str(e))
            else:
                # Without its last arrival no time would pass in it until the next record.
                return Owned(
                    place, front, breaker, (front.last, front.halt), state_bytes=len(state), received_at=front.received_at
                )  # fmt: skip
        committed = await self._reader.committed(place)
        return Owned(place, Front(str(place), self._windows, origin=max(committed or 0, begin)), breaker)

    async def _revoked(self, places: list[Place]) -> None:
        self._watch.waits("the group could not be joined")
        if self._coming is not None:
            await _ended(self._coming)
            self._coming = None
        async with self._busy:
            handing = asyncio.ensure_future(self._hand_over())
            try:
                await asyncio.wait([handing])
            finally:
                await _ended(handing)
                self._owned.clear()
            self._failed = self._failed or handing.exception()

    async def _hand_over(self) -> None:
        """All of ours: the group takes all away before it shares them out anew."""
        self._doing = "handing over"
        used = [o for o in self._owned.values() if o.used]
        await _all([sent for owned in used for sent in await self._send(owned)])
        await self._save(used)
        await self._commit()
        self._owned.clear()

    # --- records ----------------------------------------------------------------------------------------------------

    async def _take(self, found: Mapping[Place, Sequence[Record]]) -> None:
        aside, before = _Aside(), self._counts.copy()
        self._doing = "taking records"
        for place, records in found.items():
            owned = self._owned.get(place)
            if owned is None or owned.stands_until is not None:
                continue
            # Between an assignment and its seek the client may hand out what stands elsewhere.
            fresh = [r for r in records if r.offset > owned.front.last]
            for some in slices(fresh):
                if not self._feed(owned, some, aside):
                    break
                await asyncio.sleep(0)  # heartbeats share this loop
        taken = self._counts - before
        if taken["records"]:
            at_once = _TURN_EVENTS * taken["records"] // max(taken["events"], 1)
            self._most = max(1, min(self._settings.most, at_once))
        if aside.letters or aside.late:
            await self._put_aside(aside)

    def _feed(self, owned: Owned, records: Sequence[Record], aside: _Aside) -> bool:
        """False when the partition stands now, before the first of the records that is not taken."""
        front, place = owned.front, owned.place
        read = self._intake.read(place, records, owned.breaker)
        for sender, part in read.senders.items():
            front.feed(part.batch(sender), part.offset_array(), read.last)
            aside.late += [(place, *late_record(place, sender, late)) for late in front.late]
            self._counts["late"] += len(front.late)
            self._counts["events"] += len(part.events)
        if read.taken:
            front.feed(Batch(events=[]), _NONE, read.last)  # also where no event came of them
            self._counts["records"] += read.taken
            owned.received_at = max(owned.received_at or 0.0, read.received_at)
        aside.letters += read.letters
        self._rejected.update(x.reason for x in read.letters)
        owned.heard_at = time.monotonic()
        owned.confirmed_at, owned.quiet_s = None, 0.0
        if read.halt is not None:
            self._stand(owned, read.halt)
        elif front.halt is not None and owned.breaker.sure:
            self._go_well(owned)
        return read.halt is None

    async def _put_aside(self, aside: _Aside) -> None:
        self._doing = "writing dead letters and late calls"
        sent = [
            await self._writer.send("dead-letters", x.body, key=x.key, headers=to_headers(x))
            for x in aside.letters
        ]
        sent += [
            await self._writer.send(LATE, value, key=str(place).encode(), headers=headers)
            for place, value, headers in aside.late
        ]
        await _all(sent)

    # --- poison -----------------------------------------------------------------------------------------------------

    def _stand(self, owned: Owned, halt: Halt) -> None:
        self._counts["stopped"] += 1
        owned.front.halt = owned.front.halt or halt
        owned.stands_until = time.monotonic() + self._settings.poison.retry_s
        owned.saved_at = 0.0  # stored soon: whoever takes over after a sudden end shall know
        self._reader.pause([owned.place])
        _log.error(
            "partition.stands", partition=str(owned.place), offset=halt.offset, bad=halt.bad, of=halt.of, reason=halt.reason,
            again_in_s=self._settings.poison.retry_s,
        )  # fmt: skip

    def _try_again(self, now: float) -> None:
        """Goes on with those that have stood for long enough: until they are too bad once more."""
        for owned in self._owned.values():
            if owned.stands_until is not None and now >= owned.stands_until:
                owned.stands_until, owned.resumed_at, owned.heard_at = None, now, now
                owned.breaker.forget()
                self._reader.seek(owned.place, owned.following)
                self._reader.resume([owned.place])
            elif owned.front.halt is not None and owned.at_its_end_s >= self._settings.poison.retry_s:
                self._go_well(owned)  # few came since, which says nothing against them

    def _go_well(self, owned: Owned) -> None:
        owned.front.halt = None
        _log.info("partition.goes_well", partition=str(owned.place), offset=owned.front.last)

    # --- what is told -----------------------------------------------------------------------------------------------

    async def _tell(self, now: float) -> None:
        self._try_again(now)
        for owned in self._owned.values():
            owned.pass_time(self._watch.ends.get(owned.place), self._settings.cut_s)
        self._doing = "writing portions"
        sent: list[Awaitable[Any]] = []
        still = self._still(now)
        for owned in self._owned.values():
            sent += await self._send(owned, still=still)
            still = None
        await _all(sent)
        pause_s = sum(o.state_bytes for o in self._owned.values()) / _SNAPSHOT_BYTES_A_S
        await self._save(
            [
                o
                for o in self._owned.values()
                if o.changed and now - o.saved_at >= max(self._settings.snapshot_s, pause_s)
            ]
        )
        await self._commit()

    def _still(self, now: float) -> dict[str, float] | None:
        """Our idle partitions, and until when nothing came in them; None where that was told a moment ago."""
        if now - self._beat_at < _BEAT_S:
            return None
        self._beat_at = now
        return {
            str(o.place): o.empty_until - _ON_ITS_WAY_S
            for o in self._owned.values()
            if o.confirmed_at is not None and o.quiet_s >= self._settings.idle_s
        }

    async def _send(
        self, owned: Owned, sources: Sequence[str] = (), still: Mapping[str, float] | None = None
    ) -> list[Awaitable[Any]]:
        """Puts a portion on its way, if there is anything to say."""
        quiet = owned.quiet_s >= self._settings.idle_s
        portion = owned.front.cut(quiet=quiet, sources=sources, still=still)
        if portion is None:
            return []
        values = encode_in_pieces(portion, _PIECE)
        self._counts["portions"] += 1
        self._counts["portion_bytes"] += sum(map(len, values))
        return [await self._writer.send("windows", v, key=portion.source.encode()) for v in values]

    async def _save(self, those: Sequence[Owned]) -> None:
        """Stores their state. What they have told must have been acknowledged."""
        self._doing = "storing state"
        sent: list[Any] = []
        for owned in those:
            state = owned.front.snapshot()
            sent += await self._snapshots.save(owned.place, state, owned.front.last)
            owned.state_bytes = len(state)
            self._counts["snapshots"] += 1
            self._counts["snapshot_bytes"] += len(state)
            await asyncio.sleep(0)
            self._watch.at_work()
        await _all(sent)
        for owned in those:
            # Nothing was fed meanwhile: `_busy` is held.
            owned.saved, owned.saved_at = (owned.front.last, owned.front.halt), time.monotonic()

    async def _commit(self) -> None:
        self._doing = "committing"
        due = {p: o.safe for p, o in self._owned.items() if o.saved is not None and o.safe > o.committed}
        if due and await self._reader.commit(due):
            for place, n in due.items():
                self._owned[place].committed = n

    # --- what is known ----------------------------------------------------------------------------------------------

    def figures(self) -> RoleFigures:
        """How things stand now; ask on the loop that runs the role."""
        c, owned = self._counts, {str(p): o for p, o in sorted(self._owned.items())}
        return RoleFigures(
            records=c["records"], events=c["events"], rejected=dict(self._rejected), late=c["late"], portions=c["portions"],
            portion_bytes=c["portion_bytes"], snapshots=c["snapshots"], snapshot_bytes=c["snapshot_bytes"],
            rebalances=c["rebalances"], stopped=c["stopped"], owned=list(owned), lag={str(p): n for p, n in self._watch.lag().items()},
            halts={n: o.front.halt for n, o in owned.items() if o.front.halt is not None},
            state_bytes={n: o.state_bytes for n, o in owned.items()},
        )  # fmt: skip


async def _all(sent: Sequence[Awaitable[Any]]) -> None:
    for one in sent:
        await one


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancels tasks and waits until they are over; whatever they raise stays with them."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


__all__ = ["Decode", "RoleFigures", "RoleSettings", "Stuck", "WindowsRole"]
