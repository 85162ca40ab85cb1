"""What stands in topics, read from their beginning to their present end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from flyball.core.events import Batch, Event
from flyball.streams.formats.native import NativeNdjson
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.producer import WRITTEN

_native = NativeNdjson()
EVENTS = tuple(n for n in WRITTEN if n != "dead-letters")


def records(config: KafkaConfig, topics: Iterable[str]) -> list[Any]:
    """Every record of these topics (names without prefix), by partition and offset."""
    consumer = KafkaConsumer(**config.for_kafka_python(), group_id=None, enable_auto_commit=False, auto_offset_reset="earliest")  # fmt: skip
    try:
        partitions = [
            TopicPartition(config.topic(t), p)
            for t in topics
            for p in sorted(consumer.partitions_for_topic(config.topic(t)) or ())
        ]
        ends = consumer.end_offsets(partitions)
        consumer.assign(partitions)
        consumer.seek_to_beginning()
        found: list[Any] = []
        while any(consumer.position(tp) < ends[tp] for tp in partitions):
            for some in consumer.poll(timeout_ms=1000).values():
                found += some
    finally:
        consumer.close()
    return sorted(found, key=lambda r: (r.topic, r.partition, r.offset))


def batch_of(record: Any) -> Batch:
    """As a worker reads it."""
    told = dict(record.headers)
    assert told["content-type"] == b"application/x-ndjson"
    decoded = _native.decode(record.value)
    assert not decoded.rejected
    return Batch(decoded.events, told["sender"].decode(), float(told["received_at"]))


def events_in(config: KafkaConfig, topics: Iterable[str] = EVENTS) -> list[Event]:
    return [e for r in records(config, topics) for e in batch_of(r).events]
