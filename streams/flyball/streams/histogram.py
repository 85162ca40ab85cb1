"""Sparse logarithmic histograms of many series at once, built by sorting integers.

A value of a series is one integer, `slot << BUCKET_BITS | bucket`. Counting is sorting: SIMD sort of integers costs
about 10 ns a value whatever the number of series, where dense counters would need 2 kB a series.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flyball.core.columns import Histogram
from flyball.core.quantiles import quantile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flyball.core.columns import Floats, Ints

BUCKET_BITS = 8
BUCKETS = 1 << BUCKET_BITS
"""Bucket 255 ends at 1.1**255 ms, more than a year; longer values stay in it."""

_PER_LOG = 1.0 / math.log(Histogram.GROWTH)
_LOG_MS = math.log(1000.0)
_WAIT = 1 << 18
_COUNT_BITS = 31
_COUNT_MASK = (1 << _COUNT_BITS) - 1
_DENSE_LIMIT = 1 << 21
"""Up to so many possible codes a dense count is quicker than sorting."""


def buckets_of_logs(log_s: Floats) -> NDArray[np.int32]:
    """Bucket of values given as ln(seconds); -inf (zero seconds) is bucket 0."""
    raw = log_s * _PER_LOG
    raw += _LOG_MS * _PER_LOG
    np.ceil(raw, out=raw)
    np.maximum(raw, 0.0, out=raw)
    np.minimum(raw, BUCKETS - 1, out=raw)
    return raw.astype(np.int32)


def buckets(values_s: Floats) -> Ints:
    """Bucket of values in seconds, >= 0."""
    with np.errstate(divide="ignore"):
        return buckets_of_logs(np.log(values_s)).astype(np.int64)


def count_values(codes: NDArray[np.int32]) -> tuple[Ints, Ints]:
    """Sorted distinct codes, and how often each occurs."""
    ordered = np.sort(codes)
    first = _firsts(ordered)
    return ordered[first].astype(np.int64), np.diff(first, append=len(ordered))


def count_codes(codes: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Equal codes joined: sorted distinct codes, and the sum of `counts` of each.

    Codes must be < 2**32 and sums < 2**31: a window of two thousand million calls of one series and bucket.
    """
    if not len(codes):
        return codes, counts
    size = int(codes.max()) + 1
    if size <= _DENSE_LIMIT and size <= 4 * len(codes):
        dense = np.bincount(codes, counts, size)
        found = np.flatnonzero(dense)
        return found, dense[found].astype(np.int64)
    # Code and count share one integer, so that one sort of plain integers orders both.
    packed = np.sort(codes << _COUNT_BITS | counts)
    ordered = packed >> _COUNT_BITS
    first = _firsts(ordered)
    return ordered[first], np.add.reduceat(packed & _COUNT_MASK, first)


def _firsts(ordered: NDArray[Any]) -> Ints:
    """Where runs of equal values begin."""
    begins = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
    return np.flatnonzero(begins)


class HistogramSums:
    """The histogram of one value over all series of one open window, still growing.

    Values wait until there are `_WAIT` of them; counted runs are joined when they have doubled, so that each value is sorted a
    logarithmic number of times.
    """

    def __init__(self, codes: Ints | None = None, counts: Ints | None = None) -> None:
        self._values: list[NDArray[np.int32]] = []
        self._waiting = 0
        self._runs: list[tuple[Ints, Ints]] = []
        self._rows = self._joined = 0
        if codes is not None and counts is not None:
            self.add_counted(codes, counts)

    def add(self, codes: NDArray[np.int32]) -> None:
        """Add values as codes: `slot << BUCKET_BITS | bucket`."""
        self._values.append(codes)
        self._waiting += len(codes)
        if self._waiting > _WAIT:
            self._count()

    def add_counted(self, codes: Ints, counts: Ints) -> None:
        """Add codes that count `counts` times."""
        self._runs.append((codes, counts))
        self._rows += len(codes)
        if self._rows > 2 * self._joined + _WAIT:
            self.joined()

    def _count(self) -> None:
        values, self._values, self._waiting = self._values, [], 0
        if values:
            self.add_counted(*count_values(np.concatenate(values)))

    def joined(self) -> tuple[Ints, Ints]:
        """Sorted distinct codes and their counts."""
        self._count()
        empty: Ints = np.empty(0, np.int64)
        codes = np.concatenate([empty, *(run[0] for run in self._runs)])
        counts = np.concatenate([empty, *(run[1] for run in self._runs)])
        self._runs = [count_codes(codes, counts)]
        self._rows = self._joined = len(self._runs[0][0])
        return self._runs[0]


def histogram_of_codes(codes: Ints, counts: Ints) -> Histogram:
    """A `Histogram` from sorted codes whose upper part is the row."""
    return Histogram(codes >> BUCKET_BITS, codes & (BUCKETS - 1), counts)


def histogram(rows: Ints, values_s: Floats) -> Histogram:
    """A `Histogram` of values (seconds) of rows; nan counts nowhere."""
    told = ~np.isnan(values_s)
    codes = rows[told] << BUCKET_BITS | buckets(values_s[told])
    return histogram_of_codes(*count_codes(codes, np.ones_like(codes)))


def merge(parts: Sequence[Histogram]) -> Histogram:
    """The histogram of all values of `parts`; their rows must mean the same series."""
    empty: Any = np.empty(0, np.int64)
    codes = np.concatenate([empty, *(p.rows << BUCKET_BITS | p.buckets for p in parts)])
    return histogram_of_codes(*count_codes(codes, np.concatenate([empty, *(p.counts for p in parts)])))


__all__ = [
    "BUCKETS",
    "BUCKET_BITS",
    "HistogramSums",
    "buckets",
    "count_codes",
    "histogram",
    "histogram_of_codes",
    "merge",
    "quantile",
]
