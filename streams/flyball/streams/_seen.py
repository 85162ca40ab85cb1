"""Ids that were seen, for many ids at once: a table of 64-bit hashes, and the ids themselves only as long texts.

A set of half a million strings costs a miss of the cache for every look-up and keeps each string where the events lay, so that the next
body is decoded into cold memory. Here a batch is looked up by one gather over rows of seven hashes (20 ns an id), and its ids
are kept as one text, from which a snapshot is made: Python's hashes differ from process to process.
Two different ids share a hash once in 10**19 pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from flyball.core.columns import Ints

_ROW_BITS: Final = 3
_ROW: Final = 1 << _ROW_BITS
_WAYS: Final = _ROW - 1
_LOAD: Final = 4
"""Hashes a row on average before the table grows; then one row in twenty is full."""
_FIRST_ROWS: Final = 256
_JOINED: Final = 256
"""So many ids wait before they become a text."""
_BETWEEN: Final = "\x1f"


def hashes(ids: Sequence[str]) -> Ints:
    """int64[len(ids)]: this process's hash of every id; 0 for the empty one."""
    return np.fromiter(map(hash, ids), np.int64, len(ids))


class SeenIds:
    """Ids of one half of the remembered time; about 60 bytes each.

    Args:
        expected: so many are expected; growing costs as much as adding again.
    """

    __slots__ = ("_flat", "_full", "_mask", "_odd", "_rows", "_texts", "_waiting", "n")

    def __init__(self, expected: int = 0) -> None:
        self.n = 0
        self._odd: list[str] = []
        """Ids that hold the separator."""
        self._texts: list[str] = []
        self._waiting: list[str] = []
        self._make(max(_FIRST_ROWS, 1 << (expected // _LOAD).bit_length()))

    def _make(self, rows: int) -> None:
        self._mask = rows - 1
        self._rows: Ints = np.zeros((rows, _ROW), np.int64)
        """[row]: how many hashes it holds, then the hashes: one line of the cache, so one miss."""
        self._flat = self._rows.reshape(-1)
        self._full: set[int] = set()
        """Hashes whose row was full."""

    def any_of(self, keys: Ints) -> bool:
        """Whether an id with one of these hashes was added."""
        rows = self._rows.take(keys & self._mask, axis=0)
        if (rows == keys[:, None]).any():
            return True
        if self._full:  # only those that a full row may have turned away
            return not self._full.isdisjoint(keys[rows[:, 0] == _WAYS].tolist())
        return False

    def which(self, keys: Ints) -> list[bool]:
        """Whether an id with this hash was added, for every hash."""
        found: list[bool] = (self._rows.take(keys & self._mask, axis=0) == keys[:, None]).any(axis=1).tolist()
        if self._full:
            found = [there or key in self._full for there, key in zip(found, keys.tolist(), strict=True)]
        return found

    def add(self, ids: Sequence[str], keys: Ints) -> None:
        """Add distinct ids that are not there, none of them empty, with their hashes."""
        n = self.n + len(ids)
        if n > _LOAD * len(self._rows):
            self._grow(n)
        self._put(keys)
        self.n = n
        self._waiting.extend(ids)
        if len(self._waiting) >= _JOINED:
            self._join()

    def _put(self, keys: Ints) -> None:
        while len(keys):
            base = (keys & self._mask) << _ROW_BITS
            fill = self._flat.take(base)
            if fill.max() >= _WAYS:
                full = fill >= _WAYS
                self._full.update(keys[full].tolist())
                keys, base, fill = keys[~full], base[~full], fill[~full]
            fill += 1
            at = base + fill
            self._flat[at] = keys
            self._flat[base] = fill
            keys = keys[self._flat.take(at) != keys]  # of several for one row the last was put

    def _grow(self, n: int) -> None:
        held = self._rows[:, 1:]
        keys = np.concatenate([held[held != 0], np.array(sorted(self._full), np.int64)])
        self._make(1 << (2 * n // _LOAD).bit_length())
        self._put(keys)

    def _join(self) -> None:
        ids, self._waiting = self._waiting, []
        text = _BETWEEN.join(ids)
        if text.count(_BETWEEN) != len(ids) - 1:
            self._odd.extend(x for x in ids if _BETWEEN in x)
            ids = [x for x in ids if _BETWEEN not in x]
            text = _BETWEEN.join(ids)
        if ids:
            self._texts.append(text)

    def all(self) -> set[str]:
        """Every id, one by one: slow."""
        text, odd = self.state()
        return {*(text.split(_BETWEEN) if text else ()), *odd}

    def state(self) -> tuple[str, list[str]]:
        """What `restored` needs; the same for the same ids in the same order, however they came in batches."""
        self._join()
        return _BETWEEN.join(self._texts), self._odd

    @classmethod
    def restored(cls, state: tuple[str, list[str]]) -> SeenIds:
        text, odd = state
        ids = [*(text.split(_BETWEEN) if text else ()), *odd]
        new = cls(len(ids))
        if ids:
            new.add(ids, hashes(ids))
        return new
