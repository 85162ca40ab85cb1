"""The part of the pipeline that goes with a source partition: copies dropped, calls counted into windows, the rest handed on.

    records of one partition → dedup → windows without roll-ups → portion

A pure stage: time comes in with records and ticks. What it holds of a partition is small beside what passes through it, so a partition moves
to another worker by its snapshot; or without one, by reading again from `needed_from`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final, cast

import msgspec
import numpy as np

from flyball.core.codec import SnapshotError, pack_state, unpack_state
from flyball.core.columns import Window
from flyball.core.events import Batch, Event, LlmCall
from flyball.streams.dedup import Deduplicator
from flyball.streams.portion import (
    Halt,
    PackedPartial,
    PackedSingles,
    Partial,
    Portion,
    Single,
    pack_partial,
    pack_singles,
    unpack_partial,
    unpack_singles,
)
from flyball.streams.windows import Windows, WindowSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flyball.core.columns import Ints

_ONLY_CALLS: Final = {LlmCall}
MAX_CALLS: Final = 250_000
"""Calls that a partition remembers to tell copies: some 11 MB of its snapshot."""


class Late(msgspec.Struct, frozen=True):
    """A call that is in no window, because its window had closed when it came."""

    offset: int
    index: int
    """Among the events of its record."""
    event: Event
    behind_s: float
    """How far its time lies before the watermark that it met."""


class Front:
    """One source partition's dedup and windows.

    Args:
        source: name of the partition, `flyball.llm-calls/3`.
        settings: how time is cut; roll-ups are made behind, by the merger.
        origin: offset of the first record that it will be fed.
        remember_calls: bound on calls remembered to tell copies.
    """

    KIND: Final = "front"
    VERSION: Final = 1

    def __init__(
        self,
        source: str,
        settings: WindowSettings | None = None,
        *,
        origin: int = 0,
        remember_calls: int = MAX_CALLS,
    ) -> None:
        self.source = source
        self.windows = Windows(replace(settings or WindowSettings(), rollups=()))
        self._window_s = self.windows.settings.window_s
        self._dedup = Deduplicator(max_calls=remember_calls)
        self._origin = origin
        self.last = origin - 1
        """Offset of the newest record taken."""
        self._cut = origin
        self._received_at: float | None = None
        self._spans: dict[int, tuple[int, int]] = {}
        """Of each open window, the offsets of the first and the last record with a call in it."""
        self._partials: list[Partial] = []
        self._singles: list[Single] = []
        self._told: tuple[float, float, bool] = (-math.inf, -math.inf, False)
        self.halt: Halt | None = None
        """Set by whoever feeds this, when it feeds no more because too much was bad, and taken back."""
        self._told_halt: Halt | None = None
        self.late: list[Late] = []
        """The late calls of the newest batch; for whoever feeds this. Not part of the state."""

    @property
    def received_at(self) -> float | None:
        """Newest time of arrival of what was fed."""
        return self._received_at

    @property
    def needed_from(self) -> int:
        """Offset to read again from, should this be lost without a snapshot: nothing before it is in a window that is open."""
        firsts = [first for first, _ in self._spans.values()]
        return min([*firsts, self._cut])

    def feed(self, batch: Batch, offsets: Ints, last: int) -> None:
        """Takes the events of some records.

        Args:
            offsets: int64[len(batch.events)], the record of each event.
            last: offset of the newest of the records, events or not.
        """
        if batch.received_at is not None:
            self._received_at = max(self._received_at or -math.inf, batch.received_at)
        self.last = max(self.last, last)
        self.late = []
        newest, watermark, told = self.windows.newest, self.windows.watermark, offsets
        batch = self._dedup.feed(batch)
        if self._dedup.kept is not None:
            offsets = offsets[self._dedup.kept]
        events = batch.events
        if not events:
            return
        closed = self.windows.feed(batch)
        if len(self.windows.late):
            self._note_late(events, offsets, told, watermark)
        only_calls = set(map(type, events)) == _ONLY_CALLS
        if not only_calls or any([e.run for e in cast("Sequence[LlmCall]", events)]):  # noqa: C419 - twice as fast
            self._pick_singles(events, offsets, newest)
        self._note_spans(events, offsets, only_calls)
        self._settle(closed)

    def tick(self, now: float) -> None:
        """It is `now` by the clock that sets `received_at`, and all that was received has been fed."""
        self._settle(self.windows.tick(now))

    def flush(self) -> None:
        """Closes every window: the end of a replay."""
        self._settle(self.windows.flush())

    def _note_late(self, events: Sequence[Event], offsets: Ints, told: Ints, watermark: float) -> None:
        kept = self._dedup.kept
        for row in self.windows.late.tolist():
            offset = int(offsets[row])
            place = row if kept is None else kept[row]
            index = place - int(np.searchsorted(told, offset))
            self.late.append(Late(offset, index, events[row], watermark - float(self.windows.times[row])))

    def _pick_singles(self, events: Sequence[Event], offsets: Ints, newest: float) -> None:
        """Sets aside what is wanted by itself: everything but calls outside runs."""
        chosen = [i for i, e in enumerate(events) if type(e) is not LlmCall or e.run]
        if not chosen:
            return
        keys = np.fmax.accumulate(np.append(newest, self.windows.times))[1:]
        self._singles += [
            Single(key, offset, events[i])
            for i, key, offset in zip(chosen, keys[chosen].tolist(), offsets[chosen].tolist(), strict=True)
        ]

    def _note_spans(self, events: Sequence[Event], offsets: Ints, only_calls: bool) -> None:
        times = self.windows.times
        if not only_calls:
            calls = np.array([type(e) is LlmCall for e in events], np.bool_)
            times, offsets = times[calls], offsets[calls]
        if not len(times):
            return
        low, high = np.floor(times.min() / self._window_s), np.floor(times.max() / self._window_s)
        if low == high:
            self._extend(int(low), offsets)
            return
        number = np.floor(times / self._window_s)
        for n in np.unique(number[~np.isnan(number)]).tolist():
            self._extend(int(n), offsets[number == n])

    def _extend(self, number: int, offsets: Ints) -> None:
        first, last = int(offsets.min()), int(offsets.max())
        known = self._spans.get(number)
        self._spans[number] = (first, last) if known is None else (min(first, known[0]), max(last, known[1]))

    def _settle(self, closed: list[Window]) -> None:
        before = self.windows.closed_before
        for window in closed:
            number = round(window.start / self._window_s)
            self._partials.append(Partial(number, *self._spans.pop(number), window))
        if before is not None:
            # What is left behind the border are late calls: they are in no window.
            self._spans = {n: span for n, span in self._spans.items() if n >= before}

    def cut(
        self, *, quiet: bool = False, sources: Sequence[str] = (), still: Mapping[str, float] | None = None
    ) -> Portion | None:
        """Everything since the last cut; None when there is nothing to say.

        Args:
            quiet: the partition has been read to its end and nothing has come for a while. Without open windows, nobody waits for it.
            sources: all that portions are to be expected of. Given by whoever takes the partition on, and then told in any case.
            still: as of the portion; told in any case, too.
        """
        idle = quiet and not self._spans
        newest, watermark = self.windows.newest, self.windows.watermark
        told = (newest, self._closed_until(watermark), idle)
        if (
            self.last < self._cut
            and not self._partials
            and told == self._told
            and not sources
            and still is None
            and self.halt == self._told_halt
        ):
            return None
        stats = self.windows.stats
        totals = dict(stats.events) | {
            "late": stats.late, "clamped_future": stats.clamped_future, "damaged_time": stats.damaged_time,
            "overflowed": stats.overflowed, "duplicates": self._dedup.duplicates, "duplicate_steps": self._dedup.duplicate_steps,
        }  # fmt: skip
        portion = Portion(
            source=self.source, first=self._cut, last=self.last, origin=self._origin, newest=newest, watermark=watermark, idle=idle,
            received_at=self._received_at, partials=self._partials, singles=self._singles, totals=totals, skew_s=stats.skew_s,
            sources=tuple(sources), halt=self.halt, still=still,
        )  # fmt: skip
        self._partials, self._singles = [], []
        self._cut, self._told, self._told_halt = self.last + 1, told, self.halt
        return portion

    def _closed_until(self, watermark: float) -> float:
        """While time alone passes, only whole windows are news."""
        return -math.inf if watermark == -math.inf else float(math.floor(watermark / self._window_s))

    def snapshot(self) -> bytes:
        """Everything that later portions depend on, what is not cut yet included."""
        return pack_state(
            self.KIND, self.VERSION,
            (
                self.source, self._dedup.snapshot(), self.windows.snapshot(), self._origin, self.last, self._cut, self._received_at,
                self._spans, [pack_partial(p) for p in self._partials], pack_singles(self._singles), self._told,
                self.halt, self._told_halt,
            ),
        )  # fmt: skip

    def restore(self, state: bytes) -> None:
        """Go on behind record `last`, where `snapshot` was taken.

        Raises: SnapshotError when the bytes are damaged or of another version or source; ConfigError when windows were set otherwise: then
        read again from the offset that was committed.
        """
        found = unpack_state(state, self.KIND, self.VERSION, _State)
        if found.source != self.source:
            raise SnapshotError(f"state of {found.source}; this is {self.source}")
        self._dedup.restore(found.dedup)
        self.windows.restore(found.windows)
        self._origin, self.last, self._cut = found.origin, found.last, found.cut
        self._received_at, self._spans, self._told = found.received_at, found.spans, found.told
        self._partials = [unpack_partial(p) for p in found.partials]
        self._singles = unpack_singles(found.singles)
        self.halt, self._told_halt = found.halt, found.told_halt


class _State(msgspec.Struct, array_like=True, frozen=True):
    source: str
    dedup: bytes
    windows: bytes
    origin: int
    last: int
    cut: int
    received_at: float | None
    spans: dict[int, tuple[int, int]]
    partials: list[PackedPartial]
    singles: PackedSingles
    told: tuple[float, float, bool]
    halt: Halt | None = None
    told_halt: Halt | None = None


__all__ = ["MAX_CALLS", "Front", "Late"]
