"""What it costs to count one stream in eight partitions and put it together again: bytes → fronts → portions → merged windows.

The traffic of `pipeline_memory`, its bodies dealt to the partitions in turn. All work is done on one core: what the fronts take is shared among
workers where they run apart, and what merging takes is not. Baselines: decoding alone, and the same traffic through one `Windows`.

    python -m benchmarks portions
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from benchmarks.pipeline_memory import Pipeline, Row, bodies, decode_alone, in_turns, row, to_windows, traffic
from flyball.core.events import Batch
from flyball.streams.dedup import Deduplicator
from flyball.streams.formats.native import NativeNdjson
from flyball.streams.front import Front
from flyball.streams.merging import Merger
from flyball.streams.portion import decode_portion, encode_portion
from flyball.streams.windows import Windows

_PARTITIONS: Final = 8
_CALLS: Final = 100_000
_WINDOWS: Final = 2


class _Apart:
    """The fronts, and the merger behind them; counts what the merger's side takes and how many bytes pass between."""

    def __init__(self) -> None:
        self.sources = [f"llm-calls/{i}" for i in range(_PARTITIONS)]
        self.fronts = [Front(name) for name in self.sources]
        self.merger = Merger()
        self.offset, self.merging_s, self.sent_bytes, self.windows = 0, 0.0, 0, 0
        self._decode = NativeNdjson().decode

    def __call__(self, made: Sequence[bytes]) -> None:
        for n, body in enumerate(made):
            batch = Batch(events=self._decode(body).events, sender="gateway")
            self.offset += 1
            offsets = np.full(len(batch.events), self.offset, np.int64)
            self.fronts[n % _PARTITIONS].feed(batch, offsets, self.offset)
        told = [front.cut(sources=() if front.last > len(made) else self.sources) for front in self.fronts]
        for body in [encode_portion(portion) for portion in told if portion is not None]:
            self._merge(body)

    def _merge(self, body: bytes) -> None:
        begun = time.process_time()
        self.windows += len(self.merger.feed(decode_portion(body), 0.0))
        self.merging_s += time.process_time() - begun
        self.sent_bytes += len(body)


def run() -> list[Row]:
    """About a minute."""
    made = bodies(traffic(_CALLS))
    apart = _Apart()
    pipelines: list[Pipeline] = [decode_alone(), to_windows(Windows(), Deduplicator(), ()), apart]
    spent = in_turns(pipelines, [made] * len(pipelines), _WINDOWS)
    calls = statistics.median(10 * _CALLS / s[2] for s in spent)
    alone = statistics.median(10 * _CALLS / s[0] for s in spent)
    together = statistics.median(10 * _CALLS / s[1] for s in spent)
    return [
        row("bytes to 8 fronts to merged windows, of decode alone", calls, "calls/s", alone, calls / alone),
        row("the same, of one Windows", calls, "calls/s", together, calls / together),
        row("decoding and merging the portions of a window", apart.merging_s / apart.windows, "s"),
        row("portions of a window", apart.sent_bytes / apart.windows / 1e6, "MB"),
    ]
