"""One measured pass over a topic, in a process of its own on one core:
`python -m benchmarks._kafka_passes WHAT BOOTSTRAP PREFIX OWN_PREFIX CALLS`. What it writes itself, and its groups, have the prefix OWN_PREFIX.

    aiokafka, confluent               fetch and decode alone, with that client
    chain-aiokafka, chain-confluent   fetch → decode → windows → portions → merged windows → detectors, one step after the other
    worker                            the same as `flyball worker` with all roles does it: with portions by Kafka, log, snapshots, commits
    windows                           the role windows alone, from when it has CALLS partitions to when they are read to their ends
    faust                             a plain Faust agent that decodes and counts

The last line of output is `{"calls", "cpu_s", "wall_s", …}`; starting up is not in it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import methodcaller
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from benchmarks._kafka import PARTITIONS, cores, pin
from flyball.core.events import Event
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.partition import CALLS
from flyball.streams.kafka.topics import TAKEN_IN

_MOST: Final = 5000
_FETCH_BYTES: Final = 4 << 20
_TOLD_CALLS: Final = 100_000
"""Calls after which the fronts tell what they have."""


@dataclass(frozen=True)
class Config(KafkaConfig):
    """Reads events under one prefix; everything else is under its own."""

    source: str = ""

    def topic(self, name: str) -> str:
        return f"{self.source}{name}" if name in TAKEN_IN else super().topic(name)


class Spent:
    """Processor and wall time since it was made."""

    def __init__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def told(self, calls: int, **more: Any) -> dict[str, Any]:
        return {
            "calls": calls, "cpu_s": time.process_time() - self._cpu, "wall_s": time.perf_counter() - self._wall,
            "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, **more,
        }  # fmt: skip


def counter(values: Sequence[bytes]) -> Callable[[Sequence[bytes]], int]:
    """Decodes and counts; looks at the first values for how many calls are in a record."""
    decoder = msgspec.json.Decoder(Event)
    if b"\n" in values[0]:
        return lambda some: sum([len(decoder.decode_lines(v)) for v in some])
    return lambda some: len([decoder.decode(v) for v in some])


class Record(NamedTuple):
    """What the window stage needs of a record of confluent-kafka."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


Taken = Mapping[int, Sequence[Any]]
"""Records by partition."""


async def aiokafka_records(config: KafkaConfig) -> AsyncIterator[Taken]:
    from aiokafka import AIOKafkaConsumer, TopicPartition

    client = AIOKafkaConsumer(
        **config.for_aiokafka(), enable_auto_commit=False, auto_offset_reset="earliest", max_partition_fetch_bytes=_FETCH_BYTES
    )  # fmt: skip
    await client.start()
    client.assign([TopicPartition(config.topic(CALLS), p) for p in range(PARTITIONS)])
    try:
        while True:
            found = await client.getmany(timeout_ms=1000, max_records=_MOST)
            yield {tp.partition: records for tp, records in found.items()}
    finally:
        await client.stop()


async def confluent_messages(config: KafkaConfig) -> AsyncIterator[list[Any]]:
    from confluent_kafka import Consumer, TopicPartition

    client = Consumer(
        config.for_confluent()
        | {
            "group.id": config.group("alone"), "enable.auto.commit": False, "enable.auto.offset.store": False,
            "queued.min.messages": 200_000, "fetch.queue.backoff.ms": 5, "max.partition.fetch.bytes": _FETCH_BYTES,
        }
    )  # fmt: skip
    client.assign([TopicPartition(config.topic(CALLS), p, 0) for p in range(PARTITIONS)])
    try:
        while True:
            yield client.consume(_MOST, 1.0)
    finally:
        client.close()


async def confluent_records(config: KafkaConfig) -> AsyncIterator[Taken]:
    async for messages in confluent_messages(config):
        found: dict[int, list[Record]] = {}
        for partition, some in groupby(messages, methodcaller("partition")):
            found.setdefault(partition, []).extend(
                Record(m.offset(), m.timestamp()[1], m.key(), m.value(), m.headers() or ()) for m in some
            )
        yield found


async def decoded(values: AsyncIterator[Sequence[bytes]], calls: int) -> dict[str, Any]:
    spent, seen, count = Spent(), 0, None
    async for some in values:
        if some:
            count = count or counter(some)
            seen += count(some)
        if seen >= calls:
            return spent.told(seen)
    raise AssertionError("a topic has no end")


async def aiokafka_values(config: KafkaConfig) -> AsyncIterator[Sequence[bytes]]:
    async for found in aiokafka_records(config):
        for records in found.values():
            yield [r.value for r in records]


async def confluent_values(config: KafkaConfig) -> AsyncIterator[Sequence[bytes]]:
    async for messages in confluent_messages(config):
        yield [m.value() for m in messages]


class Chain:
    """The stages of both roles, without what makes them durable."""

    def __init__(self, config: Config) -> None:
        from flyball.app.kafka_windows import Decoder
        from flyball.app.settings import Settings
        from flyball.app.wiring import make_formats, make_pipeline
        from flyball.streams.front import Front
        from flyball.streams.kafka.breaker import Breaker, PoisonSettings
        from flyball.streams.kafka.client import Place
        from flyball.streams.kafka.intake import Intake

        settings = Settings()
        decoder = Decoder(settings, make_formats(settings, b"benchmark"))
        self._intake = Intake(config.source, decoder, decoder.lines)
        self._places = [Place(config.topic(CALLS), p) for p in range(PARTITIONS)]
        self._fronts = [Front(str(place)) for place in self._places]
        self._breakers = [Breaker(PoisonSettings()) for _ in self._places]
        self.pipeline = make_pipeline(settings)
        self.fed = self._told = 0

    def take(self, found: Taken) -> None:
        from flyball.streams.kafka.intake import slices

        for partition, records in found.items():
            front = self._fronts[partition]
            for some in slices(records):
                read = self._intake.read(self._places[partition], some, self._breakers[partition])
                for sender, part in read.senders.items():
                    front.feed(part.batch(sender), part.offset_array(), read.last)
                    self.fed += len(part.events)
        if self.fed - self._told >= _TOLD_CALLS:
            self.tell()

    def tell(self) -> None:
        from flyball.streams.portion import decode_portion, encode_portion

        first = not self._told
        self._told = self.fed
        sources = [str(p) for p in self._places] if first else []
        for portion in [front.cut(sources=sources) for front in self._fronts]:
            if portion is not None:
                again = decode_portion(encode_portion(portion))
                self.pipeline.feed_portion(again, again.received_at or 0.0)


async def chained(records: AsyncIterator[Taken], config: Config, calls: int) -> dict[str, Any]:
    chain = Chain(config)
    spent = Spent()
    async for found in records:
        chain.take(found)
        if chain.fed >= calls:
            chain.tell()
            totals = chain.pipeline.counters
            return spent.told(
                totals.events["llm_call"], windows=totals.windows, late=chain.pipeline.window_stats.late,
                disabled=chain.pipeline.disabled,
            )  # fmt: skip
    raise AssertionError("a topic has no end")


async def as_a_worker(config: Config, calls: int) -> dict[str, Any]:
    from flyball.app.embedded import Figures
    from flyball.app.kafka_windows import make_windows_role
    from flyball.app.portions import PortionFeed
    from flyball.app.serve import make_runtime
    from flyball.app.settings import Settings
    from flyball.app.wiring import make_formats
    from flyball.streams.kafka.worker import Worker

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data=Path(folder))
        runtime = make_runtime(settings)
        runtime.start()
        role = make_windows_role(config, settings, make_formats(settings, b"benchmark"))
        worker = Worker(config, {"windows": role.run, "control": PortionFeed(runtime, config).run})

        async def until_done() -> dict[str, Any]:
            while not role.figures().events:
                await asyncio.sleep(0.01)
            spent, before = Spent(), role.figures().events
            while seen(runtime.figures) < calls:
                await asyncio.sleep(0.05)
            totals = runtime.figures.totals
            told = {name: totals[name] for name in ("windows", "late", "disabled")}
            found = spent.told(seen(runtime.figures) - before, **told)
            worker.stop()
            return found

        def seen(figures: Figures) -> int:
            n: int = figures.totals["events"].get("llm_call", 0)
            return n

        done = asyncio.create_task(until_done())
        await worker.run()
        runtime.stop()
        return await done


async def as_window_worker(config: Config, partitions: int) -> dict[str, Any]:
    from flyball.app.kafka_windows import make_windows_role
    from flyball.app.settings import Settings
    from flyball.app.wiring import make_formats
    from flyball.streams.kafka.worker import Worker

    settings = Settings()
    role = make_windows_role(config, settings, make_formats(settings, b"benchmark"))
    worker = Worker(config, {"windows": role.run})

    async def until_done() -> dict[str, Any]:
        while not (len(owned(role.figures().owned)) == partitions and role.figures().events):
            await asyncio.sleep(0.01)
        spent, before = Spent(), role.figures().events
        while any(role.figures().lag.get(place, 1) for place in owned(role.figures().owned)):
            await asyncio.sleep(0.05)
        found = spent.told(role.figures().events - before)
        worker.stop()
        return found

    def owned(places: Sequence[str]) -> list[str]:
        return [place for place in places if place.startswith(config.topic(CALLS))]

    done = asyncio.create_task(until_done())
    await worker.run()
    return await done


def with_faust(config: KafkaConfig, calls: int) -> dict[str, Any]:
    """The first `calls` of them."""
    import faust

    app = faust.App(
        config.group("faust"), **config.for_faust(), autodiscover=False, web_enabled=False, topic_allow_declare=False,
        topic_disable_leader=True, store="memory://", datadir=tempfile.mkdtemp(), value_serializer="json", consumer_auto_offset_reset="earliest",
    )  # fmt: skip
    topic = app.topic(config.topic(CALLS), value_type=None)
    seen, spent, over = 0, None, asyncio.Event()

    @app.agent(topic)
    async def count(stream: Any) -> None:
        nonlocal seen, spent
        async for _ in stream:
            spent = spent or Spent()
            seen += 1
            if seen >= calls:
                over.set()

    async def go() -> dict[str, Any]:
        await app.start()
        await over.wait()
        assert spent is not None
        found = spent.told(seen)
        await app.stop()
        return found

    return app.loop.run_until_complete(go())


def main(arguments: Sequence[str]) -> None:
    what, bootstrap, prefix, own, calls = arguments
    logging.disable(logging.ERROR)
    pin(cores()[0] if what != "windows" else None)
    config = Config(bootstrap, prefix=own, source=prefix)
    n = int(calls)
    if what.startswith(("chain", "w")):
        from flyball.app.serve import calm_interpreter

        calm_interpreter()
    if what == "faust":
        found = with_faust(config, n)
    else:
        passes = {
            "aiokafka": lambda: decoded(aiokafka_values(config), n),
            "confluent": lambda: decoded(confluent_values(config), n),
            "chain-aiokafka": lambda: chained(aiokafka_records(config), config, n),
            "chain-confluent": lambda: chained(confluent_records(config), config, n),
            "worker": lambda: as_a_worker(config, n),
            "windows": lambda: as_window_worker(config, n),
        }
        found = asyncio.run(passes[what]())
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
