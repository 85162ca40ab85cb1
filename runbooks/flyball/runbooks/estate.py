"""The live estate: the last minutes of windows, runs and GPUs, kept small, to be asked by guards, verification and candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flyball.core.codec import pack_state, unpack_state
from flyball.core.columns import BASE_LABELS, Rollup, Window
from flyball.core.errorclass import CLASS_INDEX, NOT_ATTEMPTS, PROVIDER_HEALTH
from flyball.core.estate import Ratio
from flyball.core.events import Event
from flyball.runbooks.activity import GpuInventory, RunActivity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

KEEP_S: Final = 600.0
OBSERVED_LAG_S: Final = 30.0
"""Longer than a window of 10 s and the 15 s that it waits for slow senders."""
_STEP_S: Final = 10.0
_MOST_CACHED: Final = 2_000_000
"""Cells of remembered scopes in all: 16 MB."""
_BAD: Final = sorted(CLASS_INDEX[c] for c in PROVIDER_HEALTH)
_NOT_TRIED: Final = sorted(CLASS_INDEX[c] for c in NOT_ATTEMPTS)
_POSITION: Final = {name: i for i, name in enumerate(BASE_LABELS)}

_COLUMNS: Final[dict[str, Any]] = {
    "cell": np.int32, "calls": np.int32, "tried": np.int32, "bad": np.int32, "usd": np.float32, "usd_known": np.bool_,
    "tokens": np.float32, "tokens_known": np.bool_, "latency": np.float32, "latency_known": np.int32,
}  # fmt: skip
"""Columns of one window over its cells. `cell` indexes the table of cells; the others are counts and sums, of which 32 bits keep
seven digits: more than any guard needs."""


@dataclass(slots=True)
class _Span:
    """One window, as columns over the cells that had calls in it."""

    start: float
    end: float
    columns: dict[str, NDArray[Any]]


class LiveEstate:
    """Answers `core.estate.Estate` from the windows of the last `keep_s` seconds of event time, and from what is observed beside.

    Memory: 34 bytes per cell and window, plus the table of the cells seen within the span (36 bytes and its strings each), plus the
    activity of runs and the list of GPUs, both bounded. Questions over one span share their sums: after the first, a question costs
    one pass over the cells, however many windows the span has.
    A label that is not one of BASE_LABELS (`key`) selects nothing: no data, which is never success.

    Misleads: a span that is not a multiple of the window counts whole windows that begin inside it; a span shorter than
    one window is the newest window.
    """

    def __init__(self, keep_s: float = KEEP_S) -> None:
        self._keep_s = keep_s
        self._now = 0.0
        self._lag_s = OBSERVED_LAG_S
        self._spans: list[_Span] = []
        self._runs = RunActivity(keep_s)
        self._gpus = GpuInventory(keep_s)
        self._words: list[dict[str, int]] = [{} for _ in BASE_LABELS]
        self._names: list[list[str]] = [[] for _ in BASE_LABELS]
        self._cells: dict[tuple[str, ...], int] = {}
        self._codes = np.zeros((0, len(BASE_LABELS)), np.int32)
        # Cache of slot → cell of the windows' own numbering; valid where born agrees, rebuilt at will, never saved.
        self._slot_cell = np.full(0, -1, np.int32)
        self._slot_born = np.full(0, np.nan)
        self._rows_cache: dict[tuple[tuple[str, str], ...], NDArray[np.intp]] = {}
        self._rows_cached = 0
        self._sum_cache: dict[tuple[float, str], Floats] = {}
        self._active_cache: dict[float, list[str]] = {}

    # --- in -------------------------------------------------------------------------------------------------------

    def feed(self, windows: Sequence[Window]) -> None:
        """Takes closed windows, in the order they closed."""
        for window in windows:
            if len(window.cells):
                self._spans.append(_Span(window.start, window.end, self._columns_of(window)))
            self._now = max(self._now, window.end)
            self._lag_s = max(OBSERVED_LAG_S, 15.0 + 1.5 * (window.end - window.start))
        self._drop_old()
        self._forget_unused()

    def observe(self, events: Sequence[Event], now: float | None = None) -> None:
        """Takes what windows do not tell: steps and calls of agent runs, and samples of GPUs.

        Where nothing else is watched, no window closes: then these tell that telemetry is alive, `OBSERVED_LAG_S` behind them (more
        where windows are longer), so that they never run ahead of windows which are still open.

        Args:
            now: when they arrived; a time beyond it is a clock that is off. None in a replay.
        """
        self._active_cache.clear()
        newest = max(self._runs.observe(events, now), self._gpus.observe(events, now))
        alive = math.floor((newest - self._lag_s) / _STEP_S) * _STEP_S
        if alive > self._now:
            self._now = alive
            self._drop_old()

    def _drop_old(self) -> None:
        self._spans = [s for s in self._spans if s.end > self._now - self._keep_s]
        self._sum_cache.clear()
        self._active_cache.clear()

    def _columns_of(self, window: Window) -> dict[str, NDArray[Any]]:
        rows = window.cells
        tried = rows.calls - rows.by_class[:, _NOT_TRIED].sum(axis=1)
        made: dict[str, Any] = {
            "cell": self._cells_of(rows),
            "calls": rows.calls,
            "tried": tried,
            "bad": rows.by_class[:, _BAD].sum(axis=1),
            "usd": rows.sums["cost_usd"],
            "usd_known": rows.counts["cost_usd"] > 0,
            "tokens": rows.sums["input_tokens"] + rows.sums["output_tokens"],
            "tokens_known": (rows.counts["input_tokens"] > 0) | (rows.counts["output_tokens"] > 0),
            "latency": rows.sums["latency_s"],
            "latency_known": rows.counts["latency_s"],
        }
        return {name: np.array(made[name], dtype) for name, dtype in _COLUMNS.items()}

    def _cells_of(self, rows: Rollup) -> NDArray[np.int32]:
        if rows.capacity > len(self._slot_cell):
            grown = rows.capacity - len(self._slot_cell)
            self._slot_cell = np.concatenate([self._slot_cell, np.full(grown, -1, np.int32)])
            self._slot_born = np.concatenate([self._slot_born, np.full(grown, np.nan)])
        slots = rows.ids
        unknown = np.flatnonzero((self._slot_cell[slots] < 0) | (self._slot_born[slots] != rows.born))
        if len(unknown):
            keys = [rows.labels[slot] for slot in slots[unknown].tolist()]
            if rows.by != BASE_LABELS:
                order = [rows.by.index(name) if name in rows.by else -1 for name in BASE_LABELS]
                keys = [tuple(labels[i] if i >= 0 else "" for i in order) for labels in keys]
            self._slot_cell[slots[unknown]] = self._indices(keys)
            self._slot_born[slots[unknown]] = rows.born[unknown]
        return self._slot_cell[slots]

    def _indices(self, keys: Sequence[tuple[str, ...]]) -> list[int]:
        """The cell of each key. New ones are added column by column: a restart brings hundreds of thousands."""
        cells = self._cells
        begin = len(cells)
        found = [cells.setdefault(key, len(cells)) for key in keys]
        if len(cells) == begin:
            return found
        if len(cells) > len(self._codes):
            codes = np.zeros((max(256, 2 * len(self._codes), len(cells)), len(BASE_LABELS)), np.int32)
            codes[:begin] = self._codes[:begin]
            self._codes = codes
        added = dict.fromkeys(key for key, index in zip(keys, found, strict=True) if index >= begin)
        table = zip(zip(*added, strict=True), self._words, self._names, strict=True)
        for column, (labels, words, names) in enumerate(table):
            fresh = dict.fromkeys(word for word in labels if word not in words)
            words.update(zip(fresh, count(len(words)), strict=False))
            names += fresh
            self._codes[begin : len(cells), column] = [words[word] for word in labels]
        self._forget_rows()
        return found

    def _forget_unused(self) -> None:
        """Rebuilds the table once most of its cells are older than the span: a stream of new labels must not grow it for ever."""
        if len(self._cells) < 4096:
            return
        used = np.zeros(len(self._cells), np.bool_)
        for span in self._spans:
            used[span.columns["cell"]] = True
        if 2 * int(used.sum()) > len(self._cells):
            return
        keys = [key for key, index in self._cells.items() if used[index]]
        old = np.array([self._cells[key] for key in keys], np.int64)
        self._load_cells(keys)
        new_index = np.full(len(used), -1, np.int32)
        new_index[old] = np.arange(len(keys), dtype=np.int32)
        for span in self._spans:
            span.columns["cell"] = new_index[span.columns["cell"]]

    def _load_cells(self, keys: list[tuple[str, ...]]) -> None:
        self._words = [{} for _ in BASE_LABELS]
        self._names = [[] for _ in BASE_LABELS]
        self._cells = {}
        self._codes = np.zeros((0, len(BASE_LABELS)), np.int32)
        self._slot_cell = np.full(0, -1, np.int32)
        self._slot_born = np.full(0, np.nan)
        self._forget_rows()
        self._sum_cache.clear()
        self._indices(keys)

    # --- questions ------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return self._now

    def errors(self, scope: Mapping[str, str], span_s: float) -> Ratio:
        return Ratio(int(self._sum("bad", scope, span_s)), int(self._sum("tried", scope, span_s)))

    def calls(self, scope: Mapping[str, str], span_s: float) -> int:
        if "run" in scope:
            return self._runs.count(scope, self._now - span_s, refused=True)
        return int(self._sum("calls", scope, span_s))

    def attempts(self, scope: Mapping[str, str], span_s: float) -> int:
        if "run" in scope:
            return self._runs.count(scope, self._now - span_s, refused=False)
        return int(self._sum("tried", scope, span_s))

    def usd_per_hour(self, scope: Mapping[str, str], span_s: float) -> float | None:
        return self._rate("usd", scope, span_s, 3600.0)

    def tokens_per_min(self, scope: Mapping[str, str], span_s: float) -> float | None:
        return self._rate("tokens", scope, span_s, 60.0)

    def latency_s(self, scope: Mapping[str, str], span_s: float) -> float | None:
        n = self._sum("latency_known", scope, span_s)
        return self._sum("latency", scope, span_s) / n if n else None

    def gpus(self, scope: Mapping[str, str], span_s: float) -> Sequence[str]:
        return self._gpus.reporting(scope, span_s, self._now)

    def values(self, label: str, scope: Mapping[str, str], span_s: float) -> Sequence[str]:
        if label == "run" and not scope:
            if span_s not in self._active_cache:
                self._active_cache[span_s] = self._runs.active(self._now - span_s)
            return self._active_cache[span_s]
        rows = self._rows(scope)
        if rows is None or label not in _POSITION:
            return []
        column = _POSITION[label]
        codes, back = np.unique(self._codes[rows, column], return_inverse=True)
        weight = np.bincount(back, self._sums("calls", span_s)[rows], len(codes))
        found = [(-int(n), self._names[column][code]) for code, n in zip(codes, weight, strict=True) if n]
        return [name for _, name in sorted(found) if name]

    def _rate(self, column: str, scope: Mapping[str, str], span_s: float, per_s: float) -> float | None:
        """Over the time since the first window of the span that had any call; None when no call in scope told it."""
        if not self._sum(f"{column}_known", scope, span_s):
            return None
        covered = max((self._now - s.start for s in self._within(span_s)), default=0.0)
        return self._sum(column, scope, span_s) / covered * per_s if covered else None

    def _sum(self, column: str, scope: Mapping[str, str], span_s: float) -> float:
        rows = self._rows(scope)
        return 0.0 if rows is None else float(np.add.reduce(self._sums(column, span_s)[rows]))

    def _sums(self, column: str, span_s: float) -> Floats:
        """float64[cells]: one column added up over the span; kept until the next window."""
        cached = self._sum_cache.get((span_s, column))
        if cached is not None and len(cached) == len(self._cells):
            return cached
        total = np.zeros(len(self._cells))
        for span in self._within(span_s):
            total[span.columns["cell"]] += span.columns[column]  # a cell stands once in a window
        if len(self._sum_cache) >= 64:
            self._sum_cache.clear()
        self._sum_cache[span_s, column] = total
        return total

    def _within(self, span_s: float) -> list[_Span]:
        found = [s for s in self._spans if s.start >= self._now - span_s - 1e-6]
        return found or [s for s in self._spans if s.end >= self._now]

    def _rows(self, scope: Mapping[str, str]) -> NDArray[np.intp] | None:
        """Cells that carry all labels of the scope; None when no cell can."""
        key = tuple(sorted(scope.items()))
        cached = self._rows_cache.get(key)
        if cached is not None:
            return cached
        n = len(self._cells)
        mask = np.ones(n, np.bool_)
        for label, value in key:
            column = _POSITION.get(label)
            code = self._words[column].get(value) if column is not None else None
            if column is None or code is None:
                return None
            mask &= self._codes[:n, column] == code
        rows = np.flatnonzero(mask)
        if self._rows_cached + len(rows) > _MOST_CACHED or len(self._rows_cache) >= 10_000:
            self._forget_rows()
        self._rows_cache[key] = rows
        self._rows_cached += len(rows)
        return rows

    def _forget_rows(self) -> None:
        self._rows_cache.clear()
        self._rows_cached = 0

    # --- state ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        spans = [(s.start, s.end, [s.columns[name].tobytes() for name in _COLUMNS]) for s in self._spans]
        state = {
            "now": self._now,
            "lag_s": self._lag_s,
            "names": self._names,
            "codes": self._codes[: len(self._cells)].tobytes(),
            "spans": spans,
            "runs": self._runs.state(),
            "gpus": self._gpus.state(),
        }
        return pack_state("estate", 3, state)

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError when the bytes are of another stage or version."""
        saved = unpack_state(state, "estate", 3)
        self._now = float(saved["now"])
        self._lag_s = float(saved["lag_s"])
        codes = np.frombuffer(saved["codes"], np.int32).reshape(-1, len(BASE_LABELS)).T.tolist()
        words = (map(names.__getitem__, column) for names, column in zip(saved["names"], codes, strict=True))
        self._load_cells(list(zip(*words, strict=True)))
        self._spans = []
        for start, end, columns in saved["spans"]:
            read = {
                name: np.frombuffer(raw, dtype).copy()
                for (name, dtype), raw in zip(_COLUMNS.items(), columns, strict=True)
            }
            self._spans.append(_Span(start, end, read))
        self._active_cache.clear()
        self._runs.load(saved["runs"])
        self._gpus.load(saved["gpus"])
