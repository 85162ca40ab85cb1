"""The embedded runtime in one process: bytes → native decode → durable log → dedup → windows → detectors, all of it behind.

Traffic is that of `pipeline_memory`: bodies of 512 calls, without spans, as a gateway sends them. The sender is held back as a client that
waits for its answers is: a bounded number of bodies is on its way, and the stages are never more than a few bodies behind, so the figure is
what can be kept up for ever, not what fits into buffers. The database is in the folder for temporary files, with `synchronous=full`.

Processor time is what is judged beside the clock: the machine may be shared, and decoding alone is measured in the same run, in turns.

    python -m benchmarks embedded
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks.pipeline_memory import bodies, decode_alone, later, took_s, traffic
from flyball.app.clock import monotonic
from flyball.app.embedded import Embedded
from flyball.app.serve import calm_interpreter
from flyball.app.settings import Settings
from flyball.app.tables import print_rows
from flyball.app.wiring import make_formats, make_pipeline

BAR_CALLS_S: Final = 200_000
_START: Final = 1_700_000_000
_CALLS_A_SECOND: Final = 100_000
_WINDOW_S: Final = 10
_WARM_S: Final = 12
"""Seconds of event time before measuring: the first window closes after them."""
_BODIES_UNANSWERED: Final = 32
_BODIES_BEHIND: Final = 32


class EventTime:
    """A clock that says the second of the traffic that is being sent."""

    def __init__(self) -> None:
        self.at = float(_START)

    def now(self) -> float:
        return self.at


class Sender:
    """Posts bodies as the HTTP interface would, and waits where a client would."""

    def __init__(self, runtime: Embedded, clock: EventTime) -> None:
        self._runtime, self._clock = runtime, clock
        self._decode = make_formats(Settings(), b"benchmark")["native"].decode
        self._unanswered: deque[Future[int]] = deque()
        self._answered = 0

    def send(self, made: Sequence[bytes], second: int) -> None:
        self._clock.at = float(_START + second + 1)
        for body in made:
            self._unanswered.append(
                self._runtime.ingest(self._decode(body).events, "gateway", self._clock.at)
            )
            if len(self._unanswered) > _BODIES_UNANSWERED:
                self._answered = self._unanswered.popleft().result()
            self._runtime.wait_for(self._answered - _BODIES_BEHIND)
        self._unanswered.append(self._runtime.tick())

    def finish(self) -> None:
        while self._unanswered:
            self._answered = self._unanswered.popleft().result()
        self._runtime.wait_for(self._answered)


Seconds = list[float]


def measured(folder: Path, windows: int) -> tuple[Seconds, Seconds, Seconds]:
    """Per window of a million calls: seconds by the clock, of processor time, and of processor time of decoding alone.

    Raises: AssertionError when not every call sent was counted once.
    """
    made = bodies([msgspec.structs.replace(c, span="", trace="") for c in traffic(_CALLS_A_SECOND)])
    clock, settings = EventTime(), Settings()
    runtime = Embedded(lambda: make_pipeline(settings, monotonic), folder / "benchmark.sqlite3", clock)
    runtime.start()
    sender, alone = Sender(runtime, clock), decode_alone()
    spent: tuple[Seconds, Seconds, Seconds] = ([0.0] * windows, [0.0] * windows, [0.0] * windows)
    sent = _WARM_S + windows * _WINDOW_S
    for second in range(sent):
        bodies_now = later(made, second)
        decoding = took_s(alone, bodies_now)
        wall, cpu = time.perf_counter(), time.process_time()
        sender.send(bodies_now, second)
        sender.finish()
        if second >= _WARM_S:
            window = (second - _WARM_S) // _WINDOW_S
            spent[0][window] += time.perf_counter() - wall
            spent[1][window] += time.process_time() - cpu
            spent[2][window] += decoding
    counted = runtime.figures.totals["events"]["llm_call"]
    runtime.stop()
    if counted != _CALLS_A_SECOND * sent:
        raise AssertionError(f"{counted} calls counted, {_CALLS_A_SECOND * sent} sent")
    return spent


def run(windows: int = 2) -> list[dict[str, Any]]:
    """Two rows: by the clock (judged), and by processor time."""
    before = sys.getswitchinterval(), gc.get_threshold()
    calm_interpreter()  # as `flyball run`
    try:
        with tempfile.TemporaryDirectory() as folder:
            walls, ours, alone = measured(Path(folder), windows)
    finally:
        sys.setswitchinterval(before[0])
        gc.set_threshold(*before[1])
        gc.unfreeze()
    calls = _CALLS_A_SECOND * _WINDOW_S
    by_clock, by_cpu, decoding = (calls / min(seconds) for seconds in (walls, ours, alone))
    ratio = statistics.median(a / o for a, o in zip(alone, ours, strict=True))
    common = {"unit": "calls/s", "baseline": round(decoding)}
    return [
        {"name": "embedded with durable log", "value": round(by_clock), **common,
         "ratio": round(by_clock / decoding, 3), "bar": BAR_CALLS_S, "holds": by_clock >= BAR_CALLS_S},
        {"name": "embedded with durable log, per second of processor time", "value": round(by_cpu), **common,
         "ratio": round(ratio, 3), "bar": None, "holds": None},
    ]  # fmt: skip


if __name__ == "__main__":
    print_rows(run())
