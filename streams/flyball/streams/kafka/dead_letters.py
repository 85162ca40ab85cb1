"""Dead letters on Kafka: what a worker could not take, where it stood, and how it is sent once more.

A letter's value is the record's bytes as they were (or as much as the settings keep); all else stands in headers, so that a
letter can be read with any Kafka tool.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final
from zlib import crc32

from flyball.core.errors import ConfigError, FlyballError
from flyball.core.events import TYPE_NAMES
from flyball.streams.kafka.admin import connected
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.partition import CALLS, TOPIC_OF, partition_of

TOPIC: Final = "dead-letters"
REPLAYED: Final = "flyball-replayed"
"""Header of a record that was sent once more: the letter's id. In the dead letters themselves: the note that it was."""
_TOPIC_OF: Final = {TYPE_NAMES[kind]: topic for kind, topic in TOPIC_OF.items()}
_TYPE: Final = re.compile(rb'"type"\s*:\s*"(\w+)"')
_WAIT_MS: Final = 15_000
_NOT_OURS: Final = ("reason", "detail", "topic", "partition", "offset", "index", "at", "size")

Headers = Sequence[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class KafkaLetter:
    """One record, or one line of it, that could not be taken.

    Args:
        topic: full name; with `partition` and `offset` where the record stands.
        index: line within the record; -1 where the whole record is meant.
        at: seconds since the epoch when it was put aside.
        size: bytes of what could not be taken, also where they are not kept.
        body: None where the bytes are not kept.
        headers: those of the record: content-type, flyball-format and whatever its sender wrote.
        id: `partition/offset` within the topic of dead letters; empty before it is there.
        replayed: it was sent once more.
    """

    topic: str
    partition: int
    offset: int
    reason: str
    detail: str
    at: float
    size: int
    body: bytes | None
    index: int = -1
    headers: tuple[tuple[str, bytes], ...] = ()
    id: str = ""
    replayed: bool = False

    @property
    def key(self) -> bytes:
        return f"{self.topic}/{self.partition}".encode()


def to_headers(letter: KafkaLetter) -> list[tuple[str, bytes]]:
    """Headers of the record in the dead letters; its value is `letter.body`, its key `letter.key`.

    >>> to_headers(KafkaLetter("flyball.llm-calls", 3, 17, "json", "line 1", 1.5, 2, b"{"))[:3]
    [('reason', b'json'), ('detail', b'line 1'), ('topic', b'flyball.llm-calls')]
    """
    own = [(name, str(getattr(letter, name)).encode()) for name in _NOT_OURS]
    return own + [(f"record.{name}", value) for name, value in letter.headers]


def from_record(
    partition: int, offset: int, value: bytes | None, headers: Iterable[tuple[str, bytes]]
) -> KafkaLetter:
    """The letter in a record of the dead letters, also where somebody else wrote it there."""
    own: dict[str, str] = {}
    of_record = []
    for name, content in headers:
        if name.startswith("record."):
            of_record.append((name.removeprefix("record."), content or b""))
        else:
            own[name] = (content or b"").decode("utf-8", "replace")
    return KafkaLetter(
        topic=own.get("topic", ""),
        partition=int(_number(own, "partition", -1)),
        offset=int(_number(own, "offset", -1)),
        reason=own.get("reason", "unknown"),
        detail=own.get("detail", ""),
        at=_number(own, "at", 0.0),
        size=int(_number(own, "size", len(value or b""))),
        body=value,
        index=int(_number(own, "index", -1)),
        headers=tuple(of_record),
        id=f"{partition}/{offset}",
    )


def _number(own: dict[str, str], name: str, otherwise: float) -> float:
    try:
        return float(own[name])
    except (KeyError, ValueError):
        return otherwise


# --- reading -------------------------------------------------------------------------------------------------------


def newest(config: KafkaConfig, limit: int) -> list[KafkaLetter]:
    """The newest letters, newest first. Raises: BrokerUnreachable, ConfigError where the topic is missing."""
    with _reader(config) as (consumer, partitions):
        ends = consumer.end_offsets(partitions)
        firsts = consumer.beginning_offsets(partitions)
        # Notes of replays stand between the letters: from far enough back that `limit` letters are left in nearly all cases.
        starts = {tp: max(firsts[tp], ends[tp] - 3 * limit) for tp in partitions}
        records = list(_read(consumer, starts, ends))
    notes = {note for r in records if (note := _note(r))}
    letters = [_letter(r) for r in records if not _note(r)]
    found = [replace(x, replayed=x.id in notes) for x in letters]
    return sorted(found, key=lambda x: (x.at, x.id), reverse=True)[:limit]


def fetch(config: KafkaConfig, ids: Sequence[str]) -> list[KafkaLetter]:
    """Letters by id, in the order asked for.

    Raises: BrokerUnreachable; ConfigError for an id that is none, or whose letter is no longer kept.
    """
    places = [_place(i) for i in ids]
    with _reader(config) as (consumer, partitions):
        known = {tp.partition: tp for tp in partitions}
        ends, firsts = consumer.end_offsets(partitions), consumer.beginning_offsets(partitions)
        found = []
        for name, (partition, offset) in zip(ids, places, strict=True):
            tp = known.get(partition)
            if tp is None or not firsts[tp] <= offset < ends[tp]:
                raise ConfigError(
                    f"there is no dead letter {name}; `flyball dead-letters list --kafka …` lists them"
                )
            record = next((r for r in _read(consumer, {tp: offset}, {tp: offset + 1})), None)
            if record is None or _note(record):
                raise ConfigError(
                    f"{name} is no dead letter; `flyball dead-letters list --kafka …` lists them"
                )
            found.append(_letter(record))
    return found


def _place(name: str) -> tuple[int, int]:
    partition, slash, offset = name.partition("/")
    if not slash or not partition.isdecimal() or not offset.isdecimal():
        raise ConfigError(
            f"{name[:60]!r} is no id of a dead letter; write PARTITION/OFFSET as `flyball dead-letters list --kafka …` shows it"
        )
    return int(partition), int(offset)


@contextmanager
def _reader(config: KafkaConfig) -> Iterator[tuple[Any, list[Any]]]:
    """A consumer of no group, and the partitions of the dead letters."""
    with connected(config):
        from kafka import KafkaConsumer, TopicPartition

        consumer = KafkaConsumer(**config.for_kafka_python(), group_id=None, enable_auto_commit=False, auto_offset_reset="earliest", max_partition_fetch_bytes=16 << 20)  # fmt: skip
        try:
            topic = config.topic(TOPIC)
            known = consumer.partitions_for_topic(topic)
            if not known:
                raise ConfigError(
                    f"topic {topic} is missing; say `flyball topics create --kafka {config.bootstrap}`"
                )
            partitions = [TopicPartition(topic, p) for p in sorted(known)]
            yield consumer, partitions
        finally:
            consumer.close()


def _read(consumer: Any, starts: dict[Any, int], ends: dict[Any, int]) -> Iterator[Any]:
    """Records from `starts` to before `ends`."""
    left = {tp: ends[tp] for tp, start in starts.items() if start < ends[tp]}
    consumer.assign(list(left))
    for tp in left:
        consumer.seek(tp, starts[tp])
    while left:
        polled = consumer.poll(timeout_ms=_WAIT_MS, max_records=1000)
        if not polled:
            raise FlyballError("Kafka sends no dead letters although there are some; try again")
        for tp, records in polled.items():
            yield from (r for r in records if r.offset < ends[tp])
        # A position counts gaps too, which a marker of a transaction or a removed record leaves.
        left = {tp: end for tp, end in left.items() if consumer.position(tp) < end}


def _letter(record: Any) -> KafkaLetter:
    return from_record(record.partition, record.offset, record.value, record.headers)


def _note(record: Any) -> str:
    """Id of the letter that this record says was sent once more; empty for a letter."""
    return next((bytes(value).decode() for name, value in record.headers if name == REPLAYED), "")


# --- sending once more ---------------------------------------------------------------------------------------------


def replay(config: KafkaConfig, letters: Iterable[KafkaLetter]) -> int:
    """Sends the letters' bytes once more to the partitions they came from, and notes it beside the letters. Gives their number.

    What came over HTTP stood in no topic yet: it goes to that of its events, in the format it came in.

    Raises: ConfigError where a letter cannot be sent; nothing was sent then. BrokerUnreachable; FlyballError when not all were
    acknowledged: those that were are noted.
    """
    letters = list(letters)
    for letter in letters:
        if letter.body is None:
            raise ConfigError(
                f"the bytes of {letter.id} were not kept; it cannot be sent once more (retention.dead_letter_bytes)"
            )
        if not _destination(config, letter).startswith(config.prefix):
            raise ConfigError(
                f"{letter.id} came by topic {letter.topic!r}, which is none of {config.prefix}*; it is not sent"
            )
    with connected(config) as admin:
        from kafka import KafkaProducer
        from kafka.errors import KafkaError

        topics = sorted({_destination(config, x) for x in letters})
        partitions = {t["name"]: len(t["partitions"]) for t in admin.describe_topics(topics)}
        places = [_place_again(config, x, partitions) for x in letters]
        for x, (topic, partition) in zip(letters, places, strict=True):
            if partition not in range(partitions[topic]):
                raise ConfigError(
                    f"topic {topic} has no partition {partition}, from which {x.id} came; it is not sent"
                )
        producer = KafkaProducer(
            **config.for_kafka_python(), acks="all", enable_idempotence=True, max_request_size=16 << 20
        )
        sent = 0
        try:
            for x, (topic, partition) in zip(letters, places, strict=True):
                mark = (REPLAYED, x.id.encode())
                again = producer.send(topic, value=x.body, partition=partition, headers=[*x.headers, mark])
                again.get(_WAIT_MS / 1000)
                producer.send(config.topic(TOPIC), key=x.key, value=b"", headers=[mark]).get(_WAIT_MS / 1000)
                sent += 1
        except KafkaError as e:
            raise FlyballError(
                f"{sent} were sent, then Kafka said {type(e).__name__}; say the same again for the rest"
            ) from e
        finally:
            producer.close(5.0)
    return sent


def _destination(config: KafkaConfig, letter: KafkaLetter) -> str:
    """The topic that a letter is sent to once more."""
    if letter.topic:
        return letter.topic
    told = _TYPE.search(letter.body or b"")
    return config.topic(_TOPIC_OF.get(told[1].decode(), CALLS) if told else CALLS)


def _place_again(config: KafkaConfig, letter: KafkaLetter, partitions: Mapping[str, int]) -> tuple[str, int]:
    topic = _destination(config, letter)
    if letter.topic:
        return topic, letter.partition
    return topic, partition_of(crc32(letter.body or b""), partitions[topic])
