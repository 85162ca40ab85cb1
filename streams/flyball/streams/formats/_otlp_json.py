"""OTLP/JSON as structs that read like the protobuf messages, so that one piece of code walks both.

Protobuf's own JSON reader takes hexadecimal ids for base64 and corrupts them without an error.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import msgspec


class AnyValue(msgspec.Struct, rename="camel", gc=False):
    """One attribute value. int64 comes as a number (JavaScript) or a string (Python, Collector)."""

    string_value: str = ""
    int_value: int | str | None = None
    bool_value: bool = False
    double_value: float | str | None = None
    array_value: ArrayValue | None = None
    kvlist_value: KvList | None = None

    def WhichOneof(self, name: str) -> str | None:  # protobuf's spelling
        if self.int_value is not None:
            return "int_value"
        if self.double_value is not None:
            return "double_value"
        if self.array_value is not None:
            return "array_value"
        if self.kvlist_value is not None:
            return "kvlist_value"
        return "string_value" if self.string_value else "bool_value" if self.bool_value else None


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
    name: str = ""
    time_unix_nano: int | str = 0
    attributes: list[KeyValue] | None = None


class Span(msgspec.Struct, rename="camel", gc=False):
    name: str = ""
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
    resource_spans: list[ResourceSpans] | None = None


class RawScopeSpans(msgspec.Struct, gc=False):
    scope: Scope | None = None
    spans: list[msgspec.Raw] | None = None


class RawResourceSpans(msgspec.Struct, rename="camel", gc=False):
    resource: Resource | None = None
    scope_spans: list[RawScopeSpans] | None = None


class RawRequest(msgspec.Struct, rename="camel", gc=False):
    """The same, with every span left as bytes: for a body in which some span is damaged."""

    resource_spans: list[RawResourceSpans] | None = None


decode_request = msgspec.json.Decoder(Request).decode
decode_raw_request = msgspec.json.Decoder(RawRequest).decode
decode_span = msgspec.json.Decoder(Span).decode


def hex_id(text: Any) -> str:
    """An id in lower-case hexadecimal, whether it came so or as base64 (some exporters); by its length."""
    if not isinstance(text, str) or len(text) in (32, 16, 0):
        return text.lower() if isinstance(text, str) else ""
    if len(text) in (24, 12):
        try:
            return base64.b64decode(text, validate=True).hex()
        except (binascii.Error, ValueError):
            return text
    return text[:512]
