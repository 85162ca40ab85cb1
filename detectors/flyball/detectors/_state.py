"""State of many series in columns, by slot: what detectors keep between windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyball.core.columns import Rollup, Window

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Column:
    """One column: dtype (little endian, because snapshots travel), values per slot (0: a plain column), value when fresh."""

    dtype: str = "<f4"
    width: int = 0
    fresh: float = 0.0


class Table:
    """Named columns over the slots of one roll-up. A slot that came to mean another series is fresh again.

    `table["x"]` is dtype[capacity] where width is 0, else dtype[capacity, width].
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self._columns = dict(columns)
        self._data: dict[str, Array] = {}
        self.born: Floats = np.zeros(0)
        """float64[capacity]: start of the window in which the slot's series was born; -inf: never seen."""
        self.seen = 0
        """Slots that ever held a series."""
        for name, column in self._columns.items():
            self._data[name] = self._make(column, 0)

    def _make(self, column: Column, n: int) -> Array:
        shape = (n,) if column.width == 0 else (n, column.width)
        return np.full(shape, column.fresh, column.dtype)

    def __getitem__(self, name: str) -> Array:
        return self._data[name]

    @property
    def nbytes(self) -> int:
        return self.born.nbytes + sum(a.nbytes for a in self._data.values())

    def grow(self, capacity: int) -> None:
        more = capacity - len(self.born)
        if more <= 0:
            return
        self.born = np.concatenate([self.born, np.full(more, -np.inf)])
        for name, column in self._columns.items():
            self._data[name] = np.concatenate([self._data[name], self._make(column, more)])

    def align(self, rollup: Rollup) -> Ints:
        """Grows to the roll-up's capacity and makes slots fresh whose series is younger than their state.

        Returns: int64[m], the slots made fresh, in row order.
        """
        self.grow(rollup.capacity)
        before = self.born[rollup.ids]
        changed = rollup.born > before
        if not changed.any():
            return np.zeros(0, np.int64)
        slots = rollup.ids[changed]
        self.seen += int(np.isneginf(before[changed]).sum())
        for name, column in self._columns.items():
            self._data[name][slots] = column.fresh
        self.born[slots] = rollup.born[changed]
        return slots

    def pack(self) -> dict[str, Any]:
        slots = np.flatnonzero(~np.isneginf(self.born))
        return {
            "slots": slots.astype("<i8").tobytes(),
            "born": self.born[slots].astype("<f8").tobytes(),
            "columns": {name: self._data[name][slots].tobytes() for name in self._columns},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        slots = np.frombuffer(state["slots"], "<i8")
        capacity = int(slots.max()) + 1 if len(slots) else 0
        self.born = np.full(capacity, -np.inf)
        self.born[slots] = np.frombuffer(state["born"], "<f8")
        self.seen = len(slots)
        for name, column in self._columns.items():
            data = self._make(column, capacity)
            values = np.frombuffer(state["columns"][name], column.dtype)
            data[slots] = values.reshape((len(slots), *data.shape[1:]))
            self._data[name] = data


def find_rollup(window: Window, by: tuple[str, ...]) -> Rollup | None:
    """The roll-up over these labels, in whichever order the windows were configured to give them; None where there is none."""
    found = window.rollups.get(by)
    if found is not None:
        return found
    wanted = sorted(by)
    for labels, rollup in window.rollups.items():
        if sorted(labels) == wanted:
            return rollup
    return None


def half_life_weight(window_s: float, half_life_s: float) -> float:
    """How much of what was learned before is left after one window."""
    return float(0.5 ** (window_s / half_life_s))


def log_mean_exp(values: Array) -> Floats:
    """ln of the mean of exp over the last axis, without overflow.

    >>> float(log_mean_exp(np.array([[0.0, 0.0]]))[0])
    0.0
    """
    top = values.max(axis=-1)
    return np.asarray(top + np.log(np.exp(values - top[..., None]).mean(axis=-1)), dtype=np.float64)
