"""Writes what the lab simulates as native NDJSON, for `flyball replay`, benchmarks and people who want to look."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec
import zstandard

from flyball.core.events import Batch
from flyball.lab.sim import Simulator

_encoder = msgspec.json.Encoder()


def to_ndjson(batch: Batch) -> bytes:
    """One event a line, as `POST /v1/events` takes them; ends with a line feed."""
    return _encoder.encode_lines(batch.events)


def batches(sim: Simulator, duration_s: float, step_s: float = 10.0) -> Iterator[Batch]:
    """Everything that arrives within the next `duration_s`, in order of arrival."""
    until = sim.now + duration_s
    while sim.now < until:
        yield from sim.step(min(sim.now + step_s, until))


def write_ndjson(sim: Simulator, path: Path, duration_s: float) -> int:
    """Writes the events of the next `duration_s` in order of arrival; returns how many.

    A name that ends in `.gz` or `.zst` is compressed. The file's bytes depend on estate, seed and faults alone.
    """
    written = 0
    with _opened(path) as out:
        for batch in batches(sim, duration_s):
            out.write(to_ndjson(batch))
            written += len(batch.events)
    return written


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        # mtime 0: the same events make the same bytes.
        return gzip.GzipFile(path, "wb", compresslevel=6, mtime=0)  # type: ignore[return-value]
    if path.suffix == ".zst":
        return zstandard.open(path, "wb")  # type: ignore[no-any-return]
    return path.open("wb")
