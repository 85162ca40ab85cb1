"""Cells: the finest series that windows tell apart, and the sums of one open window over them.

This is the hot path: about 0.8 µs a call, of which nearly all is reading fields out of structs. What was measured and decided
(512 calls a chunk, 10 labels of which 8 are set; ns a call):

- list comprehensions read fields at 20 a field and 80 for a tuple of ten; `map(attrgetter(...))` needs 220 for the tuple.
- a dict of tuples costs 700 (hashing is cheap, comparing ten cold strings is not), of joined strings 470–550, of the tuple's
  64-bit hash 450; looking the hashes of a chunk up in arrays 340, and that does not grow with the cells. Two keys of a full
  table share a hash once in 10**9 tables.
- `np.fromiter` converts lists with None in them to nan at 25; `array` and `struct` are no quicker.
- `np.add.at` needs 2 a row and sums in order of arrival, so that no sum depends on where chunks end.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from flyball.core.columns import BASE_LABELS, COUNTED, SUMS
from flyball.core.errorclass import CLASS_INDEX, CLASSES
from flyball.core.events import LlmCall
from flyball.streams.histogram import BUCKET_BITS, HistogramSums, buckets_of_logs

if TYPE_CHECKING:
    from flyball.core.columns import Floats, Ints

Labels: TypeAlias = tuple[str, ...]

N_CLASSES: Final = len(CLASSES)
CLASS_BITS: Final = (N_CLASSES - 1).bit_length()
CLASS_MASK: Final = (1 << CLASS_BITS) - 1
UNKNOWN: Final = CLASS_INDEX["unknown"]

FIELDS: Final[tuple[str, ...]] = tuple(dict.fromkeys(COUNTED.values()))
"""Numeric fields of a call, in the order of the columns of `NumberReader` and of the rows of `CellSums.counts`."""
HISTOGRAMS: Final = ("latency_s", "ttft_s")
OTHER: Final = "other"
_COARSE: Final = frozenset({"provider", "model", "region", "app"})
"""Labels that an `other` cell keeps; the rest is where labels explode."""
_SUM_ROW: Final = {name: i for i, name in enumerate(SUMS)}
_LOGGED: Final = tuple(
    (f, _SUM_ROW[f"log_{f}"], _SUM_ROW[f"log2_{f}"]) for f in FIELDS if f"log_{f}" in _SUM_ROW
)
_NEED_LOG: Final = frozenset({*HISTOGRAMS, *(name for name, _, _ in _LOGGED)})
_FIRST_CAPACITY: Final = 1024
_KNOCKS: Final = 3
_WHOLE_NUMBERS: Final = 4
"""So many of FIELDS, the first ones, count tokens."""
_TRY_AGAIN: Final = 1024
"""Chunks after which columns that lacked values are taken for whole again."""


def labels_of(call: LlmCall) -> Labels:
    """The labels of a call's cell, in the order of BASE_LABELS."""
    return (
        call.provider, call.model or call.model_served, call.deployment, call.region, call.app, call.prompt,
        call.team, call.tenant, call.agent,
    )  # fmt: skip


def _hashes(calls: Sequence[LlmCall]) -> list[int]:
    """Hash of (labels, error) of each call. Spelled out, because a call per event would double its cost."""
    return [
        hash((
            c.provider, c.model or c.model_served, c.deployment, c.region, c.app, c.prompt,
            c.team, c.tenant, c.agent, c.error,
        ))
        for c in calls
    ]  # fmt: skip


class NumberReader:
    """Reads the numbers of calls into columns.

    Remembers which columns were told by every call lately: these are packed at a third of the cost of a conversion
    that looks for None. What comes out does not depend on that.
    """

    def __init__(self) -> None:
        self._whole = [True] * len(FIELDS)
        self._chunks = 0

    def read(self, calls: Sequence[LlmCall]) -> list[Floats | None]:
        """Columns of FIELDS, nan where a call did not say; None where no call of the chunk did."""
        self._chunks += 1
        if self._chunks % _TRY_AGAIN == 0:
            self._whole = [True] * len(FIELDS)
        n = len(calls)
        whole = self._whole
        columns: list[Floats | None] = []
        for i, raw in enumerate(_raw_numbers(calls)):
            # Comparing with None is slow on numbers and quick on None: only a column that starts with None is looked through.
            if raw[0] is None and raw.count(None) == n:
                columns.append(None)
                continue
            if whole[i]:
                try:
                    columns.append(floats(raw) if i >= _WHOLE_NUMBERS else _ints(raw))
                except struct.error:
                    whole[i] = False
                else:
                    continue
            columns.append(np.fromiter(raw, np.float64, n))
        return columns


def floats(values: Sequence[float]) -> Floats:
    """float64[n], read-only; a third of the time of `np.fromiter`. Raises: struct.error where one is no number."""
    return np.frombuffer(struct.pack(f"{len(values)}d", *values))


def _ints(values: Sequence[int]) -> Floats:
    return np.frombuffer(struct.pack(f"{len(values)}q", *values), np.int64).astype(np.float64)


def _raw_numbers(calls: Sequence[LlmCall]) -> tuple[list[Any], ...]:
    return (
        [c.input_tokens for c in calls],
        [c.output_tokens for c in calls],
        [c.cache_read_tokens for c in calls],
        [c.reasoning_tokens for c in calls],
        [c.cost_usd for c in calls],
        [c.latency_s for c in calls],
        [c.ttft_s for c in calls],
    )


class CodeOfHash:
    """What calls of a hash count towards: `slot << CLASS_BITS | class`, for many hashes at once.

    An open-addressing table in two arrays: numpy reads a whole chunk's entries at once and the misses of the cache overlap, where a
    dict waits for four of them, one after the other, for each call.
    """

    def __init__(self, keys: Ints | None = None, codes: Ints | None = None) -> None:
        n = 0 if keys is None else len(keys)
        self._size = 1 << max(12, (4 * n).bit_length() + 1)
        self._mask = self._size - 1
        self._keys: Ints = np.zeros(self._size, np.int64)
        self._codes: Ints = np.full(self._size, -1, np.int64)
        self._n = n
        if keys is not None and codes is not None:
            self._fill(keys, codes)

    def __len__(self) -> int:
        return self._n

    def find(self, keys: Ints) -> Ints:
        """int64[len(keys)]: the code of each hash, -1 where there is none."""
        at = keys & self._mask
        codes: Ints = self._codes.take(at)
        wrong = np.flatnonzero((self._keys.take(at) != keys) & (codes >= 0))
        while len(wrong):
            at = (at if len(at) == len(wrong) else at[wrong]) + 1 & self._mask
            keys = keys if len(keys) == len(wrong) else keys[wrong]
            there = self._codes.take(at)
            codes[wrong] = there
            still = np.flatnonzero((self._keys.take(at) != keys) & (there >= 0))
            at, keys, wrong = at.take(still), keys.take(still), wrong.take(still)
        return codes

    def put(self, key: int, code: int) -> None:
        """Add a hash that is not there."""
        if 4 * self._n >= self._size:
            twice = CodeOfHash(*self.items())
            self._size, self._mask, self._keys, self._codes = (
                twice._size,
                twice._mask,
                twice._keys,
                twice._codes,
            )
        at = key & self._mask
        while self._codes[at] >= 0:
            at = at + 1 & self._mask
        self._keys[at], self._codes[at] = key, code
        self._n += 1

    def items(self) -> tuple[Ints, Ints]:
        """All hashes and their codes."""
        used = np.flatnonzero(self._codes >= 0)
        return self._keys[used], self._codes[used]

    def _fill(self, keys: Ints, codes: Ints) -> None:
        at = keys & self._mask
        while len(keys):
            free = self._codes[at] < 0
            _, first = np.unique(at, return_index=True)
            placed = np.zeros(len(keys), np.bool_)
            placed[first] = True
            placed &= free
            self._keys[at[placed]], self._codes[at[placed]] = keys[placed], codes[placed]
            keys, codes, at = keys[~placed], codes[~placed], at[~placed] + 1 & self._mask


class CellTable:
    """Which labels have which slot; never more than `max_cells` slots.

    A few slots are kept back for `other` cells, which take the calls of new labels once the table is full: they keep provider, model,
    region and app and say "other" for the rest; if even these explode, one cell with "other" everywhere. Distinct tenants
    within an `other` cell count as one. The last tenth of the table is for labels that come back: they get a slot at about
    their third call, so that a flood of labels seen once cannot keep real newcomers out.
    """

    def __init__(self, max_cells: int) -> None:
        self.max_cells = max_cells
        self._reserve = max(1, min(1024, max_cells // 10))
        self._kept_free = (max_cells - self._reserve) // 10
        self.labels: list[Labels] = []
        self.capacity = 0
        self.born: Floats = np.empty(0)
        """Start of the first window in which the slot's present series was seen; nan until that window closes."""
        self.activity: Floats = np.empty(0)
        """Calls, halved at every close: how much was heard of the slot lately. -1: the slot is free."""
        self.is_other = np.empty(0, np.bool_)
        self.changed: list[int] = []
        """Slots that got a series since the caller last cleared this."""
        self.overflowed = 0
        self._overflowed_before = 0
        self._slot_of: dict[Labels, int] = {}
        self._others: dict[Labels, int] = {}
        self._free: list[int] = []
        self._values: dict[str, str] = {}
        self._knocks = bytearray(1 << (8 * max_cells - 1).bit_length())
        self._knocked = 0
        self._codes = CodeOfHash()
        self._grow(min(_FIRST_CAPACITY, max_cells))

    def __len__(self) -> int:
        return len(self.labels) - len(self._free)

    def codes(self, calls: Sequence[LlmCall]) -> Ints:
        """int64[len(calls)]: `slot << CLASS_BITS | class` of every call; new labels get a slot."""
        hashes = np.fromiter(_hashes(calls), np.int64, len(calls))
        codes = self._codes.find(hashes)
        if len(codes) and codes.min() < 0:
            learned: dict[int, int] = {}
            for i in np.flatnonzero(codes < 0).tolist():
                codes[i] = self._learn(int(hashes[i]), calls[i], learned)
        if self._others:
            self.overflowed += int(self.is_other[codes >> CLASS_BITS].sum())
        return codes

    def slots(self, labels: Iterable[Labels], calls: Iterable[int]) -> Ints:
        """int64: slots of label tuples (of windows to be merged) with so many calls each; new ones get a slot."""
        slots = np.array([self._slot(x, n) for x, n in zip(labels, calls, strict=True)], np.int64)
        if self._others:
            self.overflowed += int(self.is_other[slots].sum())
        return slots

    def _learn(self, key: int, call: LlmCall, learned: dict[int, int]) -> int:
        """Code of a call that is not in the table of hashes; `learned` is what this chunk added to it."""
        code = learned.get(key)
        if code is None:
            slot = self._slot(labels_of(call), 1)
            code = slot << CLASS_BITS | CLASS_INDEX.get(call.error, UNKNOWN)
            if self.is_other[slot] and self._room() > 0:
                return code  # not remembered: its next call has to be seen here, to knock again
            if len(self._codes) >= 4 * self.max_cells + 65_536:
                # Made-up error words, or labels beyond the limit; what is in use comes back at once.
                self._codes = CodeOfHash()
            self._codes.put(key, code)
            learned[key] = code
        return code

    def _room(self) -> int:
        return self.max_cells - self._reserve - (len(self) - len(self._others))

    def _slot(self, labels: Labels, calls: int) -> int:
        slot = self._slot_of.get(labels)
        if slot is None:
            room = self._room()
            if room > self._kept_free or (room > 0 and self._knock(labels, calls)):
                return self._take(labels)
            return self._other(labels)
        return slot

    def _knock(self, labels: Labels, calls: int) -> bool:
        """Whether labels without a slot have been heard often enough to get one of the last.

        Counted in a sketch of bytes that is halved as it fills (as TinyLFU does), because the labels themselves may be millions.
        """
        at = zlib.crc32("\x1f".join(labels).encode()) & (len(self._knocks) - 1)
        heard = min(255, self._knocks[at] + calls)
        self._knocks[at] = heard
        self._knocked += 1
        if self._knocked > len(self._knocks) // 8:  # so few that strangers rarely share a byte
            self._age_knocks()
        return heard >= _KNOCKS

    def _age_knocks(self) -> None:
        halved = np.frombuffer(self._knocks, np.uint8) >> 1
        self._knocks, self._knocked = bytearray(halved.tobytes()), 0

    def _other(self, labels: Labels) -> int:
        kept = tuple(v if k in _COARSE or not v else OTHER for k, v in zip(BASE_LABELS, labels, strict=True))
        if kept not in self._others and len(self._others) >= self._reserve - 1:
            kept = (OTHER,) * len(BASE_LABELS)
        slot = self._others.get(kept)
        if slot is None:
            slot = self._slot_of.get(kept)
            if slot is None:
                slot = self._take(kept)
            self._others[kept] = slot
            self.is_other[slot] = True
        return slot

    def _take(self, labels: Labels) -> int:
        # Every call brings strings of its own; cells that share a value shall share the string.
        if len(self._values) > 4 * self.max_cells:
            self._values.clear()
        labels = tuple(map(self._values.setdefault, labels, labels))
        if self._free:
            slot = self._free.pop()
            self.labels[slot] = labels
        else:
            slot = len(self.labels)
            if slot >= self.capacity:
                self._grow(min(2 * self.capacity, self.max_cells))
            self.labels.append(labels)
        self._slot_of[labels] = slot
        self.born[slot] = np.nan
        self.activity[slot] = 0.0
        self.is_other[slot] = False
        self.changed.append(slot)
        return slot

    def _grow(self, capacity: int) -> None:
        more = capacity - self.capacity
        self.born = np.append(self.born, np.full(more, np.nan))
        self.activity = np.append(self.activity, np.full(more, -1.0))
        self.is_other = np.append(self.is_other, np.zeros(more, np.bool_))
        self.capacity = capacity

    def heard(self, slots: Ints, calls: Ints, start: float) -> None:
        """A window that began at `start` closes, with so many calls in these slots."""
        used = self.activity[: len(self.labels)]
        np.multiply(used, 0.5, out=used, where=used > 0)
        self.activity[slots] += calls
        unborn = slots[np.isnan(self.born[slots])]
        self.born[unborn] = start

    def wants_room(self) -> bool:
        """Whether the table is so full that `make_room` should be called."""
        return self.pressed or len(self) > 0.9 * self.max_cells

    @property
    def pressed(self) -> bool:
        """Whether calls went to an `other` cell since room was last made."""
        return self.overflowed > self._overflowed_before

    def make_room(self, busy: Ints) -> Ints:
        """Free the slots of the rarest series, so that newcomers get cells of their own. Returns the freed slots.

        A tenth of the table is to be free. While newcomers have to go to `other`, those with the fewest calls lately make room; else
        only what has been silent for so long that its activity has faded (a dozen windows).

        Args:
            busy: slots in use by open windows; they stay.
        """
        wanted = max(1, self._kept_free) - self._room()
        self._age_knocks()
        may_go = (self.activity >= 0) & ~self.is_other
        if not self.pressed:
            may_go &= self.activity < 1 / 4096
        may_go[busy] = False
        freed = np.flatnonzero(may_go)
        order = np.argsort(self.activity[freed], kind="stable")
        freed = np.sort(freed[order[: max(0, wanted)]])
        self._overflowed_before = self.overflowed
        self._release(freed)
        return freed

    def _release(self, freed: Ints) -> None:
        if not len(freed):
            return
        # Closed windows still read the old list.
        self.labels = list(self.labels)
        for slot in freed.tolist():
            del self._slot_of[self.labels[slot]]
            self.labels[slot] = ()
        self.activity[freed] = -1.0
        self._free.extend(reversed(freed.tolist()))
        gone = np.zeros(self.capacity, np.bool_)
        gone[freed] = True
        gone |= self.is_other  # labels that overflowed may now get a cell of their own
        keys, codes = self._codes.items()
        kept = ~gone[codes >> CLASS_BITS]
        self._codes = CodeOfHash(keys[kept], codes[kept])

    def state(self) -> tuple[Any, ...]:
        """What `restore` needs. Hashes are not part of it: they differ from process to process."""
        n = len(self.labels)
        others = list(self._others.values())
        columns = (self.born[:n].tobytes(), self.activity[:n].tobytes())
        return (
            self.labels,
            self._free,
            others,
            columns,
            self.changed,
            self.overflowed,
            self._overflowed_before,
            self.capacity,
            (bytes(self._knocks) if np.frombuffer(self._knocks, np.uint8).any() else b"", self._knocked),
        )

    def restore(self, state: tuple[Any, ...]) -> None:
        (
            labels,
            self._free,
            others,
            columns,
            self.changed,
            self.overflowed,
            self._overflowed_before,
            capacity,
            knocks,
        ) = state
        told, self._knocked = knocks
        self._knocks = bytearray(told or len(self._knocks))
        self._values = {}
        self.labels = [tuple(map(self._values.setdefault, x, x)) for x in labels]
        self.capacity = 0
        self.born, self.activity, self.is_other = np.empty(0), np.empty(0), np.empty(0, np.bool_)
        self._grow(capacity)
        n = len(self.labels)
        self.born[:n], self.activity[:n] = (np.frombuffer(c) for c in columns)
        self.is_other[others] = True
        self._others = {self.labels[slot]: slot for slot in others}
        self._slot_of = {x: slot for slot, x in enumerate(self.labels) if x}
        self._codes = CodeOfHash()


class CellSums:
    """Sums of one open window over all cells.

    `by_class`: int64[capacity << CLASS_BITS], calls by code. `sums`: float64[len(SUMS), capacity]. `counts`: int64[len(FIELDS), capacity].
    """

    def __init__(self) -> None:
        self.capacity = 0
        self.by_class: Ints = np.zeros(0, np.int64)
        self.sums: Floats = np.zeros((len(SUMS), 0))
        self.counts: Ints = np.zeros((len(FIELDS), 0), np.int64)
        self.histograms = {name: HistogramSums() for name in HISTOGRAMS}

    def fit(self, capacity: int) -> None:
        more = capacity - self.capacity
        if more > 0:
            self.by_class = np.append(self.by_class, np.zeros(more << CLASS_BITS, np.int64))
            self.sums = np.append(self.sums, np.zeros((len(SUMS), more)), axis=1)
            self.counts = np.append(self.counts, np.zeros((len(FIELDS), more), np.int64), axis=1)
            self.capacity = capacity

    def add(self, codes: Ints, numbers: Sequence[Floats | None]) -> None:
        """Add calls; `numbers` as of `NumberReader`."""
        np.add.at(self.by_class, codes, 1)
        slots = codes >> CLASS_BITS
        calls = np.bincount(slots, minlength=self.capacity)
        columns = dict(zip(FIELDS, numbers, strict=True))
        for row, (name, column) in enumerate(columns.items()):
            if column is None:
                continue
            which = _told(column)
            if which is None:
                np.add.at(self.sums[_SUM_ROW[name]], slots, column)
                self.counts[row] += calls
            else:
                where = slots.take(which)
                np.add.at(self.sums[_SUM_ROW[name]], where, column.take(which))
                self.counts[row] += np.bincount(where, minlength=self.capacity)
        logs = {
            name: _log(column) for name, column in columns.items() if column is not None and name in _NEED_LOG
        }
        for name, log_row, log2_row in _LOGGED:
            if name in logs:
                log, where = logs[name], slots
                positive = log > -np.inf  # False for nan too: not told, or zero
                if not positive.all():
                    which = np.flatnonzero(positive)
                    log, where = log.take(which), slots.take(which)
                np.add.at(self.sums[log_row], where, log)
                np.add.at(self.sums[log2_row], where, log * log)
        self._add_histograms(codes, logs)

    def _add_histograms(self, codes: Ints, logs: dict[str, Floats]) -> None:
        succeeded = (codes & CLASS_MASK) == 0
        shifted = ((codes >> CLASS_BITS) << BUCKET_BITS).astype(np.int32)
        for name in HISTOGRAMS:
            if name in logs:
                log, where = logs[name], shifted
                counted = succeeded & ~np.isnan(log)
                if not counted.all():
                    which = np.flatnonzero(counted)
                    log, where = log.take(which), shifted.take(which)
                self.histograms[name].add(where | buckets_of_logs(log))

    def active(self) -> Ints:
        """Slots with at least one call, ascending."""
        return np.flatnonzero(self.by_class.reshape(-1, 1 << CLASS_BITS).any(axis=1))

    def state(self) -> tuple[Any, ...]:
        """What `restored` needs: the active slots only, and of each error class and sum only what is not zero throughout."""
        slots = self.active()
        by_class = np.flatnonzero(self.by_class)
        return (
            self.capacity, slots.astype(np.int32).tobytes(),
            by_class.astype(np.int32).tobytes(), self.by_class[by_class].tobytes(),
            [row[slots].tobytes() if row.any() else b"" for row in self.sums],
            [row[slots].tobytes() if row.any() else b"" for row in self.counts],
            [[part.tobytes() for part in self.histograms[name].joined()] for name in HISTOGRAMS],
        )  # fmt: skip

    @classmethod
    def restored(cls, state: tuple[Any, ...]) -> CellSums:
        capacity, slots_raw, codes_raw, calls, sums, counts, histograms = state
        new = cls()
        new.fit(capacity)
        slots = np.frombuffer(slots_raw, np.int32)
        new.by_class[np.frombuffer(codes_raw, np.int32)] = np.frombuffer(calls, np.int64)
        for row, raw in zip(new.sums, sums, strict=True):
            if raw:
                row[slots] = np.frombuffer(raw)
        for counts_row, raw in zip(new.counts, counts, strict=True):
            if raw:
                counts_row[slots] = np.frombuffer(raw, np.int64)
        for name, (codes, times) in zip(HISTOGRAMS, histograms, strict=True):
            new.histograms[name] = HistogramSums(
                np.frombuffer(codes, np.int64), np.frombuffer(times, np.int64)
            )
        return new


def _told(column: Floats) -> Ints | None:
    """Where a column has values; None where everywhere. Positions, because a boolean mask costs four times as much."""
    missing = np.isnan(column)
    return np.flatnonzero(~missing) if missing.any() else None


def _log(values: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        log: Floats = np.log(values)
    return log
