"""The role `windows` run in this process against a real broker, and what it said compared with windows made in one piece."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from kafka import KafkaProducer

from flyball.app.kafka_windows import Decoder
from flyball.app.settings import Settings
from flyball.core.columns import SUMS, Window
from flyball.core.events import Batch, Event, LlmCall
from flyball.streams.formats.native import NativeNdjson
from flyball.streams.kafka.admin import create_topics, wanted
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.windows_role import RoleSettings, WindowsRole
from flyball.streams.merging import Merger
from flyball.streams.portion import Portion, decode_portion
from flyball.streams.windows import Windows, WindowSettings
from tests.kafka._topics import records
from tests.streams.test_windows_properties import as_naive

NOW = 1_800_000_000.0
END = NOW + 1000.0
"""Time of the last call of each partition, which closes all windows before it."""
CALLS = "llm-calls"
WINDOWS = WindowSettings()
QUICK = RoleSettings(cut_s=0.1, snapshot_s=0.2, stuck_s=30.0)


def calls(first: int, n: int, step_s: float = 0.25) -> list[LlmCall]:
    """Calls number `first` and following of a steady stream; their numbers have sums without rounding."""
    return [
        LlmCall(
            at=NOW + i * step_s, id=f"c{i}", provider="ab"[i % 2], model=f"m{i % 3}", app=f"app{i % 5}", tenant=f"t{i % 7}",
            error="timeout" if i % 11 == 0 else "", latency_s=(i % 64) / 16, input_tokens=i % 1000, output_tokens=i % 10,
            cost_usd=(i % 8) / 16,
        )
        for i in range(first, first + n)
    ]  # fmt: skip


def line(event: Event) -> bytes:
    return msgspec.json.encode(event)


def put(
    config: KafkaConfig, partition: int, values: Iterable[bytes | None], *, topic: str = CALLS, received_at: float | None = NOW,
    headers: Sequence[tuple[str, bytes]] = (), keys: Sequence[bytes] = (),
) -> None:  # fmt: skip
    """Writes records to one partition, each acknowledged before the next call of this returns."""
    own = [] if received_at is None else [("received_at", str(received_at).encode())]
    producer = KafkaProducer(
        **config.for_kafka_python(), acks="all", enable_idempotence=True, compression_type="gzip"
    )
    try:
        for v, key in itertools.zip_longest(values, keys):
            producer.send(config.topic(topic), v, key=key, partition=partition, headers=[*own, *headers])
        producer.flush(30.0)
    finally:
        producer.close()


def put_calls(
    config: KafkaConfig,
    partitions: int,
    those: Sequence[LlmCall],
    a_record: int = 4,
    until: float | None = None,
) -> None:
    """Shares calls out over partitions, `a_record` lines a record, in the order of time."""
    for p in range(partitions):
        mine = those[p::partitions]
        some = [mine[i : i + a_record] for i in range(0, len(mine), a_record)]
        put(config, p, [b"\n".join(map(line, body)) for body in some], received_at=those[-1].at)


def end(config: KafkaConfig, partitions: int, at: float = END) -> None:
    """The call behind which all windows are closed, in each partition."""
    for p in range(partitions):
        put(config, p, [line(LlmCall(at=at, id=f"end-{p}-{at}", provider="a"))], received_at=at)


def made(config: KafkaConfig, partitions: int) -> KafkaConfig:
    create_topics(config, wanted(partitions))
    return config


def make_role(config: KafkaConfig, settings: RoleSettings = QUICK) -> WindowsRole:
    decoder = Decoder(Settings.model_construct(), {"native": NativeNdjson()})
    return WindowsRole(config, decoder, WINDOWS, settings, lines=decoder.lines)


@dataclass
class Running:
    role: WindowsRole
    task: asyncio.Task[None]
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, check: Callable[[], bool], deadline_s: float = 40.0) -> None:
        async with asyncio.timeout(deadline_s):
            while not check():
                if self.task.done():
                    self.task.result()
                    raise AssertionError("the role has ended")
                await asyncio.sleep(0.02)

    async def owns(self, n: int) -> None:
        await self.until(lambda: len(self.role.figures().owned) == n)

    async def end(self) -> None:
        """As SIGTERM: hands over and leaves."""
        self.stop.set()
        await self.task

    async def die(self) -> None:
        """Nothing more is told or stored."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


@contextlib.asynccontextmanager
async def running(config: KafkaConfig, settings: RoleSettings = QUICK) -> AsyncIterator[Running]:
    role, stop = make_role(config, settings), asyncio.Event()
    found = Running(role, asyncio.create_task(role.run(stop)), stop)
    try:
        yield found
    finally:
        if not found.task.done():
            await found.die()


async def said(config: KafkaConfig) -> list[Portion]:
    """All portions so far, in their order."""
    found = await asyncio.to_thread(records, config, ["windows"])
    return [decode_portion(r.value) for r in found]


async def said_until(
    config: KafkaConfig, ends: Mapping[str, int], running: Running | None = None, deadline_s: float = 60.0
) -> list[Portion]:
    """All portions, once each source has told the record before `ends`, and closed what is before it."""
    async with asyncio.timeout(deadline_s):
        while True:
            portions = await said(config)
            reached = {p.source: p for p in portions if p.partials or p.last >= 0}
            if all(s in reached and reached[s].last >= n - 1 for s, n in ends.items()):
                return portions
            if running is not None and running.task.done():
                running.task.result()
            await asyncio.sleep(0.1)


def merge(portions: Iterable[Portion]) -> tuple[list[Window], Merger]:
    """What control makes of the portions: the windows, and the counters."""
    merger = Merger(WINDOWS, stall_s=1e9)
    out = [item for p in portions for item in merger.feed(p, 0.0)]
    out += merger.flush()
    return [w for w in out if isinstance(w, Window)], merger


def in_one_piece(those: Iterable[LlmCall]) -> list[Window]:
    """The windows of an embedded run over the same calls."""
    windows = Windows(WINDOWS)
    found = windows.feed(Batch(events=sorted(those, key=lambda c: c.at)))
    return found + windows.flush()


def assert_same(found: Sequence[Window], wanted: Sequence[Window]) -> None:
    """Every cell of every window, exactly; sums of logarithms, which are rounded, nearly."""
    told, expected = cells(found), cells(wanted)
    assert told.keys() == expected.keys()
    for key, row in expected.items():
        for name, value in row.items():
            nearly = isinstance(name, tuple) and str(name[1]).startswith("log")
            assert told[key].get(name, 0) == (pytest.approx(value) if nearly else value), (key, name)
        assert {n for n, v in told[key].items() if v} == {n for n, v in row.items() if v}


def cells(windows: Iterable[Window]) -> dict[Any, dict[Any, Any]]:
    found: dict[Any, dict[Any, Any]] = {}
    for w in windows:
        if w.start < END - 100:
            found |= as_naive(w.cells, w.start)
    assert set(SUMS)
    return found


def run(work: Any, deadline_s: float = 120.0) -> None:
    async def timed() -> None:
        async with asyncio.timeout(deadline_s):
            await work

    asyncio.run(timed())
