"""The producer on real brokers: what it acknowledges is there, what it does not is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from flyball.core.errors import Ambiguous, ConfigError, Failed, NotAccepted
from flyball.core.events import AgentStep, Change, Event, GpuSample, LlmCall
from flyball.streams.kafka.admin import create_topics, wanted
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.partition import CALLS
from flyball.streams.kafka.producer import WRITTEN, Letter, Producer, ProducerSettings
from tests.kafka._topics import EVENTS, batch_of, events_in, records
from tests.servers.kafka_broker import Cluster

NOW = 1_800_000_000.0


def calls(first: int, n: int, size: int = 0) -> list[Event]:
    return [LlmCall(at=NOW, id=f"c{first + i}", model="m", finish="x" * size) for i in range(n)]


def made(config: KafkaConfig, partitions: int = 4) -> KafkaConfig:
    create_topics(config, wanted(partitions, WRITTEN))
    return config


@asynccontextmanager
async def producing(config: KafkaConfig, **settings: Any) -> AsyncIterator[Producer]:
    producer = Producer(config, ProducerSettings(**settings))
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop(5.0)


async def sent(producer: Producer, events: list[Event], sender: str = "s", at: float = NOW) -> None:
    await asyncio.wrap_future(producer.append(producer.encode(events), sender, at))


async def soon(check: Callable[[], bool], deadline_s: float = 30.0) -> None:
    async with asyncio.timeout(deadline_s):
        while not check():
            await asyncio.sleep(0.02)


def run(work: Awaitable[None]) -> None:
    async def timed() -> None:
        async with asyncio.timeout(90):
            await work

    asyncio.run(timed())


# --- what arrives ---------------------------------------------------------------------------------------------------


def test_every_event_arrives_as_it_was_in_the_topic_of_its_kind(kafka_config: KafkaConfig) -> None:
    body: list[Event] = [
        LlmCall(at=NOW, id="a", model="é\u2028\n", cost_usd=0.1 + 0.2, stream=True),
        AgentStep(at=NOW + 0.123456789, run="r", tool="t"),
        GpuSample(at=NOW, node="n", values={"x": 1e-300}),
        Change(at=NOW, kind="deploy", labels={"a": "b"}),
    ]

    async def work() -> None:
        async with producing(made(kafka_config)) as producer:
            await sent(producer, body, "ann@10.0.0.1", 1_800_000_001.25)

    run(work())
    found = records(kafka_config, EVENTS)
    assert {r.topic.removeprefix(kafka_config.prefix): batch_of(r).events for r in found} == {
        name: [event] for name, event in zip(EVENTS, body, strict=True)
    }
    assert {(batch_of(r).sender, batch_of(r).received_at) for r in found} == {
        ("ann@10.0.0.1", 1_800_000_001.25)
    }


def test_bodies_of_one_sender_share_records_up_to_their_size_and_others_do_not(
    kafka_config: KafkaConfig,
) -> None:
    async def work() -> None:
        async with producing(made(kafka_config, 1), record_bytes=8 << 10, quiet_s=0.05) as producer:
            bodies = [(s, calls(1000 * s + 10 * b, 10)) for b in range(20) for s in range(3)]
            futures = [producer.append(producer.encode(e), f"sender-{s}", NOW) for s, e in bodies]
            await asyncio.gather(*map(asyncio.wrap_future, futures))

    run(work())
    found = records(kafka_config, [CALLS])
    by_sender: dict[str, list[Any]] = {}
    for record in found:
        assert len(record.value) <= 8 << 10
        by_sender.setdefault(batch_of(record).sender, []).extend(batch_of(record).events)
    assert by_sender == {f"sender-{s}": calls(1000 * s, 200) for s in range(3)}
    assert len(found) < 12


def test_a_large_body_is_cut_between_lines(kafka_config: KafkaConfig) -> None:
    body = calls(0, 500, size=400) + calls(500, 1, size=512)

    async def work() -> None:
        async with producing(made(kafka_config, 2), record_bytes=16 << 10, batch_bytes=40 << 10) as producer:
            await sent(producer, body)

    run(work())
    assert len(records(kafka_config, [CALLS])) > 10
    assert sorted(map(repr, events_in(kafka_config))) == sorted(map(repr, body))


def test_order_in_a_partition_is_the_order_of_arrival(kafka_config: KafkaConfig) -> None:
    async def work() -> None:
        async with producing(made(kafka_config, 1), record_bytes=2 << 10) as producer:
            futures = []
            for b in range(100):
                futures.append(producer.append(producer.encode(calls(b * 10, 10)), "s", NOW))
                if b % 10 == 0:
                    await asyncio.sleep(0.01)
            await asyncio.gather(*map(asyncio.wrap_future, futures))

    run(work())
    assert events_in(kafka_config) == calls(0, 1000)


def test_an_empty_body_is_acknowledged_at_once(kafka_config: KafkaConfig) -> None:
    async def work() -> None:
        async with producing(made(kafka_config)) as producer:
            assert producer.append([], "s", NOW).done()
            assert producer.pending_bytes == 0

    run(work())


def test_stopping_sends_what_waits_for_company(kafka_config: KafkaConfig) -> None:
    async def work() -> None:
        producer = Producer(made(kafka_config), ProducerSettings(linger_s=3600.0, quiet_s=3600.0))
        await producer.start()
        done = producer.append(producer.encode(calls(0, 100)), "s", NOW)
        assert not done.done()
        assert await producer.stop()
        assert done.result() == 0
        assert producer.pending_bytes == 0
        with pytest.raises(NotAccepted):
            producer.append([], "s", NOW)

    run(work())
    assert len(events_in(kafka_config)) == 100


def test_it_writes_over_tls_with_a_password(secured_kafka: Cluster) -> None:
    config = made(secured_kafka.config("SASL_SSL", "SCRAM-SHA-512", prefix="secured."))

    async def work() -> None:
        async with producing(config) as producer:
            await sent(producer, calls(0, 100))

    run(work())
    assert len(events_in(config)) == 100


# --- what does not --------------------------------------------------------------------------------------------------


def test_missing_topics_stop_the_start(kafka_config: KafkaConfig) -> None:
    create_topics(kafka_config, wanted(1, [n for n in WRITTEN if n != CALLS]))

    async def work() -> None:
        with pytest.raises(ConfigError, match=rf"{kafka_config.prefix}llm-calls; run `flyball topics create"):
            await Producer(kafka_config).start()

    run(work())


def test_an_event_too_large_for_a_record_is_refused_before_it_is_sent(kafka_config: KafkaConfig) -> None:
    async def work() -> None:
        async with producing(made(kafka_config)) as producer:
            with pytest.raises(Failed, match="900000 are taken"):
                producer.encode([Change(at=NOW, kind="x", labels={"a": "b" * 1_000_000})])

    run(work())


def test_a_topic_for_smaller_batches_gets_smaller_ones_and_what_never_fits_is_told(
    kafka_config: KafkaConfig,
) -> None:
    topics = wanted(1, WRITTEN)
    create_topics(kafka_config, [replace(t, max_message_bytes=20_000) for t in topics])
    random = Random(1)  # what cannot be compressed
    noise = [LlmCall(at=NOW, id=random.randbytes(200).hex()) for _ in range(1500)]

    async def work() -> None:
        async with producing(kafka_config, record_bytes=1 << 10) as producer:
            await sent(producer, list(noise))
            letter = Letter(random.randbytes(50_000), [("reason", b"json")], b"")
            never = producer.append([], "s", NOW, [letter])
            with pytest.raises(Failed, match=r"raise the topic's max\.message\.bytes"):
                await asyncio.wrap_future(never)
            await sent(producer, calls(0, 5))

    run(work())
    assert events_in(kafka_config) == [*noise, *calls(0, 5)]


def test_a_paused_broker_is_told_to_senders_in_time_and_nothing_acknowledged_is_lost(
    own_kafka: Cluster,
) -> None:
    config = made(own_kafka.config(prefix="paused."))
    node = own_kafka.nodes[0]
    acknowledged: list[Event] = []

    async def work() -> None:
        async with producing(config, acknowledged_s=1.0) as producer:
            await sent(producer, calls(0, 50))
            acknowledged.extend(calls(0, 50))
            node.pause()
            try:
                futures = [producer.append(producer.encode(calls(100 + i, 1)), "s", NOW) for i in range(20)]
                told = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
                assert {type(x) for x in told} == {Ambiguous}
                await soon(lambda: not producer.reachable)
            finally:
                node.resume()
            await soon(lambda: producer.reachable)
            await sent(producer, calls(1000, 50))
            acknowledged.extend(calls(1000, 50))
            assert producer.pending_bytes == 0

    run(work())
    found = [repr(e) for e in events_in(config)]
    assert set(map(repr, acknowledged)) <= set(found)
    assert len(found) == len(set(found)), "the client's own repetitions are told apart by the broker"


def test_a_broker_that_was_killed_and_came_back_takes_what_waited_exactly_once(own_kafka: Cluster) -> None:
    config = made(own_kafka.config(prefix="killed."))
    node = own_kafka.nodes[0]

    async def work() -> None:
        async with producing(config) as producer:
            await sent(producer, calls(0, 50))
            node.kill()
            waiting = [producer.append(producer.encode(calls(100 + i, 1)), "s", NOW) for i in range(20)]
            node.start(wait=False)  # by the main thread: the broker ends with the thread that started it
            await asyncio.to_thread(node.wait)
            await asyncio.gather(*map(asyncio.wrap_future, waiting))

    run(work())
    assert sorted(map(repr, events_in(config))) == sorted(map(repr, calls(0, 50) + calls(100, 20)))
