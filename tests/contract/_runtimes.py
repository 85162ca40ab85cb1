"""The runtimes behind one small interface: events and poison in, time, and what came of them out.

On Kafka everything but the process is real: ingest's producer, a broker, the role that makes windows, control's way into the log, and the
runtime with its stages on a database. Time is told by the records, so that minutes pass at once.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
from kafka import KafkaConsumer, TopicPartition

from flyball.app.embedded import Embedded
from flyball.app.kafka_ingest import KafkaIngest
from flyball.app.kafka_windows import Decoder
from flyball.app.pipeline import Pipeline
from flyball.app.portions import PortionFeed
from flyball.app.replay import Replay, Source
from flyball.app.settings import KafkaSettings, Settings
from flyball.app.store import store
from flyball.app.wiring import make_formats, pipeline_config
from flyball.app.writer import Limits
from flyball.core.columns import Window
from flyball.core.estate import Emissions
from flyball.core.events import Batch, Event
from flyball.streams.formats.native import NativeNdjson
from flyball.streams.kafka.admin import create_topics, wanted
from flyball.streams.kafka.client import Writer
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.dead_letters import newest
from flyball.streams.kafka.topics import TAKEN_IN
from flyball.streams.kafka.windows_role import RoleSettings, WindowsRole
from tests.app._http import served
from tests.app._runtime import NOW, SetClock
from tests.processes import eventually

T = TypeVar("T")
ROOM = Limits(pending_bytes=64 << 10)
SLOWEST_S = 40.0
"""More than the slowest sender is waited for, and a window."""
PARTITIONS = 3
_native = NativeNdjson()
# A minute of these tests passes in a moment: nobody has stalled for that.
_SETTINGS = Settings.model_construct(runbooks=[], kafka=KafkaSettings(stall_s=3600.0))


@dataclass
class Seen:
    """What came of everything so far."""

    windows: list[Window] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    """Ids of incidents, in order of their opening."""
    singles: list[Event] = field(default_factory=list)
    """Events that are judged by themselves, in the order in which they are."""
    events: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    late: int = 0
    letters: list[tuple[bytes | None, str]] = field(default_factory=list)
    """Bytes and reason of what could not be taken."""


class Heard(Pipeline):
    """A pipeline that notes in which order single events reach the stages."""

    def __init__(self, singles: list[Event]) -> None:
        super().__init__(pipeline_config(_SETTINGS))
        self._singles = singles

    def _judge_events(self, batch: Batch, by_type: Counter[type], out: Emissions) -> None:
        self._singles += batch.events
        super()._judge_events(batch, by_type, out)


class Runtime(ABC):
    """One way through Flyball. Use it as a context manager."""

    name = ""
    waits = True
    """Whether what is offered may have to wait, and is turned away when too much does."""
    keeps_poison = True
    """Whether the bytes of what could not be taken are kept."""
    sorts = False
    """Whether events are put in order of event time first, so that none is ever late."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = SetClock(NOW)
        self._heard = Seen()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self._live())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextmanager
    def _live(self) -> Iterator[None]:
        yield

    @abstractmethod
    def offer(self, events: list[Event], sender: str = "gateway", received_at: float = 0.0) -> Future[int]:
        """Hands in what one body held; resolves once it is durable. Raises: Overloaded."""

    def give(self, events: list[Event], sender: str = "gateway", received_at: float = 0.0) -> None:
        self.offer(events, sender, received_at).result(60)

    @abstractmethod
    def give_lines(self, body: bytes) -> None:
        """Hands in lines as somebody wrote them, now."""

    @abstractmethod
    def pass_time(self, to: float) -> None:
        """Until it is `to`, with nothing more given: late enough that every window closes."""

    @abstractmethod
    def restart(self) -> None:
        """An end and a new start between two records."""

    @abstractmethod
    def seen(self) -> Seen:
        """All that came of what was given before time last passed."""

    def _hear(self, said: Emissions) -> None:
        self._heard.windows += said.windows
        self._heard.opened += [c.incident.id for c in said.changes if not c.old]

    def _arrives(self, events: Sequence[Event], received_at: float) -> float:
        """When it arrived: a moment after its newest event, unless said otherwise."""
        at = received_at or max(e.at for e in events) + 0.25
        self._is_at_least(at)
        return at

    def _is_at_least(self, at: float) -> None:
        self.clock.at = max(self.clock.at, at)

    def _counted(self, pipeline: Pipeline) -> Seen:
        heard = self._heard
        heard.events, heard.duplicates = +pipeline.counters.events, pipeline.duplicates
        heard.late = pipeline.window_stats.late
        return heard


class Memory(Runtime):
    """The pipeline alone."""

    name = "memory"
    waits = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._pipeline = Heard(self._heard.singles)

    def offer(self, events: list[Event], sender: str = "gateway", received_at: float = 0.0) -> Future[int]:
        at = self._arrives(events, received_at)
        self._hear(self._pipeline.feed(Batch(events=events, sender=sender, received_at=at)))
        done: Future[int] = Future()
        done.set_result(0)
        return done

    def give_lines(self, body: bytes) -> None:
        decoded = _native.decode(body)
        self._heard.letters += [(r.data, r.reason) for r in decoded.rejected]
        self.give(decoded.events)

    def pass_time(self, to: float) -> None:
        self.clock.at = to
        self._hear(self._pipeline.tick(to))

    def restart(self) -> None:
        state = self._pipeline.snapshot()
        self._pipeline = Heard(self._heard.singles)
        self._pipeline.restore(state)

    def seen(self) -> Seen:
        return self._counted(self._pipeline)


class OnSqlite(Runtime):
    """`flyball run`: HTTP interface, log and stages on a file."""

    name = "sqlite"

    @contextmanager
    def _live(self) -> Iterator[None]:
        self._running = ExitStack()
        self._start()
        yield
        self._running.close()

    def _start(self) -> None:
        self._client, self._runtime = self._running.enter_context(
            served(
                self.folder, self.clock, pipeline=partial(Heard, self._heard.singles), listener=self._hear, limits=ROOM
            )
        )  # fmt: skip

    def offer(self, events: list[Event], sender: str = "gateway", received_at: float = 0.0) -> Future[int]:
        return self._runtime.ingest(events, sender, self._arrives(events, received_at))

    def give_lines(self, body: bytes) -> None:
        self._client.post("/v1/events", content=body).raise_for_status()

    def pass_time(self, to: float) -> None:
        self.clock.at = to
        assert self._runtime.wait_for(self._runtime.tick(to).result(30))

    def restart(self) -> None:
        self._running.close()
        self._start()

    def seen(self) -> Seen:
        with self._runtime.reader.connect() as c:
            letters = store.list_dead_letters(c)
        self._heard.letters = [(x["body"], x["reason"]) for x in reversed(letters)]
        return self._runtime.ask(self._counted).result(30)


class Replayed(Runtime):
    """`flyball replay` of a file, in the order of event time: what is given is written, and read when time passes."""

    name = "replay"
    waits = False
    keeps_poison = False
    sorts = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._file = folder / "events.ndjson"
        self._pipeline = Heard(self._heard.singles)

    def offer(self, events: list[Event], sender: str = "gateway", received_at: float = 0.0) -> Future[int]:
        self.give_lines(b"\n".join(map(_line, events)))
        done: Future[int] = Future()
        done.set_result(0)
        return done

    def give_lines(self, body: bytes) -> None:
        with self._file.open("ab") as f:
            f.write(body + b"\n")

    def restart(self) -> None:
        """Nothing runs before time passes."""

    def pass_time(self, to: float) -> None:
        """Replays all of the file anew: it knows no yesterday."""
        self._heard = Seen()
        self._pipeline = Heard(self._heard.singles)
        source = Source([self._file], {"native": _native}, "native")
        for said in Replay(self._pipeline).emissions(source):
            self._hear(said)
        self._heard.letters = [(None, reason) for reason in source.rejected.elements()]

    def seen(self) -> Seen:
        return self._counted(self._pipeline)


class OnKafka(Runtime):
    """`flyball run --kafka` and `flyball worker` with all its roles, but in this process."""

    name = "kafka"
    _PACE = RoleSettings(cut_s=0.05, snapshot_s=0.5, idle_s=0.1)

    def __init__(self, folder: Path, config: KafkaConfig) -> None:
        super().__init__(folder)
        self.config = config
        create_topics(config, wanted(PARTITIONS))
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @contextmanager
    def _live(self) -> Iterator[None]:
        thread = threading.Thread(target=self._loop.run_forever, name="kafka-runtime", daemon=True)
        thread.start()
        self._consumer = KafkaConsumer(**self.config.for_kafka_python(), group_id=None)
        self._places = [
            TopicPartition(self.config.topic(t), p)
            for t in TAKEN_IN
            for p in sorted(self._consumer.partitions_for_topic(self.config.topic(t)) or ())
        ]
        self._intake = KafkaIngest(self.config, self.clock, ROOM)
        self._on_loop(self._intake.start())
        self._writer: Writer = self._call(partial(Writer, self.config))
        self._on_loop(self._writer.start())
        self._start()
        try:
            yield
        finally:
            self._end(gently=True)
            self._on_loop(self._intake.stop())
            self._on_loop(self._writer.stop())
            self._consumer.close()
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join(30)
            self._loop.close()

    def _start(self) -> None:
        self._runtime = Embedded(
            partial(Heard, self._heard.singles), self.folder / "flyball.sqlite3", self.clock, listener=self._hear,
            limits=ROOM,
        )  # fmt: skip
        self._runtime.start()

        async def roles() -> None:
            self._stop = asyncio.Event()
            windows = WindowsRole(
                self.config, Decoder(_SETTINGS, make_formats(_SETTINGS, b"key of the tests")),
                pipeline_config(_SETTINGS).windows, self._PACE, clock=self.clock.now,
            )  # fmt: skip
            control = PortionFeed(self._runtime, self.config)
            self._tasks = [asyncio.ensure_future(r.run(self._stop)) for r in (windows, control)]

        self._on_loop(roles())

    def _end(self, *, gently: bool) -> None:
        async def end() -> None:
            self._stop.set()
            if not gently:
                for task in self._tasks:
                    task.cancel()
            for found in await asyncio.gather(*self._tasks, return_exceptions=True):
                if isinstance(found, Exception):
                    raise found

        self._on_loop(end())
        assert self._runtime.stop()

    def _on_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def _call(self, work: Callable[[], T]) -> T:
        """Calls it on the thread of the loop."""

        async def call() -> T:
            return work()

        found: T = self._on_loop(call())
        return found

    def offer(self, events: list[Event], sender: str = "gateway", received_at: float = 0.0) -> Future[int]:
        at = received_at or max(e.at for e in events) + 0.25
        taken = self._call(lambda: self._intake.ingest(events, sender, at))
        # Not before: whoever sees an empty partition tells that it was empty until now.
        taken.add_done_callback(lambda _: self._is_at_least(at))
        return taken

    def give_lines(self, body: bytes) -> None:
        """As somebody else writes them to a topic, all in one record."""
        self._send(0, body, self.clock.at)

    def _send(self, place: int, body: bytes, received_at: float) -> None:
        topic, partition = self._places[place]

        async def send() -> None:
            headers = [
                ("content-type", b"application/x-ndjson"),
                ("received_at", repr(received_at).encode()),
            ]
            name = topic.removeprefix(self.config.prefix)
            await (await self._writer.send(name, body, partition=partition, headers=headers))

        self._on_loop(send())

    def _arrived(self, *, idle: bool = False) -> bool:
        """Whether every record of the topics has reached the stages; and whether every partition has then been told to be idle."""
        for task in self._tasks:
            assert not task.done(), task
        ends = self._consumer.end_offsets(self._places)
        told = self._runtime.ask(lambda p: p.sources).result(30)
        return all(
            (found := told.get(f"{place.topic}/{place.partition}")) is not None
            and found[0] + 1 >= end
            and (found[2] or not idle)
            for place, end in ends.items()
        )

    def pass_time(self, to: float) -> None:
        """Time is told by records: an empty one in each partition says that it is `to`."""
        assert eventually(self._arrived, 60), self._runtime.ask(lambda p: p.sources).result(30)
        for place in range(len(self._places)):
            self._send(place, b"", to)
        # Control's own clock stays until all is there: to it this would be a long silence of all but one partition.
        assert eventually(lambda: self._arrived(idle=True), 60), self._runtime.ask(
            lambda p: p.sources
        ).result(30)
        self.clock.at = to
        assert self._runtime.wait_for(self._runtime.tick(to).result(30))
        # Not before the worker has said again, some time after `to`, that its partitions are empty.
        assert eventually(lambda: self._runtime.ask(lambda p: p.watermark).result(30) >= to - SLOWEST_S, 60)

    def restart(self) -> None:
        """The windows' state and what was told of them are those of a moment ago: read again from there."""
        self._end(gently=False)
        self._start()

    def seen(self) -> Seen:
        self._heard.letters = [(x.body, x.reason) for x in reversed(newest(self.config, 1000))]
        return self._runtime.ask(self._counted).result(30)


def _line(event: Event) -> bytes:
    return msgspec.json.encode(event)
