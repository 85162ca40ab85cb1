"""The way of the data in memory, on one core: bytes → native decode → dedup → windows → window detectors.

Traffic is made here, the same every time: calls of about 410 bytes over 4 providers, 20 apps and 200 tenants, in bodies of 512 lines, at
100,000 calls a second of event time, so that a window of 10 s holds a million calls. Every figure is measured against
msgspec decoding alone, in processor time, pass by pass in turns, and is the median over whole windows: machines differ and are shared.

    python benchmarks/pipeline_memory.py [--json]
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec
import numpy as np

import flyball.detectors
from flyball.core.codec import decode_events, encode_events
from flyball.core.events import Batch, Event, LlmCall
from flyball.core.plugins import Registry
from flyball.core.ports import WindowDetector
from flyball.streams.dedup import Deduplicator
from flyball.streams.formats.native import NativeNdjson
from flyball.streams.windows import Windows, WindowSettings

BAR_RATIO: Final = 0.45
BAR_FLAT: Final = 1.5
BAR_BYTES_A_SERIES: Final = 1000.0
BAR_SNAPSHOT_S: Final = 0.1

_PASS_CALLS: Final = 100_000
_PASSES_A_WINDOW: Final = 10
_BODY_CALLS: Final = 512
_AT: Final = b'"at":1700000000'
_ID: Final = b"chatcmpl-P0000"
_PROVIDERS: Final = ("openai", "anthropic", "azure", "vertex_ai")
_MODELS: Final = (
    ("gpt-4o-2024-08-06", "gpt-4o-mini"), ("claude-sonnet-4-20250514", "claude-3-5-haiku"),
    ("gpt-4o-eu", "gpt-4.1"), ("gemini-2.5-pro", "gemini-2.5-flash"),
)  # fmt: skip

Row = dict[str, Any]
Pipeline = Callable[[Sequence[bytes]], None]


def traffic(n: int, cells: int | None = None, seed: int = 1) -> list[LlmCall]:
    """`n` calls within one second. With `cells`, spread evenly over exactly so many combinations of labels."""
    random = np.random.default_rng(seed)
    tenant = np.minimum(random.zipf(1.3, n) - 1, 199) if cells is None else random.integers(0, cells, n)
    kind = random.integers(0, 160, n) if cells is None else tenant % 160
    failed = random.random(n) < 0.01
    cached = random.random(n) < 0.3
    prompt = random.lognormal(7.0, 1.2, n).astype(int) + 1
    answer = random.lognormal(5.0, 1.0, n).astype(int) + 1
    took = random.lognormal(0.5, 0.7, n).round(3)
    return [
        _call(i, int(kind[i]), int(tenant[i]), bool(failed[i]), int(prompt[i]), int(answer[i]), float(took[i]),
              bool(cached[i]), n)
        for i in range(n)
    ]  # fmt: skip


def _call(
    i: int, kind: int, tenant: int, failed: bool, prompt: int, answer: int, took: float, cached: bool, n: int
) -> LlmCall:
    provider, model, app = kind % 4, kind // 4 % 2, kind // 8 % 20
    return LlmCall(
        at=1_700_000_000.0 + (i * 999 // n) / 1000.0, id=f"{_ID.decode()}-{i:012x}", provider=_PROVIDERS[provider],
        model=_MODELS[provider][model], deployment=f"{_PROVIDERS[provider]}-main",
        region="eu-west-1" if provider % 2 else "us-east-1", app=f"app-{app:02d}", prompt=f"assistant-{app:02d}@v{app % 5}",
        team=f"team-{tenant % 12}", tenant=f"tenant-{tenant:05d}", key=f"key-{tenant % 50}", operation="chat",
        error="overloaded" if failed else "", error_code="529" if failed else "", input_tokens=prompt,
        output_tokens=None if failed else answer, cache_read_tokens=prompt // 2 if cached else None,
        cost_usd=round(prompt * 3e-6, 6), latency_s=took, ttft_s=None if failed else round(took / 4, 3),
        finish="" if failed else "stop", stream=True,
    )  # fmt: skip


def bodies(calls: Sequence[LlmCall]) -> list[bytes]:
    encoder = msgspec.json.Encoder()
    return [encoder.encode_lines(calls[i : i + _BODY_CALLS]) for i in range(0, len(calls), _BODY_CALLS)]


def later(made: Sequence[bytes], seconds: int) -> list[bytes]:
    """The same bodies, `seconds` later and with other ids: as if they were new."""
    at, ids = b'"at":17%08d' % seconds, b"chatcmpl-P%04d" % seconds
    return [body.replace(_AT, at).replace(_ID, ids) for body in made]


def window_detectors() -> list[WindowDetector]:
    """Every detector of the house that reads windows."""
    registry = Registry("detectors", flyball.detectors, skip=("conformance",))
    return [kind() for kind in map(registry.get, registry.kinds()) if kind.reads == "windows"]


def decode_alone() -> Pipeline:
    decoder = msgspec.json.Decoder(Event)

    def go(made: Sequence[bytes]) -> None:
        for body in made:
            decoder.decode_lines(body)

    return go


def to_windows(windows: Windows, dedup: Deduplicator | None, detectors: Sequence[WindowDetector]) -> Pipeline:
    decode = NativeNdjson().decode

    def go(made: Sequence[bytes]) -> None:
        for body in made:
            batch = Batch(events=decode(body).events, sender="gateway")
            if dedup is not None:
                batch = dedup.feed(batch)
            closed = windows.feed(batch)
            if closed:
                for detector in detectors:
                    detector.feed(closed)

    return go


def took_s(pipeline: Pipeline, made: Sequence[bytes]) -> float:
    begun = time.process_time()
    pipeline(made)
    return time.process_time() - begun


def in_turns(
    pipelines: Sequence[Pipeline], traffics: Sequence[Sequence[bytes]], windows: int
) -> list[list[float]]:
    """CPU seconds of each pipeline per whole window; the pipelines take turns second by second.

    Before that they warm up, until the first window has closed: then every series is new.
    """
    spent = []
    first = _PASSES_A_WINDOW + 3
    for second in range(first):
        for pipeline, made in zip(pipelines, traffics, strict=True):
            pipeline(later(made, second))
    for window in range(windows):
        sums = [0.0] * len(pipelines)
        begin = first + window * _PASSES_A_WINDOW
        for second in range(begin, begin + _PASSES_A_WINDOW):
            for i, (pipeline, made) in enumerate(zip(pipelines, traffics, strict=True)):
                sums[i] += took_s(pipeline, later(made, second))
        spent.append(sums)
    return spent


def row(name: str, value: float, unit: str, baseline: float | None = None, ratio: float | None = None,
        bar: float | None = None, *, at_most: bool = False) -> Row:  # fmt: skip
    judged = value if ratio is None else ratio
    holds = None if bar is None else judged <= bar if at_most else judged >= bar
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "ratio": ratio,
        "bar": bar,
        "holds": holds,
    }


def speed(detectors: Sequence[WindowDetector], windows: int) -> Iterator[Row]:
    """What decoding alone reaches, and what is left of it with windows and with everything."""
    made = bodies(traffic(_PASS_CALLS))
    full = Windows()
    pipelines = [
        decode_alone(),
        to_windows(Windows(), None, ()),
        to_windows(full, Deduplicator(), detectors),
    ]
    spent = in_turns(pipelines, [made] * len(pipelines), windows)
    calls = _PASS_CALLS * _PASSES_A_WINDOW
    alone = calls / statistics.median(s[0] for s in spent)
    yield row("native decode alone (msgspec)", alone, "calls/s")
    for i, name in ((1, "bytes to windows"), (2, f"bytes to dedup, windows, {len(detectors)} detectors")):
        value = calls / statistics.median(s[i] for s in spent)
        ratio = statistics.median(s[0] / s[i] for s in spent)
        yield row(name, value, "calls/s", alone, ratio, BAR_RATIO)
    yield row("cells of that traffic", full.stats.cells, "cells")


def flatness(windows: int) -> Iterator[Row]:
    """Cost of a call with 100 and with 100,000 cells, closing included."""
    wide = WindowSettings(max_cells=150_000)
    few, many = bodies(traffic(_PASS_CALLS, 100)), bodies(traffic(_PASS_CALLS, 100_000))
    pipelines = [to_windows(Windows(wide), None, ()), to_windows(Windows(wide), None, ())]
    spent = in_turns(pipelines, [few, many], windows)
    calls = _PASS_CALLS * _PASSES_A_WINDOW
    costs = [statistics.median(s[i] for s in spent) / calls * 1e6 for i in (0, 1)]
    ratio = statistics.median(s[1] / s[0] for s in spent)
    yield row(
        "bytes to windows, 100,000 cells (against 100)",
        costs[1],
        "µs/call",
        costs[0],
        ratio,
        BAR_FLAT,
        at_most=True,
    )


def memory() -> Iterator[Row]:
    """What 100,000 cells hold on to, one window open and one just closed, and how long a snapshot takes."""
    calls = traffic(200_000, 100_000)
    chunks = [calls[i : i + _BODY_CALLS] for i in range(0, len(calls), _BODY_CALLS)]
    gc.collect()
    tracemalloc.start()
    windows = Windows(WindowSettings(max_cells=150_000))
    series = 0
    for shift in (0.0, 20.0):
        for chunk in chunks:
            # Decoded anew, as by the log: else the strings that cells keep would be those of the traffic.
            moved = [msgspec.structs.replace(c, at=c.at + shift) for c in chunk]
            for closed in windows.feed(Batch(events=decode_events(encode_events(list[Event](moved))))):
                series = len(closed.cells) + sum(len(r) for r in closed.rollups.values())
                del closed
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    yield row("memory of windows per series", held / series, "bytes", bar=BAR_BYTES_A_SERIES, at_most=True)
    times = []
    for _ in range(5):
        begun = time.process_time()
        state = windows.snapshot()
        times.append(time.process_time() - begun)
    yield row("snapshot of 100,000 cells", statistics.median(times), "s", bar=BAR_SNAPSHOT_S, at_most=True)
    yield row("snapshot of 100,000 cells, size", len(state) / 1e6, "MB")
    begun = time.process_time()
    Windows(WindowSettings(max_cells=150_000)).restore(state)
    yield row("restoring 100,000 cells", time.process_time() - begun, "s")


def run(detectors: Sequence[WindowDetector] | None = None, windows: int = 2) -> list[Row]:
    """All rows; `windows` windows of a million calls each are measured. About a minute."""
    chosen = window_detectors() if detectors is None else detectors
    return [*speed(chosen, windows), *flatness(windows), *memory()]


def main() -> int:
    rows = run()
    if "--json" in sys.argv[1:]:
        print(json.dumps(rows, indent=1))
    else:
        for r in rows:
            against = "" if r["ratio"] is None else f"  ratio {r['ratio']:.3f}"
            verdict = (
                "" if r["holds"] is None else f"  bar {r['bar']:g}: {'holds' if r['holds'] else 'MISSED'}"
            )
            print(f"{r['name']:55s} {r['value']:14,.3f} {r['unit']}{against}{verdict}")
    return 0 if all(r["holds"] is not False for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
