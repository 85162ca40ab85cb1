"""Portions of many sources in, closed windows and single events out: in one order, each once.

    portions → applied already? → partial windows kept, the fullest of each → watermark over sources → WindowMerger
                                → single events kept, by time              ↗

What does not depend on how the portions of different sources come in between each other, as long as no source is idle or stalled beyond
what it then still says, and nothing is late: which windows come, what is in them, which single events come, and the order of all of it (by
`Single.key`, then source, then offset; a window stands where its end plus the allowed lateness is). Nor does it depend on where portions are
cut, or on portions that come twice or once more from an earlier record on. What does depend on it: how many of these items one call
returns, and so how single events are cut into batches; slots of series; sums of floats in their last bits where sources are numbered otherwise.
What a source says after it was idle or stalled takes its place as long as nothing behind that place has gone out; later single events
come at once, later windows are counted as late.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import msgspec

from flyball.core.codec import pack_state, unpack_state
from flyball.core.columns import Window
from flyball.core.events import TYPE_NAMES, Batch, Event, LlmCall
from flyball.streams.portion import (
    Halt,
    PackedPartial,
    PackedSingles,
    Partial,
    Piece,
    Portion,
    PortionError,
    Single,
    pack_partial,
    pack_singles,
    put_together,
    unpack_partial,
    unpack_singles,
)
from flyball.streams.windows import WindowMerger, WindowSettings, WindowStats

STALL_S: Final = 30.0
_SILENCE_S: Final = 5.0
"""Of a silence of all sources no more than this counts as time in which one of them could have moved."""
_HELD_S: Final = 5.0
"""How long exporters hold calls back as they are shipped: LiteLLM's callback and OpenTelemetry's batches for five seconds."""
_KEPT_WINDOWS: Final = 64
"""Merged windows of which is known what went into them, to tell a repetition from what came too late."""
_UNFINISHED: Final = 4
"""Portions of a source in pieces that are remembered; only one can be on its way, and one of whoever had the source before."""
_TYPES: Final = frozenset(TYPE_NAMES.values())
_CALLS: Final = TYPE_NAMES[LlmCall]

Merged: TypeAlias = "Window | Batch"
"""A closed window, or single events that come before whatever follows."""


@dataclass(slots=True)
class _Source:
    last: int = -1
    """Offset of the newest record that is applied."""
    newest: float = -math.inf
    watermark: float = -math.inf
    idle: bool = False
    moved_at: float = 0.0
    """When its time last moved, or somebody was last known to be at work on it, as `Merger._elapsed` counts."""
    origin: int = 0
    totals: dict[str, int] = field(default_factory=dict)
    skew_s: dict[str, float] = field(default_factory=dict)
    waiting: deque[Single] = field(default_factory=deque)
    still: float = -math.inf
    """Until when a broker has confirmed that nothing more came in it, while it is idle; -inf where nobody tells."""
    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    """By checksum: portions that have not come whole."""

    def gather(self, piece: Piece) -> Portion | None:
        """The portion that is whole with this piece. Those of one who was cut off on the way stay without an end.

        Raises: PortionError where the pieces do not fit together.
        """
        there = self.pieces.setdefault(piece.crc, [])
        if piece.number == len(there):
            there.append(piece)
        if len(there) == piece.of:
            return put_together(self.pieces.pop(piece.crc))
        while len(self.pieces) > _UNFINISHED:
            del self.pieces[next(iter(self.pieces))]
        return None

    @property
    def reached(self) -> float:
        """No single event that is still to come has an earlier key, unless it is late."""
        return max(self.newest, self.watermark)


class Merger:
    """Puts what the fronts of all sources said together again. A pure stage.

    Args:
        settings: as those of the fronts; roll-ups are made here.
        stall_s: a source whose time has not moved for so long is not waited for any more.
    """

    KIND: Final = "merger"
    VERSION: Final = 1

    def __init__(self, settings: WindowSettings | None = None, *, stall_s: float = STALL_S) -> None:
        self.settings = settings or WindowSettings()
        self.stall_s = stall_s
        self._windows = WindowMerger(self.settings)
        self._sources: dict[str, _Source] = {}
        self._parts: dict[int, dict[str, Partial]] = {}
        self._merged: dict[int, dict[str, tuple[int, int, int]]] = {}
        """First and last offset and calls of what went into the newest merged windows."""
        self._closed_before: int | None = None
        self._now = self._moving_s = 0.0
        self._fed_at = -math.inf
        self._beats = False
        """Whether those at work say so every second."""
        self._received_at: float | None = None
        self._closed = 0
        self.totals: Counter[str] = Counter()
        """Over all sources and since the beginning: events by type, and the counters of the fronts."""
        self.late = 0
        """Calls of windows that had been merged when they came."""
        self.stale = 0
        """Portions that held nothing new."""
        self.missed = 0
        """Records that no portion has told: removed before they were read."""
        self.halts: dict[str, Halt] = {}
        """Sources that stand, and why they first did."""

    # --- in -------------------------------------------------------------------------------------------------------

    def feed(self, portion: Portion, at: float) -> list[Merged]:
        """Takes one portion that came `at`; returns what is complete now, in order.

        Raises: PortionError when its windows are cut otherwise than here; nothing of it is taken then.
        """
        if portion.piece is not None:
            whole = self._source(portion.source).gather(portion.piece)
            return [] if whole is None else self.feed(whole, at)
        for partial in portion.partials:
            self._check(partial)
        self._moving_s, self._now = self._elapsed(at), max(self._now, at)
        self._fed_at = self._now
        for name in portion.sources:
            self._source(name)
        source = self._source(portion.source)
        if portion.sources:
            source.moved_at = self._moving_s  # somebody has just taken it on
        if portion.still is not None:
            self._hear_of(portion.still, at)
        self._count(source, portion)
        if portion.last < source.last:
            self.stale += 1
            return self._release()
        if portion.received_at is not None:
            # Never later than it came: clocks of producers set the times of records.
            self._received_at = max(self._received_at or -math.inf, min(portion.received_at, at))
        if 0 <= source.last < portion.first - 1:
            self.missed += portion.first - 1 - source.last
        source.waiting += [s for s in portion.singles if s.offset > source.last]
        for partial in portion.partials:
            self._keep(portion.source, partial)
        if portion.newest > source.newest or portion.watermark > source.watermark or source.idle:
            source.moved_at = self._moving_s
        source.last = portion.last
        source.newest = max(source.newest, portion.newest)
        source.watermark = max(source.watermark, portion.watermark)
        if not portion.idle:
            source.still = -math.inf
        source.idle = portion.idle
        source.skew_s = dict(portion.skew_s)
        if portion.halt is None:
            self.halts.pop(portion.source, None)
        else:
            self.halts.setdefault(portion.source, portion.halt)
        return self._release()

    def tick(self, now: float) -> list[Merged]:
        """It is `now` by the clock that says when portions come: who has stalled for too long is passed over."""
        self._now = max(self._now, now)
        return self._release()

    def flush(self) -> list[Merged]:
        """Everything that waits: the end of a replay."""
        before = max(self._parts, default=-1) + 1
        return self._take(before, (math.inf, ""), math.inf)

    def _hear_of(self, still: Mapping[str, float], at: float) -> None:
        self._beats = True
        for name, until in still.items():
            source = self._source(name)
            if source.idle:
                # Not later than it is here: a worker whose clock is ahead would make what others read late.
                source.still, source.moved_at = max(source.still, min(until, at)), self._moving_s

    def _elapsed(self, now: float) -> float:
        """Time in which somebody was at work. While nobody says anything (all workers are down, or the brokers are), nobody stalls: or else
        whoever spoke first again would close the windows of all others."""
        passed_s = max(0.0, now - self._fed_at) if self._fed_at > -math.inf else 0.0
        return self._moving_s + (min(passed_s, _SILENCE_S) if self._beats else passed_s)

    def _check(self, partial: Partial) -> None:
        window, window_s = partial.window, self.settings.window_s
        if (window.start, window.end) != (partial.number * window_s, partial.number * window_s + window_s):
            raise PortionError(
                f"a window from {window.start} to {window.end}, but here they are {window_s:g} s long; set window_s alike everywhere"
            )

    def _source(self, name: str) -> _Source:
        found = self._sources.get(name)
        if found is None:
            found = self._sources[name] = _Source(moved_at=self._moving_s)
        return found

    def _count(self, source: _Source, portion: Portion) -> None:
        totals = dict(portion.totals)
        if portion.origin == source.origin:
            # A front that was restored tells less for a while: what was counted stays counted.
            grown = {k: n - source.totals.get(k, 0) for k, n in totals.items()}
            more = {k: n for k, n in grown.items() if n > 0}
            self.totals.update(more)
            totals = source.totals | {k: totals[k] for k in more}
        elif portion.first > source.last:
            self.totals.update(totals)
        # else a front that lost its state and reads again. Where its portions straddle what was counted, that counts again:
        # windows and single events are exact, these counters are not then.
        source.origin, source.totals = portion.origin, totals

    def _keep(self, name: str, partial: Partial) -> None:
        if self._closed_before is not None and partial.number < self._closed_before:
            first, last, calls = self._merged.get(partial.number, {}).get(name, (math.inf, -1, 0))
            if partial.first < first or partial.last > last:
                self.late += max(0, partial.calls - calls)
            return
        there = self._parts.setdefault(partial.number, {})
        known = there.get(name)
        if known is None or partial.covers(known):
            there[name] = partial

    # --- out ------------------------------------------------------------------------------------------------------

    def _release(self) -> list[Merged]:
        elapsed_s = self._elapsed(self._now)
        # An idle source holds back what lies after the last word about it: whoever reads it may have died since.
        holding = [
            (s.still if s.idle else s.reached, name, self._complete_until(s))
            for name, s in self._sources.items()
            if elapsed_s < s.moved_at + self.stall_s and not (s.idle and s.still == -math.inf)
        ]
        if holding:
            watermark = min(w for _, _, w in holding)
            reached, name, _ = min(holding)
            limit = (reached, name)
        else:
            watermark = max((s.watermark for s in self._sources.values()), default=-math.inf)
            limit = (math.inf, "")
        before = self._closed_before
        if watermark > -math.inf:
            passed = math.floor(watermark / self.settings.window_s)
            before = passed if before is None else max(before, passed)
        # A single event stays behind the first window that is still open, or their order would be that of arrival.
        until = math.inf if not holding else -math.inf if before is None else self._place(before)
        return self._take(before, limit, until)

    def _complete_until(self, source: _Source) -> float:
        """Event time up to which nothing more of a source is expected.

        That an idle one is empty says when its next record will come at the earliest, not how old the calls in it will be then.
        """
        if not source.idle:
            return source.watermark
        if not source.totals.get(_CALLS):
            return source.still
        held_s = min(self.settings.lateness_s + _HELD_S, self.settings.max_delay_s)
        return max(source.watermark, source.still - held_s)

    def _place(self, number: int) -> float:
        """Where a window stands among the keys of single events: as if one sender had sent everything."""
        return (number + 1) * self.settings.window_s + self.settings.lateness_s

    def _take(self, before: int | None, limit: tuple[float, str], until: float) -> list[Merged]:
        """Windows with a lower number than `before`, single events up to (key, source) = `limit` and earlier than `until`."""
        found: list[tuple[float, str, Window | Event]] = []
        if before is not None:
            self._closed_before = before
            found += [
                (self._place(n), "", self._merge(n)) for n in sorted(n for n in self._parts if n < before)
            ]
        for name, source in self._sources.items():
            waiting = source.waiting
            while waiting and (waiting[0].key, name) <= limit and waiting[0].key < until:
                single = waiting.popleft()
                found.append((single.key, name, single.event))
        found.sort(key=_order)
        return list(self._grouped(found))

    def _grouped(self, found: Sequence[tuple[float, str, Window | Event]]) -> Iterable[Merged]:
        events: list[Event] = []
        for _, _, item in found:
            if not isinstance(item, Window):
                events.append(item)
                continue
            if events:
                yield Batch(events=events, received_at=self._received_at)
                events = []
            yield item
        if events:
            yield Batch(events=events, received_at=self._received_at)

    def _merge(self, number: int) -> Window:
        parts = self._parts.pop(number)
        self._merged[number] = {name: (p.first, p.last, p.calls) for name, p in parts.items()}
        for old in [n for n in self._merged if n < number - _KEPT_WINDOWS]:
            del self._merged[old]
        self._closed += 1
        return self._windows.merge([parts[name].window for name in sorted(parts)])

    # --- what it knows --------------------------------------------------------------------------------------------

    @property
    def sources(self) -> dict[str, tuple[int, float, bool]]:
        """Of each source: newest record applied, newest event time, whether it is idle."""
        return {name: (s.last, s.newest, s.idle) for name, s in sorted(self._sources.items())}

    @property
    def watermark(self) -> float:
        """Event time before which windows are merged; -inf before the first."""
        before = self._closed_before
        return -math.inf if before is None else before * self.settings.window_s

    @property
    def duplicates(self) -> int:
        """Copies of calls that were dropped."""
        return self.totals["duplicates"]

    @property
    def stats(self) -> WindowStats:
        """As those of `Windows`, over all sources."""
        skews = [s.skew_s for s in self._sources.values()]
        return WindowStats(
            events={k: n for k, n in self.totals.items() if k in _TYPES}, late=self.totals["late"] + self.late, late_by_sender={},
            clamped_future=self.totals["clamped_future"], damaged_time=self.totals["damaged_time"],
            overflowed=self.totals["overflowed"] + self._windows.overflowed, windows_closed=self._closed, cells=self._windows.cells,
            open_windows=len(self._parts), skew_s={sender: s for skew in skews for sender, s in skew.items()},
        )  # fmt: skip

    def snapshot(self) -> bytes:
        """Everything that later output depends on."""
        sources = [
            (name, s.last, s.newest, s.watermark, s.idle, s.moved_at, s.origin, s.totals, s.skew_s, pack_singles(s.waiting))
            for name, s in self._sources.items()
        ]  # fmt: skip
        parts = [(name, pack_partial(p)) for there in self._parts.values() for name, p in there.items()]
        return pack_state(
            self.KIND, self.VERSION,
            (
                sources, parts, self._merged, self._closed_before, self._now, self._received_at, self._closed, dict(self.totals),
                self.late, self.stale, self.missed, self._windows.snapshot(), self.halts,
                {name: s.still for name, s in self._sources.items() if s.still > -math.inf}, self._fed_at, self._moving_s, self._beats,
                {name: s.pieces for name, s in self._sources.items() if s.pieces},
            ),
        )  # fmt: skip

    def restore(self, state: bytes) -> None:
        """Go on where `snapshot` was taken. Raises: SnapshotError when the bytes are damaged or of another version."""
        found = unpack_state(state, self.KIND, self.VERSION, _State)
        self._sources = {}
        for name, last, newest, watermark, idle, moved_at, origin, totals, skew_s, waiting in found.sources:
            self._sources[name] = _Source(
                last,
                newest,
                watermark,
                idle,
                moved_at,
                origin,
                totals,
                skew_s,
                deque(unpack_singles(waiting)),
            )
        self._parts = {}
        for name, packed in found.parts:
            partial = unpack_partial(packed)
            self._parts.setdefault(partial.number, {})[name] = partial
        self._merged, self._closed_before = found.merged, found.closed_before
        self._now, self._received_at, self._closed = found.now, found.received_at, found.closed
        self.totals = Counter(found.totals)
        self.late, self.stale, self.missed = found.late, found.stale, found.missed
        self._windows.restore(found.windows)
        self.halts = found.halts
        for name, until in found.still.items():
            self._sources[name].still = until
        for name, pieces in found.pieces.items():
            self._sources[name].pieces = pieces
        self._fed_at, self._moving_s, self._beats = found.fed_at, found.moving_s, found.beats


def _order(item: tuple[float, str, Window | Event]) -> tuple[float, str]:
    return item[0], item[1]


_PackedSource: TypeAlias = tuple[
    str, int, float, float, bool, float, int, dict[str, int], dict[str, float], PackedSingles
]


class _State(msgspec.Struct, array_like=True, frozen=True):
    sources: list[_PackedSource]
    parts: list[tuple[str, PackedPartial]]
    merged: dict[int, dict[str, tuple[int, int, int]]]
    closed_before: int | None
    now: float
    received_at: float | None
    closed: int
    totals: dict[str, int]
    late: int
    stale: int
    missed: int
    windows: bytes
    halts: dict[str, Halt] = {}
    still: dict[str, float] = {}
    fed_at: float = -math.inf
    moving_s: float = 0.0
    beats: bool = False
    pieces: dict[str, dict[int, list[Piece]]] = {}


__all__ = ["STALL_S", "Merged", "Merger"]
