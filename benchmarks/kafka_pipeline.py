"""From a Kafka topic to detectors on one core, against fetching and decoding alone, Faust and Quix Streams.

A real broker on this machine, one node, kept on another core where there is one. A topic of 8 partitions holds 14 s of the traffic of `pipeline_memory`
(100,000 calls a second of event time), once with one call a record and once with 62 kB of lines a record, written by aiokafka with the
compression that our ingest uses. Each pass is a process of its own, kept on one core, and what is compared takes turns. The chain: fetch → decode →
windows → portions → merged windows → detectors. The worker: the same as `flyball worker` hosts it, with portions by Kafka, the log in SQLite,
snapshots and commits. Both with aiokafka, which the worker uses; the chain with confluent-kafka's batch consume too. Faust and Quix Streams
decode and count the first calls. Processor time; figures are medians.

    python -m benchmarks kafka_pipeline
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

from benchmarks._kafka import apart, broker, cores, fill, lines, passes, topics
from benchmarks.pipeline_memory import Row, row
from flyball.app.tables import print_rows
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.partition import CALLS
from flyball.streams.kafka.producer import ProducerSettings
from tests.servers.kafka_broker import CannotStart, cache

BAR_ONE: Final = 0.7
BAR_MANY: Final = 0.5
BAR_FAUST: Final = 20.0
BAR_QUIX: Final = 3.0
_KINDS: Final = ("aiokafka", "chain-aiokafka", "confluent", "chain-confluent", "worker")
_SECONDS: Final = 14
"""The first window closes after 12."""
_TURNS: Final = 3
_LINES: Final = 150
"""Some 62 kB."""
_FAUST_CALLS: Final = 40_000
_QUIX_CALLS: Final = 200_000
Pass: TypeAlias = "dict[str, Any]"
_QUIX: Final = "quixstreams==3.28.1"


def in_turns(config: KafkaConfig, calls: int) -> dict[str, list[Pass]]:
    """Passes by kind. Raises: AssertionError where not every call was counted where it belongs."""
    found: dict[str, list[Pass]] = {kind: [] for kind in _KINDS}
    for turn in range(_TURNS):
        own = f"{config.prefix}{turn}."
        topics(KafkaConfig(config.bootstrap, prefix=own))
        for kind in _KINDS:
            one = passes(kind, config.bootstrap, config.prefix, own, str(calls))
            if one.get("late") or one.get("disabled") or one.get("windows", 1) < 1:
                raise AssertionError(f"{kind}: calls were lost: {one}")
            found[kind].append(one)
    return found


def a_second(of: list[Pass]) -> float:
    """Calls per second of processor time."""
    found: float = statistics.median(p["calls"] / p["cpu_s"] for p in of)
    return found


def compared(config: KafkaConfig, kind: str, bar: float, calls: int) -> Iterator[Row]:
    """The rows of one topic."""
    found = in_turns(config, calls)

    def against(ours: str, theirs: str, name: str, bar: float | None = None) -> Row:
        ratio = statistics.median(
            t["cpu_s"] / t["calls"] / (o["cpu_s"] / o["calls"])
            for o, t in zip(found[ours], found[theirs], strict=True)
        )
        return row(
            f"{kind}: {name}",
            round(a_second(found[ours])),
            "calls/s",
            round(a_second(found[theirs])),
            round(ratio, 3),
            bar,
        )

    yield against("chain-aiokafka", "aiokafka", "to detectors, of fetch and decode alone", bar)
    yield against("chain-confluent", "confluent", "the same with confluent-kafka")
    yield against("chain-confluent", "chain-aiokafka", "to detectors with confluent-kafka, of aiokafka")
    yield against("worker", "aiokafka", "flyball worker, of fetch and decode alone")
    wall = statistics.median(p["calls"] / p["wall_s"] for p in found["worker"])
    yield row(f"{kind}: flyball worker, by the clock", round(wall), "calls/s")
    yield row(f"{kind}: most memory of the worker", max(p["rss_mb"] for p in found["worker"]), "MB")


def quix_python() -> Path | None:
    """Python of an environment with Quix Streams, made once outside the repository; None where that cannot be done."""
    home = cache() / _QUIX.replace("==", "-")
    python = home / "bin" / "python"
    if not (home / ".ready").exists():
        print(f"making an environment with {_QUIX} in {home}", file=sys.stderr)
        for command in (
            [sys.executable, "-m", "venv", str(home)],
            [str(python), "-m", "pip", "install", "-q", _QUIX],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"Quix Streams is not installed: {done.stderr[-300:]}", file=sys.stderr)
                return None
        (home / ".ready").touch()
    return python


def beside(config: KafkaConfig, ours: float) -> Iterator[Row]:
    """What others need for decoding and counting alone."""
    own = f"{config.prefix}others."
    topics(KafkaConfig(config.bootstrap, prefix=own))
    faust = [
        passes("faust", config.bootstrap, config.prefix, f"{own}{turn}.", str(_FAUST_CALLS))
        for turn in range(_TURNS)
    ]
    yield row(
        "one a record: to detectors, of a Faust agent that decodes and counts", ours, "calls/s", a_second(faust),
        ours / a_second(faust), BAR_FAUST,
    )  # fmt: skip
    python = quix_python()
    if python is None:
        return
    script = Path(__file__).with_name("_quix.py")
    core = cores()[0]
    quix = [
        apart([
            str(python), str(script), config.bootstrap, config.topic(CALLS), f"{own}quix{turn}", str(_QUIX_CALLS),
            str(-1 if core is None else core),
        ])
        for turn in range(_TURNS)
    ]  # fmt: skip
    yield row(
        "one a record: to detectors, of Quix Streams that decodes and counts", ours, "calls/s", a_second(quix), ours / a_second(quix),
        BAR_QUIX,
    )  # fmt: skip


def run() -> list[Row]:
    """About five minutes."""
    compression = ProducerSettings().compression
    second = lines()
    rows: list[Row] = []
    try:
        with broker() as (cluster, _):
            for kind, bar, a_record in (("many a record", BAR_MANY, _LINES), ("one a record", BAR_ONE, 1)):
                config = KafkaConfig(cluster.bootstrap, prefix=f"{kind.split()[0]}.")
                topics(config)
                calls = fill(config, lambda _: second, _SECONDS, a_record, compression)
                rows += compared(config, kind, bar, calls)
            rows += beside(config, next(r["value"] for r in rows if r["name"].startswith(kind)))
    except CannotStart as e:
        print(f"kafka_pipeline: {e}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    print_rows(run())
