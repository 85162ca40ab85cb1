"""The embedded runtime: one process, one database, exact after `kill -9`.

Two threads. The *writer* (`writer.py`) owns the only connection that writes: it appends what ingest hands it, acknowledges after the
commit, and stores what the stages conclude. The *stages* thread reads the log in order (`backlog.py`: from memory while it keeps up, else
from disk) and feeds the pipeline. Everything that influences the pipeline is a record of the log: events, ticks of the clock, the word of
people, reports of enforcement points and hooks, the runbooks that count. So a restart restores the last snapshot, re-reads the log up to the stored position without saying
anything, and goes on from there: nothing is lost, nothing is said twice.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import structlog
from sqlalchemy import Connection

from flyball.app.backlog import Backlog
from flyball.app.board import DirectiveBoard
from flyball.app.finite import finite
from flyball.app.orders import Fault, Order, author_of, encode_order
from flyball.app.pipeline import Counters, Pipeline
from flyball.app.records import Append, Record, Work, record_of
from flyball.app.store import acts, operations, outbox, store
from flyball.app.store.database import Database, open_database
from flyball.app.store.owner import DatabaseLost, Fenced
from flyball.app.store.rows import Commit, DeadLetter, OutboxRow, Publication, Skipped, entry_of
from flyball.app.switchboard import Switchboard
from flyball.app.writer import Limits, Overloaded, Retention, Stopped, Stored, Writer
from flyball.core.anomaly import Anomaly
from flyball.core.codec import SnapshotError, encode_events
from flyball.core.directives import Intervention, LedgerEntry
from flyball.core.errors import ConfigError
from flyball.core.estate import Emissions
from flyball.core.events import Batch, Event
from flyball.core.incident import IncidentChange
from flyball.core.plans import Mode, Waiting
from flyball.core.ports import Clock
from flyball.runbooks.loader import RunbookSet
from flyball.streams.portion import Portion

__all__ = ["Embedded", "Figures", "Limits", "NoAlerts", "Overloaded", "Retention", "Stopped"]

Publish: TypeAlias = Callable[
    [Sequence[Anomaly], Sequence[IncidentChange], Sequence[LedgerEntry]], list[Publication]
]
"""What a record of the log led to → what of it is to be published."""
T = TypeVar("T")
_log = structlog.get_logger(__name__)
_STAGE_EVENTS: Final = 20_000
"""Events a micro-batch takes at most: some 50 ms of work, so that commits and stops are never far."""


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


@dataclass(frozen=True, slots=True)
class Figures:
    """What the stages thread publishes after each micro-batch. `totals` is stored too, and survives a restart."""

    totals: dict[str, Any]
    stage_seconds: dict[str, float]
    clock_skew_s: dict[str, float]
    waiting: list[Waiting]
    runbooks: RunbookSet
    ceiling: Mode
    recorded: bool
    """Whether the runbooks that count stand in the log."""
    wanted: frozenset[str]
    """Operations that are still to be sent."""

    @classmethod
    def of(cls, p: Pipeline, operations: Iterable[str] = ()) -> Figures:
        stats = p.window_stats
        totals = p.counters.as_dict() | {
            "duplicates": p.duplicates, "late": stats.late, "clamped": stats.clamped_future, "overflowed": stats.overflowed,
            "watermark": p.watermark, "disabled": dict(p.disabled),
        }  # fmt: skip
        wanted = frozenset(o for o in operations if p.wanted(o))
        return cls(
            totals, dict(p.stage_seconds), stats.skew_s, p.waiting(), p.runbooks, p.mode, p.recorded, wanted
        )


class Embedded:
    """Hosts a pipeline on a log in a database.

    Args:
        make_pipeline: called at start; the pipeline is fed by the stages thread alone.
        where: the database file (Path), the address of a PostgreSQL, or what `open_database` or `wait_for_ownership` gave. It is this
            process's own until `stop`.
        clock: wall time.
        alerts: turns an incident's change into rows of the outbox.
        listener: hears what each record led to, on the stages thread, before it is stored; for watching, not for acting.
        publish: what each record led to → what of it is to be published; stored in the same transaction.
        snapshot_every_s: seconds between snapshots; a restart re-reads at most that much of the log.

    Raises: ConfigError when the database cannot be written, is in use, or holds another schema; DatabaseLost when it does not answer.
    """

    def __init__(
        self,
        make_pipeline: Callable[[], Pipeline],
        where: Path | str | Database,
        clock: Clock,
        *,
        alerts: Alerts | None = None,
        listener: Callable[[Emissions], None] = lambda _said: None,
        publish: Publish | None = None,
        limits: Limits | None = None,
        retention: Retention | None = None,
        snapshot_every_s: float = 30.0,
        synchronous: str = "full",
    ) -> None:
        self.clock = clock
        self.switchboard = Switchboard()
        self.board = DirectiveBoard(clock, self.switchboard)
        self._make_pipeline = make_pipeline
        self.pipeline = make_pipeline()
        self._figures = Figures.of(self.pipeline)
        self._alerts = alerts or NoAlerts()
        self._listener, self._publish_what = listener, publish
        self._limits = limits or Limits()
        self._snapshot_every_s = snapshot_every_s
        self.database = open_database(where, synchronous) if isinstance(where, Path | str) else where
        self.reader = self.database.reader
        with self.reader.connect() as c:
            self._position = store.position(c)
            appended = store.last_log_id(c)
            unread = store.backlog_bytes(c, self._position)
            totals = store.edge(c)
            self._skip = acts.skipped_positions(c)
            self._starts = set(operations.open_starts(c))
            self._faults = len(self._skip)
        self._unsaved: list[Skipped] = []
        self._asked: deque[Callable[[], None]] = deque()
        self._answers: dict[int, Future[Intervention]] = {}
        self._backlog = Backlog(self.reader, self._position, appended, unread, self._limits.memory_events)
        self._writer = Writer(
            self.database, appended, totals, retention or Retention(), self.board, self._after_commit
        )
        self._moved = threading.Condition()
        self._failure: BaseException | None = None
        self._snapshot_at = 0.0
        self._threads: list[threading.Thread] = []
        self.on_failure: Callable[[], object] = lambda: None
        """Called once, on the thread that failed."""
        self.on_publications: Callable[[], object] = lambda: None
        """Called on the writer's thread once more is stored that is to be published."""
        self.ready = False

    # --- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Recovers, then starts both threads. Returns once new events are taken."""
        with self.reader.connect() as c:
            self._alerts.told = outbox.channels_told(c)
            self.switchboard.set(acts.live_stops(c))
            shown = acts.shown_directives(c)
        self._recover()
        self._figures = Figures.of(self.pipeline, self._starts)
        self.board.put(self.pipeline.directives(), shown)
        self._snapshot_at = self.clock.now()
        for name, work in (("flyball-stages", self._run_stages), ("flyball-writer", self._writer.run)):
            thread = threading.Thread(target=self._guard, args=(work,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        self.ready = True

    def stop(self, timeout_s: float = 30.0) -> bool:
        """Takes no more, lets the stages finish what is in the log, stores a last snapshot. Returns False when time ran out.

        What was not finished by then is not lost: it is in the log, and the next start reads it.
        """
        self.ready = False
        self.board.close()
        drained = True
        self._backlog.close()
        if self._threads:
            stages, writer = self._threads
            stages.join(timeout_s)
            drained = not stages.is_alive()
            self._backlog.close(give_up=True)
            stages.join(timeout_s)
            self._writer.close()
            writer.join(timeout_s)
            drained = drained and not writer.is_alive() and self._failure is None
        self.database.close()
        return drained

    @property
    def failure(self) -> BaseException | None:
        """What ended a thread, if anything did; the process should then end too, and be restarted."""
        return self._failure

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as e:  # noqa: BLE001 - whatever ended a thread ends the process, and is told
            self.ready = False
            if self._failure is None or isinstance(self._failure, Stopped):
                self._failure = e
                # The store's own errors say all there is to say; of others we want to know where they come from.
                plain = isinstance(e, DatabaseLost | Fenced)
                tell = _log.error if plain else _log.exception
                tell("runtime.stopped", thread=threading.current_thread().name, why=str(e))
            self.on_failure()
            with self._moved:
                self._moved.notify_all()

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
        body: bytes | None = None,
    ) -> Future[int]:
        """Appends what one body held. The future resolves to its position after the commit.

        Args:
            patient: False for senders that lose what they cannot send at once; they are turned away last.
            body: `encode_events(events)`, where the caller has it already.

        Raises: Overloaded when the memory or disk budget is spent; Stopped.
        """
        if body is None:
            body = encode_events(events)
        self.admit(len(body), patient)
        batch = Batch(events=events, sender=sender, received_at=received_at)
        return self._append(Append("events", sender, received_at, body, batch, len(events), format, dead))

    def take_portion(
        self, body: bytes, portion: Portion, consumed: Mapping[tuple[str, int], int]
    ) -> Future[int]:
        """Appends a portion, and with it, in the same transaction, how far its topic was read.

        Args:
            body: `portion` as it came.
            consumed: (topic, partition) → the offset that comes next.

        Raises: Stopped.
        """
        return self._append(
            Append(
                "portion", portion.source, self.clock.now(), body, portion, len(portion.singles),
                also=lambda c: store.put_offsets(c, consumed),
            )
        )  # fmt: skip

    def consumed(self, topic: str) -> dict[int, int]:
        """Of each partition of a topic, the offset that comes next after what is stored."""
        with self.reader.connect() as c:
            return {partition: n for (_, partition), n in store.get_offsets(c, topic).items()}

    def tick(self, now: float | None = None) -> Future[int]:
        """Lets time pass to `now`; None: to what the clock says."""
        now = self.clock.now() if now is None else now
        return self._append(Append("tick", "", now, b"", now))

    def order(self, order: Order, *, also: Callable[[Connection], object] | None = None) -> Future[int]:
        """Takes what a person, an enforcement point or a hook says. The kill switch acts when the future resolves.

        Args:
            also: what is stored with it, in the same transaction.

        Raises: Stopped.
        """
        return self._append(_order_record(order, also=also))

    def say(self, order: Order) -> tuple[Future[int], Future[Intervention]]:
        """As `order`, for a person who waits for what came of it: the second future, once the stages have reached it."""
        answer: Future[Intervention] = Future()
        return self._append(_order_record(order, answer=answer)), answer

    def ask(self, question: Callable[[Pipeline], T]) -> Future[T]:
        """Asks the pipeline on its own thread, between two records. `question` must change nothing."""
        answer: Future[T] = Future()

        def work() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(question(self.pipeline))
            except Exception as e:  # noqa: BLE001 - whatever it is belongs to whoever asked
                answer.set_exception(e)

        self._asked.append(work)
        self._backlog.wake()
        if self._failure is not None or not self.ready:
            raise Stopped("the stages have ended")
        return answer

    def write(self, work: Callable[[Connection], object]) -> Future[None]:
        """Runs `work` on the writer's connection with the next commit: outbox receipts and the like. Raises: Stopped."""
        job = Work(work)
        self._writer.put(job)
        return job.done

    def trim(self) -> None:
        """Removes what retention lets go of; in the background, a little at a time."""
        self._writer.trim(self.clock.now())

    def admit(self, size: int, patient: bool = True) -> None:
        """Whether `size` more bytes may come in. Raises: Overloaded."""
        factor = 1 if patient else 2
        if self._writer.pending_bytes + size > self._limits.pending_bytes * factor:
            raise Overloaded("memory for waiting bodies is spent", 1.0)
        if self._backlog.size + size > self._limits.backlog_bytes * factor:
            raise Overloaded("disk for unread events is spent", 10.0)

    def hold(self, size: int) -> None:
        """Counts bytes of a body that is being read against the memory budget; the same with a minus when it was handed over."""
        self._writer.hold(size)

    def _append(self, record: Append) -> Future[int]:
        self._writer.put(record)
        return record.done

    def _after_commit(self, stored: Stored) -> None:
        """On the writer's thread: shows what is durable to the stages and to readers."""
        if stored.rows:
            for a, r in zip(stored.appends, stored.rows, strict=True):
                if a.answer is not None:
                    self._answers[r.id] = a.answer
            self._backlog.add(
                [
                    Record(r.id, r.received_at, len(r.body), r.n, a.payload)
                    for a, r in zip(stored.appends, stored.rows, strict=True)
                ]
            )
        for commit in stored.commits:
            self._position = max(self._position, commit.position)
            for answer, said in commit.answers:
                if answer.set_running_or_notify_cancel():
                    answer.set_result(said)
        if any(c.publications for c in stored.commits):
            self.on_publications()
        if stored.commits:
            with self._moved:
                self._moved.notify_all()

    # --- the stages -----------------------------------------------------------------------------------------------

    def _run_stages(self) -> None:
        while (records := self._backlog.take(_STAGE_EVENTS)) is not None:
            if not records:
                self._answer_asked()
                continue
            done: list[Record] = []
            commit = Commit(position=0, at=self.clock.now())
            for record in records:
                self._answer_asked()
                if (
                    record.position in self._skip
                ):  # left out in an earlier life that ended before it could say so
                    continue
                if self._try(record, commit):
                    done.append(record)
                    continue
                # Half of what it did may stand in the stages: they are made again as they were before it.
                if done:
                    commit.position = done[-1].position
                    self._publish(commit)
                    done = []
                self._leave_out(record)
                commit = Commit(position=record.position, at=self.clock.now())
            commit.position = records[-1].position
            if commit.at - self._snapshot_at >= self._snapshot_every_s:
                commit.snapshot, self._snapshot_at = self.pipeline.snapshot(), commit.at
            self._publish(commit)
            self._backlog.done(records)
        last = Commit(position=self._backlog.read, at=self.clock.now(), snapshot=self.pipeline.snapshot())
        self._publish(last)
        self._answer_asked()

    def _publish(self, commit: Commit) -> None:
        self._figures = Figures.of(self.pipeline, self._starts)
        self._starts = set(self._figures.wanted)
        commit.counters = self._figures.totals
        commit.skipped, self._unsaved = self._unsaved, []
        self._writer.put(commit)

    def _answer_asked(self) -> None:
        while self._asked:
            self._asked.popleft()()

    def _try(self, record: Record, commit: Commit) -> bool:
        """Whether the stages took the record; what it led to goes into `commit`."""
        try:
            said = self._process(record)
        except MemoryError:
            raise  # says nothing about the record
        except Exception as e:  # noqa: BLE001 - whatever a stage raises would come again at every restart
            self._note_fault(record, e)
            return False
        self._conclude(record, said, commit)
        return True

    def _process(self, record: Record) -> Emissions:
        payload = record.payload
        if isinstance(payload, Batch):
            return self.pipeline.feed(payload)
        if isinstance(payload, Portion):
            return self.pipeline.feed_portion(payload, record.received_at)
        if isinstance(payload, float):
            return self.pipeline.tick(payload)
        return self.pipeline.take(payload)

    def _conclude(self, record: Record, said: Emissions, commit: Commit) -> None:
        self._listener(said)
        changes = [finite(c) for c in said.changes]
        commit.changes += changes
        entries = [
            entry_of(item)
            for items in (said.decisions, said.directives, said.outcomes, said.operations, said.people)
            for item in items
        ]
        commit.entries += entries
        if self._publish_what is not None:
            commit.publications += self._publish_what(said.anomalies, changes, entries)
        commit.directives += said.directives
        commit.operations += said.operations
        self._starts.update(o.id for o in said.operations if o.verb == "start")
        for change in changes:
            commit.outbox += self._alerts(change)
        for person in said.people:
            if not person.accepted:
                _log.warning(
                    "person.refused",
                    kind=person.kind,
                    subject=person.subject,
                    by=person.by,
                    why=person.reason,
                )
        answer = self._answers.pop(record.position, None)
        if answer is not None and said.people:
            commit.answers.append((answer, said.people[0]))

    # --- records that make a stage raise --------------------------------------------------------------------------

    def _note_fault(self, record: Record, error: Exception) -> None:
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}"[:500]
        _log.error(
            "record.left_out", position=record.position, why=reason, at=f"{where.filename}:{where.lineno}"
        )
        with self.reader.connect() as c:
            row = store.read_log(c, record.position - 1, record.position)[0]
        self._skip.add(record.position)
        self._faults += 1
        self._unsaved.append(
            Skipped(record.position, row.received_at, row.kind, row.sender, row.n, reason, row.body)
        )
        if not isinstance(record.payload, Fault):
            told = Fault(at=self.clock.now(), position=record.position, kind=row.kind, reason=reason)
            self._append(_order_record(told))

    def _leave_out(self, record: Record) -> None:
        """Makes the pipeline again, as it was before the record, and stores that the record is left out from now on."""
        before = record.position - 1
        self.wait_for(before)
        self._recover(before)
        self._publish(Commit(position=record.position, at=self.clock.now()))
        self._snapshot_at = 0.0  # soon a snapshot behind it: another fault then costs little
        answer = self._answers.pop(record.position, None)
        if answer is not None and not isinstance(record.payload, Batch | Portion | float):
            order = record.payload
            said = Intervention(
                at=order.at, by=author_of(order), kind=type(order).__name__, subject="", accepted=False,
                reason="stage_raised",
            )  # fmt: skip
            if answer.set_running_or_notify_cancel():
                answer.set_result(said)

    def _recover(self, until: int | None = None) -> None:
        """State as of a position: the snapshot, and the log behind it read again in silence."""
        until = self._position if until is None else until
        while not self._read_again(until):
            pass  # a record that raises now was fine for the version before: it is left out from now on

    def _read_again(self, until: int) -> bool:
        """False when a record raised; it is then among those to skip."""
        with self.reader.connect() as c:
            saved = store.newest_snapshots(c)
            first = store.first_log_id(c)
            totals = store.counters(c)
        self.pipeline = self._make_pipeline()
        after = 0
        for position, state in saved:
            try:
                self.pipeline.restore(state)
                after = position
                break
            except (SnapshotError, ConfigError) as e:  # ConfigError: windows were set otherwise then
                # What was restored up to the failing stage must not mix with what is read again.
                self.pipeline = self._make_pipeline()
                _log.warning("snapshot.unreadable", position=position, why=str(e))
        for row in store.iter_log(self.reader, after, until):
            if row.id in self._skip:
                continue
            record = record_of(row)
            try:
                self._process(record)
            except MemoryError:
                raise
            except Exception as e:  # noqa: BLE001 - as in `_try`
                self._note_fault(record, e)
                return False
        if saved and not after:
            _log.warning("log.read_again", first=first, to=until)
            if first != 1:
                # Retention has removed the beginning; what was counted then is still known.
                self.pipeline.counters = Counters.from_dict(totals)
        return True

    # --- out ------------------------------------------------------------------------------------------------------

    @property
    def figures(self) -> Figures:
        """How things stood after the newest processed stretch of the log; safe to read from any thread."""
        return self._figures

    @property
    def received(self) -> Counter[str]:
        """Events appended since the beginning, by format."""
        return self._writer.received

    @property
    def rejected(self) -> Counter[str]:
        """Events that could not be taken since the beginning, by reason."""
        return self._writer.rejected

    @property
    def faults(self) -> int:
        """Records that were left out since the beginning, because a stage raised."""
        return self._faults

    def lag(self) -> tuple[float, int]:
        """(seconds since the oldest record arrived that the stages have not read, bytes not read)."""
        since = self._backlog.waiting_since()
        return (max(0.0, self.clock.now() - since) if since is not None else 0.0), self._backlog.size

    @property
    def position(self) -> int:
        """Newest record whose consequences are stored."""
        return self._position

    @property
    def appended(self) -> int:
        """Newest record that is durable."""
        return self._backlog.appended

    def wait_for(self, position: int, timeout_s: float = 60.0) -> bool:
        """Waits until the consequences of everything up to `position` are stored; False when time or a thread ran out."""
        with self._moved:
            return self._moved.wait_for(
                lambda: self._position >= position or self._failure is not None, timeout_s
            ) and (self._position >= position)


def _order_record(order: Order, **more: Any) -> Append:
    return Append("order", author_of(order), order.at, encode_order(order), order, **more)
