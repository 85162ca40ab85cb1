"""From the record that shows a loop to the lease that stops it, by way of Kafka; and from the end of a window to its being judged.

A real broker on this machine and `flyball worker` with all roles and SQLite, under live traffic on all eight partitions of the calls. A hundred agent
runs loop one after the other; the third like step of each is what the shipped runbook `runaway-agent` acts on (here in mode `auto`, and without
its limits on how often). Measured is from handing that step to the producer to its lease in `flyball.directives`: no window is in that. What is: single
events wait until every partition has come as far (`lateness_s`, 2 s, of calls), portions are cut every 0.5 s. Windows are of 1 s here; from the end
of one to its showing in `/v1/status`, the lateness allowed is part of it.

    python -m benchmarks kafka_latency
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Final

import httpx
import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from benchmarks._kafka import PARTITIONS, broker, topics
from benchmarks.pipeline_memory import Row, row
from flyball.app.tables import print_rows
from flyball.core.events import AgentStep, LlmCall
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.partition import CALLS, STEPS
from tests.processes import free_port, running
from tests.servers.kafka_broker import CannotStart

_RUNS: Final = 100
_EVERY_S: Final = 0.5
_WARM_S: Final = 15.0
_PATIENCE_S: Final = 30.0
_BEAT_S: Final = 0.1
_CALLS_A_BEAT: Final = 5
"""Of each partition."""
_LOOP: Final = re.compile(rb'"run":\s*"(loop-\d+)"')
_encode = msgspec.json.Encoder().encode


def runbooks(folder: Path) -> Path:
    """`runaway-agent` in mode auto, as often as there are loops."""
    text = files("flyball.runbooks").joinpath("library/runaway-agent.yaml").read_text("utf-8")
    text = text[: text.index("tests:")].replace("mode: suggest", "mode: auto")
    for limit, wide in (("cooldown: 30m", "cooldown: 1s"), ("runs: 20/1h", "runs: 1000/1h"), ("traffic: 10%, tenants: 1", "traffic: 100%, tenants: 1000")):  # fmt: skip
        assert limit in text, f"the shipped runbook has no {limit!r} any more"
        text = text.replace(limit, wide)
    made = folder / "runbooks"
    made.mkdir()
    (made / "runaway-agent.yaml").write_text(text, "utf-8")
    return made


class Live:
    """Traffic, loops among it, and what comes of them."""

    def __init__(self, config: KafkaConfig, url: str) -> None:
        self._config, self._url = config, url
        self.sent_at: dict[str, float] = {}
        self.seen_at: dict[str, float] = {}
        self.windows_s: list[float] = []
        self._over = asyncio.Event()

    async def run(self) -> None:
        client = AIOKafkaProducer(**self._config.for_aiokafka(), acks="all", enable_idempotence=True)
        await client.start()
        tasks = [
            asyncio.create_task(work) for work in (self._traffic(client), self._leases(), self._windows())
        ]
        try:
            await asyncio.sleep(_WARM_S)
            await self._loops(client)
            end = time.perf_counter() + _PATIENCE_S
            while len(self.seen_at) < _RUNS and time.perf_counter() < end:
                await asyncio.sleep(_BEAT_S)
        finally:
            self._over.set()
            await asyncio.gather(*tasks)
            await client.stop()

    async def _traffic(self, client: AIOKafkaProducer) -> None:
        n = 0
        while not self._over.is_set():
            for partition in range(PARTITIONS):
                n += 1
                calls = [
                    LlmCall(at=time.time(), id=f"call-{n}-{k}", provider="openai", model="gpt-4o", app=f"app-{k}", latency_s=1.0,
                            input_tokens=100, output_tokens=10)
                    for k in range(_CALLS_A_BEAT)
                ]  # fmt: skip
                await client.send(
                    self._config.topic(CALLS), b"\n".join(map(_encode, calls)), partition=partition
                )
            await asyncio.sleep(_BEAT_S)

    async def _loops(self, client: AIOKafkaProducer) -> None:
        for n in range(_RUNS):
            run = f"loop-{n}"
            for step in range(3):
                now = time.time()
                told = AgentStep(
                    at=now, run=run, app=f"agents-{n}", agent=f"agent-{n}", tenant=f"tenant-{n}", tool="search", step=step, args_hash="a",
                    result_hash="b", id=f"{run}/{step}",
                )  # fmt: skip
                self.sent_at[run] = time.perf_counter()
                await client.send_and_wait(self._config.topic(STEPS), _encode(told), partition=n % PARTITIONS)
            await asyncio.sleep(_EVERY_S)

    async def _leases(self) -> None:
        client = AIOKafkaConsumer(
            self._config.topic("directives"), **self._config.for_aiokafka(), auto_offset_reset="earliest"
        )
        await client.start()
        try:
            while not self._over.is_set():
                for records in (await client.getmany(timeout_ms=100)).values():
                    for found in (_LOOP.search(r.value or b"") for r in records):
                        if found is not None:
                            self.seen_at.setdefault(found[1].decode(), time.perf_counter())
        finally:
            await client.stop()

    async def _windows(self) -> None:
        """How long after its end each window shows, by a poll every 20 ms: what event time had come to is told by the watermark."""
        watermark = 0.0
        async with httpx.AsyncClient(base_url=self._url, timeout=30.0) as client:
            while not self._over.is_set():
                with contextlib.suppress(httpx.TransportError, KeyError, ValueError):
                    told = float((await client.get("/v1/status")).json()["watermark"])
                    if watermark and told > watermark:
                        self.windows_s.append(time.time() - told)
                    watermark = max(watermark, told)
                await asyncio.sleep(0.02)

    def took_s(self) -> list[float]:
        return [self.seen_at[run] - self.sent_at[run] for run in self.sent_at if run in self.seen_at]


@contextlib.contextmanager
def worker(config: KafkaConfig, folder: Path) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "flyball.app", "worker", "--kafka", config.bootstrap, "--port", str(port), "--runbooks", str(runbooks(folder)),
    ]  # fmt: skip
    env = {
        "FLYBALL_KAFKA__PREFIX": config.prefix, "FLYBALL_DATA": str(folder / "data"), "FLYBALL_MODE": "auto", "FLYBALL_WINDOW_S": "1",
    }  # fmt: skip
    with running(command, f"{url}/readyz", folder / "flyball.log", env):
        yield url


def figures(name: str, took_s: list[float]) -> list[Row]:
    quantiles = statistics.quantiles(took_s, n=100)
    return [row(f"{name}, {which}", round(quantiles[k], 3), "s") for which, k in (("p50", 49), ("p99", 98))]


def run() -> list[Row]:
    """About two minutes. Raises: AssertionError when a loop was not stopped."""
    try:
        with broker(pinned=False) as (cluster, folder):
            config = KafkaConfig(cluster.bootstrap, prefix="latency.")
            topics(config)
            with worker(config, folder) as url:
                live = Live(config, url)
                asyncio.run(live.run())
    except CannotStart as e:
        print(f"kafka_latency: {e}", file=sys.stderr)
        return []
    if len(live.seen_at) < _RUNS:
        raise AssertionError(f"{_RUNS} runs looped, {len(live.seen_at)} were stopped")
    return [
        *figures("produced step to lease in Kafka, no window between", live.took_s()),
        *figures("end of a window of 1 s to its being judged, 2 s of lateness in it", live.windows_s),
    ]


if __name__ == "__main__":
    print_rows(run())
