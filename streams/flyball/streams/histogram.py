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
    from flyball.core.columns import Floats, Ints

BUCKET_BITS = 8
BUCKETS = 1 << BUCKET_BITS
"""Bucket 255 ends at 1.1**255 ms, more than a year; longer values stay in it."""

_PER_LOG = 1.0 / math.log(Histogram.GROWTH)
_LOG_MS = math.log(1000.0)
_COUNT_BITS = 31
_COUNT_MASK = (1 << _COUNT_BITS) - 1
_DENSE_LIMIT = 1 << 21
"""Up to so many possible codes a dense count is quicker than sorting."""


def buckets_of_logs(log_s: Floats) -> Ints:
    """Bucket of values given as ln(seconds); -inf (zero seconds) is bucket 0."""
    raw = np.ceil((log_s + _LOG_MS) * _PER_LOG)
    return np.clip(raw, 0, BUCKETS - 1).astype(np.int64)


def buckets(values_s: Floats) -> Ints:
    """Bucket of values in seconds, >= 0."""
    with np.errstate(divide="ignore"):
        return buckets_of_logs(np.log(values_s))


def count_codes(codes: Ints, counts: Ints | None = None) -> tuple[Ints, Ints]:
    """Equal codes joined: sorted distinct codes, and the sum of `counts` (1 where None) of each.

    Codes must be < 2**32 and sums < 2**31: a window of two thousand million calls of one series and bucket.
    """
    if not len(codes):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if counts is None:
        ordered = np.sort(codes)
        first = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
        return ordered[first], np.diff(first, append=len(ordered))
    size = int(codes.max()) + 1
    if size <= _DENSE_LIMIT and size <= 16 * len(codes):
        dense = np.bincount(codes, counts, size)
        found = np.flatnonzero(dense)
        return found, dense[found].astype(np.int64)
    # Code and count share one integer, so that one sort of plain integers orders both.
    packed = np.sort(codes << _COUNT_BITS | counts)
    ordered = packed >> _COUNT_BITS
    first = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
    return ordered[first], np.add.reduceat(packed & _COUNT_MASK, first)


class HistogramSums:
    """The histogram of one value over all series of one open window, still growing.

    Holds counted runs and joins them when they have doubled, so that each value is sorted a logarithmic number of times.
    """

    def __init__(self, codes: Ints | None = None, counts: Ints | None = None) -> None:
        self._runs: list[tuple[Ints, Ints]] = []
        self._rows = self._joined = 0
        if codes is not None and counts is not None:
            self.add(codes, counts)

    def add(self, codes: Ints, counts: Ints | None = None) -> None:
        """Add values as codes (`slot << BUCKET_BITS | bucket`), each counting `counts` times."""
        run = count_codes(codes) if counts is None else (codes, counts)
        self._runs.append(run)
        self._rows += len(run[0])
        if self._rows > 2 * self._joined + (1 << 16):
            self.joined()

    def joined(self) -> tuple[Ints, Ints]:
        """Sorted distinct codes and their counts."""
        if len(self._runs) != 1:
            codes = np.concatenate([np.empty(0, np.int64), *(run[0] for run in self._runs)])
            counts = np.concatenate([np.empty(0, np.int64), *(run[1] for run in self._runs)])
            self._runs = [count_codes(codes, counts)]
        else:
            self._runs = [count_codes(*self._runs[0])]
        self._rows = self._joined = len(self._runs[0][0])
        return self._runs[0]


def histogram_of_codes(codes: Ints, counts: Ints) -> Histogram:
    """A `Histogram` from sorted codes whose upper part is the row."""
    return Histogram(codes >> BUCKET_BITS, codes & (BUCKETS - 1), counts)


def histogram(rows: Ints, values_s: Floats) -> Histogram:
    """A `Histogram` of values (seconds) of rows; nan counts nowhere."""
    told = ~np.isnan(values_s)
    return histogram_of_codes(*count_codes(rows[told] << BUCKET_BITS | buckets(values_s[told])))


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
