"""The live estate: the last minutes of windows, kept small, to be asked by guards, verification and candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from flyball.core.codec import pack_state, unpack_state
from flyball.core.columns import BASE_LABELS, Window
from flyball.core.errorclass import CLASS_INDEX, NOT_ATTEMPTS, PROVIDER_HEALTH
from flyball.core.estate import Ratio

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEEP_S: Final = 600.0
_BAD: Final = sorted(CLASS_INDEX[c] for c in PROVIDER_HEALTH)
_NOT_TRIED: Final = sorted(CLASS_INDEX[c] for c in NOT_ATTEMPTS)
_POSITION: Final = {name: i for i, name in enumerate(BASE_LABELS)}


@dataclass(slots=True)
class _Span:
    """One window, as columns over the cells that had calls in it. `cell` indexes the table of cells."""

    start: float
    end: float
    cell: NDArray[np.int32]
    calls: NDArray[np.int32]
    tried: NDArray[np.int32]
    bad: NDArray[np.int32]
    usd: NDArray[np.float64]
    usd_known: NDArray[np.int32]


class LiveEstate:
    """Answers `core.estate.Estate` from the windows of the last `keep_s` seconds of event time.

    Memory: 32 bytes per cell and window, plus the table of the cells seen within the span (36 bytes and its strings each).
    A label that is not one of BASE_LABELS (`run`, `key`) selects nothing: no data, which is never success.

    Misleads: a span that is not a multiple of the window counts whole windows that begin inside it; a span shorter than
    one window is the newest window.
    """

    def __init__(self, keep_s: float = KEEP_S) -> None:
        self._keep_s = keep_s
        self._now = 0.0
        self._spans: list[_Span] = []
        self._words: list[dict[str, int]] = [{} for _ in BASE_LABELS]
        self._names: list[list[str]] = [[] for _ in BASE_LABELS]
        self._cells: dict[tuple[str, ...], int] = {}
        self._codes = np.zeros((0, len(BASE_LABELS)), np.int32)
        # Cache of slot → cell of the windows' own numbering; valid where born agrees, rebuilt at will, never saved.
        self._slot_cell = np.full(0, -1, np.int32)
        self._slot_born = np.full(0, np.nan)
        self._mask_cache: dict[tuple[tuple[str, str], ...], NDArray[np.bool_]] = {}

    # --- in -------------------------------------------------------------------------------------------------------

    def feed(self, windows: Sequence[Window]) -> None:
        """Takes closed windows, in the order they closed."""
        for window in windows:
            rows = window.cells
            if len(rows):
                self._spans.append(
                    _Span(
                        start=window.start,
                        end=window.end,
                        cell=self._cells_of(window),
                        calls=rows.calls.astype(np.int32),
                        tried=(rows.calls - rows.by_class[:, _NOT_TRIED].sum(axis=1)).astype(np.int32),
                        bad=rows.by_class[:, _BAD].sum(axis=1).astype(np.int32),
                        usd=np.asarray(rows.sums["cost_usd"], np.float64).copy(),
                        usd_known=np.asarray(rows.counts["cost_usd"]).astype(np.int32),
                    )
                )
            self._now = max(self._now, window.end)
        self._spans = [s for s in self._spans if s.end > self._now - self._keep_s]
        self._forget_unused()

    def _cells_of(self, window: Window) -> NDArray[np.int32]:
        rows = window.cells
        if rows.capacity > len(self._slot_cell):
            grown = rows.capacity - len(self._slot_cell)
            self._slot_cell = np.concatenate([self._slot_cell, np.full(grown, -1, np.int32)])
            self._slot_born = np.concatenate([self._slot_born, np.full(grown, np.nan)])
        slots = rows.ids
        unknown = np.flatnonzero((self._slot_cell[slots] < 0) | (self._slot_born[slots] != rows.born))
        if len(unknown):
            order = [rows.by.index(name) if name in rows.by else -1 for name in BASE_LABELS]
            found = [self._cell(rows.labels[int(slots[i])], order) for i in unknown]
            self._slot_cell[slots[unknown]] = found
            self._slot_born[slots[unknown]] = rows.born[unknown]
        return self._slot_cell[slots]

    def _cell(self, labels: tuple[str, ...], order: list[int]) -> int:
        key = tuple(labels[i] if i >= 0 else "" for i in order)
        known = self._cells.get(key)
        if known is not None:
            return known
        index = len(self._cells)
        if index >= len(self._codes):
            more = np.zeros((max(256, len(self._codes)), len(BASE_LABELS)), np.int32)
            self._codes = np.concatenate([self._codes, more])
        for column, word in enumerate(key):
            words = self._words[column]
            if word not in words:
                words[word] = len(words)
                self._names[column].append(word)
            self._codes[index, column] = words[word]
        self._cells[key] = index
        self._mask_cache.clear()
        return index

    def _forget_unused(self) -> None:
        """Rebuilds the table once most of its cells are older than the span: a stream of new labels must not grow it for ever."""
        if len(self._cells) < 4096:
            return
        used = np.zeros(len(self._cells), np.bool_)
        for span in self._spans:
            used[span.cell] = True
        if 2 * int(used.sum()) > len(self._cells):
            return
        keys = [key for key, index in self._cells.items() if used[index]]
        old = np.array([self._cells[key] for key in keys], np.int64)
        self._load_cells(keys)
        new_index = np.full(len(used), -1, np.int32)
        new_index[old] = np.arange(len(keys), dtype=np.int32)
        for span in self._spans:
            span.cell = new_index[span.cell]

    def _load_cells(self, keys: list[tuple[str, ...]]) -> None:
        self._words = [{} for _ in BASE_LABELS]
        self._names = [[] for _ in BASE_LABELS]
        self._cells = {}
        self._codes = np.zeros((0, len(BASE_LABELS)), np.int32)
        self._slot_cell = np.full(0, -1, np.int32)
        self._slot_born = np.full(0, np.nan)
        self._mask_cache.clear()
        order = list(range(len(BASE_LABELS)))
        for key in keys:
            self._cell(key, order)

    # --- questions ------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return self._now

    def errors(self, scope: Mapping[str, str], span_s: float) -> Ratio:
        mask = self._mask(scope)
        if mask is None:
            return Ratio(0, 0)
        k = n = 0
        for span in self._within(span_s):
            chosen = mask[span.cell]
            k += int(span.bad[chosen].sum())
            n += int(span.tried[chosen].sum())
        return Ratio(k, n)

    def calls(self, scope: Mapping[str, str], span_s: float) -> int:
        mask = self._mask(scope)
        if mask is None:
            return 0
        return sum(int(span.calls[mask[span.cell]].sum()) for span in self._within(span_s))

    def attempts(self, scope: Mapping[str, str], span_s: float) -> int:
        return self.errors(scope, span_s).n

    def tokens_per_min(self, scope: Mapping[str, str], span_s: float) -> float | None:
        return None

    def latency_s(self, scope: Mapping[str, str], span_s: float) -> float | None:
        return None

    def gpus(self, scope: Mapping[str, str], span_s: float) -> Sequence[str]:
        return []

    def values(self, label: str, scope: Mapping[str, str], span_s: float) -> Sequence[str]:
        mask = self._mask(scope)
        if mask is None or label not in _POSITION:
            return []
        column = _POSITION[label]
        weight = np.zeros(len(self._names[column]), np.int64)
        for span in self._within(span_s):
            chosen = mask[span.cell]
            np.add.at(weight, self._codes[span.cell[chosen], column], span.calls[chosen])
        found = [(-int(weight[i]), self._names[column][i]) for i in np.flatnonzero(weight)]
        return [name for _, name in sorted(found) if name]

    def usd_per_hour(self, scope: Mapping[str, str], span_s: float) -> float | None:
        mask = self._mask(scope)
        if mask is None:
            return None
        usd, known, covered = 0.0, 0, 0.0
        for span in self._within(span_s):
            chosen = mask[span.cell]
            usd += float(span.usd[chosen].sum())
            known += int(span.usd_known[chosen].sum())
            covered = max(covered, self._now - span.start)
        return usd / covered * 3600.0 if known and covered else None

    def _within(self, span_s: float) -> list[_Span]:
        found = [s for s in self._spans if s.start >= self._now - span_s - 1e-6]
        return found or [s for s in self._spans if s.end >= self._now]

    def _mask(self, scope: Mapping[str, str]) -> NDArray[np.bool_] | None:
        """Which cells carry all labels of the scope; None when no cell can."""
        key = tuple(sorted(scope.items()))
        cached = self._mask_cache.get(key)
        if cached is not None:
            return cached
        mask = np.ones(len(self._cells), np.bool_)
        for label, value in key:
            column = _POSITION.get(label)
            code = self._words[column].get(value) if column is not None else None
            if column is None or code is None:
                return None
            mask &= self._codes[: len(mask), column] == code
        if len(self._mask_cache) >= 64:
            self._mask_cache.clear()
        self._mask_cache[key] = mask
        return mask

    # --- state ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        spans = [
            (
                s.start, s.end, s.cell.tobytes(), s.calls.tobytes(), s.tried.tobytes(), s.bad.tobytes(), s.usd.tobytes(),
                s.usd_known.tobytes(),
            )
            for s in self._spans
        ]  # fmt: skip
        return pack_state("estate", 1, {"now": self._now, "cells": list(self._cells), "spans": spans})

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError when the bytes are of another stage or version."""
        saved = unpack_state(state, "estate", 1)
        self._now = float(saved["now"])
        self._load_cells([tuple(key) for key in saved["cells"]])
        self._spans = []
        for start, end, cell, calls, tried, bad, usd, known in saved["spans"]:
            ints = [np.frombuffer(b, np.int32).copy() for b in (cell, calls, tried, bad, known)]
            self._spans.append(
                _Span(start, end, ints[0], ints[1], ints[2], ints[3], np.frombuffer(usd, np.float64).copy(), ints[4])
            )  # fmt: skip
