"""The port to a Kafka client: what a role needs of one, and aiokafka behind it (docs/adr/0006 says why)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.topics import MAX_MESSAGE_BYTES

_FETCH_BYTES: Final = 4 << 20
SESSION_MS: Final = 10_000
HAND_OVER_MS: Final = 30_000
"""How long the others wait for one that stores its state before it gives partitions away."""


class Place(NamedTuple):
    """One partition of one topic, by its full name."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}"


class Record(Protocol):
    """One record as it came."""

    offset: int
    timestamp: int
    """Milliseconds since the epoch."""
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


Moved = Callable[[list[Place]], Awaitable[None]]


class GroupReader:
    """Reads what a consumer group gives to this process. Nothing is committed unless `commit` is called.

    `assigned` and `revoked` are called with the partitions that came and that go. Records may be handed out while `assigned` is still at
    work: a role takes only those of partitions that it has registered, and always seeks first.
    """

    def __init__(
        self, config: KafkaConfig, role: str, topics: Sequence[str], assigned: Moved, revoked: Moved
    ) -> None:
        self._topics = [config.topic(t) for t in topics]
        self._consumer = AIOKafkaConsumer(
            **config.for_aiokafka(), group_id=config.group(role), enable_auto_commit=False, auto_offset_reset="earliest",
            max_partition_fetch_bytes=_FETCH_BYTES, session_timeout_ms=SESSION_MS, heartbeat_interval_ms=SESSION_MS // 4,
            rebalance_timeout_ms=HAND_OVER_MS,
        )  # fmt: skip
        self._listener = _Listener(assigned, revoked)

    async def start(self) -> None:
        await self._consumer.start()
        self._consumer.subscribe(self._topics, listener=self._listener)

    async def stop(self) -> None:
        """Leaves the group at once."""
        await self._consumer.stop()

    def sources(self) -> list[Place]:
        """All partitions of all topics of the group, this process's or not."""
        return [
            Place(t, p) for t in self._topics for p in sorted(self._consumer.partitions_for_topic(t) or ())
        ]

    async def read(self, most: int, wait_s: float) -> Mapping[Place, Sequence[Record]]:
        found = await self._consumer.getmany(timeout_ms=int(wait_s * 1000), max_records=most)
        return {Place(tp.topic, tp.partition): records for tp, records in found.items()}

    def seek(self, place: Place, offset: int) -> None:
        self._consumer.seek(TopicPartition(*place), offset)

    def pause(self, places: Iterable[Place]) -> None:
        """`read` gives nothing of these until `resume`; they stay this process's."""
        self._consumer.pause(*(TopicPartition(*p) for p in places))

    def resume(self, places: Iterable[Place]) -> None:
        self._consumer.resume(*(TopicPartition(*p) for p in places))

    async def committed(self, place: Place) -> int | None:
        found: int | None = await self._consumer.committed(TopicPartition(*place))
        return found

    async def commit(self, offsets: Mapping[Place, int]) -> bool:
        """False when the group is being shared out anew: somebody else will commit."""
        try:
            await self._consumer.commit({TopicPartition(*p): o for p, o in offsets.items()})
        except (CommitFailedError, IllegalStateError):
            return False
        return True

    async def begins(self, places: Iterable[Place]) -> dict[Place, int]:
        found = await self._consumer.beginning_offsets([TopicPartition(*p) for p in places])
        return {Place(tp.topic, tp.partition): o for tp, o in found.items()}

    async def ends(self, places: Iterable[Place]) -> dict[Place, int]:
        """The offset that the next record of each will have, as a broker says now."""
        found = await self._consumer.end_offsets([TopicPartition(*p) for p in places])
        return {Place(tp.topic, tp.partition): o for tp, o in found.items()}


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    def __init__(self, assigned: Moved, revoked: Moved) -> None:
        self._assigned, self._revoked = assigned, revoked

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        await self._assigned(sorted(Place(tp.topic, tp.partition) for tp in assigned))

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        await self._revoked(sorted(Place(tp.topic, tp.partition) for tp in revoked))


async def read_all(
    config: KafkaConfig, places: Sequence[Place], progress: Callable[[], None] = lambda: None
) -> list[Record]:
    """Every record of these partitions, up to their ends as of now, each partition in order: a compacted topic's state.

    Args:
        progress: called as records come.
    """
    consumer = AIOKafkaConsumer(
        **config.for_aiokafka(), enable_auto_commit=False, auto_offset_reset="earliest", max_partition_fetch_bytes=_FETCH_BYTES
    )  # fmt: skip
    await consumer.start()
    try:
        tps = [TopicPartition(*p) for p in places]
        consumer.assign(tps)
        ends = await consumer.end_offsets(tps)
        await consumer.seek_to_beginning(*tps)
        found: list[Any] = []
        while left := [tp for tp in tps if await consumer.position(tp) < ends[tp]]:
            for records in (await consumer.getmany(*left, timeout_ms=500)).values():
                found += records
                progress()
        return found
    finally:
        await consumer.stop()


class Writer:
    """Sends records; each is there, on all replicas in sync, once it was awaited."""

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._producer = AIOKafkaProducer(
            **config.for_aiokafka(), acks="all", enable_idempotence=True, compression_type="zstd", linger_ms=2,
            max_request_size=MAX_MESSAGE_BYTES,
        )  # fmt: skip

    async def start(self) -> None:
        await self._producer.start()

    async def stop(self) -> None:
        await self._producer.stop()

    async def partitions(self, topic: str) -> int:
        return len(await self._producer.partitions_for(self._config.topic(topic)))

    async def send(
        self, topic: str, value: bytes | None, *, key: bytes | None = None, partition: int | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> Awaitable[Any]:  # fmt: skip
        """Puts a record on its way, in the order of calls; await what it returns for the acknowledgement. `topic` without prefix."""
        sent: Awaitable[Any] = await self._producer.send(
            self._config.topic(topic), value, key=key, partition=partition, headers=list(headers)
        )
        return sent


class TopicReader:
    """Reads all partitions of one topic, outside any group: for the one process that owns the database."""

    def __init__(self, config: KafkaConfig, topic: str, role: str) -> None:
        self.topic = config.topic(topic)
        self._config, self._name = config, topic
        self._consumer = AIOKafkaConsumer(
            **config.for_aiokafka(), group_id=config.group(role), enable_auto_commit=False, auto_offset_reset="earliest",
            max_partition_fetch_bytes=2 * MAX_MESSAGE_BYTES,
        )  # fmt: skip

    async def start(self, consumed: Mapping[int, int]) -> None:
        """Goes on at the offsets that come next; from the beginning where none is known."""
        await self._consumer.start()
        asked = Writer(self._config)  # a consumer knows nothing of a topic that it has not subscribed to
        await asked.start()
        try:
            n = await asked.partitions(self._name)
        finally:
            await asked.stop()
        tps = [TopicPartition(self.topic, p) for p in range(n)]
        self._consumer.assign(tps)
        for tp in tps:
            if tp.partition in consumed:
                self._consumer.seek(tp, consumed[tp.partition])
            else:
                await self._consumer.seek_to_beginning(tp)

    async def stop(self) -> None:
        await self._consumer.stop()

    async def read(self, most: int, wait_s: float) -> Mapping[Place, Sequence[Record]]:
        found = await self._consumer.getmany(timeout_ms=int(wait_s * 1000), max_records=most)
        return {Place(tp.topic, tp.partition): records for tp, records in found.items()}

    @property
    def places(self) -> list[Place]:
        return sorted(Place(tp.topic, tp.partition) for tp in self._consumer.assignment())

    async def ends(self) -> dict[Place, int]:
        """The offset that the next record of each partition will have, as a broker says now."""
        found = await self._consumer.end_offsets([TopicPartition(*p) for p in self.places])
        return {Place(tp.topic, tp.partition): o for tp, o in found.items()}

    def end_seen(self, place: Place) -> int:
        """The same as of the newest answer to a fetch; 0 before the first."""
        return self._consumer.highwater(TopicPartition(*place)) or 0

    async def commit(self, offsets: Mapping[Place, int]) -> None:
        """For those who look at lag; where to go on stands in the database."""
        await self._consumer.commit({TopicPartition(*p): o for p, o in offsets.items()})


__all__ = ["GroupReader", "KafkaError", "Place", "Record", "TopicReader", "Writer", "read_all"]
