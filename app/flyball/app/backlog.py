"""What the stages have not read yet: in memory as far as it fits, else on disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from sqlalchemy import Engine

from flyball.app.records import Record, record_of
from flyball.app.store import store

_DISK_BYTES = 8 << 20
"""Bytes of the log read from disk at once: some 20,000 calls."""


class Backlog:
    """Filled by the writer after each commit, emptied by the stages, in order of position.

    A record that does not fit into memory is not kept at all: the gap shows in the positions, and the stages read it from disk.

    Args:
        reader: of the database that holds the log.
        position: newest record that the stages have read.
        appended: newest record of the log.
        size: bytes of the records between the two.
        memory_events: events kept decoded.
    """

    def __init__(self, reader: Engine, position: int, appended: int, size: int, memory_events: int) -> None:
        self._reader = reader
        self._memory_events = memory_events
        self._kept: deque[Record] = deque()
        self._kept_events = 0
        self._news = threading.Condition()
        self._read = position
        self._read_received_at: float | None = None
        self._taken_received_at: float | None = None
        self._closed = self._given_up = self._woken = False
        self.appended = appended
        self.size = size

    def add(self, records: Sequence[Record]) -> None:
        """Durable records, in order."""
        with self._news:
            for record in records:
                self.size += record.size
                # Small records cost memory too: a tick counts as much as an event.
                cost = max(1, record.n)
                if self._kept_events < self._memory_events:
                    self._kept.append(record)
                    self._kept_events += cost
            self.appended = records[-1].position
            self._news.notify()

    def take(self, most_events: int) -> list[Record] | None:
        """The next records; waits for news. Empty when woken for something else, None when closed and all was read, or given up."""
        with self._news:
            while self.appended <= self._read and not self._closed and not self._woken:
                self._news.wait()
            self._woken = False
            if self._given_up or (self._closed and self.appended <= self._read):
                return None
            if self.appended <= self._read:
                return []
            taken = self._from_memory(most_events)
        if not taken:
            taken = self._from_disk()
        self._taken_received_at = taken[0].received_at if taken else None
        return taken

    def _from_memory(self, most_events: int) -> list[Record]:
        taken: list[Record] = []
        due, events = self._read + 1, 0
        while self._kept and events < most_events and self._kept[0].position == due:
            record = self._kept.popleft()
            self._kept_events -= max(1, record.n)
            events += record.n
            due += 1
            taken.append(record)
        return taken

    def _from_disk(self) -> list[Record]:
        with self._news:
            until = self._kept[0].position - 1 if self._kept else self.appended
        with self._reader.connect() as c:
            return [record_of(row) for row in store.read_log(c, self._read, until, most_bytes=_DISK_BYTES)]

    def done(self, records: Sequence[Record]) -> None:
        """These were read."""
        with self._news:
            self._read = records[-1].position
            self._read_received_at = records[-1].received_at
            self._taken_received_at = None
            self.size = max(0, self.size - sum(r.size for r in records))

    @property
    def read(self) -> int:
        """Newest record that the stages have read."""
        return self._read

    def wake(self) -> None:
        """Ends a wait for news without any."""
        with self._news:
            self._woken = True
            self._news.notify_all()

    def close(self, *, give_up: bool = False) -> None:
        """Nothing more will come; with `give_up` what is there is left for the next start."""
        with self._news:
            self._closed = True
            self._given_up = self._given_up or give_up
            self._news.notify_all()

    def waiting_since(self) -> float | None:
        """When the oldest unread record arrived; None when all were read. At worst too early, by the time one stretch of the log took."""
        with self._news:
            if self.appended <= self._read:
                return None
            if self._taken_received_at is not None:
                return self._taken_received_at
            if self._kept and self._kept[0].position == self._read + 1:
                return self._kept[0].received_at
            return self._read_received_at
