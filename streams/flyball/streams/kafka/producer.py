"""Writes events to the topics: many lines a record, acknowledged by the brokers before anyone is told that they are in.

What goes the way of the events: `encode` (any thread) splits a body by topic and partition and writes its lines; `append` (the loop's
thread) puts them into the open record of their partition and sender and returns a future. A record is sealed at 64 kB, after 50 ms, or once nothing
has come in for 5 ms; a lane per partition sends what is sealed as one batch, and waits for its acknowledgement before the next.
Order in a partition is therefore the order of `append`.

The client repeats what failed for a while (idempotently: nothing twice). A body that is not acknowledged in time is told so; what of it was
not sent yet is dropped then, because its sender will send it again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import msgspec
import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    KafkaError,
    MessageSizeTooLargeError,
    OutOfOrderSequenceNumber,
    ProducerClosed,
    ProducerFenced,
    RecordListTooLargeError,
    UnknownProducerId,
)

from flyball.core.errors import Ambiguous, ConfigError, EffectError, Failed, NotAccepted
from flyball.core.events import Event
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.partition import CALLS, CHANGES, SAMPLES, STEPS, Router
from flyball.streams.kafka.topics import TOPICS

NDJSON: Final = "application/x-ndjson"
DEAD_LETTERS: Final = "dead-letters"
WRITTEN: Final = (CALLS, STEPS, SAMPLES, CHANGES, DEAD_LETTERS)
"""Topics that must be there, without prefix."""
MOST_EVENT_BYTES: Final = 900_000
"""As JSON. Brokers take a megabyte a record unless told otherwise."""

_RECORD_COSTS: Final = 500
"""Bytes of memory of a record beside its lines, roughly."""
_PROBE_S: Final = 2.0
_PROBES: Final = 2
"""So many questions in a row without an answer, and no acknowledgement meanwhile, mean that no broker is there."""
_LOOK_S: Final = 0.25
_REQUEST_S: Final = 10.0
_AGAIN: Final = (OutOfOrderSequenceNumber, UnknownProducerId, ProducerFenced, ProducerClosed)
"""The broker refused the batch for the producer's sake, or it never left: nothing of it is in, and a new producer may send it."""
_TOO_LARGE: Final = (MessageSizeTooLargeError, RecordListTooLargeError)

_lines = msgspec.json.Encoder().encode_lines
_log = structlog.get_logger(__name__)
Headers = list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class ProducerSettings:
    """Args:
    record_bytes: a record is sealed at this size.
    linger_s: and at this age at the latest.
    quiet_s: and at once when nothing has come in for so long: who sends one body after the other does not wait for `linger_s`.
    batch_bytes: records that go to a partition together, before compression.
    compression: the client compresses lz4 at its highest level, ten times slower than zstd at its default and no smaller.
    acknowledged_s: after so long without an acknowledgement the sender is told.
    request_s: as long as the client tries to send a batch.
    """

    record_bytes: int = 64 << 10
    linger_s: float = 0.05
    quiet_s: float = 0.005
    batch_bytes: int = 256 << 10
    compression: Literal["lz4", "zstd"] = "zstd"
    acknowledged_s: float = 30.0
    request_s: float = _REQUEST_S


class Part(NamedTuple):
    """Lines of one body that go to one partition. `topic` is without prefix."""

    topic: str
    partition: int
    data: bytes


class Letter(NamedTuple):
    """A record of the dead letters; `data` is None where the bytes are not kept."""

    data: bytes | None
    headers: Headers
    key: bytes


class _Body:
    """What was handed in at once; done when all its records are."""

    __slots__ = ("deadline", "future", "waiting")

    def __init__(self, deadline: float) -> None:
        self.future: Future[int] = Future()
        self.deadline = deadline
        self.waiting = 0

    @property
    def over(self) -> bool:
        return self.future.done()

    def settle(self, why: EffectError | None) -> None:
        """One of its records is acknowledged, or refused."""
        self.waiting -= 1
        if why is not None:
            self.fail(why)
        elif not self.waiting and not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_result(0)

    def fail(self, why: EffectError) -> None:
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(why)


class _Record:
    """Lines of one sender on their way to one partition."""

    __slots__ = ("bodies", "letter", "pieces", "received_at", "sender", "size")

    def __init__(self, sender: str, received_at: float, letter: Letter | None = None) -> None:
        self.sender = sender
        self.received_at = received_at
        self.letter = letter
        self.pieces: list[bytes] = []
        self.bodies: list[_Body] = []
        self.size = 0

    def add(self, data: bytes, body: _Body, received_at: float) -> None:
        self.pieces.append(data)
        self.size += len(data) + 1
        self.received_at = max(self.received_at, received_at)
        if not self.bodies or self.bodies[-1] is not body:
            self.bodies.append(body)
            body.waiting += 1

    def put_into(self, batch: Any) -> bool:
        """False when the batch has no room for it."""
        key, headers = None, self._headers() if self.letter is None else self.letter.headers
        value: bytes | None = self.pieces[0] if len(self.pieces) == 1 else b"\n".join(self.pieces)
        if self.letter is not None:
            value, key = self.letter.data, self.letter.key
        return batch.append(timestamp=None, key=key, value=value, headers=headers) is not None

    def _headers(self) -> Headers:
        return [
            ("content-type", NDJSON.encode()),
            ("sender", self.sender.encode("utf-8", "replace")),
            ("received_at", repr(self.received_at).encode()),
        ]


class _Lane:
    """One partition."""

    __slots__ = ("news", "open", "partition", "ready", "topic")

    def __init__(self, topic: str, partition: int) -> None:
        self.topic, self.partition = topic, partition
        self.open: dict[str, _Record] = {}
        self.ready: deque[_Record] = deque()
        self.news = asyncio.Event()


class Producer:
    """See the module. Everything but `encode` is for the thread of the loop that `start` ran on.

    on_failure is called when a task of it ends by an error that it has no answer to: `failure`. Nothing is taken from then on.
    """

    def __init__(self, config: KafkaConfig, settings: ProducerSettings | None = None) -> None:
        self._config = config
        self._settings = settings or ProducerSettings()
        self._batch_bytes = self._settings.batch_bytes
        self._router = Router()
        self._partitions: dict[str, int] = {}
        self._lanes: dict[tuple[str, int], _Lane] = {}
        self._bodies: deque[_Body] = deque()
        self._client: AIOKafkaProducer | None = None
        self._gone: dict[AIOKafkaProducer, asyncio.Future[None]] = {}
        """Done when a client sends nothing any more: what it has not acknowledged by then it never will."""
        self._there = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._opened_at = self._added_at = 0.0
        self._closed = False
        self._records = 0
        self._next_letter = 0
        self.on_failure: Callable[[], None] = lambda: None
        self.failure: BaseException | None = None
        self.reachable = False
        """Whether a broker answered when last asked, a moment ago."""
        self.pending_bytes = 0
        """Bytes that are not yet acknowledged or given up."""
        self.acknowledged_records = 0
        self.acknowledged_bytes = 0
        self.refused_records = 0

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises: ConfigError when no broker answers or a topic is missing."""
        self._loop = asyncio.get_running_loop()
        client = self._make()
        try:
            await client.start()
            await self._look_at_topics(client)
        except (KafkaError, OSError) as e:
            await self._retire(client)
            what = (
                f"{self._config.bootstrap} cannot be used ({_said(e)}); check that the brokers run there, "
                "and that security protocol and credentials are theirs"
            )
            raise ConfigError(what, where="kafka") from e
        except ConfigError:
            await self._retire(client)
            raise
        self._client = client
        self._there.set()
        self.reachable = True
        self._spawn(self._watch())

    async def stop(self, timeout_s: float = 30.0) -> bool:
        """Takes no more and waits for what was taken. False when not all of it was acknowledged in time."""
        self.close()
        drained = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            drained = False
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        why = Ambiguous("stopped before Kafka had acknowledged; some of it may have been taken")
        for body in self._bodies:
            drained = drained and body.over
            body.fail(why)
        if self._client is not None:
            await self._retire(self._client)
            self._client = None
        return drained and self.failure is None

    def close(self) -> None:
        """Takes no more, and sends what waits for company."""
        self._closed = True
        self._seal_all()

    def _make(self) -> AIOKafkaProducer:
        client = AIOKafkaProducer(
            **self._config.for_aiokafka(),
            enable_idempotence=True,
            acks="all",
            compression_type=self._settings.compression,
            max_batch_size=self._batch_bytes,
            request_timeout_ms=int(self._settings.request_s * 1000),
            metadata_max_age_ms=60_000,
        )
        self._gone[client] = self._loop.create_future()
        return client

    async def _look_at_topics(self, client: AIOKafkaProducer) -> None:
        """Learns the partitions. Raises: ConfigError when a topic is missing; KafkaError."""
        names = {self._config.topic(n): n for n in WRITTEN}
        cluster = await client.client.fetch_all_metadata()
        missing = sorted(set(names) - set(cluster.topics()))
        if missing:
            raise ConfigError(
                f"topics are missing: {', '.join(missing)}; run `flyball topics create --kafka {self._config.bootstrap}`",
                where="kafka",
            )
        self._partitions = {n: len(cluster.partitions_for_topic(full)) for full, n in names.items()}
        await client.client.set_topics(list(names))

    async def _retire(self, client: AIOKafkaProducer) -> None:
        """Ends a client once what it holds is settled, or the request time is over."""
        try:
            await asyncio.wait_for(client.stop(), _REQUEST_S)
        except (KafkaError, OSError, TimeoutError):
            with contextlib.suppress(KafkaError, OSError, TimeoutError):
                # `stop` waits for ever while no broker answers, and left alone its task would go on sending.
                await asyncio.wait_for(client._sender.close(), _LOOK_S)
            await client.client.close()
        finally:
            gone = self._gone.pop(client)
            if not gone.done():
                gone.set_result(None)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        self.failure = self.failure or task.exception()
        self._closed = True
        _log.error("producer.stopped", why=repr(task.exception()), exc_info=task.exception())
        for body in self._bodies:
            body.fail(Ambiguous("the producer has failed; some of it may have been taken"))
        self.on_failure()

    # --- in -------------------------------------------------------------------------------------------------------

    def encode(self, events: Sequence[Event]) -> list[Part]:
        """The body's lines by topic and partition. Any thread may call it.

        Raises: Failed when an event is too large for a record.
        """
        parts = []
        for (topic, partition), found in self._router.split(events, self._partitions).items():
            data = _lines(found).rstrip(b"\n")
            for piece in _cut(data, self._settings.record_bytes):
                if len(piece) > MOST_EVENT_BYTES:
                    raise Failed(f"an event of {len(piece)} bytes as JSON; {MOST_EVENT_BYTES} are taken")
                parts.append(Part(topic, partition, piece))
        return parts

    def append(
        self, parts: Iterable[Part], sender: str, received_at: float, letters: Iterable[Letter] = ()
    ) -> Future[int]:
        """Takes a body. The future resolves once all of it is acknowledged; else it raises:

        NotAccepted: nothing of it was sent. Ambiguous: not acknowledged; some of it may have been taken. Failed: will never be taken.
        """
        if self._closed:
            raise NotAccepted("stopped; nothing was taken", retry_after_s=1.0)
        now = self._loop.time()
        body = _Body(now + self._settings.acknowledged_s)
        for part in parts:
            self._add(part, sender, received_at, body)
        for letter in letters:
            self._next_letter += 1
            record = _Record(sender, received_at, letter)
            record.add(letter.data or b"", body, received_at)
            partition = self._next_letter % self._partitions[DEAD_LETTERS]
            self._count(record)
            self._seal(self._lane(DEAD_LETTERS, partition), record)
        if not body.waiting:
            body.future.set_result(0)
            return body.future
        self._bodies.append(body)
        self._added_at = now
        if self._timer is None:
            self._opened_at = now
            self._timer = self._loop.call_later(self._settings.quiet_s, self._due)
        return body.future

    def _add(self, part: Part, sender: str, received_at: float, body: _Body) -> None:
        lane = self._lane(part.topic, part.partition)
        record = lane.open.get(sender)
        if record is not None and record.size + len(part.data) > self._settings.record_bytes:
            self._seal(lane, lane.open.pop(sender))
            record = None
        if record is None:
            record = lane.open[sender] = _Record(sender, received_at)
            self._count(record)
        record.add(part.data, body, received_at)
        self.pending_bytes += len(part.data) + 1
        if record.size >= self._settings.record_bytes:
            self._seal(lane, lane.open.pop(sender))

    def _count(self, record: _Record) -> None:
        self.pending_bytes += _RECORD_COSTS + record.size
        self._records += 1
        self._idle.clear()

    def _lane(self, topic: str, partition: int) -> _Lane:
        lane = self._lanes.get((topic, partition))
        if lane is None:
            lane = self._lanes[topic, partition] = _Lane(self._config.topic(topic), partition)
            self._spawn(self._run(lane))
        return lane

    def _due(self) -> None:
        """Seals what is open, unless bodies still come in and the oldest is young."""
        now, s = self._loop.time(), self._settings
        left = min(self._added_at + s.quiet_s, self._opened_at + s.linger_s) - now
        if left > 0.0:
            self._timer = self._loop.call_later(left, self._due)
        else:
            self._seal_all()

    def _seal_all(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for lane in self._lanes.values():
            for record in lane.open.values():
                self._seal(lane, record)
            lane.open.clear()

    def _seal(self, lane: _Lane, record: _Record) -> None:
        lane.ready.append(record)
        lane.news.set()

    # --- out ------------------------------------------------------------------------------------------------------

    async def _run(self, lane: _Lane) -> None:
        while True:
            while not lane.ready:
                lane.news.clear()
                await lane.news.wait()
            await self._there.wait()
            client = self._client
            if client is None:
                continue
            known = client.client.cluster.partitions_for_topic(lane.topic)
            if known is not None and lane.partition not in known:
                self._settle(lane.ready, NotAccepted(f"{lane.topic} has lost its partition {lane.partition}"))
                lane.ready.clear()
                continue
            batch = client.create_batch()
            taken = self._fill(batch, lane)
            if not taken:
                continue
            gone = self._gone[client]
            try:
                acknowledged = await client.send_batch(batch, lane.topic, partition=lane.partition)
                await asyncio.wait((acknowledged, gone), return_when=asyncio.FIRST_COMPLETED)
                if not acknowledged.done():
                    raise KafkaError("the connection was given up")
                acknowledged.result()
            except KafkaError as e:
                self._renew(client)
                self._not_taken(lane, taken, e)
            else:
                self.acknowledged_records += len(taken)
                self.acknowledged_bytes += sum(r.size for r in taken)
                self._settle(taken, None)

    def _fill(self, batch: Any, lane: _Lane) -> list[_Record]:
        taken: list[_Record] = []
        while lane.ready:
            record = lane.ready[0]
            if all(body.over for body in record.bodies):
                self._settle([lane.ready.popleft()], None)
                continue
            if not record.put_into(batch):
                break
            taken.append(lane.ready.popleft())
            if batch.size() >= self._batch_bytes:
                break
        return taken

    def _not_taken(self, lane: _Lane, taken: list[_Record], error: KafkaError) -> None:
        """A batch failed for good: sent again where that is safe and sensible, else its senders are told."""
        size = sum(r.size for r in taken)
        if isinstance(error, _TOO_LARGE) and len(taken) > 1:
            self._batch_bytes = max(1, size // 2)
            _log.warning("batch.too_large", topic=lane.topic, bytes=size, next_bytes=self._batch_bytes)
        elif not isinstance(error, _AGAIN):
            _log.warning("batch.refused", topic=lane.topic, partition=lane.partition, why=_said(error))
            self.refused_records += len(taken)
            why = f"Kafka refused it ({_said(error)})"
            never = isinstance(error, _TOO_LARGE)
            self._settle(
                taken,
                Failed(f"{why}: a record of {size} bytes; raise the topic's max.message.bytes")
                if never
                else Ambiguous(f"{why}; some of it may have been taken"),
            )
            return
        lane.ready.extendleft(reversed(taken))

    def _settle(self, records: Sequence[_Record], why: EffectError | None) -> None:
        for record in records:
            self.pending_bytes -= record.size + _RECORD_COSTS
            for body in record.bodies:
                body.settle(why)
        self._records -= len(records)
        if not self._records:
            self._idle.set()

    def _renew(self, old: AIOKafkaProducer) -> None:
        """Another client in place of one with a failed batch: the partition's sequence has a gap that the broker will never accept."""
        if self._client is not old:
            return
        self._client = None
        self._there.clear()
        self._spawn(self._retire(old))
        self._spawn(self._start_again())

    async def _start_again(self) -> None:
        while self._client is None:
            client = self._make()
            try:
                await client.start()
                await self._look_at_topics(client)
                self._client = client
                self._there.set()
            except (KafkaError, OSError, ConfigError) as e:
                _log.warning("kafka.not_usable", why=_said(e))
            finally:
                if self._client is not client:  # also when told to stop meanwhile
                    await self._retire(client)
            if self._client is None:
                await asyncio.sleep(1.0)

    async def _watch(self) -> None:
        """Tells senders whose time is over; asks whether a broker is there."""
        asked_at, acknowledged, failed = self._loop.time(), 0, 0
        while True:
            await asyncio.sleep(_LOOK_S)
            now = self._loop.time()
            self._expire(now)
            if now - asked_at >= _PROBE_S:
                asked_at = now
                # One broker of several that is gone costs a question, not readiness.
                answered = await self._probe() or self.acknowledged_records != acknowledged
                acknowledged = self.acknowledged_records
                failed = 0 if answered else failed + 1
                found = failed < _PROBES
                if found != self.reachable:
                    _log.warning(
                        "kafka.reachable" if found else "kafka.unreachable", at=self._config.bootstrap
                    )
                self.reachable = found

    def _expire(self, now: float) -> None:
        bodies = self._bodies
        expired = False
        while bodies and (bodies[0].over or bodies[0].deadline <= now):
            body = bodies.popleft()
            if not body.over:
                expired = True
                seconds = f"{self._settings.acknowledged_s:g} s"
                body.fail(
                    Ambiguous(f"not acknowledged by Kafka within {seconds}; some of it may have been taken")
                )
        if expired:
            for lane in self._lanes.values():
                kept = [r for r in lane.ready if not all(b.over for b in r.bodies)]
                gone = [r for r in lane.ready if all(b.over for b in r.bodies)]
                lane.ready = deque(kept)
                self._settle(gone, None)

    async def _probe(self) -> bool:
        """Whether metadata can be had; learns of new partitions by the way."""
        client = self._client
        if client is None:
            return False
        try:
            found = bool(await asyncio.wait_for(client.client.force_metadata_update(), _PROBE_S))
        except (KafkaError, TimeoutError):
            return False
        partitions = {n: client.client.cluster.partitions_for_topic(self._config.topic(n)) for n in WRITTEN}
        self._partitions = {n: len(p) if p else self._partitions[n] for n, p in partitions.items()}
        return found


def _cut(data: bytes, most: int) -> Iterable[bytes]:
    """`data` in pieces of whole lines, of at most `most` bytes where the lines are shorter."""
    start, size = 0, len(data)
    while size - start > most:
        end = data.rfind(b"\n", start, start + most)
        if end < 0:
            end = data.find(b"\n", start)
            if end < 0:
                break
        yield data[start:end]
        start = end + 1
    yield data[start:]


def _said(error: BaseException) -> str:
    """Type and text; some of Kafka's errors have only a type."""
    text = str(error)
    return text if type(error).__name__ in text else f"{type(error).__name__}: {text}".rstrip(": ")


assert set(WRITTEN) <= set(TOPICS)
