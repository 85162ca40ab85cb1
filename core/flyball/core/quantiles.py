"""Quantiles of a `Histogram`, for every row at once. Detectors and enrichment both need them, so they stand in core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flyball.core.columns import Histogram

if TYPE_CHECKING:
    from flyball.core.columns import Floats

BUCKET_0_S = 0.001
"""Upper end of bucket 0, seconds; what is below it cannot be told apart."""


def quantile(histogram: Histogram, n_rows: int, q: float) -> Floats:
    """The `q`-quantile of every row, in seconds; nan for rows without a value.

    It is the value of rank ceil(q × count), given as the geometric middle of its bucket: at most 5 % away from
    the value itself. Values up to 1 ms all read 1 ms. With few values a high quantile is the largest value: look at the count
    before believing a p99.

    Args:
        histogram: sorted by row, then bucket.
        n_rows: rows of the roll-up that the histogram belongs to.
        q: 0 < q <= 1.

    Returns: float64[n_rows].
    """
    if not 0.0 < q <= 1.0:
        raise ValueError(f"q = {q!r} is not a quantile; 0 < q <= 1")
    # The array's own namespace instead of an import: core stays free of numpy and quick to import.
    np: Any = histogram.counts.__array_namespace__()
    out: Floats = np.full(n_rows, np.nan)
    if not len(histogram.rows):
        return out
    running = histogram.counts.cumsum()
    first = np.flatnonzero(np.diff(histogram.rows, prepend=-1))
    rows = histogram.rows[first]
    before = running[first] - histogram.counts[first]
    last = np.append(first[1:], len(running)) - 1
    total = running[last] - before
    # The tiny allowance keeps 0.9 × 10 = 9.000000000000002 from becoming rank 10.
    rank = np.clip(np.ceil(q * total - 1e-9).astype(np.int64), 1, total)
    bucket = histogram.buckets[np.searchsorted(running, before + rank)]
    middle = BUCKET_0_S * Histogram.GROWTH ** (bucket - 0.5)
    out[rows] = np.where(bucket > 0, middle, BUCKET_0_S)
    return out
