"""What the benchmarks on a real broker share: the broker, topics full of calls, and measured processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from aiokafka import AIOKafkaProducer

from benchmarks.pipeline_memory import traffic
from flyball.core.events import LlmCall
from flyball.streams.kafka.admin import create_topics, wanted
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.partition import CALLS
from tests.servers.kafka_broker import Cluster, running_cluster

PARTITIONS: Final = 8
CALLS_A_SECOND: Final = 100_000
"""Of event time: a window of 10 s holds a million calls."""
WINDOW_S: Final = 10
_AT: Final = b'"at":1700000000'
_ID: Final = b"chatcmpl-P0000"
_BATCH_BYTES: Final = 256 << 10


def cores() -> tuple[int | None, int | None]:
    """(of the measured process, of the broker): two that are not the same, where there are two."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return (usable[0], usable[-1]) if len(usable) > 1 else (None, None)


def pin(core: int | None, pid: int = 0) -> None:
    """Keeps a process, all its threads, on one core."""
    if core is None:
        return
    tasks = [int(name) for name in os.listdir(f"/proc/{pid}/task")] if pid else [0]
    for task in tasks:
        os.sched_setaffinity(task, {core})


@contextlib.contextmanager
def broker(pinned: bool = True) -> Iterator[tuple[Cluster, Path]]:
    """A broker and a folder. Raises: CannotStart."""
    with (
        tempfile.TemporaryDirectory(prefix="flyball-bench-") as folder,
        running_cluster(Path(folder), for_load=True) as cluster,
    ):
        if pinned:
            pin(cores()[1], cluster.nodes[0].pid)
        yield cluster, Path(folder)


def topics(config: KafkaConfig, partitions: int = PARTITIONS) -> None:
    create_topics(config, wanted(partitions))


def lines(calls: Sequence[LlmCall] | None = None) -> list[bytes]:
    """A second of traffic, one call a line."""
    encode = msgspec.json.Encoder().encode
    return [encode(c) for c in (traffic(CALLS_A_SECOND) if calls is None else calls)]


def moved(second: Sequence[bytes], at: int, number: int) -> list[bytes]:
    """The same lines, in the second `at` of event time and with ids of their own."""
    when, ids = b'"at":%d' % at, b"chatcmpl-P%04d" % number
    return [line.replace(_AT, when).replace(_ID, ids) for line in second]


def begin(seconds: int) -> int:
    """A second of event time, at the start of a window, so long ago that `seconds` have passed."""
    return (int(time.time()) - seconds - WINDOW_S) // WINDOW_S * WINDOW_S


def fill(
    config: KafkaConfig, lines_of: Callable[[int], Sequence[bytes]], seconds: int, lines_a_record: int, compression: str | None,
    partitions: int = PARTITIONS,
) -> int:  # fmt: skip
    """Writes so many seconds of calls to the topic of calls, dealt to its partitions in turn. Returns how many calls."""
    written = 0

    async def go() -> None:
        nonlocal written
        client = AIOKafkaProducer(
            **config.for_aiokafka(), acks=1, compression_type=compression, max_batch_size=_BATCH_BYTES
        )
        await client.start()
        try:
            begun = begin(seconds)
            for number in range(seconds):
                now = moved(lines_of(number), begun + number, number)
                written += len(now)
                await asyncio.gather(
                    *(
                        lane(client, p, joined(now[p::partitions], lines_a_record), begun + number + 1)
                        for p in range(partitions)
                    )
                )
        finally:
            await client.stop()

    async def lane(client: AIOKafkaProducer, partition: int, values: Sequence[bytes], at: int) -> None:
        topic, batch = config.topic(CALLS), client.create_batch()
        for value in values:
            if batch.append(timestamp=at * 1000, key=None, value=value) is None:
                await (await client.send_batch(batch, topic, partition=partition))
                batch = client.create_batch()
                batch.append(timestamp=at * 1000, key=None, value=value)
        await (await client.send_batch(batch, topic, partition=partition))

    asyncio.run(go())
    return written


def joined(values: Sequence[bytes], lines_a_record: int) -> Sequence[bytes]:
    if lines_a_record == 1:
        return values
    return [b"\n".join(values[i : i + lines_a_record]) for i in range(0, len(values), lines_a_record)]


def apart(
    command: Sequence[str], timeout_s: float = 300.0, env: dict[str, str] | None = None
) -> dict[str, Any]:
    """What a program that was started by itself says on its last line of output, as JSON.

    Raises: RuntimeError with the end of what it said when it fails.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, env=os.environ | (env or {})
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-1000:]}{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def passes(*arguments: str, timeout_s: float = 300.0) -> dict[str, Any]:
    """One pass of `benchmarks._kafka_passes`."""
    return apart([sys.executable, "-m", "benchmarks._kafka_passes", *arguments], timeout_s)
