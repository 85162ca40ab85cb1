"""`flyball worker` on a real broker: the lab's events come to the incidents of the embedded run, also when it is killed on the way."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from flyball.app.pipeline import Pipeline
from flyball.app.settings import Settings
from flyball.app.wiring import pipeline_config
from flyball.core.estate import Emissions
from flyball.core.events import TYPE_NAMES, Batch
from flyball.lab import Lab
from flyball.streams.kafka.admin import create_topics, wanted
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.producer import Producer
from tests.processes import eventually, free_port
from tests.servers.kafka_ways import Kafka

LASTS_S = 420.0


class Listening:
    """The lab's governor, which keeps every body and what came of it."""

    def __init__(self) -> None:
        self.pipeline = Pipeline(pipeline_config(Settings.model_construct(runbooks=[])))
        self.bodies: list[Batch] = []
        self.opened: list[str] = []
        self.windows = 0

    def _heard(self, said: Emissions) -> Emissions:
        self.opened += [c.incident.id for c in said.changes if not c.old]
        self.windows += len(said.windows)
        return said

    def feed(self, batch: Batch) -> Emissions:
        self.bodies.append(batch)
        return self._heard(self.pipeline.feed(batch))

    def tick(self, now: float) -> Emissions:
        return self._heard(self.pipeline.tick(now))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)


@functools.cache
def embedded() -> Listening:
    """An outage, governed by the embedded pipeline. It has just ended: telemetry of hours ago is treated otherwise."""
    governor = Listening()
    lab = Lab(
        lambda: governor,
        seed=301,
        rate=10.0,
        warmup="5m",
        start_at=float(int(time.time() - LASTS_S) // 10 * 10),
    )
    lab.at("0s").provider("b").fails(0.6)
    lab.run("90s")
    for later in range(30):
        governor.tick(lab.sim.now + later)
    return governor


def produce(config: KafkaConfig, bodies: list[Batch]) -> None:
    async def go() -> None:
        producer = Producer(config)
        await producer.start()
        for body in bodies:
            done = producer.append(producer.encode(body.events), body.sender, body.received_at or 0.0, [])
            await asyncio.wrap_future(done)
        assert await producer.stop()

    asyncio.run(go())


@contextmanager
def worker(config: KafkaConfig, folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    env = os.environ | {
        "FLYBALL_KAFKA__PREFIX": config.prefix,
        "FLYBALL_KAFKA_PREFIX": config.prefix,
        "FLYBALL_DATA": str(folder),
    }
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flyball.app", "worker", "--kafka", config.bootstrap, "--port", str(port)],
            env=env, stdout=log, stderr=log, cwd=folder,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)


def status(port: int) -> dict[str, Any]:
    try:
        found: dict[str, Any] = httpx.get(f"http://127.0.0.1:{port}/v1/status", timeout=5.0).json()
    except httpx.HTTPError:
        return {}
    return found


def said(port: int, what: str) -> int:
    found = status(port).get(what, 0)
    return sum(found.values()) if isinstance(found, dict) else int(found)


@pytest.mark.parametrize("killed", [False, True], ids=["undisturbed", "killed"])
def test_the_worker_finds_what_the_embedded_run_finds(kafka: Kafka, tmp_path: Path, killed: bool) -> None:
    reference = embedded()
    config = kafka.config()
    create_topics(config, wanted(8))
    produce(config, reference.bodies)
    port = free_port()
    total = sum(reference.pipeline.counters.events.values())
    if killed:
        with worker(config, tmp_path, port) as process:
            eventually(lambda: said(port, "events") > total // 4, 60.0)
            process.send_signal(signal.SIGKILL)
            process.wait(10)
    with worker(config, tmp_path, port) as process:
        eventually(lambda: process.poll() is not None or said(port, "windows") >= reference.windows, 90.0)
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        now = status(port)
        opened = [i["id"] for i in httpx.get(f"http://127.0.0.1:{port}/v1/incidents").json()]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, (tmp_path / "log").read_text()[-3000:]
    assert now["events"] == dict(reference.pipeline.counters.events)
    assert (now["windows"], now["late"]) == (reference.windows, 0)
    assert sorted(opened) == sorted(reference.opened)
    assert set(TYPE_NAMES.values()) >= now["events"].keys()
