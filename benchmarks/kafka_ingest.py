"""The way into Kafka: what the producer of `flyball run --kafka` writes, acknowledged, against aiokafka alone with the same bytes.

A real broker on this machine (one node, 8 partitions), both writers in this process on one loop, in turns; `acks=all`, idempotent, zstd. aiokafka alone is
given finished records and fills batches of the same size, one a partition in flight; ours is given decoded calls in bodies of 512, splits them by call identity, writes
the lines, and answers each body. Processor time of this process; the wall time stands beside it. Last, the same over HTTP: `flyball run --kafka` as shipped.

    python -m benchmarks kafka_ingest
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
from aiokafka import AIOKafkaProducer

from benchmarks.pipeline_memory import bodies, later, traffic
from flyball.app.tables import print_rows
from flyball.core.events import Event
from flyball.streams.kafka.admin import create_topics, wanted
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.partition import CALLS
from flyball.streams.kafka.producer import WRITTEN, Part, Producer, ProducerSettings
from tests.processes import free_port, running
from tests.servers.kafka_broker import CannotStart
from tests.servers.kafka_ways import any_kafka

BAR_RATIO: Final = 0.3
"""Splitting and writing the lines is work that aiokafka alone does not do here."""
_CALLS: Final = 102_400
_BODY: Final = 512
_PASSES: Final = 7
_PARTITIONS: Final = 8
_POSTS: Final = 400
_EXPORTERS: Final = 8


async def alone(client: AIOKafkaProducer, topic: str, records: Sequence[Part]) -> None:
    """Batches of the same size, one a partition in flight."""

    async def lane(partition: int, mine: Sequence[bytes]) -> None:
        batch = client.create_batch()
        for value in mine:
            if batch.append(timestamp=None, key=None, value=value) is None or batch.size() > 256 << 10:
                await (await client.send_batch(batch, topic, partition=partition))
                batch = client.create_batch()
                batch.append(timestamp=None, key=None, value=value)
        await (await client.send_batch(batch, topic, partition=partition))

    lanes = [[r.data for r in records if r.partition == p] for p in range(_PARTITIONS)]
    await asyncio.gather(*(lane(p, mine) for p, mine in enumerate(lanes)))


async def ours(producer: Producer, made: Sequence[Sequence[Event]]) -> None:
    waiting = []
    for i, events in enumerate(made):
        parts = producer.encode(events)
        waiting.append(asyncio.wrap_future(producer.append(parts, f"exporter-{i % _EXPORTERS}", time.time())))
        await asyncio.sleep(0)
    await asyncio.gather(*waiting)


async def timed(work: Callable[[], Awaitable[None]]) -> tuple[float, float]:
    """(processor seconds, seconds)."""
    wall, cpu = time.perf_counter(), time.process_time()
    await work()
    return time.process_time() - cpu, time.perf_counter() - wall


async def compare(config: KafkaConfig) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    calls: list[Event] = list(traffic(_CALLS))
    made = [calls[i : i + _BODY] for i in range(0, _CALLS, _BODY)]
    producer = Producer(config)
    client = AIOKafkaProducer(
        **config.for_aiokafka(), enable_idempotence=True, acks="all", compression_type=ProducerSettings().compression,
        max_batch_size=ProducerSettings().batch_bytes,
    )  # fmt: skip
    await producer.start()
    await client.start()
    try:
        records = [
            p for chunk in range(0, _CALLS, 1280) for p in producer.encode(calls[chunk : chunk + 1280])
        ]
        theirs, mine = [], []
        for _ in range(_PASSES):
            theirs.append(await timed(lambda: alone(client, config.topic(CALLS), records)))
            mine.append(await timed(lambda: ours(producer, made)))
    finally:
        await client.stop()
        await producer.stop()
    return theirs[1:], mine[1:]  # the first pass warms up


async def post(url: str) -> tuple[float, list[float]]:
    """(calls a second, seconds of each answer) of exporters that post one body after the other."""
    made = bodies(traffic(_CALLS))
    every = [body for second in range(2) for body in later(made, int(time.time()) % 10**8 + second)][:_POSTS]
    took: list[float] = []

    async def exporter(mine: Sequence[bytes]) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60.0) as client:
            for body in mine:
                begun = time.perf_counter()
                (await client.post("/v1/events", content=body)).raise_for_status()
                took.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    await asyncio.gather(*(exporter(every[e::_EXPORTERS]) for e in range(_EXPORTERS)))
    return len(every) * _BODY / (time.perf_counter() - begun), took


def over_http(config: KafkaConfig, folder: Path) -> tuple[float, list[float]]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "flyball.app", "run", "--port", str(port), "--data", str(folder / "data"),
        "--kafka", config.bootstrap,
    ]  # fmt: skip
    env = {"FLYBALL_KAFKA__PREFIX": config.prefix, "FLYBALL_KAFKA__PARTITIONS": str(_PARTITIONS)}
    with running(command, f"{url}/readyz", folder / "flyball.log", env):
        return asyncio.run(post(url))


def run() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with any_kafka(Path(folder)) as kafka:
                config = kafka.config()
                create_topics(config, wanted(_PARTITIONS, WRITTEN))
                theirs, mine = asyncio.run(compare(config))
                a_second, took = over_http(config, Path(folder))
        except CannotStart as e:
            print(f"kafka_ingest: {e}", file=sys.stderr)
            return []
    size = len(msgspec.json.Encoder().encode_lines(traffic(1000))) / 1000
    rows = []
    for kind, index in (("processor", 0), ("wall", 1)):
        value, baseline = (statistics.median(_CALLS / t[index] for t in of) for of in (mine, theirs))
        ratio = statistics.median(t[index] / m[index] for t, m in zip(theirs, mine, strict=True))
        judged = index == 0
        rows.append(
            {"name": f"calls of {size:.0f} bytes acknowledged by Kafka, {kind} time, against aiokafka alone", "value": round(value),
             "unit": "calls/s", "baseline": round(baseline), "ratio": round(ratio, 2), "bar": BAR_RATIO if judged else None,
             "holds": bool(ratio >= BAR_RATIO) if judged else None}
        )  # fmt: skip
    p50, p99 = statistics.quantiles(took, n=100)[49], statistics.quantiles(took, n=100)[98]
    rows.append(
        {"name": "calls posted to flyball run --kafka and acknowledged", "value": round(a_second), "unit": "calls/s",
         "baseline": None, "ratio": None, "bar": None, "holds": None}
    )  # fmt: skip
    rows.append(
        {"name": f"answer to POST /v1/events with Kafka, {_EXPORTERS} exporters at full speed, p99 (baseline: p50)", "value": round(p99, 4), "unit": "s",
         "baseline": round(p50, 4), "ratio": None, "bar": None, "holds": None}
    )  # fmt: skip
    return rows


if __name__ == "__main__":
    print_rows(run())
    sys.exit()
