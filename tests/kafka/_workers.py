"""`flyball worker` as a process, the lab's events in the topics, and what a worker says."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec

from flyball.app.pipeline import Pipeline
from flyball.app.settings import Settings
from flyball.app.wiring import pipeline_config
from flyball.core.estate import Emissions
from flyball.core.events import Batch
from flyball.lab import Lab
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.producer import Producer
from tests.kafka._topics import records
from tests.processes import eventually, free_port

LASTS_S = 420.0
"""Of the lab's run: five quiet minutes, an outage, a little time after it."""


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
def just_now() -> Listening:
    """An outage that has just ended, governed by the embedded pipeline; the same for all tests of a process. Telemetry of hours ago is treated otherwise."""
    governor = Listening()
    lab = Lab(
        lambda: governor, seed=301, rate=10.0, warmup="5m", start_at=float(int(time.time() - LASTS_S) // 10 * 10)
    )  # fmt: skip
    lab.at("0s").provider("b").fails(0.6)
    lab.run("90s")
    for later in range(30):
        governor.tick(lab.sim.now + later)
    return governor


def moved(bodies: Sequence[Batch], ends_at: float) -> list[Batch]:
    """The same, ending at about another time: moved by whole windows."""
    by = (ends_at - (bodies[-1].received_at or 0.0)) // 10.0 * 10.0
    return [
        Batch(
            [msgspec.structs.replace(e, at=e.at + by) for e in b.events], b.sender, (b.received_at or 0.0) + by
        )
        for b in bodies
    ]  # fmt: skip


def produce(config: KafkaConfig, bodies: Sequence[Batch]) -> None:
    async def go() -> None:
        producer = Producer(config)
        await producer.start()
        for body in bodies:
            done = producer.append(producer.encode(body.events), body.sender, body.received_at or 0.0, [])
            await asyncio.wrap_future(done)
        assert await producer.stop()

    asyncio.run(go())


@dataclass
class Worker:
    """A running process, and what it says."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    url: str = field(init=False)

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        """What is answered with 200; None where nothing is."""
        try:
            answer = httpx.get(f"{self.url}{path}", timeout=5.0)
        except httpx.HTTPError:
            return None
        return answer.json() if answer.status_code == 200 else None

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/v1/status") or {}
        return found

    def metrics(self) -> dict[str, float]:
        """Figures without labels, by name; empty where there is no answer."""
        try:
            page = httpx.get(f"{self.url}/metrics", timeout=5.0).text
        except httpx.HTTPError:
            return {}
        return {
            name: float(value) for name, value in re.findall(r"^(flyball_\w+) (\S+)$", page, re.MULTILINE)
        }

    def role(self) -> str:
        return str(self.status().get("role", ""))

    def count(self, what: str) -> int:
        found = self.status().get(what, 0)
        return sum(found.values()) if isinstance(found, dict) else int(found)

    def until(self, check: Any, deadline_s: float = 90.0) -> Any:
        """The first true result of `check()`; fails with the end of the log when the process has ended or the time is over."""
        found = eventually(lambda: self.process.poll() is not None or check(), deadline_s, every_s=0.5)
        assert self.process.poll() is None, f"exit {self.process.poll()}: {self.said()}"
        assert found, f"{self.status()}\n{self.said()}"
        return found

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


def environment(config: KafkaConfig, folder: Path, **settings: str) -> dict[str, str]:
    mine = {"KAFKA": config.bootstrap, "KAFKA_PREFIX": config.prefix, "DATA": str(folder), "HASH_KEY": "key of the tests", "KAFKA_PARTITIONS": "4"}  # fmt: skip
    return os.environ | {f"FLYBALL_{k}": v for k, v in (mine | settings).items()}


@contextlib.contextmanager
def worker(config: KafkaConfig, folder: Path, *arguments: str, **settings: str) -> Iterator[Worker]:
    """`flyball worker` for as long as the block lasts. Settings as of variables: `MODE="auto"`."""
    folder.mkdir(exist_ok=True)
    port, log = free_port(), folder / "log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "flyball.app", "worker", "--port", str(port), *arguments],
            env=environment(config, folder, **settings), stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=folder,
        )  # fmt: skip
    try:
        yield Worker(process, port, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)


def database(where: Path | str) -> dict[str, str]:
    """Settings that say where the database is; a file is always in the data folder."""
    return {"DATABASE": where} if isinstance(where, str) else {}


@dataclass(frozen=True)
class Said:
    """A record of an output topic."""

    key: str
    value: Any
    headers: dict[str, str]


def published(config: KafkaConfig, topic: str) -> list[Said]:
    return [
        Said(
            (r.key or b"").decode(),
            None if r.value is None else json.loads(r.value),
            {k: v.decode() for k, v in r.headers},
        )
        for r in records(config, [topic])
    ]
