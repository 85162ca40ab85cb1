"""`flyball replay`: recorded events through the same stages, in event time, with no effect on the world."""

from __future__ import annotations

import gzip
import io
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, Final

import zstandard

from flyball.app import views
from flyball.app.pipeline import Pipeline
from flyball.core.errors import ConfigError
from flyball.core.estate import Emissions
from flyball.core.events import Batch, Event
from flyball.core.ports import Format
from flyball.streams.sniff import sniff

_CHUNK: Final = 8 << 20
_REORDER_EVENTS: Final = 1_000_000
"""Events held to be put in order; a file that is out of order by more than this counts the rest as late."""
_SLICE_EVENTS: Final = 5_000
_at = attrgetter("at")


class Source:
    """The events of files in event-time order, with what was rejected on the way.

    Args:
        formats: by kind.
        kind: a format, or `auto` to tell it from each file.
        progress: called with the bytes read so far (of the files as stored).
    """

    def __init__(
        self,
        files: Sequence[Path],
        formats: Mapping[str, Format],
        kind: str,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._files, self._formats, self._kind, self._progress = files, formats, kind, progress
        self.rejected: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self.errors: list[str] = []
        self._read = 0

    def __iter__(self) -> Iterator[Event]:
        held: list[Event] = []
        for path in self._files:
            for body, kind in self._bodies(path):
                decoded = self._formats[kind].decode(body)
                held += decoded.events
                self.ignored.update(decoded.ignored)
                for r in decoded.rejected:
                    self.rejected[r.reason] += 1
                    if len(self.errors) < 20:
                        self.errors.append(f"{path}: {r.detail}")
                if len(held) > _REORDER_EVENTS:
                    held.sort(key=_at)
                    half = len(held) // 2
                    yield from held[:half]
                    del held[:half]
        held.sort(key=_at)
        yield from held

    def _bodies(self, path: Path) -> Iterator[tuple[bytes, str]]:
        """Whole bodies; large NDJSON files in parts that end with a line."""
        try:
            with path.open("rb") as raw:
                stream = _plain(_Counting(raw, self._advance))
                head = stream.read(_CHUNK)
                kind = self._kind if self._kind != "auto" else sniff(head, "", path.name)
                if kind not in self._formats:
                    raise ConfigError(
                        f"unknown format {kind!r}; one of auto, {', '.join(sorted(self._formats))}"
                    )
                rest = stream.read(_CHUNK)
                if not rest:
                    yield head, kind
                    return
                lines = kind in ("native", "litellm") and head.lstrip()[:1] != b"["
                if not lines:
                    yield head + rest + stream.read(), kind
                    return
                pending = head + rest
                while pending:
                    cut = pending.rfind(b"\n") + 1
                    more = stream.read(_CHUNK)
                    if not more:
                        yield pending, kind
                        return
                    yield pending[:cut], kind
                    pending = pending[cut:] + more
        except OSError as e:
            raise ConfigError(
                f"cannot be read ({e.strerror or e}); name an existing file", where=str(path)
            ) from e
        except (EOFError, zstandard.ZstdError) as e:
            raise ConfigError(f"is damaged or cut short ({e})", where=str(path)) from e

    def _advance(self, n: int) -> None:
        self._read += n
        if self._progress is not None:
            self._progress(self._read)


class _Counting(io.RawIOBase):
    """Tells how much of the stored file was read, whatever its compression."""

    def __init__(self, raw: BinaryIO, advance: Callable[[int], None]) -> None:
        self._raw, self._advance = raw, advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self._advance(len(data))
        return len(data)


def _plain(raw: _Counting) -> BinaryIO:
    buffered = io.BufferedReader(raw, 1 << 20)
    magic = buffered.peek(4)[:4]
    if magic[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=buffered)  # type: ignore[return-value]
    if magic == b"\x28\xb5\x2f\xfd":
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(
            buffered, read_across_frames=True
        )
        return io.BufferedReader(reader)
    return buffered


class Replay:
    """Feeds a pipeline in event time and turns what it says into the objects of `--json`, in order."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._first: float | None = None
        self._last = 0.0
        self._now = 0.0

    def run(self, source: Source) -> Iterator[dict[str, Any]]:
        for said in self.emissions(source):
            yield from self._said(said)
        yield self._summary(source)

    @property
    def span(self) -> tuple[float | None, float | None]:
        """Event time of the first and the last event read; None before the first."""
        return self._first, self._last or None

    def emissions(self, source: Source) -> Iterator[Emissions]:
        """What the pipeline says, record by record."""
        held: list[Event] = []
        for event in source:
            if held and (len(held) >= _SLICE_EVENTS or int(event.at) > int(held[0].at)):
                yield from self._feed(held)
                held = []
            held.append(event)
        if held:
            yield from self._feed(held)
        yield self._pipeline.flush()
        if self._last:
            # Let holds, verifications and leases that follow from the last window run out, as they would have.
            for later in range(1, 121):
                yield self._pipeline.tick(self._last + later)

    def _feed(self, events: list[Event]) -> Iterator[Emissions]:
        at = events[0].at
        if self._first is None:
            self._first = self._now = at
        # Ticks second by second, as the live runtime has them; a long gap needs no more than its first minutes.
        second = float(int(self._now) + 1)
        while second <= at and second <= self._now + 600:
            yield self._pipeline.tick(second)
            second += 1.0
        self._now = max(self._now, at)
        self._last = max(self._last, events[-1].at)
        yield self._pipeline.feed(Batch(events=events, sender="replay"))

    def _said(self, out: Emissions) -> Iterator[dict[str, Any]]:
        lines: list[tuple[float, int, dict[str, Any]]] = []
        for change in out.changes:
            if not change.old:
                insort(lines, (change.at, len(lines), views.incident(change.incident)), key=lambda x: x[:2])
            if change.old != change.new:
                insort(lines, (change.at, len(lines), views.incident_change(change)), key=lambda x: x[:2])
        for decision in out.decisions:
            insort(lines, (decision.at, len(lines), views.decision(decision)), key=lambda x: x[:2])
        for moved in out.directives:
            insort(lines, (moved.at, len(lines), views.directive_change(moved)), key=lambda x: x[:2])
        for asked in out.operations:
            insort(lines, (asked.at, len(lines), views.operation(asked)), key=lambda x: x[:2])
        for outcome in out.outcomes:
            insort(lines, (outcome.at, len(lines), views.outcome(outcome)), key=lambda x: x[:2])
        yield from (line for _, _, line in lines)

    def _summary(self, source: Source) -> dict[str, Any]:
        p = self._pipeline
        c = p.counters
        return {
            "type": "summary", "events": dict(c.events), "rejected": dict(source.rejected), "ignored": dict(source.ignored),
            "late": p.windows.stats.late, "duplicates": p.duplicates, "incidents": c.incidents, "pages": c.pages,
            "directives": c.directives, "anomalies": c.anomalies, "windows": c.windows, "from": self._first, "to": self._last or None,
            "disabled_detectors": dict(p.disabled),
        }  # fmt: skip
