"""Event-time windows: events in, closed windows out.

    batch → times corrected → late ones counted → waiting list → chunks of columns → sums over cells → window

A batch costs a few numpy calls and one append; calls wait until there are `CHUNK_CALLS` of them, then their fields are read into columns, and
columns wait until a window has as many rows as cells, so that every step is amortised over many calls. What comes out does
not depend on where these borders fall: slots are given in order of arrival and sums run in order of arrival.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import numpy as np

from flyball.core.codec import pack_state, unpack_state
from flyball.core.columns import BASE_LABELS, SUMS, Rollup, Window
from flyball.core.errors import ConfigError, did_you_mean
from flyball.core.events import TYPE_NAMES, Batch, Event, LlmCall
from flyball.streams.cells import (
    CLASS_BITS,
    CLASS_MASK,
    FIELDS,
    HISTOGRAMS,
    CellSums,
    CellTable,
    NumberReader,
    floats,
)
from flyball.streams.histogram import BUCKET_BITS
from flyball.streams.rollups import DEFAULT_ROLLUPS, RollupBuilder
from flyball.streams.watermark import Sender, Watermarks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flyball.core.columns import Floats, Ints

CHUNK_CALLS: Final = 128
"""Calls read into columns at once: enough to pay for the numpy calls, few enough to be still in the cache."""
COMPACT_ROWS: Final = 1 << 16
_SAMPLES: Final = 3
_FORGET_S: Final = 86_400.0
_FORGET_EVERY: Final = 64
_ONLY_CALLS: Final = {LlmCall}
_NONE: Final = np.empty(0, np.int64)
_SANE_S: Final = 1e11
"""No event time is further from 1970 than this (three thousand years); beyond, a number is damaged."""


@dataclass(frozen=True)
class WindowSettings:
    """How time is cut and how long it is waited for.

    Args:
        window_s: length of a window of event time, seconds.
        lateness_s: how far out of order one sender's events may come.
        max_delay_s: how long the slowest sender is waited for.
        max_cells: most combinations of base labels held at once; further ones share `other` cells.
        rollups: label sets that every window is also summed over.

    Raises: ConfigError for a value without meaning or an unknown label.
    """

    window_s: float = 10.0
    lateness_s: float = 2.0
    max_delay_s: float = 15.0
    max_cells: int = 100_000
    rollups: tuple[tuple[str, ...], ...] = DEFAULT_ROLLUPS

    def __post_init__(self) -> None:
        if not 0.0 < self.window_s < math.inf:
            raise ConfigError(
                f"{self.window_s!r} is no length of time; more than 0 seconds", where="window_s"
            )
        for name in ("lateness_s", "max_delay_s"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{getattr(self, name)!r} is no delay; 0 seconds or more", where=name)
        if self.max_delay_s < self.lateness_s:
            raise ConfigError(
                f"{self.max_delay_s} is less than lateness_s = {self.lateness_s}", where="max_delay_s"
            )
        if not 2 <= self.max_cells <= 1 << 22:
            raise ConfigError(f"{self.max_cells!r} cells; 2 to {1 << 22}", where="max_cells")
        for label in (label for by in self.rollups for label in by):
            if label not in BASE_LABELS:
                raise ConfigError(
                    f"unknown label {label!r}{did_you_mean(label, BASE_LABELS)}", where="rollups"
                )


@dataclass(frozen=True, slots=True)
class WindowStats:
    """Counters since the start (they survive a restart), and what is held now."""

    events: dict[str, int]
    """By type."""
    late: int
    """Calls whose window had closed; in no window."""
    late_by_sender: dict[str, int]
    """Of senders still remembered."""
    clamped_future: int
    damaged_time: int
    """Events whose time is no number or absurd; in no window."""
    overflowed: int
    """Calls that went to an `other` cell because the table was full."""
    windows_closed: int
    cells: int
    open_windows: int
    skew_s: dict[str, float]
    """Senders whose clock is measured to be off: how far it is ahead of ours (negative: behind), seconds."""


Chunk: TypeAlias = "tuple[Ints, list[Floats | None]]"


@dataclass(slots=True)
class _Open:
    """A window that still takes calls."""

    sums: CellSums = field(default_factory=CellSums)
    chunks: list[Chunk] = field(default_factory=list)
    rows: int = 0
    samples: dict[int, list[str]] = field(default_factory=dict)
    sampled: Any = None
    """bool[codes]: has its samples already; None until something fails."""

    def add(self, codes: Ints, numbers: list[Floats | None], calls: Sequence[LlmCall], capacity: int) -> None:
        """Add a chunk of calls: their codes, their numbers, and themselves for the samples."""
        self.chunks.append((codes, numbers))
        self.rows += len(codes)
        failed = np.flatnonzero(codes & CLASS_MASK)
        if len(failed):
            self._sample(codes, failed, calls, capacity)

    def _sample(self, codes: Ints, failed: Ints, calls: Sequence[LlmCall], capacity: int) -> None:
        more = (capacity << CLASS_BITS) - (0 if self.sampled is None else len(self.sampled))
        if more > 0:
            had = np.empty(0, np.bool_) if self.sampled is None else self.sampled
            self.sampled = np.append(had, np.zeros(more, np.bool_))
            self.sampled[[code for code, ids in self.samples.items() if len(ids) >= _SAMPLES]] = True
        failed = failed[~self.sampled[codes[failed]]]
        for i, code in zip(failed.tolist(), codes[failed].tolist(), strict=True):
            ids = self.samples.setdefault(code, [])
            call = calls[i]
            event_id = call.id or "/".join(part for part in (call.trace, call.span) if part)
            if len(ids) < _SAMPLES and event_id:
                ids.append(event_id)
                if len(ids) == _SAMPLES:
                    self.sampled[code] = True

    def compact(self, capacity: int) -> None:
        """Turn waiting columns into sums."""
        self.sums.fit(capacity)
        if not self.chunks:
            return
        codes = np.concatenate([codes for codes, _ in self.chunks])
        numbers: list[Floats | None] = []
        for k in range(len(FIELDS)):
            parts = [chunk[1][k] for chunk in self.chunks]
            told = any(part is not None for part in parts)
            numbers.append(
                np.concatenate([_told(p, len(c[0])) for p, c in zip(parts, self.chunks, strict=True)])
                if told
                else None
            )
        self.sums.add(codes, numbers)
        self.chunks, self.rows = [], 0


def _told(part: Floats | None, n: int) -> Floats:
    return np.full(n, np.nan) if part is None else part


class Windows:
    """Cuts the stream of calls into windows and closes them as the watermark passes. A pure stage.

    Other events than calls only move time on. A window without calls is not emitted. `live` is what closed windows say
    of themselves; set it to False while history is replayed to rebuild state.

    Args:
        settings: how time is cut.
        chunk_calls: calls read into columns at once; changes speed, never results.
        compact_rows: rows that wait in columns before they are summed; changes speed and memory, never results.
    """

    KIND: Final = "windows"
    VERSION: Final = 1

    def __init__(
        self,
        settings: WindowSettings | None = None,
        *,
        chunk_calls: int = CHUNK_CALLS,
        compact_rows: int = COMPACT_ROWS,
    ) -> None:
        self.settings = settings or WindowSettings()
        self.live = True
        self._chunk_calls, self._compact_rows = chunk_calls, compact_rows
        s = self.settings
        self._time = Watermarks(s.lateness_s, s.max_delay_s)
        self._cells = CellTable(s.max_cells)
        self._rollups = RollupBuilder(s.rollups, s.max_cells, _FORGET_S)
        self._numbers = NumberReader()
        self._open: dict[int, _Open] = {}
        self._closed_before: int | None = None
        """Number of the first window that is not closed; None while all are open."""
        self._waiting: list[LlmCall] = []
        self._runs: list[tuple[int, int]] = []
        """(window, how many) of the waiting calls, in order."""
        self._events: Counter[str] = Counter()
        self._damaged = self._windows_closed = 0
        self.times: Floats = np.empty(0)
        """Corrected times of the events of the newest batch, nan where damaged; for whoever feeds this. Not part of the state."""
        self.late: Ints = _NONE
        """Which events of the newest batch are calls whose window had closed; for whoever feeds this. Not part of the state."""

    @property
    def closed_before(self) -> int | None:
        """Number of the first window that is not closed (its start is that times `window_s`); None while all are open."""
        return self._closed_before

    @property
    def watermark(self) -> float:
        """Event time before which windows are closed; -inf before the first event."""
        return self._time.value

    @property
    def newest(self) -> float:
        """Newest corrected event time of all; -inf before the first event."""
        return self._time.newest

    @property
    def stats(self) -> WindowStats:
        senders = self._time.senders
        return WindowStats(
            events=dict(self._events), late=self._time.late,
            late_by_sender={name: s.late for name, s in senders.items() if s.late},
            clamped_future=self._time.clamped_future, damaged_time=self._damaged, overflowed=self._cells.overflowed,
            windows_closed=self._windows_closed, cells=len(self._cells), open_windows=len(self._open),
            skew_s={name: -s.correction_s for name, s in senders.items() if s.correction_s},
        )  # fmt: skip

    def feed(self, batch: Batch) -> list[Window]:
        """Take one batch; returns the windows that it closed, oldest first."""
        self.late = _NONE
        events = batch.events
        if not events:
            return []
        types = set(map(type, events))
        only_calls = types == _ONLY_CALLS
        if only_calls:
            self._events["llm_call"] += len(events)
        else:
            for kind, n in Counter(map(type, events)).items():
                self._events[TYPE_NAMES[kind]] += n
        at = floats([e.at for e in events])
        low, high = float(at.min()), float(at.max())
        sane: Any = None
        if not (low > -_SANE_S and high < _SANE_S):
            sane = np.abs(at) < _SANE_S
            self.times = np.full(len(at), np.nan)
            events, at = self._without_damaged(events, at, sane)
            if not events:
                return []
        sender = self._time.sender(batch.sender)
        corrected = self._time.correct(sender, at, batch.received_at)
        if corrected is not at or not only_calls or len(at) != len(batch.events):
            at = corrected
            low, high = float(at.min()), float(at.max())
        if sane is None:
            self.times = at
        else:
            self.times[sane] = at
        if LlmCall in types:
            self._place(events, at, low, high, sender, only_calls)
            if sane is not None:
                self.late = np.flatnonzero(sane)[self.late]
        self._time.observe(batch.sender, sender, high, batch.received_at, calls=LlmCall in types)
        return self._close_passed()

    def tick(self, now: float) -> list[Window]:
        """It is `now` by the clock that sets `received_at`, and all that was received has been fed."""
        self._time.tick(now)
        return self._close_passed()

    def flush(self) -> list[Window]:
        """Close every window: the end of a replay."""
        if not self._open:
            return []
        end = max(self._open) + 1
        self._time.value = max(self._time.value, end * self.settings.window_s)
        return self._close_before(end)

    def _without_damaged(
        self, events: Sequence[Event], at: Floats, sane: NDArray[np.bool_]
    ) -> tuple[Sequence[Event], Floats]:
        self._damaged += int((~sane).sum())
        return [events[i] for i in np.flatnonzero(sane).tolist()], at[sane]

    def _place(
        self, events: Sequence[Event], at: Floats, low: float, high: float, sender: Sender, only_calls: bool
    ) -> None:
        """Put calls on the waiting list, with the number of their window."""
        window_s = self.settings.window_s
        first, last = math.floor(low / window_s), math.floor(high / window_s)
        closed_before = self._closed_before
        if only_calls and first == last and (closed_before is None or first >= closed_before):
            self._wait(first, cast("Sequence[LlmCall]", events))
            return
        number = np.floor(at / window_s).astype(np.int64)
        chosen = np.arange(len(at))
        if not only_calls:
            chosen = np.array([i for i, e in enumerate(events) if type(e) is LlmCall], np.int64)
            number = number[chosen]
        if closed_before is not None and len(number) and number.min() < closed_before:
            late = number < closed_before
            self.late = chosen[late]
            self._time.count_late(sender, len(self.late))
            chosen, number = chosen[~late], number[~late]
        for window in np.unique(number).tolist():
            self._wait(window, [cast(LlmCall, events[i]) for i in chosen[number == window].tolist()])

    def _wait(self, window: int, calls: Sequence[LlmCall]) -> None:
        if window not in self._open:
            self._open[window] = _Open()
        self._waiting.extend(calls)
        if self._runs and self._runs[-1][0] == window:
            self._runs[-1] = (window, self._runs[-1][1] + len(calls))
        else:
            self._runs.append((window, len(calls)))
        if len(self._waiting) >= self._chunk_calls:
            self._absorb()

    def _absorb(self) -> None:
        """Read the waiting calls into columns of their windows."""
        calls, runs = self._waiting, self._runs
        if not calls:
            return
        self._waiting, self._runs = [], []
        codes, numbers = self._cells.codes(calls), self._numbers.read(calls)
        capacity = self._cells.capacity
        begin = 0
        for number, n in runs:
            part = slice(begin, begin + n)
            begin += n
            window = self._open[number]
            if n == len(calls):
                window.add(codes, numbers, calls, capacity)
            else:
                columns = [None if column is None else column[part] for column in numbers]
                window.add(codes[part], columns, calls[part], capacity)
            if window.rows >= max(self._compact_rows, capacity):
                window.compact(capacity)

    def _close_passed(self) -> list[Window]:
        value = self._time.value
        if value == -math.inf:
            return []
        before = math.floor(value / self.settings.window_s)
        if self._closed_before is not None and before <= self._closed_before:
            return []
        return self._close_before(before)

    def _close_before(self, before: int) -> list[Window]:
        due = sorted(number for number in self._open if number < before)
        self._closed_before = before
        if not due:
            return []
        self._absorb()
        return [self._close(number) for number in due]

    def _close(self, number: int) -> Window:
        window_s, cells = self.settings.window_s, self._cells
        open_window = self._open.pop(number)
        open_window.compact(cells.capacity)
        sums, start = open_window.sums, number * window_s
        slots = sums.active()
        calls = sums.by_class.reshape(-1, 1 << CLASS_BITS)[slots].sum(axis=1)
        cells.heard(slots, calls, start)
        samples = {
            (c >> CLASS_BITS, c & CLASS_MASK): tuple(ids) for c, ids in open_window.samples.items() if ids
        }
        window = self._rollups.build(start, start + window_s, sums, cells, samples, self.live)
        self._windows_closed += 1
        if cells.wants_room():
            cells.make_room(self._busy())
        if self._windows_closed % _FORGET_EVERY == 0:
            self._rollups.forget_silent(start)
        return window

    def _busy(self) -> Ints:
        """Cell slots in use by open windows."""
        busy = np.zeros(self._cells.capacity, np.bool_)
        for open_window in self._open.values():
            open_window.compact(self._cells.capacity)
            busy[open_window.sums.active()] = True
        return np.flatnonzero(busy)

    def snapshot(self) -> bytes:
        """Everything that later windows depend on, open windows included."""
        self._absorb()
        for open_window in self._open.values():
            open_window.compact(self._cells.capacity)
        s = self.settings
        windows = [
            (number, w.sums.state(), [(code, ids) for code, ids in w.samples.items() if ids])
            for number, w in self._open.items()
        ]
        return pack_state(
            self.KIND, self.VERSION,
            (
                (s.window_s, s.max_cells, s.rollups), self._time.state(), self._cells.state(), self._rollups.state(), windows,
                self._closed_before, dict(self._events), self._damaged, self._windows_closed, self.live,
            ),
        )  # fmt: skip

    def restore(self, state: bytes) -> None:
        """Go on where `snapshot` was taken.

        Raises: SnapshotError when the bytes are damaged or of another version; ConfigError when window length, number of cells or
        roll-ups have been changed since: then state has to be rebuilt from the log.
        """
        settings, time, cells, rollups, windows, *rest = unpack_state(state, self.KIND, self.VERSION)
        s = self.settings
        found = (settings[0], settings[1], tuple(tuple(by) for by in settings[2]))
        if found != (s.window_s, s.max_cells, s.rollups):
            raise ConfigError(
                f"the snapshot was taken with window_s, max_cells, rollups = {found}; rebuild from the log, or set them back",
                where="windows",
            )
        self._time.restore(time)
        self._cells.restore(cells)
        self._rollups.restore(rollups)
        self._waiting, self._runs = [], []
        self._open = {
            number: _Open(sums=CellSums.restored(sums), samples=dict(samples))
            for number, sums, samples in windows
        }
        self._closed_before, events, self._damaged, self._windows_closed, self.live = rest
        self._events = Counter(events)


class WindowMerger:
    """Makes one window of partial ones (of partitions, of workers) that cover the same span. Keeps stable slots.

    Only the cells of the parts are read; roll-ups are made anew, so that distinct tenants are counted once.
    """

    def __init__(self, settings: WindowSettings | None = None) -> None:
        self.settings = settings or WindowSettings()
        self._cells = CellTable(self.settings.max_cells)
        self._rollups = RollupBuilder(self.settings.rollups, self.settings.max_cells, _FORGET_S)
        self._merged = 0

    @property
    def cells(self) -> int:
        """How many series of cells have a slot."""
        return len(self._cells)

    @property
    def overflowed(self) -> int:
        """Cells that went to an `other` one because the table was full."""
        return self._cells.overflowed

    def merge(self, parts: Sequence[Window]) -> Window:
        """Raises: ValueError when there is no part, or parts of different spans."""
        if not parts or any((p.start, p.end) != (parts[0].start, parts[0].end) for p in parts):
            raise ValueError(f"parts of one span are wanted, got {[(p.start, p.end) for p in parts]}")
        slots = [
            self._cells.slots([p.cells.labels[i] for i in p.cells.ids.tolist()], p.cells.calls.tolist())
            for p in parts
        ]
        sums, samples = CellSums(), dict[tuple[int, int], tuple[str, ...]]()
        sums.fit(self._cells.capacity)
        for part, mine in zip(parts, slots, strict=True):
            _add_cells(sums, part.cells, mine)
            slot_of = dict(zip(part.cells.ids.tolist(), mine.tolist(), strict=True))
            for (slot, klass), ids in part.samples.items():
                key = (slot_of[slot], klass)
                samples[key] = (samples.get(key, ()) + ids)[:_SAMPLES]
        active = sums.active()
        self._cells.heard(
            active, sums.by_class.reshape(-1, 1 << CLASS_BITS).sum(axis=1)[active], parts[0].start
        )
        live = all(part.live for part in parts)
        window = self._rollups.build(parts[0].start, parts[0].end, sums, self._cells, samples, live)
        self._merged += 1
        if self._cells.wants_room():
            self._cells.make_room(np.empty(0, np.int64))
        if self._merged % _FORGET_EVERY == 0:
            self._rollups.forget_silent(parts[0].start)
        return window

    def snapshot(self) -> bytes:
        return pack_state("window_merger", 1, (self._cells.state(), self._rollups.state(), self._merged))

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError when the bytes are damaged or of another version."""
        cells, rollups, self._merged = unpack_state(state, "window_merger", 1)
        self._cells.restore(cells)
        self._rollups.restore(rollups)


def _add_cells(sums: CellSums, cells: Rollup, slots: Ints) -> None:
    row, klass = np.nonzero(cells.by_class)
    np.add.at(sums.by_class, slots[row] << CLASS_BITS | klass, cells.by_class[row, klass])
    for i, name in enumerate(SUMS):
        np.add.at(sums.sums[i], slots, cells.sums[name])
    for i, name in enumerate(FIELDS):
        np.add.at(sums.counts[i], slots, cells.counts[name])
    for name in HISTOGRAMS:
        part = cells.histograms[name]
        sums.histograms[name].add_counted(slots[part.rows] << BUCKET_BITS | part.buckets, part.counts)


def merge_windows(parts: Sequence[Window], settings: WindowSettings | None = None) -> Window:
    """One window of partial ones, with slots of its own. For a stream of windows use one `WindowMerger`: its slots are stable.

    Roll-ups are those of `settings`, or of the first part.
    Raises: ValueError when there is no part, or parts of different spans.
    """
    if settings is None:
        rollups = tuple(parts[0].rollups) if parts else ()
        cells = 16 + sum(len(part.cells) for part in parts)
        settings = WindowSettings(max_cells=2 * cells, rollups=rollups)
    return WindowMerger(settings).merge(parts)
