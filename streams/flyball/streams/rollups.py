"""From the cells of a closing window to its roll-ups: the cost per event does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from flyball.core.columns import BASE_LABELS, COUNTED, SUMS, Histogram, Rollup, Window
from flyball.streams.cells import CLASS_BITS, FIELDS, HISTOGRAMS, N_CLASSES, CellSums, CellTable, Labels
from flyball.streams.histogram import BUCKET_BITS, BUCKETS, count_codes, histogram_of_codes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flyball.core.columns import Floats, Ints

Samples: TypeAlias = Mapping[tuple[int, int], tuple[str, ...]]

DEFAULT_ROLLUPS: Final[tuple[Labels, ...]] = (
    (), ("provider",), ("provider", "model"), ("provider", "region"), ("provider", "tenant"), ("model",), ("deployment",), ("app",),
    ("app", "provider"), ("app", "model"), ("app", "prompt"), ("app", "agent"), ("team",), ("tenant",),
)  # fmt: skip

_UNRESOLVED: Final = -2
_NONE: Final = -1
_NOBODY: Final = 0
"""Code of calls that tell neither tenant nor team."""
_TEAM, _TENANT = BASE_LABELS.index("team"), BASE_LABELS.index("tenant")
_FIRST_CAPACITY: Final = 64
_TOGETHER: Final = 1 << 12
"""So many (roll-up, cell) pairs are summed at once: more would not be in the cache."""


class GroupTable:
    """Stable slots of the series of one roll-up; as many as cells at most.

    A series silent for a day gives its slot up, and earlier when the table is full.
    """

    def __init__(self, by: Labels, max_groups: int) -> None:
        self.by = by
        self.max_groups = max_groups
        self._positions = [BASE_LABELS.index(name) for name in by]
        self.labels: list[Labels] = []
        self.capacity = min(_FIRST_CAPACITY, max_groups)
        self.born: Floats = np.full(self.capacity, np.nan)
        self.heard: Floats = np.full(self.capacity, -np.inf)
        """Start of the last window with data; -inf: the slot is free."""
        self._slot_of: dict[Labels, int] = {}
        self._free: list[int] = []

    def resolve(self, cells: Iterable[Labels], start: float) -> list[int]:
        """Slot of the series of each cell, _NONE where the cell lacks a label. New series are born at `start`."""
        if not self.by:
            return [self._slot((), start) for _ in cells]
        columns = list(zip(*cells, strict=True))
        chosen = list(zip(*(columns[p] for p in self._positions), strict=True)) if columns else []
        found = list(map(self._slot_of.get, chosen))
        return [
            slot if slot is not None else self._slot(labels, start) if all(labels) else _NONE
            for slot, labels in zip(found, chosen, strict=True)
        ]

    def room(self) -> int:
        return self.max_groups - len(self.labels) + len(self._free)

    def _slot(self, labels: Labels, start: float) -> int:
        slot = self._slot_of.get(labels)
        if slot is None:
            if self._free:
                slot = self._free.pop()
                self.labels[slot] = labels
            else:
                slot = len(self.labels)
                if slot >= self.capacity:
                    self._grow(min(2 * self.capacity, self.max_groups))
                self.labels.append(labels)
            self._slot_of[labels] = slot
            self.born[slot] = self.heard[slot] = start
        return slot

    def _grow(self, capacity: int) -> None:
        more = capacity - self.capacity
        self.born = np.append(self.born, np.full(more, np.nan))
        self.heard = np.append(self.heard, np.full(more, -np.inf))
        self.capacity = capacity

    def forget(self, before: float, keep: Ints, at_least: int = 0) -> Ints:
        """Free slots last heard of before `before`, and the longest silent ones until `at_least` are free.

        Args:
            keep: slots that must stay.
        Returns: the freed slots.
        """
        may_go = self.heard > -np.inf
        may_go[keep] = False
        candidates = np.flatnonzero(may_go)
        order = candidates[np.argsort(self.heard[candidates], kind="stable")]
        n = max(int((self.heard[order] < before).sum()), min(len(order), at_least - self.room()))
        freed = np.sort(order[: max(0, n)])
        if len(freed):
            self.labels = list(self.labels)  # closed windows still read the old list
            for slot in freed.tolist():
                del self._slot_of[self.labels[slot]]
                self.labels[slot] = ()
            self.heard[freed] = -np.inf
            self._free.extend(reversed(freed.tolist()))
        return freed

    def state(self) -> tuple[Any, ...]:
        n = len(self.labels)
        return (self.labels, self._free, self.born[:n].tobytes(), self.heard[:n].tobytes(), self.capacity)

    def restore(self, state: tuple[Any, ...]) -> None:
        labels, self._free, born, heard, capacity = state
        self.labels = [tuple(x) for x in labels]
        self.born, self.heard, self.capacity = np.empty(0), np.empty(0), 0
        self._grow(capacity)
        n = len(self.labels)
        self.born[:n], self.heard[:n] = np.frombuffer(born), np.frombuffer(heard)
        # A freed slot holds the empty tuple, which is also the one series of the total: told apart by `heard`.
        self._slot_of = {x: slot for slot, x in enumerate(self.labels) if self.heard[slot] > -np.inf}


_Place: TypeAlias = "tuple[GroupTable, Ints, int]"
"""A roll-up's table, the slots of its rows, and its first row."""


class RollupBuilder:
    """Makes a `Window` of the sums of a closing window, and keeps the slots of every roll-up's series."""

    def __init__(self, rollups: Sequence[Labels], max_groups: int, forget_s: float) -> None:
        self.tables = [GroupTable(by, max_groups) for by in rollups]
        self.forget_s = forget_s
        self._groups: Ints = np.empty((len(self.tables), 0), np.int64)
        """[roll-up, cell slot]: the slot of the series that the cell belongs to."""
        self._who: Ints = np.empty(0, np.int64)
        """[cell slot]: code of the tenant (else team) of the cell."""
        self._who_of: dict[str, int] = {"": _NOBODY}

    def build(
        self, start: float, end: float, sums: CellSums, cells: CellTable, samples: Samples, live: bool
    ) -> Window:
        """Close a window. The cells' `born` must have been set."""
        self._forget_changed(cells)
        slots = sums.active()
        by_class = sums.by_class.reshape(-1, 1 << CLASS_BITS)[slots, :N_CLASSES]
        calls = by_class.sum(axis=1)
        row_of_slot = np.zeros(sums.capacity, np.int64)
        row_of_slot[slots] = np.arange(len(slots))
        fine: dict[str, Histogram] = {}
        for name in HISTOGRAMS:
            codes, counts = sums.histograms[name].joined()
            fine[name] = histogram_of_codes(
                row_of_slot[codes >> BUCKET_BITS] << BUCKET_BITS | codes & (BUCKETS - 1), counts
            )
        named = self._who[slots] != _NOBODY
        failing = np.minimum(by_class, named[:, None].astype(np.int64))
        failing[:, 0] = 0
        cell_rollup = Rollup(
            by=BASE_LABELS, ids=slots, capacity=cells.capacity, born=cells.born[slots], labels=cells.labels, calls=calls,
            by_class=by_class, tenants=named.astype(np.int64), failing_tenants=failing,
            sums={name: sums.sums[i, slots] for i, name in enumerate(SUMS)},
            counts={name: sums.counts[i, slots] for i, name in enumerate(FIELDS)}, histograms=fine,
        )  # fmt: skip
        self._resolve(slots, cells, start)
        fine_columns = _Fine(cell_rollup, self._who[slots])
        rollups: dict[Labels, Rollup] = {}
        together = max(1, _TOGETHER // max(1, len(slots)))
        for first in range(0, len(self.tables), together):
            some = range(first, min(first + together, len(self.tables)))
            rollups.update(self._coarse(some, cell_rollup, fine_columns, start))
        return Window(start=start, end=end, cells=cell_rollup, rollups=rollups, samples=samples, live=live)

    def _forget_changed(self, cells: CellTable) -> None:
        more = cells.capacity - self._groups.shape[1]
        if more > 0:
            fresh = np.full((len(self.tables), more), _UNRESOLVED, np.int64)
            self._groups = np.append(self._groups, fresh, axis=1)
            self._who = np.append(self._who, np.zeros(more, np.int64))
        if not cells.changed:
            return
        if len(self._who_of) > 2 * cells.capacity:
            self._who_of = {"": _NOBODY}
            cells.changed = [slot for slot, labels in enumerate(cells.labels) if labels]
        self._groups[:, cells.changed] = _UNRESOLVED
        codes, labels = self._who_of, cells.labels
        for slot in cells.changed:
            who = labels[slot][_TENANT] or labels[slot][_TEAM] if labels[slot] else ""
            self._who[slot] = codes.setdefault(who, len(codes))
        cells.changed = []

    def _resolve(self, slots: Ints, cells: CellTable, start: float) -> None:
        for i, table in enumerate(self.tables):
            groups = self._groups[i]
            unknown = slots[groups[slots] == _UNRESOLVED]
            if len(unknown) > table.room():
                used = groups[slots]
                self._drop(i, table.forget(start - self.forget_s, used[used >= 0], at_least=len(unknown)))
            if len(unknown):
                groups[unknown] = table.resolve([cells.labels[slot] for slot in unknown.tolist()], start)

    def _drop(self, i: int, freed: Ints) -> None:
        if len(freed):
            gone = np.zeros(self.tables[i].capacity + 1, np.bool_)  # the last stands for _NONE
            gone[freed] = True
            groups = self._groups[i]
            groups[gone[np.maximum(groups, _NONE)]] = _UNRESOLVED

    def forget_silent(self, now: float) -> None:
        """Give up the slots of series that were silent for `forget_s`."""
        for i, table in enumerate(self.tables):
            self._drop(i, table.forget(now - self.forget_s, np.empty(0, np.int64)))

    def _coarse(self, some: range, cells: Rollup, fine: _Fine, start: float) -> dict[Labels, Rollup]:
        """Several roll-ups at once, their rows one after the other: a numpy call costs more than it does with a few hundred cells."""
        places, rows, n = self._places(some, cells.ids, start)
        by_class = np.zeros((n, N_CLASSES), np.int64)
        for k, column in fine.classes.items():
            by_class[:, k] = _totals(rows, column, n)
        calls = by_class.sum(axis=1)
        nothing, none = _read_only(np.zeros(n)), _read_only(np.zeros(n, np.int64))
        sums = {name: _totals(rows, column, n) for name, column in fine.sums.items()}
        counts = {name: _totals(rows, column, n).astype(np.int64) for name, column in fine.counts.items()}
        tenants, failing = self._distinct(rows, n, fine)
        histograms = {name: _coarser(h, rows, places) for name, h in cells.histograms.items()}
        made: dict[Labels, Rollup] = {}
        for i, (table, ids, first) in enumerate(places):
            part = slice(first, first + len(ids))
            made[table.by] = Rollup(
                by=table.by, ids=ids, capacity=table.capacity, born=table.born[ids], labels=table.labels,
                calls=calls[part], by_class=by_class[part], tenants=tenants[part], failing_tenants=failing[part],
                sums={name: sums.get(name, nothing)[part] for name in cells.sums},
                counts={name: counts.get(name, none)[part] for name in cells.counts},
                histograms={name: several[i] for name, several in histograms.items()},
            )  # fmt: skip
        return made

    def _places(self, some: range, slots: Ints, start: float) -> tuple[list[_Place], Ints, int]:
        """Where the rows of some roll-ups are, the row of every cell in each of them, and how many rows there are.

        After the rows of each roll-up comes one that collects the cells that lack a label.
        """
        places: list[_Place] = []
        rows: Ints = np.empty((len(some), len(slots)), np.int64)
        first = 0
        for j, index in enumerate(some):
            table = self.tables[index]
            groups = self._groups[index].take(slots)
            present = np.zeros(table.capacity + 1, np.bool_)
            present[groups] = True
            present[_NONE] = False
            ids = present.nonzero()[0]
            table.heard[ids] = start
            n = len(ids)
            row_of_group = np.full(table.capacity + 1, first + n, np.int64)
            row_of_group[ids] = np.arange(first, first + n)
            row_of_group.take(groups, out=rows[j], mode="wrap")
            places.append((table, ids, first))
            first += n + 1
        return places, rows, first

    def _distinct(self, rows: Ints, n: int, fine: _Fine) -> tuple[Ints, Ints]:
        """Distinct tenants of every row, and those with failures by class; calls that name nobody count for none."""
        width = len(self._who_of) + 1
        named = rows[:, fine.named] * width + fine.who[fine.named]
        tenants = np.bincount(distinct(named.reshape(-1)) // width, minlength=n)
        failing = np.zeros((n, N_CLASSES), np.int64)
        if len(fine.failing_cell):
            row_and_class = rows[:, fine.failing_cell] * N_CLASSES + fine.failing_class
            triples = distinct((row_and_class * width + fine.who[fine.failing_cell]).reshape(-1))
            np.add.at(failing.reshape(-1), triples // width, 1)
        return tenants, failing

    def state(self) -> tuple[Any, ...]:
        return (
            [t.state() for t in self.tables],
            self._groups.astype(np.int32).tobytes(), self._who.astype(np.int32).tobytes(), list(self._who_of),
        )  # fmt: skip

    def restore(self, state: tuple[Any, ...]) -> None:
        tables, groups, who, who_of = state
        for table, part in zip(self.tables, tables, strict=True):
            table.restore(part)
        self._who = np.frombuffer(who, np.int32).astype(np.int64)
        self._groups = (
            np.frombuffer(groups, np.int32).astype(np.int64).reshape(len(self.tables), len(self._who))
        )
        self._who_of = {name: i for i, name in enumerate(who_of)}


class _Fine:
    """Columns of a window's cells, made once for all roll-ups; without those that are zero throughout."""

    def __init__(self, cells: Rollup, who: Ints) -> None:
        self.who = who
        kinds = np.flatnonzero(cells.by_class.any(axis=0)).tolist()
        self.classes = {k: cells.by_class[:, k].astype(np.float64) for k in kinds}
        self.sums = {name: column for name, column in cells.sums.items() if column.any()}
        self.counts = {
            name: column.astype(np.float64) for name, column in cells.counts.items() if column.any()
        }
        named = who != _NOBODY
        self.named = named.nonzero()[0]
        failing = [(((column > 0) & named).nonzero()[0], k) for k, column in self.classes.items() if k]
        empty: Ints = np.empty(0, np.int64)
        self.failing_cell = np.concatenate([empty, *(where for where, _ in failing)])
        self.failing_class = np.concatenate([empty, *(np.full(len(where), k) for where, k in failing)])


def distinct(codes: Ints) -> Ints:
    """Sorted distinct codes. They may need all 63 bits."""
    ordered = np.sort(codes)
    begins = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
    return ordered[begins]


def _totals(rows: Ints, column: Floats, n: int) -> Floats:
    """float64[n]: sums of a column of cells; `rows[roll-up, cell]`."""
    return np.bincount(rows.reshape(-1), _repeated(column, len(rows)), n).astype(np.float64, copy=False)


def _repeated(column: NDArray[Any], times: int) -> NDArray[Any]:
    if times == 1:
        return column
    repeated = np.empty((times, len(column)), column.dtype)
    repeated[:] = column
    return repeated.reshape(-1)


def _coarser(fine: Histogram, rows: Ints, places: Sequence[_Place]) -> list[Histogram]:
    """The histograms of roll-up rows from that of cells."""
    codes = rows.take(fine.rows, axis=1) << BUCKET_BITS
    codes |= fine.buckets
    joined, times = count_codes(codes.reshape(-1), _repeated(fine.counts, len(rows)))
    coarse = histogram_of_codes(joined, times)
    bounds = [bound for _, ids, first in places for bound in (first, first + len(ids))]
    at = np.searchsorted(coarse.rows, bounds).tolist()
    return [
        Histogram(coarse.rows[a:b] - first, coarse.buckets[a:b], coarse.counts[a:b])
        for (_, _, first), a, b in zip(places, at[::2], at[1::2], strict=True)
    ]


def _read_only(column: NDArray[Any]) -> NDArray[Any]:
    """A column that several names share."""
    column.flags.writeable = False
    return column


__all__ = ["COUNTED", "DEFAULT_ROLLUPS", "GroupTable", "RollupBuilder"]
