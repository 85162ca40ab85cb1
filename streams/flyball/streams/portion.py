"""What one source partition said since its last portion, as one envelope: the value of a record of `flyball.windows`.

A portion holds the partial windows that closed, the events that something behind windows wants one by one, and how far the source has come.
Portions may come twice, and again with other borders; `merging.Merger` takes each event and each window of them once.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from flyball.core.codec import SnapshotError, decode_events, encode_events, pack_state, unpack_state
from flyball.core.columns import BASE_LABELS, SUMS, Histogram, Rollup, Window
from flyball.core.errors import FlyballError
from flyball.core.events import Event
from flyball.streams.cells import CLASS_BITS, CLASS_MASK, FIELDS, HISTOGRAMS, N_CLASSES
from flyball.streams.histogram import BUCKETS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flyball.core.columns import Ints

_KIND: Final = "portion"
_VERSION: Final = 1
_SANE_S: Final = 1e11


class PortionError(FlyballError):
    """Bytes that are no portion, or one of a version that this one does not read."""


class Partial(msgspec.Struct, frozen=True):
    """One window of one source, cells only.

    It replaces an earlier one of the same source and number when it covers at least as much: `first` and `last` are the offsets of the
    first and the last record that the window has a call of.
    """

    number: int
    """Of the window: it starts at `number * window_s`."""
    first: int
    last: int
    window: Window

    @property
    def calls(self) -> int:
        return int(self.window.cells.calls.sum())

    def covers(self, other: Partial) -> bool:
        """Whether nothing of `other` would be missing."""
        return self.first <= other.first and self.last >= other.last


class Single(msgspec.Struct, frozen=True, array_like=True):
    """An event that is wanted by itself.

    `key`: the newest event time of the source when it came; single events of all sources are put in this order.
    """

    key: float
    offset: int
    event: Event


class Halt(msgspec.Struct, frozen=True, array_like=True):
    """Why a source stands: too much of what came could not be taken. It keeps its place, and is tried again.

    Args:
        at: when it came to stand, as the records' times of arrival say.
        offset: the record that it stands at.
        reason: the most frequent reason for what could not be taken.
        bad: how many could not be taken, of the `of` newest.
        limit: the share of them that is bearable.
    """

    at: float
    offset: int
    reason: str
    bad: int
    of: int
    limit: float

    @property
    def share(self) -> float:
        return self.bad / self.of if self.of else 1.0


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Some bytes of a portion that is too large for a record: piece `number` of `of`."""

    number: int
    of: int
    crc: int
    """Of all its bytes: pieces of another portion do not fit."""
    data: bytes


class Portion(msgspec.Struct, frozen=True, kw_only=True):
    """What a source said in the records `first` to `last`; `last < first` when only time has passed.

    `watermark`: windows of the source that end up to here are closed and were told. `newest`: its newest event time, corrected. Both are
    -inf before its first event. `idle`: it has nothing more for now, and nobody needs to wait for it. `origin`: offset from which `totals` count.
    `received_at`: newest time of arrival of a record, None where that is not known.
    """

    source: str
    first: int
    last: int
    origin: int = 0
    newest: float = -math.inf
    watermark: float = -math.inf
    idle: bool = False
    received_at: float | None = None
    partials: Sequence[Partial] = ()
    singles: Sequence[Single] = ()
    totals: Mapping[str, int] = {}
    """Events by type, and what the counters of windows and of the deduplicator say, all since `origin`."""
    skew_s: Mapping[str, float] = {}
    """Senders whose clock is off."""
    sources: Sequence[str] = ()
    """All sources that a portion is to be expected of; told by whoever has just taken this one on."""
    halt: Halt | None = None
    """Told in every portion while the source stands, until it has been seen to go well again."""
    still: Mapping[str, float] | None = None
    """Told once a second by whoever is at work, however little there is to say: its idle sources, and until when (seconds since the epoch)
    a broker has confirmed that nothing more came in each. None in all other portions."""
    piece: Piece | None = None
    """Then this says nothing else, and the portion counts once all its pieces have come, in order."""


def encode_in_pieces(portion: Portion, most_bytes: int) -> list[bytes]:
    """One portion as records, each with little more than `most_bytes`: a window of 100,000 cells has 20 MB."""
    whole = encode_portion(portion)
    if len(whole) <= most_bytes:
        return [whole]
    datas = [whole[i : i + most_bytes] for i in range(0, len(whole), most_bytes)]
    crc = zlib.crc32(whole)
    p = portion
    return [
        encode_portion(
            Portion(
                source=p.source, first=p.first, last=p.last, idle=p.idle, received_at=p.received_at, piece=Piece(k, len(datas), crc, data)
            )
        )
        for k, data in enumerate(datas)
    ]  # fmt: skip


def put_together(pieces: Sequence[Piece]) -> Portion:
    """The portion that all its pieces, in order, are of. Raises: PortionError where they do not fit."""
    whole = b"".join(piece.data for piece in pieces)
    if zlib.crc32(whole) != pieces[0].crc:
        raise PortionError("the pieces of a portion do not fit together")
    return decode_portion(whole)


def encode_portion(portion: Portion) -> bytes:
    """One portion as bytes: about 100 bytes a cell and 150 a single event before compression."""
    p = portion
    return pack_state(
        _KIND, _VERSION,
        (
            p.source, p.first, p.last, p.origin, p.newest, p.watermark, p.idle, p.received_at,
            [pack_partial(x) for x in p.partials], pack_singles(p.singles), p.totals, p.skew_s, list(p.sources),
            p.halt, p.still, p.piece,
        ),
    )  # fmt: skip


def decode_portion(data: bytes) -> Portion:
    """The inverse of `encode_portion`.

    Raises: PortionError when the bytes are damaged, or of another version.
    """
    try:
        raw = unpack_state(data, _KIND, _VERSION, _Wire)
        return Portion(
            source=raw.source, first=raw.first, last=raw.last, origin=raw.origin, newest=raw.newest, watermark=raw.watermark,
            idle=raw.idle, received_at=raw.received_at, partials=[unpack_partial(x) for x in raw.partials],
            singles=unpack_singles(raw.singles), totals=raw.totals, skew_s=raw.skew_s, sources=raw.sources, halt=raw.halt,
            still=raw.still, piece=raw.piece,
        )  # fmt: skip
    except (SnapshotError, msgspec.DecodeError, ValueError, IndexError) as e:
        raise PortionError(f"not a portion that this version reads: {e}") from e


class PackedCells(msgspec.Struct, array_like=True, frozen=True):
    """The cells of a window as they travel: little-endian columns; strings once each."""

    start: float
    end: float
    live: bool
    values: list[str]
    labels: bytes
    """uint32[n, len(BASE_LABELS)]: positions in `values`."""
    classes: bytes
    """uint32: `row << CLASS_BITS | class`, ascending."""
    calls: bytes
    """uint32, of `classes`."""
    sums: list[bytes]
    """float64[n] each, in the order of SUMS; empty where zero throughout."""
    counts: list[bytes]
    """uint32[n] each, in the order of FIELDS; empty where zero throughout."""
    histograms: list[tuple[bytes, bytes, bytes]]
    """uint32 rows, uint8 buckets, uint32 counts, in the order of HISTOGRAMS."""
    samples: list[tuple[int, list[str]]]
    """Of `row << CLASS_BITS | class`."""


class PackedPartial(msgspec.Struct, array_like=True, frozen=True):
    number: int
    first: int
    last: int
    cells: PackedCells


PackedSingles = tuple[bytes, bytes, bytes]


class _Wire(msgspec.Struct, array_like=True, frozen=True):
    source: str
    first: int
    last: int
    origin: int
    newest: float
    watermark: float
    idle: bool
    received_at: float | None
    partials: list[PackedPartial]
    singles: PackedSingles
    totals: dict[str, int]
    skew_s: dict[str, float]
    sources: list[str]
    halt: Halt | None = None
    still: dict[str, float] | None = None
    piece: Piece | None = None


def pack_singles(singles: Sequence[Single]) -> PackedSingles:
    """Single events as (keys, offsets, events)."""
    keys = np.array([s.key for s in singles], "<f8").tobytes()
    offsets = np.array([s.offset for s in singles], "<i8").tobytes()
    return keys, offsets, encode_events([s.event for s in singles])


def unpack_singles(packed: PackedSingles) -> list[Single]:
    """The inverse of `pack_singles`. Raises: ValueError, msgspec.DecodeError."""
    keys, offsets, events = packed
    return [
        Single(k, o, e)
        for k, o, e in zip(
            np.frombuffer(keys, "<f8").tolist(),
            np.frombuffer(offsets, "<i8").tolist(),
            decode_events(events),
            strict=True,
        )
    ]


def pack_partial(partial: Partial) -> PackedPartial:
    """A partial window as plain values and bytes."""
    return PackedPartial(partial.number, partial.first, partial.last, _pack_cells(partial.window))


def unpack_partial(packed: PackedPartial) -> Partial:
    """The inverse of `pack_partial`. Raises: ValueError or IndexError when columns do not fit together."""
    return Partial(packed.number, packed.first, packed.last, _unpack_cells(packed.cells))


def _pack_cells(window: Window) -> PackedCells:
    cells = window.cells
    ids = cells.ids.tolist()
    position: dict[str, int] = {}
    labels = [position.setdefault(v, len(position)) for i in ids for v in cells.labels[i]]
    row, klass = np.nonzero(cells.by_class)
    row_of = {slot: r for r, slot in enumerate(ids)}
    return PackedCells(
        start=window.start, end=window.end, live=window.live, values=list(position),
        labels=np.array(labels, "<u4").tobytes(), classes=(row << CLASS_BITS | klass).astype("<u4").tobytes(),
        calls=cells.by_class[row, klass].astype("<u4").tobytes(),
        sums=[_column(cells.sums[name], "<f8") for name in SUMS], counts=[_column(cells.counts[name], "<u4") for name in FIELDS],
        histograms=[
            (h.rows.astype("<u4").tobytes(), h.buckets.astype("u1").tobytes(), h.counts.astype("<u4").tobytes())
            for h in (cells.histograms[name] for name in HISTOGRAMS)
        ],
        samples=[(row_of[slot] << CLASS_BITS | k, list(told)) for (slot, k), told in window.samples.items()],
    )  # fmt: skip


def _column(column: NDArray[Any], kind: str) -> bytes:
    return column.astype(kind).tobytes() if column.any() else b""


def _unpack_cells(packed: PackedCells) -> Window:
    if not (abs(packed.start) < _SANE_S and packed.start < packed.end < _SANE_S):
        raise ValueError(f"{packed.start!r} to {packed.end!r} is no window")
    width = len(BASE_LABELS)
    rows = np.frombuffer(packed.labels, "<u4").reshape(-1, width).tolist()
    values = packed.values
    n = len(rows)
    codes = _ints(packed.classes, "<u4", packed.calls, n << CLASS_BITS)
    by_class = np.zeros((n, N_CLASSES), np.int64)
    by_class[codes >> CLASS_BITS, codes & CLASS_MASK] = np.frombuffer(packed.calls, "<u4")
    nothing = np.zeros(n, np.int64)
    cells = Rollup(
        by=BASE_LABELS, ids=np.arange(n), capacity=n, born=np.full(n, packed.start), calls=by_class.sum(axis=1), by_class=by_class,
        labels=[tuple(values[i] for i in row) for row in rows],
        tenants=nothing, failing_tenants=np.zeros((n, N_CLASSES), np.int64),
        sums={name: _read(raw, "<f8", n).astype(np.float64) for name, raw in zip(SUMS, packed.sums, strict=True)},
        counts={name: _read(raw, "<u4", n).astype(np.int64) for name, raw in zip(FIELDS, packed.counts, strict=True)},
        histograms={name: _histogram(parts, n) for name, parts in zip(HISTOGRAMS, packed.histograms, strict=True)},
    )  # fmt: skip
    samples = {(code >> CLASS_BITS, code & CLASS_MASK): tuple(told) for code, told in packed.samples}
    if any(not 0 <= row < n for row, _ in samples):
        raise ValueError("samples of cells that are not there")
    return Window(packed.start, packed.end, cells, {}, samples, packed.live)


def _read(raw: bytes, kind: str, n: int) -> NDArray[Any]:
    column = np.frombuffer(raw, kind) if raw else np.zeros(n, kind)
    if len(column) != n:
        raise ValueError(f"a column of {len(column)} rows, {n} wanted")
    return column


def _ints(raw: bytes, kind: str, beside: bytes, below: int) -> Ints:
    """int64: a column that goes with `beside` (uint32), all of it less than `below`."""
    column = np.frombuffer(raw, kind).astype(np.int64)
    if len(column) * 4 != len(beside) or (len(column) and int(column.max()) >= below):
        raise ValueError("columns that do not fit together")
    return column


def _histogram(parts: tuple[bytes, bytes, bytes], n: int) -> Histogram:
    rows, buckets, counts = parts
    return Histogram(
        _ints(rows, "<u4", counts, n),
        _ints(buckets, "u1", counts, BUCKETS),
        np.frombuffer(counts, "<u4").astype(np.int64),
    )


__all__ = [
    "Halt",
    "PackedPartial",
    "PackedSingles",
    "Partial",
    "Piece",
    "Portion",
    "PortionError",
    "Single",
    "decode_portion",
    "encode_in_pieces",
    "encode_portion",
    "pack_partial",
    "pack_singles",
    "put_together",
    "unpack_partial",
    "unpack_singles",
]
