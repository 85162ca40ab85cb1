"""The embedded runtime: one process, one SQLite file, exact after `kill -9`.

Two threads. The *writer* owns the only connection that writes: it appends what ingest hands it, acknowledges after the commit, and
stores what the stages conclude. The *stages* thread reads the log in order (from memory while it keeps up, else from disk) and feeds
the pipeline. Everything that influences the pipeline is a record of the log: events, ticks of the clock, people's commands, reports of
enforcement points. So a restart restores the last snapshot, re-reads the log up to the stored position without saying anything, and goes
on from there: nothing is lost, nothing is said twice.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import structlog
from sqlalchemy import Connection

from flyball.app.board import DirectiveBoard
from flyball.app.pipeline import Pipeline
from flyball.app.store import store
from flyball.app.store.sqlite import open_reader, open_writer
from flyball.app.store.store import Commit, DeadLetter, LogRow, OutboxRow, entry_of
from flyball.core.codec import SnapshotError, decode_events, encode_events
from flyball.core.directives import Enforced
from flyball.core.errors import ConfigError, FlyballError
from flyball.core.estate import Emissions
from flyball.core.events import Batch, Event
from flyball.core.incident import IncidentChange
from flyball.core.ports import Clock

_log = structlog.get_logger(__name__)
_STAGE_EVENTS: Final = 20_000
"""Events a micro-batch takes at most: some 50 ms of work, so that commits and stops are never far."""


class Overloaded(FlyballError):
    """Memory or disk budget is spent; the sender should come back in `retry_after_s`."""

    def __init__(self, what: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(what)


class Command(msgspec.Struct, frozen=True):
    """A person's word about an incident, as a record of the log."""

    kind: str
    incident: str
    by: str
    at: float
    until: float | None = None


class Alerts(Protocol):
    """Turns an incident's change into rows of the outbox. `told`: incident id → channels that had something of it."""

    told: dict[str, set[str]]

    def __call__(self, change: IncidentChange) -> list[OutboxRow]: ...


class NoAlerts:
    """Tells nobody."""

    def __init__(self) -> None:
        self.told: dict[str, set[str]] = {}

    def __call__(self, change: IncidentChange) -> list[OutboxRow]:
        return []


@dataclass(slots=True)
class Append:
    """One record on its way into the log."""

    kind: str
    sender: str
    received_at: float
    body: bytes
    payload: Any = None
    n: int = 0
    format: str = ""
    dead: Sequence[DeadLetter] = ()
    done: Future[int] = field(default_factory=Future)


@dataclass(slots=True)
class Work:
    """Something to do on the writer's connection, in the transaction of whatever else is due."""

    run: Callable[[Connection], object]
    done: Future[None] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class _Ready:
    position: int
    payload: Any
    n: int
    size: int
    received_at: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What the stages thread publishes after each micro-batch. `totals` is stored too, and survives a restart."""

    totals: dict[str, Any]
    stage_seconds: dict[str, float]
    clock_skew_s: dict[str, float]
    waiting: list[dict[str, Any]]

    @classmethod
    def of(cls, p: Pipeline) -> Figures:
        stats = p.windows.stats
        totals = p.counters.as_dict() | {
            "duplicates": p.duplicates, "late": stats.late, "clamped": stats.clamped_future, "overflowed": stats.overflowed,
            "watermark": p.watermark, "disabled": dict(p.disabled),
        }  # fmt: skip
        return cls(totals, dict(p.stage_seconds), stats.skew_s, p.waiting())


@dataclass(frozen=True, slots=True)
class Limits:
    pending_bytes: int = 256 << 20
    backlog_bytes: int = 4 << 30
    memory_events: int = 200_000


@dataclass(frozen=True, slots=True)
class Retention:
    log_s: float = 86_400.0
    log_bytes: int = 4 << 30
    dead_letters_s: float = 86_400.0


class Embedded:
    """Hosts a pipeline on a log in SQLite.

    Args:
        make_pipeline: called once at start; the pipeline is fed by the stages thread alone.
        path: of the database file.
        clock: wall time.
        alerts: turns an incident's change into rows of the outbox.
        listener: hears what each record led to, on the stages thread, before it is stored; for watching, not for acting.
        snapshot_every_s: seconds between snapshots; a restart re-reads at most that much of the log.
    """

    def __init__(
        self,
        make_pipeline: Callable[[], Pipeline],
        path: Path,
        clock: Clock,
        *,
        alerts: Alerts | None = None,
        listener: Callable[[Emissions], None] = lambda _said: None,
        limits: Limits | None = None,
        retention: Retention | None = None,
        snapshot_every_s: float = 30.0,
        synchronous: str = "full",
    ) -> None:
        self.path = path
        self.clock = clock
        self.board = DirectiveBoard(clock)
        self.pipeline = make_pipeline()
        self._figures = Figures.of(self.pipeline)
        self._alerts = alerts or NoAlerts()
        self._listener = listener
        self._limits = limits or Limits()
        self._retention = retention or Retention()
        self._snapshot_every_s = snapshot_every_s
        self._writer_engine = open_writer(path, synchronous)
        self.reader = open_reader(path)
        self._jobs: queue.SimpleQueue[Append | Commit | Work | None] = queue.SimpleQueue()
        self._pending_bytes = 0
        self._pending_lock = threading.Lock()
        self._ready: deque[_Ready] = deque()
        self._ready_events = 0
        self._news = threading.Condition()
        self._stopping = False
        self._failure: BaseException | None = None
        self.rejected: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self._position = 0
        self._appended = 0
        self._snapshot_at = 0.0
        self._backlog_bytes = 0
        self._threads: list[threading.Thread] = []
        self.ready = False

    # --- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Recovers, then starts both threads. Returns once new events are taken."""
        with self.reader.connect() as c:
            self._position = store.position(c)
            self._appended = store.last_log_id(c)
            self._backlog_bytes = store.backlog_bytes(c, self._position)
            edge = store.edge(c)
            saved = store.newest_snapshot(c)
            self._alerts.told = store.channels_told(c)
        self.rejected, self.received = Counter(edge["rejected"]), Counter(edge["received"])
        self._recover(saved)
        self._figures = Figures.of(self.pipeline)
        self.board.put(self.pipeline.directives())
        self._snapshot_at = self.clock.now()
        self._threads = [
            threading.Thread(target=self._guard, args=(self._write,), name="flyball-writer", daemon=True),
            threading.Thread(
                target=self._guard, args=(self._run_stages,), name="flyball-stages", daemon=True
            ),
        ]
        for thread in self._threads:
            thread.start()
        self.ready = True

    def stop(self, timeout_s: float = 30.0) -> bool:
        """Takes no more, lets the stages finish what is in the log, stores a last snapshot. Returns False when time ran out.

        What was not finished by then is not lost: it is in the log, and the next start reads it.
        """
        self.ready = False
        with self._news:
            self._stopping = True
            self._news.notify_all()
        stages, writer = self._threads[1], self._threads[0]
        stages.join(timeout_s)
        self._jobs.put(None)
        writer.join(timeout_s)
        drained = not stages.is_alive() and not writer.is_alive()
        self.reader.dispose()
        self._writer_engine.dispose()
        return drained

    @property
    def failure(self) -> BaseException | None:
        """What ended a thread, if anything did; the process should then end too, and be restarted."""
        return self._failure

    # --- in -------------------------------------------------------------------------------------------------------

    def ingest(
        self,
        events: list[Event],
        sender: str,
        received_at: float,
        *,
        format: str = "native",
        dead: Sequence[DeadLetter] = (),
        patient: bool = True,
    ) -> Future[int]:
        """Appends what one body held. The future resolves to its position after the commit.

        Args:
            patient: False for senders that lose what they cannot send at once; they are turned away last.

        Raises: Overloaded when the memory or disk budget is spent.
        """
        body = encode_events(events)
        self._admit(len(body), patient)
        batch = Batch(events=events, sender=sender, received_at=received_at)
        return self._append(Append("events", sender, received_at, body, batch, len(events), format, dead))

    def tick(self) -> Future[int]:
        now = self.clock.now()
        return self._append(Append("tick", "", now, b"", now))

    def command(self, command: Command) -> Future[int]:
        return self._append(
            Append("command", command.by, command.at, msgspec.msgpack.encode(command), command)
        )

    def enforced(self, report: Enforced) -> Future[int]:
        return self._append(
            Append("enforced", report.point, report.at, msgspec.msgpack.encode(report), report)
        )

    def write(self, work: Callable[[Connection], object]) -> Future[None]:
        """Runs `work` on the writer's connection with the next commit: outbox receipts and the like."""
        job = Work(work)
        self._jobs.put(job)
        return job.done

    def trim(self) -> None:
        now, r = self.clock.now(), self._retention
        self.write(
            lambda c: store.trim(
                c,
                log_before=now - r.log_s,
                log_bytes=r.log_bytes,
                dead_before=now - r.dead_letters_s,
                limit=5000,
            )
        )

    def _append(self, record: Append) -> Future[int]:
        if self._failure is not None:
            raise FlyballError(f"the runtime has stopped: {self._failure}") from self._failure
        with self._pending_lock:
            self._pending_bytes += len(record.body)
        self._jobs.put(record)
        return record.done

    def _admit(self, size: int, patient: bool) -> None:
        factor = 1 if patient else 2
        if self._pending_bytes + size > self._limits.pending_bytes * factor:
            raise Overloaded("memory for waiting bodies is spent", 1.0)
        if self._backlog_bytes + size > self._limits.backlog_bytes * factor:
            raise Overloaded("disk for unread events is spent", 10.0)

    # --- the writer -----------------------------------------------------------------------------------------------

    def _write(self) -> None:
        with self._writer_engine.connect() as connection:
            while True:
                jobs = [self._jobs.get()]
                while len(jobs) < 1024:
                    try:
                        jobs.append(self._jobs.get_nowait())
                    except queue.Empty:
                        break
                wanted = [j for j in jobs if j is not None]
                if wanted:
                    self._store(connection, wanted)
                if len(wanted) < len(jobs):
                    return

    def _store(self, connection: Connection, jobs: Sequence[Append | Commit | Work]) -> None:
        """One transaction for all jobs; only afterwards is anything acknowledged, shown or handed to the stages."""
        appends = [j for j in jobs if isinstance(j, Append)]
        dead = [d for a in appends for d in a.dead]
        rows = []
        for offset, a in enumerate(appends, self._appended + 1):
            rows.append(LogRow(offset, a.kind, a.received_at, a.sender, a.n, a.body))
            if a.kind == "events":
                self.received[a.format] += a.n
        for d in dead:
            self.rejected[d.reason] += d.n
        with connection.begin():
            if rows:
                store.append_log(connection, rows)
            if dead:
                store.append_dead_letters(connection, dead)
            if rows or dead:
                edge = {"rejected": dict(self.rejected), "received": dict(self.received)}
                store.put_meta(connection, "edge", msgspec.json.encode(edge).decode())
            for job in jobs:
                if isinstance(job, Commit):
                    store.apply_commit(connection, job)
                elif isinstance(job, Work):
                    job.run(connection)
        self._after_commit(appends, rows, [j for j in jobs if isinstance(j, Commit)])
        for job in jobs:
            if isinstance(job, Work):
                job.done.set_result(None)

    def _after_commit(
        self, appends: Sequence[Append], rows: Sequence[LogRow], commits: Sequence[Commit]
    ) -> None:
        size = sum(len(r.body) for r in rows)
        with self._pending_lock:
            self._pending_bytes -= size
        if rows:
            with self._news:
                self._appended = rows[-1].id
                self._backlog_bytes += size
                for a, r in zip(appends, rows, strict=True):
                    keep = self._ready_events < self._limits.memory_events
                    self._ready.append(
                        _Ready(r.id, a.payload if keep else None, r.n, len(r.body), r.received_at)
                    )
                    self._ready_events += r.n if keep else 0
                self._news.notify()
        for commit in commits:
            self._position = max(self._position, commit.position)
            if commit.directives:
                self.board.change(commit.directives)
        for a, r in zip(appends, rows, strict=True):
            a.done.set_result(r.id)

    # --- the stages -----------------------------------------------------------------------------------------------

    def _run_stages(self) -> None:
        position = self._position
        while True:
            records = self._next(position)
            if not records:
                break
            commit = Commit(position=records[-1].id, at=self.clock.now())
            size = 0
            for record in records:
                self._conclude(self._process(record), commit)
                size += record.size
            position = commit.position
            if commit.at - self._snapshot_at >= self._snapshot_every_s:
                commit.snapshot, self._snapshot_at = self.pipeline.snapshot(), commit.at
            self._figures = Figures.of(self.pipeline)
            commit.counters = self._figures.totals
            self._jobs.put(commit)
            with self._news:
                self._backlog_bytes = max(0, self._backlog_bytes - size)
        self._jobs.put(
            Commit(
                position=position,
                snapshot=self.pipeline.snapshot(),
                at=self.clock.now(),
                counters=Figures.of(self.pipeline).totals,
            )
        )

    def _next(self, position: int) -> list[_Record]:
        """The next records in order: from memory, or from disk where memory let go of them. Empty when stopping and done."""
        with self._news:
            while not self._ready and self._appended <= position:
                if self._stopping:
                    return []
                self._news.wait(1.0)
            taken: list[_Ready] = []
            events = 0
            while self._ready and events < _STAGE_EVENTS and self._ready[0].payload is not None:
                if self._ready[0].position > position + 1 and not taken:
                    break  # records of before the start, still on disk
                item = self._ready.popleft()
                self._ready_events -= item.n
                events += item.n
                taken.append(item)
        if taken:
            return [_Record(t.position, t.size, t.payload) for t in taken]
        with self.reader.connect() as c:
            rows = store.read_log(c, position, limit=32)
        with self._news:
            while self._ready and rows and self._ready[0].position <= rows[-1].id:
                gone = self._ready.popleft()
                self._ready_events -= gone.n if gone.payload is not None else 0
        return [_Record(r.id, len(r.body), _payload(r)) for r in rows]

    def _process(self, record: _Record) -> Emissions:
        payload = record.payload
        if isinstance(payload, Batch):
            return self.pipeline.feed(payload)
        if isinstance(payload, float):
            return self.pipeline.tick(payload)
        if isinstance(payload, Enforced):
            return self.pipeline.enforced(payload)
        assert isinstance(payload, Command)
        try:
            return self.pipeline.command(
                payload.kind, payload.incident, payload.by, payload.at, payload.until
            )
        except ConfigError as e:
            # The API has looked before; between its look and now the incident moved on. Nothing to do, and said so.
            _log.warning(
                "command.refused", kind=payload.kind, incident=payload.incident, by=payload.by, why=str(e)
            )
            return Emissions()

    def _conclude(self, said: Emissions, commit: Commit) -> None:
        self._listener(said)
        commit.changes += said.changes
        for item in (said.decisions, said.directives, said.outcomes):
            commit.entries += map(entry_of, item)
        commit.directives += said.directives
        for change in said.changes:
            commit.outbox += self._alerts(change)

    def _recover(self, saved: tuple[int, bytes] | None) -> None:
        """State as of the stored position: the snapshot, and the log behind it read again in silence."""
        after = 0
        if saved is not None:
            try:
                self.pipeline.restore(saved[1])
                after = saved[0]
            except SnapshotError as e:
                _log.warning("snapshot.unreadable", why=str(e), then="the log is read again from its start")
        for row in store.iter_log(self.reader, after, self._position):
            self._process(_Record(row.id, len(row.body), _payload(row)))

    # --- out ------------------------------------------------------------------------------------------------------

    @property
    def figures(self) -> Figures:
        """How things stood after the newest processed stretch of the log; safe to read from any thread."""
        return self._figures

    def lag(self) -> tuple[float, int]:
        """(seconds since the oldest record arrived that the stages have not read, bytes not read)."""
        with self._news:
            oldest = self._ready[0].received_at if self._ready else None
        return (max(0.0, self.clock.now() - oldest) if oldest is not None else 0.0), self._backlog_bytes

    @property
    def position(self) -> int:
        """Newest record whose consequences are stored."""
        return self._position

    @property
    def appended(self) -> int:
        """Newest record that is durable."""
        return self._appended

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as e:
            self._failure, self.ready = e, False
            _log.exception("runtime.stopped", thread=threading.current_thread().name)
            raise


@dataclass(frozen=True, slots=True)
class _Record:
    id: int
    size: int
    payload: Batch | float | Command | Enforced


def _payload(row: LogRow) -> Batch | float | Command | Enforced:
    if row.kind == "events":
        return Batch(events=decode_events(row.body), sender=row.sender, received_at=row.received_at)
    if row.kind == "tick":
        return row.received_at
    if row.kind == "command":
        return msgspec.msgpack.decode(row.body, type=Command)
    return msgspec.msgpack.decode(row.body, type=Enforced)
