"""From records to batches of events: decoding, senders told apart, what cannot be taken set aside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
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
_LETTER_BYTES: Final = MAX_MESSAGE_BYTES - (64 << 10)
"""A letter's bytes; its headers need some room in the record too."""

Decode = Callable[[str, bytes, Mapping[str, bytes]], Decoded]
"""(topic without prefix, value, headers) → events and what could not be taken. Raises nothing about the bytes."""

Lines = Callable[[str, Mapping[str, bytes]], bool]
"""(topic without prefix, headers) → whether a value is lines, one event each, so that the values of several records can be read at once."""

Headers = Sequence[tuple[str, bytes]]


@dataclass(slots=True)
class Part:
    """The events of one sender among some records."""

    events: list[Event] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    received_at: float = 0.0

    def batch(self, sender: str) -> Batch:
        return Batch(events=self.events, sender=sender, received_at=self.received_at)

    def offset_array(self) -> Ints:
        return np.array(self.offsets, np.int64)


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


class Intake:
    """Reads records of source topics.

    Args:
        prefix: of the names of topics.
        decode: bytes to events.
        lines: which values may be read several at once, where each is a single line: three times as fast.
    """

    def __init__(self, prefix: str, decode: Decode, lines: Lines) -> None:
        self._prefix, self._decode, self._lines = prefix, decode, lines

    def read(self, place: Place, records: Sequence[Record], breaker: Breaker) -> Read:
        topic, found = place.topic.removeprefix(self._prefix), Read()
        for own, same in groupby(records, _headers):
            some, headers = list(same), dict(own)
            part = found.senders.setdefault(headers.get("sender", b"").decode("utf-8", "replace"), Part())
            received_at = max(arrival(r) for r in some)
            if len(some) > 1 and self._lines(topic, headers):
                events = self._together(topic, some, headers)
                if events is not None:
                    part.events += events
                    part.offsets += [r.offset for r in some]
                    breaker.take(received_at, len(some), [])
                    _note(found, part, some[-1].offset, received_at, len(some))
                    continue
            for r in some:
                decoded, at = self._alone(topic, r.value or b"", headers), arrival(r)
                breaker.take(at, len(decoded.events), decoded.rejected)
                if decoded.rejected and breaker.too_bad:
                    found.halt = breaker.halt(r.offset, at)
                    return found
                part.events += decoded.events
                part.offsets += [r.offset] * len(decoded.events)
                found.letters += [_letter(place, r, bad, at) for bad in decoded.rejected]
                _note(found, part, r.offset, at, 1)
        return found

    def _alone(self, topic: str, value: bytes, headers: Mapping[str, bytes]) -> Decoded:
        try:
            return self._decode(topic, value, headers)
        except Exception as e:  # noqa: BLE001 - what a format (also a third party's) raises would come again at every restart
            return Decoded(
                [], [Rejected("decoder_raised", f"The format raised {type(e).__name__}.", value, -1)]
            )

    def _together(
        self, topic: str, records: Sequence[Record], headers: Mapping[str, bytes]
    ) -> list[Event] | None:
        """One event a record; None when it is not so, and each record must be read by itself."""
        body = b"\n".join([r.value or b"" for r in records])
        if body.count(b"\n") != len(records) - 1:
            return None
        decoded = self._alone(topic, body, headers)
        # No line holds more than one event, so as many as records means one of each.
        return decoded.events if len(decoded.events) == len(records) else None


def _note(found: Read, part: Part, last: int, received_at: float, n: int) -> None:
    part.received_at = max(part.received_at, received_at)
    found.received_at = max(found.received_at, received_at)
    found.last = last
    found.taken += n


def _letter(place: Place, record: Record, bad: Rejected, at: float) -> KafkaLetter:
    kept, detail = len(bad.data) <= _LETTER_BYTES, bad.detail
    if not kept:
        detail += " Its bytes are more than a record holds; see the topic."
    return KafkaLetter(
        topic=place.topic, partition=place.partition, offset=record.offset, reason=bad.reason, detail=detail, at=at,
        size=len(bad.data), body=bad.data if kept else None, index=bad.index, headers=tuple(record.headers),
    )  # fmt: skip


_headers: Final[Callable[[Record], Headers]] = attrgetter("headers")


def slices(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """Records that came within half a second of each other: senders are told apart within these only, so that going through a
    backlog takes nobody's time far ahead of the others'."""
    times = [arrival(r) for r in records]
    if not times or max(times) - min(times) <= _SLICE_S:
        if records:
            yield records
        return
    begin = 0
    for i, at in enumerate(times):
        if abs(at - times[begin]) > _SLICE_S:
            yield records[begin:i]
            begin = i
    yield records[begin:]


def arrival(record: Record) -> float:
    """When the record's events arrived: as our ingest says, else when the record was made."""
    for name, value in record.headers:
        if name == "received_at":
            try:
                return float(value)
            except ValueError:
                break
    return record.timestamp / 1000.0


__all__ = ["Decode", "Headers", "Intake", "Lines", "Part", "Read", "arrival", "slices"]
