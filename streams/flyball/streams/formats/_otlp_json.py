"""OTLP/JSON as structs. Protobuf's own JSON reader takes hexadecimal ids for base64 and corrupts them without an error."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from typing import Any

import msgspec

_DEEPEST = 40


class AnyValue(msgspec.Struct, rename="camel", gc=False):
    """One attribute value. int64 comes as a number (JavaScript) or a string (Python, Collector)."""

    string_value: str | None = None
    int_value: int | str | None = None
    bool_value: bool | None = None
    double_value: float | str | None = None
    array_value: ArrayValue | None = None
    kvlist_value: KvList | None = None
    bytes_value: str | None = None


class ArrayValue(msgspec.Struct, gc=False):
    values: list[AnyValue] = []


class KeyValue(msgspec.Struct, gc=False):
    key: str = ""
    value: AnyValue | None = None


class KvList(msgspec.Struct, gc=False):
    values: list[KeyValue] = []


class Status(msgspec.Struct, gc=False):
    code: int | str | None = 0
    message: str | None = ""


class SpanEvent(msgspec.Struct, rename="camel", gc=False):
    name: str | None = ""
    time_unix_nano: int | str = 0
    attributes: list[KeyValue] | None = None


class Span(msgspec.Struct, rename="camel", gc=False):
    name: str | None = ""
    trace_id: str = ""
    span_id: str = ""
    parent_span_id: str | None = ""
    start_time_unix_nano: int | str = 0
    end_time_unix_nano: int | str = 0
    attributes: list[KeyValue] | None = None
    events: list[SpanEvent] | None = None
    status: Status | None = None


class Scope(msgspec.Struct, gc=False):
    name: str | None = ""


class Resource(msgspec.Struct, gc=False):
    attributes: list[KeyValue] | None = None


class ScopeSpans(msgspec.Struct, gc=False):
    scope: Scope | None = None
    spans: list[Span] | None = None


class ResourceSpans(msgspec.Struct, rename="camel", gc=False):
    resource: Resource | None = None
    scope_spans: list[ScopeSpans] | None = None


class Request(msgspec.Struct, rename="camel", gc=False):
    resource_spans: list[ResourceSpans]


class RawScopeSpans(msgspec.Struct, gc=False):
    scope: Scope | None = None
    spans: list[msgspec.Raw] | None = None


class RawResourceSpans(msgspec.Struct, rename="camel", gc=False):
    resource: Resource | None = None
    scope_spans: list[RawScopeSpans] | None = None


class RawRequest(msgspec.Struct, rename="camel", gc=False):
    """The same, with every span left as bytes: for a body in which some span is damaged."""

    resource_spans: list[RawResourceSpans]


decode_request = msgspec.json.Decoder(Request).decode
decode_raw_request = msgspec.json.Decoder(RawRequest).decode
decode_span = msgspec.json.Decoder(Span).decode


def plain(value: AnyValue | None, depth: int = 0) -> Any:
    """An AnyValue as plain data: str, int, float, bool, list, dict or None."""
    if value is None or depth > _DEEPEST:
        return None
    if value.string_value is not None:
        return value.string_value
    if value.int_value is not None:
        return _whole(value.int_value)
    if value.double_value is not None:
        return value.double_value
    if value.bool_value is not None:
        return value.bool_value
    if value.array_value is not None:
        return [plain(v, depth + 1) for v in value.array_value.values]
    if value.kvlist_value is not None:
        return {entry.key: plain(entry.value, depth + 1) for entry in value.kvlist_value.values}
    return value.bytes_value


def _whole(value: int | str) -> int | str:
    if isinstance(value, int):
        return value
    return int(value) if len(value) <= 20 and value.lstrip("-").isdigit() and value.isascii() else value


def hex_id(text: Any) -> str:
    """An id in lower-case hexadecimal, whether it came so or as base64 (some exporters); by its length."""
    if not isinstance(text, str):
        return ""
    if len(text) in (24, 12):
        try:
            return base64.b64decode(text, validate=True).hex()
        except (binascii.Error, ValueError):
            return text
    return text.lower()


class JsonSpan:
    """What is read of a JSON span besides its attributes."""

    hex = staticmethod(hex_id)

    @staticmethod
    def name(span: Span) -> str:
        return span.name or ""

    @staticmethod
    def status(span: Span) -> tuple[bool, str]:
        """Failed or not, and the message."""
        if span.status is None:
            return False, ""
        return span.status.code in (2, "STATUS_CODE_ERROR"), span.status.message or ""

    @staticmethod
    def events(span: Span) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Name, time and attributes of each span event."""
        for event in span.events or ():
            at = _whole(event.time_unix_nano)
            yield (
                event.name or "",
                at if isinstance(at, int) else 0,
                {a.key: plain(a.value) for a in event.attributes or ()},
            )

    @staticmethod
    def keys(span: Span) -> list[str]:
        """Names of the attributes, for dead letters."""
        return [a.key for a in span.attributes or ()]
