"""Histograms: mergeable, bounded error, the same however the values were added."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.core.columns import Histogram
from flyball.core.quantiles import quantile
from flyball.streams.histogram import (
    BUCKET_BITS,
    BUCKETS,
    HistogramSums,
    buckets,
    count_codes,
    histogram,
    histogram_of_codes,
    merge,
)  # fmt: skip

seconds = st.floats(min_value=0.001, max_value=100_000.0)
series = st.lists(st.lists(seconds, max_size=30), min_size=1, max_size=6)


def of(values: list[list[float]]) -> Histogram:
    rows = np.repeat(np.arange(len(values)), [len(v) for v in values])
    return histogram(rows, np.array([x for v in values for x in v], np.float64))


def same(a: Histogram, b: Histogram) -> bool:
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("rows", "buckets", "counts"))


@given(series, st.floats(min_value=0.01, max_value=1.0))
def test_a_quantile_is_at_most_five_percent_away_from_the_value_of_its_rank(
    values: list[list[float]], q: float
) -> None:
    found = quantile(of(values), len(values), q)
    for row, told in zip(found, values, strict=True):
        if not told:
            assert np.isnan(row)
        else:
            rank = min(len(told), max(1, int(np.ceil(q * len(told) - 1e-9))))
            assert row == pytest.approx(sorted(told)[rank - 1], rel=0.05)


@given(series, series)
def test_merging_histograms_equals_the_histogram_of_all_values(
    a: list[list[float]], b: list[list[float]]
) -> None:
    size = max(len(a), len(b))
    a += [[] for _ in range(size - len(a))]
    b += [[] for _ in range(size - len(b))]
    assert same(merge([of(a), of(b)]), of([x + y for x, y in zip(a, b, strict=True)]))


def test_merging_nothing_gives_an_empty_histogram() -> None:
    assert len(merge([]).rows) == 0
    assert np.isnan(quantile(merge([]), 2, 0.5)).all()


@given(st.lists(st.lists(st.integers(0, 5000), max_size=50), max_size=6))
def test_counts_do_not_depend_on_how_values_were_added(parts: list[list[int]]) -> None:
    sums = HistogramSums()
    for part in parts:
        sums.add(np.array(part, np.int32))
        sums.joined()
    codes, counts = sums.joined()
    expected_codes, expected_counts = np.unique([x for part in parts for x in part], return_counts=True)
    assert codes.tolist() == expected_codes.tolist()
    assert counts.tolist() == expected_counts.tolist()


def test_sparse_and_dense_counting_agree() -> None:
    near = np.arange(0, 4000, 7, dtype=np.int64) % 1000
    far = near + (1 << 25)  # too high a code to be counted in a dense array
    times = np.arange(1, len(near) + 1)
    codes, counts = count_codes(near, times)
    far_codes, far_counts = count_codes(far, times)
    assert (far_codes - (1 << 25)).tolist() == codes.tolist()
    assert far_counts.tolist() == counts.tolist()


def test_values_up_to_a_millisecond_share_bucket_0_and_a_year_fits() -> None:
    assert buckets(np.array([0.0, 0.0005, 0.001])).tolist() == [0, 0, 0]
    assert buckets(np.array([1e12])).tolist() == [BUCKETS - 1]
    assert quantile(histogram(np.array([0]), np.array([0.0])), 1, 0.5).tolist() == [0.001]


def test_missing_values_count_nowhere() -> None:
    assert histogram(np.array([0, 1]), np.array([np.nan, 1.0])).rows.tolist() == [1]


def test_rows_and_buckets_come_sorted() -> None:
    h = histogram_of_codes(
        *count_codes(np.array([3 << BUCKET_BITS | 1, 2, 1], np.int64), np.array([1, 1, 2]))
    )
    assert (h.rows.tolist(), h.buckets.tolist(), h.counts.tolist()) == ([0, 0, 3], [1, 2, 1], [2, 1, 1])


@pytest.mark.parametrize("q", [0.0, -1.0, 1.5])
def test_a_quantile_outside_of_zero_and_one_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match="not a quantile"):
        quantile(of([[1.0]]), 1, q)
