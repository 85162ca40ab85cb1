"""Our own format: one event as JSON a line (NDJSON), in the fields of `flyball.core.events`.

Quick where the body is good: one call decodes all of it. Only a body with a fault is read line by line, so that
its good lines count and each bad one is told by itself.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

import msgspec

from flyball.core.events import EARLIEST, LATEST, Event
from flyball.core.ports import Decoded, Rejected
from flyball.streams.formats._options import FormatOptions

_event = msgspec.json.Decoder(Event)
_events = msgspec.json.Decoder(list[Event])
_raws = msgspec.json.Decoder(list[msgspec.Raw])
_any = msgspec.json.Decoder().decode
_schema_components = msgspec.json.schema_components
_KNOWN: Final[frozenset[str]] = frozenset(f for t in Event.__args__ for f in t.__struct_fields__)


class NativeNdjson:
    """NDJSON of events; a JSON array of events or one event over several lines is taken too.

    Unknown fields are ignored, so that a newer sender may talk to an older Flyball.
    """

    kind: ClassVar[str] = "native"

    def __init__(self, options: FormatOptions | None = None) -> None:
        self._options = options or FormatOptions()

    def decode(self, body: bytes, content_type: str = "") -> Decoded:
        array = body.lstrip()[:1] == b"["
        try:
            events = _events.decode(body) if array else _event.decode_lines(body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return self._one_by_one(body, array)
        times = [event.at for event in events]
        if not times or (min(times) >= EARLIEST and max(times) < LATEST):
            return Decoded(events)
        pieces = self._pieces(body, array)
        if len(pieces) != len(events):
            pieces = [b""] * len(events)
        good: list[Event] = []
        bad: list[Rejected] = []
        for index, event in enumerate(events):
            if EARLIEST <= event.at < LATEST:
                good.append(event)
            else:
                bad.append(_bad_time(event.at, pieces[index], index))
        return Decoded(good, bad)

    def schema(self) -> dict[str, Any]:
        """JSON Schema of one event: what a sender may write."""
        (ref,), components = _schema_components([Event], ref_template="#/$defs/{name}")
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "Flyball event",
            "description": "One line of NDJSON; `type` says which event it is.",
            **ref,
            "$defs": components,
        }

    def _pieces(self, body: bytes, array: bool) -> list[bytes]:
        if array:
            try:
                return [bytes(raw) for raw in _raws.decode(body)]
            except RecursionError:
                return [body]
            except (msgspec.DecodeError, UnicodeDecodeError):
                pass  # no list after all: lines, of which the first is damaged
        lines = [line for line in body.splitlines() if line.strip()]
        return [body] if len(lines) > 1 and spans_lines(body) else lines

    def _one_by_one(self, body: bytes, array: bool) -> Decoded:
        pieces = self._pieces(body, array)
        good: list[Event] = []
        bad: list[Rejected] = []
        for index, piece in enumerate(pieces):
            try:
                event = _event.decode(piece)
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as e:
                bad.append(_rejected(e, piece, index))
                continue
            if EARLIEST <= event.at < LATEST:
                good.append(event)
            else:
                bad.append(_bad_time(event.at, piece, index))
        return Decoded(good, bad)


def spans_lines(body: bytes) -> bool:
    """Whether the body is one JSON value, written over several lines, rather than a value a line."""
    try:
        _any(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return False
    return True


def _bad_time(at: float, piece: bytes, index: int) -> Rejected:
    detail = f"`at` is {at:.0f}; must be seconds since the epoch, UTC, from 2010 to 2099."
    return Rejected("timestamp", detail, _stripped(piece), index)


def _stripped(piece: bytes) -> bytes:
    """The piece with the fields of an event only: what else a sender put there may be content."""
    try:
        fields = msgspec.json.decode(piece)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return piece
    if not isinstance(fields, dict):
        return piece
    return msgspec.json.encode({k: v for k, v in fields.items() if k in _KNOWN or k == "type"})


_MEANINGS: Final[tuple[tuple[str, str], ...]] = (
    (">= 0", "negative"),
    ("<= ", "too_large"),
    ("of length", "too_long"),
    ("missing required", "missing_field"),
    ("Invalid value", "unknown_type"),
)
"""What msgspec's sentence holds → our reason."""


def _rejected(error: Exception, piece: bytes, index: int) -> Rejected:
    text = str(error)
    if isinstance(error, RecursionError):
        return Rejected("json", "nested too deeply to be an event.", b"", index)
    if not isinstance(error, msgspec.ValidationError):
        return Rejected("json", "not JSON; one event as a JSON object a line is expected.", piece, index)
    reason = next(
        (name for part, name in _MEANINGS if part in text and not (name == "too_large" and "length" in text)),
        "type",
    )
    # The path is ours to show; a value out of the body is not.
    path = text.partition("`$")[2].partition("`")[0].lstrip(".") or "the event"
    wanted = "a known `type`" if reason == "unknown_type" else text.partition(" - at")[0]
    detail = f"{path}: {wanted}; see `flyball schema events`."
    return Rejected(reason, detail, _stripped(piece), index)
