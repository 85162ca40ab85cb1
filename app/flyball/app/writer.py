"""The one writer: a thread that owns the only connection that writes, and commits whatever is due in one transaction."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection

from flyball.app.board import DirectiveBoard
from flyball.app.records import Append, Work
from flyball.app.store import acts, store
from flyball.app.store.database import Database
from flyball.app.store.rows import Commit, DeadLetter, EdgeTotals, LogRow, Skipped
from flyball.core.directives import StopChange
from flyball.core.errors import FlyballError

_MOST_JOBS: Final = 1024
LINGER_S: Final = 0.002
"""How long the first job of a transaction waits for others: commits cost far more than rows."""
_TRIM_ROWS: Final = 500
"""Rows of the log removed in one transaction: answers wait for it."""


class Overloaded(FlyballError):
    """Memory or disk budget is spent; the sender should come back in `retry_after_s`."""

    def __init__(self, what: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(what)


_UNWRITABLE: Final = "the log cannot be written; nothing was stored"


class Stopped(FlyballError):
    """The runtime takes nothing any more: it was stopped, or one of its threads failed. Nothing was stored."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What may wait, and where. Over it, senders are turned away; those that cannot repeat only over twice that.

    Args:
        pending_bytes: memory for bodies that are being read or wait for their commit.
        backlog_bytes: disk for records that the stages have not read.
        memory_events: events kept decoded between log and stages; more are read back from disk.
    """

    pending_bytes: int = 256 << 20
    backlog_bytes: int = 4 << 30
    memory_events: int = 200_000


@dataclass(frozen=True, slots=True)
class Retention:
    """How long records stay. What a restart would read again stays in any case.

    Args:
        dead_letters_bytes: over it the bytes of new dead letters are not kept, only what was wrong.
        dead_letters: over so many none are stored, only counted.
    """

    log_s: float = 86_400.0
    log_bytes: int = 4 << 30
    dead_letters_s: float = 86_400.0
    dead_letters_bytes: int = 256 << 20
    dead_letters: int = 200_000


@dataclass(frozen=True, slots=True)
class Stored:
    """What one transaction made durable."""

    appends: Sequence[Append]
    rows: Sequence[LogRow]
    commits: Sequence[Commit]


class Writer:
    """Takes jobs from any thread and stores them; acknowledges after the commit, in order.

    Args:
        database: owned by this process.
        appended: newest position of the log.
        board: shows leases to enforcement points; it and the kill switch follow each commit at once.
        after_commit: called on the writer's thread with what is now durable, before anything is acknowledged.
    """

    def __init__(
        self,
        database: Database,
        appended: int,
        totals: EdgeTotals,
        retention: Retention,
        board: DirectiveBoard,
        after_commit: Callable[[Stored], None],
    ) -> None:
        self._database = database
        self._appended = appended
        self._retention = retention
        self._board = board
        self._after_commit = after_commit
        self.received, self.rejected = Counter(totals.received), Counter(totals.rejected)
        self._log_bytes = totals.log_bytes
        self._dead_bytes, self._dead = totals.dead_bytes, totals.dead
        self._jobs: queue.SimpleQueue[Append | Commit | Work | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._pending_bytes = 0
        self._closed: FlyballError | None = None

    @property
    def pending_bytes(self) -> int:
        """Bytes of bodies that are held in memory until their commit."""
        return self._pending_bytes

    def hold(self, size: int) -> None:
        """Counts `size` bytes as pending (negative: no longer)."""
        with self._lock:
            self._pending_bytes += size

    def put(self, job: Append | Commit | Work) -> None:
        """Raises: Stopped when nothing is stored any more."""
        with self._lock:  # so that no job can slip in behind the last one, where nobody would answer it
            if self._closed is not None:
                raise Stopped(str(self._closed)) from self._closed
            if isinstance(job, Append):
                self._pending_bytes += len(job.body)
            self._jobs.put(job)

    def close(self, why: str = "stopped") -> None:
        """Stores what is queued and ends the thread; later jobs are refused."""
        self._refuse(Stopped(why))
        self._jobs.put(None)

    def _refuse(self, why: FlyballError) -> None:
        with self._lock:
            self._closed = self._closed or why

    def run(self) -> None:
        """The thread's work. When it raises, everyone who waits is told."""
        jobs: list[Append | Commit | Work] = []
        stored = False
        try:
            with self._database.connect() as connection:
                last = False
                while not last:
                    jobs, last = self._due()
                    stored = False
                    if jobs:
                        self._store(connection, jobs)
                    elif not last:
                        with self._database.transaction(connection):
                            pass  # nothing was due for long: is this process still the owner?
                stored = True
        finally:
            self._refuse(Stopped(_UNWRITABLE))
            if not stored:
                self._answer_nobody(jobs)

    def _due(self) -> tuple[list[Append | Commit | Work], bool]:
        """A job, and whatever else is queued, or none when the database wants to hear from us; whether these are the last."""
        jobs: list[Append | Commit | Work] = []
        try:
            job = self._jobs.get(timeout=self._database.ping_s)
        except queue.Empty:
            return jobs, False
        if self._jobs.empty():
            time.sleep(LINGER_S)
        while job is not None:
            jobs.append(job)
            if len(jobs) >= _MOST_JOBS:
                return jobs, False
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return jobs, False
        return jobs, True

    def _store(self, connection: Connection, jobs: Sequence[Append | Commit | Work]) -> None:
        """One transaction for all jobs; only afterwards is anything acknowledged, shown or handed to the stages."""
        appends = [j for j in jobs if isinstance(j, Append)]
        commits = [j for j in jobs if isinstance(j, Commit)]
        rows = [
            LogRow(position, a.kind, a.received_at, a.sender, a.n, a.body)
            for position, a in enumerate(appends, self._appended + 1)
        ]
        for a in appends:
            if a.format:
                self.received[a.format] += a.n
        dead = [d for a in appends for d in a.dead]
        dead += [_letter(r) for c in commits for r in c.skipped]
        for d in dead:
            self.rejected[d.reason] += d.n
        with self._database.transaction(connection):
            if rows:
                store.append_log(connection, rows)
            if rows or dead:
                store.append_dead_letters(connection, self._affordable(dead))
                store.put_edge(connection, self.received, self.rejected)
            draft = self._board.draft()
            for job in jobs:
                if isinstance(job, Commit):
                    shown = [(m, draft.move(m)) for m in job.directives]
                    store.apply_commit(connection, job, shown, self._database.epoch)
                    continue
                if isinstance(job, Work):
                    job.run(connection)
                    continue
                if job.also is not None:
                    job.also(connection)
                if isinstance(job.payload, StopChange):
                    draft.switch(job.payload)
                    acts.put_stops(connection, draft.stops)
                    acts.show_directives(connection, draft.shown)
        size = sum(len(r.body) for r in rows)
        self._log_bytes += size
        if rows:
            self._appended = rows[-1].id
            self.hold(-size)
        if draft.changed:
            # The kill switch acts from here on, whatever the stages are at.
            self._board.publish(draft)
        self._after_commit(Stored(appends, rows, commits))
        for a, r in zip(appends, rows, strict=True):
            _resolve(a.done, r.id)
        for job in jobs:
            if isinstance(job, Work):
                _resolve(job.done, None)

    def _affordable(self, letters: Sequence[DeadLetter]) -> list[DeadLetter]:
        """The letters that are kept, without their bytes where the budget is spent: bad bodies cannot fill the disk."""
        kept = []
        for letter in letters:
            if self._dead >= self._retention.dead_letters:
                break
            size = len(letter.body or b"")
            if self._dead_bytes + size > self._retention.dead_letters_bytes:
                letter, size = letter.without_bytes(), 0
            self._dead += 1
            self._dead_bytes += size
            kept.append(letter)
        return kept

    def trim(self, now: float) -> None:
        """Removes what is older or more than may be kept, some rows a transaction, until nothing is left to remove."""
        kept = self._retention

        def work(connection: Connection) -> None:
            gone = store.trim_log(connection, now - kept.log_s, self._log_bytes - kept.log_bytes, _TRIM_ROWS)
            self._log_bytes -= gone.size
            if gone.rows >= _TRIM_ROWS:
                self._jobs.put(Work(work))
                return
            dead = store.trim_dead_letters(connection, now - kept.dead_letters_s, _TRIM_ROWS)
            self._dead -= dead.rows
            self._dead_bytes -= dead.size
            if dead.rows >= _TRIM_ROWS:
                self._jobs.put(Work(work))

        self.put(Work(work))

    def _answer_nobody(self, jobs: Sequence[Append | Commit | Work]) -> None:
        """Tells everyone who waits that nothing was stored; called once the thread stores nothing more."""
        waiting = list(jobs)
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                waiting.append(job)
        for job in waiting:
            if not isinstance(job, Commit) and not job.done.done():
                job.done.set_exception(Stopped(_UNWRITABLE))


def _letter(record: Skipped) -> DeadLetter:
    """A record that was left out keeps its bytes like anything that could not be taken."""
    return DeadLetter(
        record.at, record.sender, record.kind, "stage_raised", f"record {record.position}: {record.reason}",
        len(record.body), record.body, record.n,
    )  # fmt: skip


def _resolve(done: Future[int] | Future[None], value: int | None) -> None:
    """Sets a result unless the asker has left: a cancelled request must not stop the writer."""
    if done.set_running_or_notify_cancel():
        done.set_result(value)  # type: ignore[arg-type]
