"""A million series by way of Kafka: what a worker with all roles holds, and how long it takes to go on after `kill -9`.

A series is a cell (a combination of base labels) or a row of a roll-up. The traffic names 340,000 tenants, each with one call in a window of 10 s, so that
hardly anything is shared: the dearest case there is. Two windows of it are in a topic of 8 partitions; `flyball worker`, with
SQLite and `max_cells` as large as that needs, reads them, is killed once a snapshot holds them, and is started again.

    python -m benchmarks kafka_series
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx
import msgspec

from benchmarks._kafka import broker, fill, lines, topics
from benchmarks.pipeline_memory import Row, row, traffic
from flyball.app.tables import print_rows
from flyball.app.wiring import DATABASE_FILE
from flyball.core.columns import BASE_LABELS
from flyball.core.events import LlmCall
from flyball.streams.cells import labels_of
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.producer import ProducerSettings
from flyball.streams.rollups import DEFAULT_ROLLUPS
from tests.processes import eventually, free_port
from tests.servers.kafka_broker import CannotStart

BAR_SERIES: Final = 1_000_000
BAR_RESTORE_S: Final = 15.0
BAR_MB: Final = 4000.0
_TENANTS_A_SECOND: Final = 34_000
_WINDOW_S: Final = 10
_SECONDS: Final = 24
_CELLS: Final = 450_000
_PATIENCE_S: Final = 900.0


class Running:
    """A worker, and what can be seen of it."""

    def __init__(self, config: KafkaConfig, folder: Path, name: str) -> None:
        self.url, self.log = f"http://127.0.0.1:{(port := free_port())}", folder / f"{name}.log"
        env = os.environ | {
            "FLYBALL_KAFKA__PREFIX": config.prefix, "FLYBALL_DATA": str(folder / "data"), "FLYBALL_MAX_CELLS": str(_CELLS),
            "FLYBALL_KAFKA__STUCK_S": "600",  # a machine that is shared may give the first window of new series minutes
        }  # fmt: skip
        self.begun = time.perf_counter()
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flyball.app", "worker", "--kafka", config.bootstrap, "--port", str(port)],
                env=env, stdout=out, stderr=out,
            )  # fmt: skip

    def told(self, path: str) -> str:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"{self.url}{path}", timeout=60.0)
            return answer.text if answer.status_code == 200 else ""
        return ""

    def windows(self) -> int:
        found = re.search(r'"windows":\s*(\d+)', self.told("/v1/status"))
        return int(found[1]) if found else 0

    def alive(self) -> None:
        """Raises: AssertionError with the end of what it said."""
        if self.process.poll() is not None:
            raise AssertionError(f"the worker ended: {self.log.read_text()[-3000:]}")

    def until_windows(self, n: int) -> None:
        eventually(lambda: self.process.poll() is not None or self.windows() >= n, _PATIENCE_S, 0.5)
        self.alive()

    def until_ready(self) -> float:
        """Seconds since its start until it governs and its partitions are taken on."""
        eventually(
            lambda: (
                self.process.poll() is not None
                or ("partitions.taken" in self.log.read_text() and self.told("/readyz"))
            ),
            _PATIENCE_S,
            0.1,
        )
        self.alive()
        return time.perf_counter() - self.begun

    def until_stored(self, database: Path) -> None:
        """Until a snapshot holds all that was in the log when this was asked."""

        def position(what: str) -> int:
            with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as c:
                found = c.execute(what).fetchone()[0]
            return int(found or 0)

        now = position("SELECT max(id) FROM log")
        eventually(lambda: position("SELECT max(position) FROM snapshots") >= now, _PATIENCE_S, 0.5)
        self.alive()

    def cpu_s(self) -> float:
        ticks = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")

    def most_mb(self) -> float:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) / 1024 if found else 0.0


@contextlib.contextmanager
def worker(config: KafkaConfig, folder: Path, name: str) -> Iterator[Running]:
    running = Running(config, folder, name)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait(30)


def calls_of(second: int) -> list[LlmCall]:
    """One call of each of this second's tenants; the same tenants come again a window later."""
    first = second % _WINDOW_S * _TENANTS_A_SECOND
    return [
        msgspec.structs.replace(call, tenant=f"tenant-{first + i:06d}")
        for i, call in enumerate(traffic(_TENANTS_A_SECOND))
    ]


def lines_of(second: int) -> list[bytes]:
    return lines(calls_of(second))


def series() -> int:
    """Cells and rows of roll-ups of a window."""
    cells = {labels_of(call) for second in range(_WINDOW_S) for call in calls_of(second)}
    found = len(cells)
    for by in DEFAULT_ROLLUPS:
        positions = [BASE_LABELS.index(name) for name in by]
        found += len({named for cell in cells if all(named := tuple(cell[p] for p in positions))})
    return found


def run() -> list[Row]:
    """About three minutes."""
    try:
        with broker(pinned=False) as (cluster, folder):
            config = KafkaConfig(cluster.bootstrap, prefix="series.")
            topics(config)
            fill(config, lines_of, _SECONDS, 100, ProducerSettings().compression)
            with worker(config, folder, "first") as first:
                first.until_windows(_SECONDS // _WINDOW_S)
                first.until_stored(folder / "data" / DATABASE_FILE)
                memory = first.most_mb()
            with worker(config, folder, "second") as second:
                took_s = second.until_ready()
                cpu_s, again = second.cpu_s(), second.most_mb()
    except CannotStart as e:
        print(f"kafka_series: {e}", file=sys.stderr)
        return []
    return [
        row("series of a window", series(), "series", bar=BAR_SERIES),
        row("most memory of a worker with all roles", memory, "MB", bar=BAR_MB, at_most=True),
        row("most memory of it once more, after kill -9", again, "MB"),
        row(
            "start to governing again, after kill -9", round(took_s, 1), "s", bar=BAR_RESTORE_S, at_most=True
        ),
        row("processor time of that", round(cpu_s, 1), "s"),
    ]


if __name__ == "__main__":
    print_rows(run())
