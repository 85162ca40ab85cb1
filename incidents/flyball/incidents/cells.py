"""What the last windows held, cell by cell: the memory that root ranking, baselines and impact are computed from.

Rows (cell × window) are kept in full for a bounded stretch, then melt into decayed sums per cell. The melting is what
keeps the onset of a fault out of the baseline it is judged by: a window counts as past only once it is minutes old.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from flyball.core.columns import BASE_LABELS, Rollup, Window
from flyball.incidents.signals import FAMILY_NAMES, FAMILY_OF_INDEX, LEFT_OUT, Spec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

COLUMNS: Final[tuple[str, ...]] = (
    "calls", "attempts", "input_tokens", "n_input", "output_tokens", "n_output", "cache_read_tokens", "cost_usd", "n_cost",
    "latency_s", "n_latency", "ttft_s", "n_ttft",
)  # fmt: skip
COLUMN: Final[dict[str, int]] = {name: i for i, name in enumerate(COLUMNS)}
_SUMS: Final = {
    n: n for n in ("input_tokens", "output_tokens", "cache_read_tokens", "cost_usd", "latency_s", "ttft_s")
}
_COUNTS: Final = {
    "n_input": "input_tokens", "n_output": "output_tokens", "n_cost": "cost_usd", "n_latency": "latency_s",
    "n_ttft": "ttft_s",
}  # fmt: skip
LABEL_POSITION: Final[dict[str, int]] = {name: i for i, name in enumerate(BASE_LABELS)}

_REMEMBERED_MASKS: Final = 256
ERROR_FLOOR: Final = 0.005
"""Failed share that is expected even of what never failed: one failure among a few calls is no proof."""
_MIN_BASE: Final = 20.0
"""Calls in the past before a label set's own past says what to expect."""
_VOLUME_FLOOR: Final = {"calls": 0.2, "cost_usd": 1e-4}
"""What is expected per window of a cell that was never seen."""
_FAMILY_INDEX: Final = np.array(FAMILY_OF_INDEX)
_LEFT_OUT: Final = list(LEFT_OUT)


class Slice(msgspec.Struct):
    """One window, compact. `cells`: int32[m]; `data`: float32[len(COLUMNS), m]; failures sparse: (cell, class, count).

    `totals`: label → calls by code of its value, made when first asked for.
    """

    start: float
    end: float
    cells: Any
    data: Any
    fail_cells: Any
    fail_classes: Any
    fail_counts: Any
    totals: dict[str, Any] = {}


class Measure:
    """One signal over the cells of a span: mass now, mass expected, and the count it is over; float64[k] each, all finite.

    `idx`: int64[k], the cells. `excess = now - expected`.
    """

    def __init__(self, cells: Cells, idx: Ints, now: Floats, expected: Floats, count: Floats) -> None:
        self._cells = cells
        self.idx, self.now, self.expected, self.count = idx, now, expected, count
        self.excess = now - expected
        self._columns: dict[str, NDArray[np.int32]] = {}
        self._scopes: dict[tuple[tuple[str, str], ...], Bools] = {}

    def codes(self, label: str) -> NDArray[np.int32]:
        """Codes of one label, int32[k]; gathered once."""
        found = self._columns.get(label)
        if found is None:
            found = self._columns[label] = self._cells.codes[LABEL_POSITION[label], self.idx]
        return found

    def mask(self, scope: Mapping[str, str]) -> Bools:
        """Which cells carry all labels of a scope; the last few scopes asked for are remembered."""
        key = tuple(sorted(scope.items()))
        found = self._scopes.get(key)
        if found is None:
            found = np.ones(len(self.idx), dtype=bool)
            for label, value in key:
                code = self._cells.code_of(label, value)
                if code is None:
                    found = np.zeros(len(self.idx), dtype=bool)
                    break
                found &= self.codes(label) == code
            if len(self._scopes) >= _REMEMBERED_MASKS:
                self._scopes.clear()
            self._scopes[key] = found
        return found

    def any_mask(self, scopes: Sequence[Mapping[str, str]]) -> Bools:
        if len(scopes) == 1:
            return self.mask(scopes[0])
        found = np.zeros(len(self.idx), dtype=bool)
        for scope in scopes:
            found |= self.mask(scope)
        return found

    def without(self, scopes: Sequence[Mapping[str, str]]) -> Measure:
        """The same without the cells of some scopes: what they do not explain."""
        if not scopes:
            return self
        keep = ~self.any_mask(scopes)
        return Measure(self._cells, self.idx[keep], self.now[keep], self.expected[keep], self.count[keep])

    def rate(self, rows: Bools | Ints) -> float:
        """Excess over the expected: 1.0 is twice as much; 0.0 where nothing is expected."""
        expected = float(self.expected[rows].sum())
        return float(self.excess[rows].sum()) / expected if expected > 0 else 0.0

    def share(self, outer: Mapping[str, str], inner: Sequence[Mapping[str, str]]) -> float:
        """Share of the excess of `outer` that lies in one of `inner`; 0.0 where `outer` has no excess."""
        rows = np.nonzero(self.mask(outer))[0]
        positive = np.maximum(self.excess[rows], 0.0)
        total = float(positive.sum())
        return float(positive[self.any_mask(inner)[rows]].sum()) / total if total > 0.0 else 0.0


class Cells:
    """The table of cells, the ring of windows over it, and the decayed past.

    Bounds: `max_cells` distinct cells, `ring_windows` windows and `ring_rows` rows in full. When the table is full, cells
    that no kept window holds are forgotten, with their past.
    """

    def __init__(self, *, ring_windows: int, ring_rows: int, max_cells: int, half_life_s: float) -> None:
        self._ring_windows, self._ring_rows, self._max_cells, self._half_life_s = (
            ring_windows,
            ring_rows,
            max_cells,
            half_life_s,
        )
        self.ring: deque[Slice] = deque()
        self._rows = 0
        self.values: list[list[str]] = [[""] for _ in BASE_LABELS]
        self._code: list[dict[str, int]] = [{"": 0} for _ in BASE_LABELS]
        self._index: dict[tuple[str, ...], int] = {}
        self.codes: NDArray[np.int32] = np.zeros((len(BASE_LABELS), 256), dtype=np.int32)
        self.n = 0
        self._slot_cell: NDArray[np.int32] = np.full(0, -1, dtype=np.int32)
        self._slot_born: Floats = np.zeros(0)
        self._past: NDArray[np.float32] = np.zeros((len(COLUMNS), 256), dtype=np.float32)
        self._past_failed: NDArray[np.float32] = np.zeros((len(FAMILY_NAMES), 256), dtype=np.float32)
        self._past_windows = 0.0
        self._groups: dict[tuple[str, ...], tuple[Ints, int]] = {}
        self._measures: dict[tuple[Spec, float], Measure] = {}

    # ---- reading windows

    def absorb(
        self, window: Window, frozen: Sequence[tuple[float, Sequence[Mapping[str, str]]]] = ()
    ) -> Slice:
        """Takes one closed window. New cells cost some µs each, known ones next to nothing.

        Args:
            frozen: (since, scopes) of open incidents: what is anomalous does not teach the past it is compared with.
        """
        rollup = window.cells
        cells = self._cells_of(rollup)
        data = np.zeros((len(COLUMNS), len(rollup)), dtype=np.float32)
        data[COLUMN["calls"]] = rollup.calls
        by_class = rollup.by_class
        data[COLUMN["attempts"]] = rollup.calls - by_class[:, _LEFT_OUT].sum(axis=1)
        for name, source in _SUMS.items():
            if source in rollup.sums:
                data[COLUMN[name]] = rollup.sums[source]
        for name, source in _COUNTS.items():
            if source in rollup.counts:
                data[COLUMN[name]] = rollup.counts[source]
        failing = np.nonzero(rollup.calls != by_class[:, 0])[0]
        rows, classes = np.nonzero(by_class[failing, 1:])
        rows = failing[rows]
        counts = by_class[rows, classes + 1]
        piece = Slice(
            window.start,
            window.end,
            cells,
            data,
            cells[rows],
            (classes + 1).astype(np.int32),
            counts.astype(np.int64),
        )
        self.ring.append(piece)
        self._rows += len(cells)
        while len(self.ring) > self._ring_windows or (self._rows > self._ring_rows and len(self.ring) > 3):
            self._melt(self.ring.popleft(), frozen)
        if self.n > self._max_cells:
            self._compact()
        self._measures.clear()
        return self.ring[-1]

    def _cells_of(self, rollup: Rollup) -> NDArray[np.int32]:
        ids = rollup.ids
        if rollup.capacity > len(self._slot_cell):
            grown = max(rollup.capacity, 2 * len(self._slot_cell))
            self._slot_cell = _grown(self._slot_cell, grown, -1)
            self._slot_born = _grown(self._slot_born, grown, 0.0)
        born = rollup.born if len(rollup.born) == len(ids) else rollup.born[ids]
        fresh = np.nonzero((self._slot_cell[ids] < 0) | (self._slot_born[ids] != born))[0]
        if len(fresh):
            order = [rollup.by.index(name) if name in rollup.by else -1 for name in BASE_LABELS]
            straight = order == list(range(len(rollup.by)))
            for row in fresh.tolist():
                slot = int(ids[row])
                found = rollup.labels[slot]
                labels = found if straight else tuple("" if i < 0 else found[i] for i in order)
                self._slot_cell[slot] = self._intern(labels)
            self._slot_born[ids[fresh]] = born[fresh]
        return self._slot_cell[ids]

    def _intern(self, labels: tuple[str, ...]) -> int:
        cell = self._index.get(labels)
        if cell is not None:
            return cell
        cell = self.n
        if cell == self.codes.shape[1]:
            self._grow(2 * cell)
        for position, value in enumerate(labels):
            code = self._code[position].get(value)
            if code is None:
                code = self._code[position][value] = len(self.values[position])
                self.values[position].append(value)
            self.codes[position, cell] = code
        self._index[labels] = cell
        self.n += 1
        self._groups.clear()
        return cell

    def _grow(self, size: int) -> None:
        self.codes = _grown(self.codes, size, 0)
        self._past = _grown(self._past, size, 0)
        self._past_failed = _grown(self._past_failed, size, 0)

    def _melt(self, piece: Slice, frozen: Sequence[tuple[float, Sequence[Mapping[str, str]]]]) -> None:
        decay = 0.5 ** ((piece.end - piece.start) / self._half_life_s)
        held = np.zeros(self.n, dtype=bool)
        for since, scopes in frozen:
            if piece.end > since:
                held |= self.any_mask(scopes, np.arange(self.n))
        some = bool(held.any())
        for past in (self._past, self._past_failed):
            # As if this window had been like the ones before, where it is anomalous: rates stay what they were.
            mean = past[:, : self.n][:, held] / self._past_windows if some and self._past_windows else None
            past[:, : self.n] *= decay
            if mean is not None:
                past[:, : self.n][:, held] += mean
        learn = ~held[piece.cells] if some else slice(None)
        into = piece.cells[learn]
        for column, values in zip(self._past, piece.data, strict=True):
            column[into] += values[learn]
        families = _FAMILY_INDEX[piece.fail_classes]
        known = (families >= 0) & ~held[piece.fail_cells]
        np.add.at(self._past_failed, (families[known], piece.fail_cells[known]), piece.fail_counts[known])
        self._past_windows = self._past_windows * decay + 1.0
        self._rows -= len(piece.cells)

    def _compact(self) -> None:
        """Forgets cells that no kept window holds; when that is not enough, older windows go first."""
        used = np.unique(np.concatenate([p.cells for p in self.ring]))
        while len(used) > 0.8 * self._max_cells and len(self.ring) > 1:
            self._rows -= len(self.ring.popleft().cells)
            used = np.unique(np.concatenate([p.cells for p in self.ring]))
        labels = [self.labels_of(int(c)) for c in used]
        past, failed = self._past[:, used].copy(), self._past_failed[:, used].copy()
        moved = np.zeros(self.n, dtype=np.int32)
        moved[used] = np.arange(len(used), dtype=np.int32)
        for piece in self.ring:
            piece.cells, piece.fail_cells = moved[piece.cells], moved[piece.fail_cells]
            piece.totals = {}
        self._reset_table(labels)
        self._past[:, : len(used)], self._past_failed[:, : len(used)] = past, failed
        self._slot_cell[:] = -1

    def _reset_table(self, labels: Sequence[tuple[str, ...]]) -> None:
        self.values = [[""] for _ in BASE_LABELS]
        self._code = [{"": 0} for _ in BASE_LABELS]
        self._index = {}
        self.n = 0
        self._groups.clear()
        size = max(256, len(labels))
        self.codes = np.zeros((len(BASE_LABELS), size), dtype=np.int32)
        self._past = np.zeros((len(COLUMNS), size), dtype=np.float32)
        self._past_failed = np.zeros((len(FAMILY_NAMES), size), dtype=np.float32)
        for one in labels:
            self._intern(one)

    # ---- asking

    def labels_of(self, cell: int) -> tuple[str, ...]:
        return tuple(self.values[p][c] for p, c in enumerate(self.codes[:, cell].tolist()))

    def knows(self, scope: Mapping[str, str]) -> bool:
        """Whether every label of the scope is one that cells carry, with a value seen in some call."""
        return bool(scope) and all(
            k in LABEL_POSITION and v in self._code[LABEL_POSITION[k]] for k, v in scope.items()
        )

    def totals(self, piece: Slice, label: str) -> Floats:
        """Calls of a window by code of one label, whatever the scope; kept with the window."""
        found = piece.totals.get(label)
        if found is None:
            code = self.codes[LABEL_POSITION[label], piece.cells]
            found = piece.totals[label] = np.bincount(code, piece.data[COLUMN["calls"]]).astype(np.float64)
        known: Floats = found
        return known

    def code_of(self, label: str, value: str) -> int | None:
        position = LABEL_POSITION.get(label)
        return None if position is None else self._code[position].get(value)

    def mask(self, scope: Mapping[str, str], idx: NDArray[Any]) -> Bools:
        """Which of the cells carry all labels of the scope; an empty scope is everything."""
        found = np.ones(len(idx), dtype=bool)
        for name, value in scope.items():
            position = LABEL_POSITION.get(name)
            code = None if position is None else self._code[position].get(value)
            if code is None:
                return np.zeros(len(idx), dtype=bool)
            found &= self.codes[position, idx] == code
        return found

    def group(self, by: tuple[str, ...]) -> tuple[Ints, int]:
        """Group number of every cell by some labels, and how many numbers there are. One label: its code."""
        known = self._groups.get(by)
        if known is not None:
            return known
        n = self.n
        if not by:
            result = (np.zeros(n, dtype=np.int64), 1)
        elif len(by) == 1:
            position = LABEL_POSITION[by[0]]
            result = (self.codes[position, :n].astype(np.int64), len(self.values[position]))
        else:
            key = np.zeros(n, dtype=np.int64)
            for name in by:
                position = LABEL_POSITION[name]
                # Re-numbered at every label: a plain product of five large alphabets would not fit 64 bits.
                _, key = np.unique(
                    key * len(self.values[position]) + self.codes[position, :n], return_inverse=True
                )
            result = (key, int(key.max()) + 1 if n else 0)
        self._groups[by] = result
        return result

    def spans(self, since: float) -> tuple[list[Slice], list[Slice]]:
        """(windows that show the trouble since then, windows of the past). At least the newest is of the trouble."""
        if not self.ring:
            return [], []
        now = [p for p in self.ring if p.end > since] or [self.ring[-1]]
        guard = now[0].end - now[0].start
        return now, [p for p in self.ring if p.end <= min(since, now[0].start) - guard]

    def measure(self, spec: Spec, since: float) -> Measure | None:
        """The signal since then against its own past; None where there is nothing to compare."""
        key = (spec, since)
        if key not in self._measures:
            found = self._measure(spec, since)
            if found is None:
                return None
            self._measures[key] = found
        return self._measures[key]

    def _measure(self, spec: Spec, since: float) -> Measure | None:
        now_slices, past_slices = self.spans(since)
        if not now_slices:
            return None
        now, count = self._sums(spec, now_slices)
        past, past_count = self._sums(spec, past_slices)
        past += self._past_sum(spec)
        past_count += self._past[COLUMN[spec.per], : self.n] if spec.per in COLUMN else 0.0
        if spec.kind == "volume":
            windows = len(past_slices) + self._past_windows
            expected = past / windows * len(now_slices) if windows else np.zeros(self.n)
            expected = np.maximum(expected, _VOLUME_FLOOR[spec.column] * len(now_slices))
            if not windows:
                return None
            idx = np.nonzero((now > 0) | (past > 0))[0]
            return Measure(self, idx, now[idx], expected[idx], np.full(len(idx), float(len(now_slices))))
        mean = self._expected_mean(spec, past, past_count)
        if mean is None:
            return None
        idx = np.nonzero(count > 0)[0]
        return Measure(self, idx, now[idx], count[idx] * mean[idx], count[idx])

    def _expected_mean(self, spec: Spec, past: Floats, past_count: Floats) -> Floats | None:
        mean = np.full(self.n, np.nan)
        for by in spec.hierarchy:
            inverse, groups = self.group(by)
            mass, calls = np.bincount(inverse, past, groups), np.bincount(inverse, past_count, groups)
            with np.errstate(divide="ignore", invalid="ignore"):
                of_group = np.where(calls >= _MIN_BASE, mass / calls, np.nan)
            mean = np.where(np.isnan(mean), of_group[inverse], mean)
        if spec.kind == "errors":
            floored: Floats = np.maximum(np.nan_to_num(mean, nan=0.0), ERROR_FLOOR)
            return floored
        if np.isnan(mean).any():
            return None
        positive: Floats = np.maximum(mean, 1e-12)
        return positive

    def _sums(self, spec: Spec, slices: Sequence[Slice]) -> tuple[Floats, Floats]:
        mass, count = np.zeros(self.n), np.zeros(self.n)
        if not slices:
            return mass, count
        cells = np.concatenate([p.cells for p in slices])
        if spec.per in COLUMN:
            per = COLUMN[spec.per]
            count += np.bincount(cells, np.concatenate([p.data[per] for p in slices]), self.n)
        if spec.kind == "errors":
            wanted = np.isin(_FAMILY_INDEX, spec.families)
            for p in slices:
                hit = wanted[p.fail_classes]
                mass += np.bincount(p.fail_cells[hit], p.fail_counts[hit], self.n)
        else:
            column = COLUMN[spec.column]
            mass += np.bincount(cells, np.concatenate([p.data[column] for p in slices]), self.n)
        return mass, count

    def _past_sum(self, spec: Spec) -> Floats:
        if spec.kind == "errors":
            failed: Floats = self._past_failed[list(spec.families), : self.n].sum(axis=0).astype(np.float64)
            return failed
        return self._past[COLUMN[spec.column], : self.n].astype(np.float64)

    def past_rates(
        self, scopes: Sequence[Mapping[str, str]], since: float, families: Sequence[int]
    ) -> tuple[float, float, float]:
        """(failed share, $ per minute, calls per minute) of the scopes before `since`; zeros without a past."""
        _, past = self.spans(since)
        if not self.n:
            return 0.0, 0.0, 0.0
        inside = self.any_mask(scopes, np.arange(self.n))
        spec = Spec("errors", "failed", "attempts", tuple(families))
        failed, attempts = self._sums(spec, past)
        failed += self._past_sum(spec)
        attempts += self._past[COLUMN["attempts"], : self.n]
        cost = self._past[COLUMN["cost_usd"], : self.n].astype(np.float64)
        calls = self._past[COLUMN["calls"], : self.n].astype(np.float64)
        for p in past:
            cost += np.bincount(p.cells, p.data[COLUMN["cost_usd"]], self.n)
            calls += np.bincount(p.cells, p.data[COLUMN["calls"]], self.n)
        window_s = self.ring[-1].end - self.ring[-1].start
        minutes = (len(past) + self._past_windows) * window_s / 60.0
        n = float(attempts[inside].sum())
        if not minutes:
            return 0.0, 0.0, 0.0
        return (
            float(failed[inside].sum()) / n if n else 0.0,
            float(cost[inside].sum()) / minutes,
            float(calls[inside].sum()) / minutes,
        )

    def any_mask(self, scopes: Sequence[Mapping[str, str]], idx: NDArray[Any]) -> Bools:
        found = np.zeros(len(idx), dtype=bool)
        for scope in scopes:
            found |= self.mask(scope, idx)
        return found

    # ---- snapshot

    def state(self) -> dict[str, Any]:
        return {
            "labels": [self.values[p][1:] for p in range(len(BASE_LABELS))],
            "codes": self.codes[:, : self.n].tobytes(),
            "n": self.n,
            "slot_cell": self._slot_cell.tobytes(),
            "slot_born": self._slot_born.tobytes(),
            "past": self._past[:, : self.n].tobytes(),
            "past_failed": self._past_failed[:, : self.n].tobytes(),
            "past_windows": self._past_windows,
            "ring": [
                [p.start, p.end, p.cells.tobytes(), p.data.tobytes(), p.fail_cells.tobytes(), p.fail_classes.tobytes(),
                 p.fail_counts.tobytes()]
                for p in self.ring
            ],
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        width, n = len(BASE_LABELS), int(state["n"])
        self.values = [["", *values] for values in state["labels"]]
        self._code = [{v: i for i, v in enumerate(values)} for values in self.values]
        size = max(256, n)
        self.codes = _grown(np.frombuffer(state["codes"], dtype=np.int32).reshape(width, n), size, 0)
        self.n = n
        columns = zip(self.values, self.codes[:, :n].tolist(), strict=True)
        labels = zip(*(map(values.__getitem__, codes) for values, codes in columns), strict=True)
        self._index = dict(zip(labels, range(n), strict=True))
        self._slot_cell = np.frombuffer(state["slot_cell"], dtype=np.int32).copy()
        self._slot_born = np.frombuffer(state["slot_born"], dtype=np.float64).copy()
        self._past = _grown(np.frombuffer(state["past"], dtype=np.float32).reshape(len(COLUMNS), n), size, 0)
        self._past_failed = _grown(
            np.frombuffer(state["past_failed"], dtype=np.float32).reshape(len(FAMILY_NAMES), n), size, 0
        )
        self._past_windows = float(state["past_windows"])
        self.ring = deque()
        for start, end, cells, data, fail_cells, fail_classes, fail_counts in state["ring"]:
            self.ring.append(
                Slice(
                    start,
                    end,
                    np.frombuffer(cells, dtype=np.int32).copy(),
                    np.frombuffer(data, dtype=np.float32).reshape(len(COLUMNS), -1).copy(),
                    np.frombuffer(fail_cells, dtype=np.int32).copy(),
                    np.frombuffer(fail_classes, dtype=np.int32).copy(),
                    np.frombuffer(fail_counts, dtype=np.int64).copy(),
                )
            )
        self._rows = sum(len(p.cells) for p in self.ring)
        self._groups.clear()
        self._measures.clear()


def _grown(array: NDArray[Any], size: int, fill: float) -> NDArray[Any]:
    """A writable copy with a last axis of at least `size`; what is new holds `fill`."""
    n = array.shape[-1]
    out = np.full((*array.shape[:-1], max(size, n)), fill, dtype=array.dtype)
    out[..., :n] = array
    return out
