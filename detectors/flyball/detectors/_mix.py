"""Means over calls that neither one tenant's burst nor a shift of the mix can move: read from a window's cells."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from flyball.core.columns import Rollup, Window
from flyball.detectors._state import Column, Floats, Ints, Table, half_life_weight

_TENANT_CALLS: Final = 3.0
"""Calls that one tenant counts in a window at least, however few the others make."""
_LEARNED_CALLS: Final = 20.0
"""Calls of a kind before it has a normal of its own."""
_UNTOLD, _NEVER = -1, -2


class CellRows:
    """Which row of one roll-up each cell of a window belongs to. A cache over cell slots: no snapshot needs it."""

    def __init__(self) -> None:
        self._cells = Table({"slot": Column("<i8", fresh=_UNTOLD), "born": Column("<f8")})

    def of(self, window: Window, rollup: Rollup) -> Ints:
        """int64[cells]: row of `rollup`; -1 for cells that lack one of its labels."""
        cells, t = window.cells, self._cells
        t.align(cells)
        place = np.full(rollup.capacity, -1, np.int64)
        place[rollup.ids] = np.arange(len(rollup))
        slot = t["slot"][cells.ids]
        row = np.where(
            (slot >= 0) & (slot < rollup.capacity), place[np.clip(slot, 0, rollup.capacity - 1)], -1
        )
        known = (slot == _NEVER) | ((row >= 0) & (rollup.born[row] == t["born"][cells.ids]))
        if known.all():
            return row
        places = [cells.by.index(label) for label in rollup.by]
        row_of = {rollup.labels[s]: r for r, s in enumerate(rollup.ids.tolist())}
        for i in np.flatnonzero(~known).tolist():
            cell = int(cells.ids[i])
            labels = cells.labels[cell]
            key = tuple(labels[p] for p in places)
            found = row_of.get(key, -1)
            row[i] = found
            t["slot"][cell] = rollup.ids[found] if found >= 0 else _UNTOLD if all(key) else _NEVER
            t["born"][cell] = rollup.born[found] if found >= 0 else -np.inf
        return row


class CellCodes:
    """A number for each value that one or several labels of a cell take together. A cache, as `CellRows`.

    Numbers hold for one window only once more than `most` values were seen: then it starts anew.
    """

    def __init__(self, labels: tuple[str, ...], most: int = 1_000_000) -> None:
        self.labels, self._most = labels, most
        self._cells = Table({"code": Column("<i8")})
        self.code_of: dict[tuple[str, ...], int] = {}

    def of(self, window: Window) -> Ints:
        """int64[cells]; equal where the labels are equal, 0 where all of them are empty."""
        cells = window.cells
        if len(self.code_of) > self._most:
            self._cells, self.code_of = Table({"code": Column("<i8")}), {}
        fresh = self._cells.align(cells)
        if len(fresh):
            places = [cells.by.index(label) for label in self.labels]
            for slot in fresh.tolist():
                key = tuple(cells.labels[slot][p] for p in places)
                self._cells["code"][slot] = (
                    self.code_of.setdefault(key, len(self.code_of) + 1) if any(key) else 0
                )
        codes: Ints = self._cells["code"][cells.ids]
        return codes


def tenant_scale(row: Ints, tenant: Ints, calls: Floats, rows: int) -> Floats:
    """float64[cells] in (0, 1]: how much of each cell's calls counts, so that no tenant has more than a third of its row's.

    A client that sends hundreds of calls at once says much about itself and little about the app. Calls without a tenant
    count in full. `row`: -1 counts nowhere.
    """
    pair, at = np.unique(row * (int(tenant.max(initial=0)) + 1) + tenant, return_inverse=True)
    of_pair = np.bincount(at, calls, len(pair))[at]
    there = row >= 0
    of_row = np.bincount(row[there], calls[there], rows)[np.where(there, row, 0)]
    most = np.maximum(_TENANT_CALLS, (of_row - of_pair) / 2)
    scale = np.where(tenant > 0, np.minimum(1.0, most / np.maximum(of_pair, 1e-9)), 1.0)
    return np.where(there & (calls > 0), scale, 0.0)


def by_row(row: Ints, rows: int, *values: Floats) -> list[Floats]:
    """Sums of cells' values over the rows of a roll-up."""
    there = row >= 0
    at = row[there]
    return [np.bincount(at, v[there], rows).astype(np.float64) for v in values]


class Kinds:
    """The normal of ln(value) for each kind of call (an app on a model, say): what a mean over calls is expected to be, given
    which calls it is a mean of.

    Args:
        labels: what makes a kind.
        half_life_s: age at which what was learned counts half.
        most: kinds remembered; those with fewest calls lately are forgotten first.
    """

    def __init__(self, labels: tuple[str, ...], half_life_s: float, most: int = 50_000) -> None:
        self.labels, self._half_life_s, self._most = labels, half_life_s, most
        self._codes = CellCodes(labels)
        self._state = np.zeros((2, 1))
        """float64[2, codes]: calls lately, mean; the index is the code."""

    def _read(self, window: Window) -> Ints:
        codes = self._codes.of(window)
        missing = len(self._codes.code_of) + 1 - self._state.shape[1]
        if missing > 0:
            self._state = np.concatenate([self._state, np.zeros((2, missing))], axis=1)
        return codes

    def normal(self, window: Window) -> tuple[Floats, Floats]:
        """float64[cells] each: the normal of the cell's kind; 1.0 where it is known, else 0.0."""
        codes = self._read(window)
        calls, mean = self._state[:, codes]
        return mean, (calls >= _LEARNED_CALLS).astype(np.float64)

    def learn(self, window: Window, calls: Floats, logs: Floats, teaches: Floats) -> None:
        """`teaches`: float64[cells] in [0, 1]."""
        codes, state = self._read(window), self._state
        state[0] *= half_life_weight(window.end - window.start, self._half_life_s)
        n = np.bincount(codes, calls * teaches, state.shape[1])
        sums = np.bincount(codes, logs * teaches, state.shape[1])
        told = n > 0
        state[0] += n
        state[1][told] += (sums[told] - n[told] * state[1][told]) / state[0][told]
        if state.shape[1] > self._most:
            self._forget()

    def _forget(self) -> None:
        keep = np.sort(np.argsort(-self._state[0], kind="stable")[: self._most // 2])
        kept = {int(c) for c in keep}
        self.load(
            [(list(k), *self._state[:, c].tolist()) for k, c in self._codes.code_of.items() if c in kept]
        )

    def pack(self) -> list[Any]:
        return [(list(key), *self._state[:, code].tolist()) for key, code in self._codes.code_of.items()]

    def load(self, state: list[Any]) -> None:
        self._codes = CellCodes(self.labels)
        self._codes.code_of = {tuple(key): i for i, (key, _, _) in enumerate(state, start=1)}
        self._state = np.zeros((2, len(state) + 1))
        for i, (_, calls, mean) in enumerate(state, start=1):
            self._state[:, i] = calls, mean
