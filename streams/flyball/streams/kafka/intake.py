"""From records to batches of events: decoding, senders told apart, what cannot be taken set aside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from flyball.core.events import Batch, Event
from flyball.core.ports import Decoded, Rejected
from flyball.streams.kafka.breaker import Breaker
from flyball.streams.kafka.client import Place, Record
from flyball.streams.kafka.dead_letters import KafkaLetter
from flyball.streams.kafka.topics import MAX_MESSAGE_BYTES
from flyball.streams.portion import Halt

if TYPE_CHECKING:
    from flyball.core.columns import Ints

_SLICE_S: Final = 0.5
_SLICE_BYTES: Final = 2 << 20
_TELLING: Final = frozenset({"sender", "content-type", "flyball-format"})
_LETTER_BYTES: Final = MAX_MESSAGE_BYTES - (64 << 10)
"""A letter's bytes; its headers need some room in the record too."""

Decode = Callable[[str, bytes, Mapping[str, bytes]], Decoded]
"""(topic without prefix, value, headers) → events and what could not be taken. Raises nothing about the bytes."""

Lines = Callable[[str, Mapping[str, bytes]], bool]
"""(topic without prefix, headers) → whether a value is lines, one event each, so that the values of several records can be read at once."""

Kept = Callable[[bytes], bytes | None]
"""Bytes of what could not be taken → what may be kept of them; None where a setting keeps nothing."""

Headers = Sequence[tuple[str, bytes]]


@dataclass(slots=True)
class Part:
    """The events of one sender among some records."""

    events: list[Event] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Of the records."""
    counts: list[int] = field(default_factory=list)
    """Events of each record."""
    received_at: float = 0.0

    def batch(self, sender: str) -> Batch:
        return Batch(events=self.events, sender=sender, received_at=self.received_at)

    def take(self, events: list[Event], offsets: list[int], counts: list[int], received_at: float) -> None:
        self.events += events
        self.offsets += offsets
        self.counts += counts
        self.received_at = max(self.received_at, received_at)

    def offset_array(self) -> Ints:
        return np.repeat(np.array(self.offsets, np.int64), self.counts)


@dataclass(slots=True)
class Read:
    """What some records held. With `halt`, the partition should stand before the record that it names: it and what follows is not taken."""

    senders: dict[str, Part] = field(default_factory=dict)
    letters: list[KafkaLetter] = field(default_factory=list)
    halt: Halt | None = None
    taken: int = 0
    last: int = -1
    """Offset of the last record that is taken."""
    received_at: float = 0.0

    def part(self, headers: Mapping[str, bytes]) -> Part:
        """Of the sender that the headers name."""
        return self.senders.setdefault(headers.get("sender", b"").decode("utf-8", "replace"), Part())


class Intake:
    """Reads records of source topics.

    Args:
        prefix: of the names of topics.
        decode: bytes to events.
        lines: which values may be read several at once: five times as fast where a record is a single line.
        kept: what of rejected bytes a dead letter keeps.
    """

    def __init__(self, prefix: str, decode: Decode, lines: Lines, kept: Kept = bytes) -> None:
        self._prefix, self._decode, self._lines, self._kept = prefix, decode, lines, kept

    def read(self, place: Place, records: Sequence[Record], breaker: Breaker) -> Read:
        topic = place.topic.removeprefix(self._prefix)
        found = self._together(topic, records) if len(records) > 1 else None
        if found is not None:
            breaker.take(found.received_at, sum(len(p.events) for p in found.senders.values()), [])
            return found
        return self._one_by_one(place, topic, records, breaker)

    def _together(self, topic: str, records: Sequence[Record]) -> Read | None:
        """Each sender's lines in one go; None where anything is not as it mostly is, and each record must be read by itself."""
        found = Read(taken=len(records), last=records[-1].offset)
        for own, some in _alike(records).items():
            headers = dict(own)
            if not self._lines(topic, headers):
                return None
            values = [(r.value or b"").rstrip() for r in some]
            body = b"\n".join(values)
            counts = [1] * len(some)
            if body.count(b"\n") != len(some) - 1:
                counts = [v.count(b"\n") + 1 for v in values]
            decoded = self._alone(topic, body, headers)
            # No line holds more than one event, so as many events as lines means one of each.
            if decoded.rejected or len(decoded.events) != sum(counts):
                return None
            part = found.part(headers)
            part.take(decoded.events, [r.offset for r in some], counts, max(arrivals(some)))
            found.received_at = max(found.received_at, part.received_at)
        return found

    def _one_by_one(self, place: Place, topic: str, records: Sequence[Record], breaker: Breaker) -> Read:
        found = Read()
        for r in records:
            headers, at = dict(r.headers), arrival(r)
            decoded = self._alone(topic, r.value or b"", headers)
            breaker.take(at, len(decoded.events), decoded.rejected)
            if decoded.rejected and breaker.too_bad:
                found.halt = breaker.halt(r.offset, at)
                return found
            found.part(headers).take(decoded.events, [r.offset], [len(decoded.events)], at)
            found.letters += [self._letter(place, r, bad, at) for bad in decoded.rejected]
            found.received_at, found.last = max(found.received_at, at), r.offset
            found.taken += 1
        return found

    def _alone(self, topic: str, value: bytes, headers: Mapping[str, bytes]) -> Decoded:
        try:
            return self._decode(topic, value, headers)
        except Exception as e:  # noqa: BLE001 - what a format (also a third party's) raises would come again at every restart
            return Decoded(
                [], [Rejected("decoder_raised", f"The format raised {type(e).__name__}.", value, -1)]
            )

    def _letter(self, place: Place, record: Record, bad: Rejected, at: float) -> KafkaLetter:
        body, detail = self._kept(bad.data), bad.detail
        if body is not None and len(body) > _LETTER_BYTES:
            body, detail = None, f"{detail} Its bytes are more than a record holds; see the topic."
        return KafkaLetter(
            topic=place.topic, partition=place.partition, offset=record.offset, reason=bad.reason, detail=detail, at=at,
            size=len(bad.data), body=body, index=bad.index, headers=tuple(record.headers),
        )  # fmt: skip


def _alike(records: Sequence[Record]) -> Mapping[Headers, Sequence[Record]]:
    """Records by what their headers say of how to read them, and whose they are; each group in order."""
    headers = [r.headers for r in records]
    if headers.count(headers[0]) == len(headers):
        return {_telling(headers[0]): records}
    found: dict[Headers, list[Record]] = {}
    for r, own in zip(records, headers, strict=True):
        found.setdefault(_telling(own), []).append(r)
    return found


def _telling(headers: Headers) -> Headers:
    return tuple((name, value) for name, value in headers if name in _TELLING)


def slices(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """Records that came within half a second of each other: senders are told apart within these only, so that going through a
    backlog takes nobody's time far ahead of the others'. Nor are they more than a few megabytes: they are decoded at once."""
    times = arrivals(records)
    if not times:
        return
    sizes = [len(r.value or b"") for r in records]
    if max(times) - min(times) <= _SLICE_S and sum(sizes) <= _SLICE_BYTES:
        yield records
        return
    begin = size = 0
    for i, at in enumerate(times):
        if i > begin and (abs(at - times[begin]) > _SLICE_S or size + sizes[i] > _SLICE_BYTES):
            yield records[begin:i]
            begin, size = i, 0
        size += sizes[i]
    yield records[begin:]


def arrivals(records: Sequence[Record]) -> list[float]:
    """`arrival` of each."""
    headers = [r.headers for r in records]
    if any(headers):
        return [arrival(r) for r in records]
    return [r.timestamp / 1000.0 for r in records]


def arrival(record: Record) -> float:
    """When the record's events arrived: as our ingest says, else when the record was made."""
    for name, value in record.headers:
        if name == "received_at":
            try:
                return float(value)
            except ValueError:
                break
    return record.timestamp / 1000.0


__all__ = ["Decode", "Headers", "Intake", "Kept", "Lines", "Part", "Read", "arrival", "arrivals", "slices"]
