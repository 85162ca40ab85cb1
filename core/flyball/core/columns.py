"""Closed windows as columns: what windows hand to detectors and to correlation.

Arrays are numpy; `n` is the number of series that had events in the window. All arrays of one `Rollup` have the same
row order. Rows exist only for series with at least one event: absence of a row is absence of data, never zero errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]

BASE_LABELS: Final[tuple[str, ...]] = (
    "provider",
    "model",
    "deployment",
    "region",
    "app",
    "prompt",
    "team",
    "tenant",
    "agent",
)
"""The labels of a cell: the finest thing that windows tell apart."""

SUMS: Final[tuple[str, ...]] = (
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "reasoning_tokens",
    "cost_usd",
    "latency_s",
    "ttft_s",
    "log_input_tokens",
    "log_output_tokens",
    "log2_input_tokens",
    "log2_output_tokens",
    "log_latency_s",
    "log2_latency_s",
    "log_ttft_s",
    "log2_ttft_s",
)
"""Columns of `Rollup.sums`. `log_x` is the sum of ln(x), `log2_x` of ln(x)², over calls where x > 0 was reported."""

COUNTED: Final[dict[str, str]] = {name: name.removeprefix("log_").removeprefix("log2_") for name in SUMS}
"""Which column of `Rollup.counts` divides a sum: `sums["log_latency_s"] / counts["latency_s"]`."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Sparse logarithmic histogram of every row: mergeable, relative error at most 5 %.

    Bucket b holds values in (GROWTH**(b-1), GROWTH**b] × 1 ms; bucket 0 everything up to 1 ms.
    `rows`, `buckets`, `counts`: int64[m], sorted by row, then bucket.
    """

    rows: Ints
    buckets: Ints
    counts: Ints

    GROWTH = 1.1


@dataclass(frozen=True, slots=True)
class Rollup:
    """One label set's aggregate of one window.

    `ids`: int64[n], the stable slot of each row's series, < `capacity`; a detector keeps state in arrays of
    that size. A slot can come to mean another series: `born[i]` is the start of the window in which it last did, and
    state older than that is not this series'.
    `labels[slot]` are the label values in the order of `by`. Rows that lack one of the labels do not exist.
    """

    by: tuple[str, ...]
    ids: Ints
    capacity: int
    born: Floats
    labels: Sequence[tuple[str, ...]]
    calls: Ints
    by_class: Ints
    """int64[n, len(CLASSES)]: calls by error class, column 0 = success."""
    tenants: Ints
    """int64[n]: distinct tenants (teams, where no tenant is told) that called; 0 where no call tells either."""
    failing_tenants: Ints
    """int64[n, len(CLASSES)]: distinct tenants with at least one failure of the class; column 0 is unused (0)."""
    sums: Mapping[str, Floats]
    counts: Mapping[str, Ints]
    """counts[x]: int64[n], calls for which x was reported; missing is not zero."""
    histograms: Mapping[str, Histogram]
    """`latency_s`, `ttft_s`; successful calls only."""

    def __len__(self) -> int:
        return len(self.ids)

    def row_labels(self, row: int) -> dict[str, str]:
        return dict(zip(self.by, self.labels[int(self.ids[row])], strict=True))


@dataclass(frozen=True, slots=True)
class Window:
    """One closed span [start, end) of event time.

    `cells` is the finest roll-up (by BASE_LABELS; labels may be empty there), `rollups` the configured ones.
    `samples` maps (cell slot, index of the error class) to up to three event ids.
    `live` is False while windows are rebuilt from history in which nobody may be woken.
    """

    start: float
    end: float
    cells: Rollup
    rollups: Mapping[tuple[str, ...], Rollup]
    samples: Mapping[tuple[int, int], tuple[str, ...]]
    live: bool = True

    def sample_ids(
        self, scope: Mapping[str, str], error_index: int | None = None, limit: int = 5
    ) -> list[str]:
        """Up to `limit` event ids of failed calls whose cell carries all labels of `scope`."""
        found: list[str] = []
        position = {name: i for i, name in enumerate(self.cells.by)}
        for (slot, index), ids in self.samples.items():
            if error_index is not None and index != error_index:
                continue
            labels = self.cells.labels[slot]
            if all(k in position and labels[position[k]] == v for k, v in scope.items()):
                found.extend(ids)
                if len(found) >= limit:
                    break
        return found[:limit]
