"""OTLP protobuf, read for speed: the generated classes make a Python object of every attribute and of its value.

The messages here have the field numbers of OTLP's, but leave attributes, span events and statuses as bytes, which are
then read in place, and only where the name is known. Strings are bytes too: one that is not UTF-8 spoils itself, not
the whole body.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FIELD = descriptor_pb2.FieldDescriptorProto
_BYTES, _MESSAGE, _FIXED64 = _FIELD.TYPE_BYTES, _FIELD.TYPE_MESSAGE, _FIELD.TYPE_FIXED64
_PACKAGE: Final = "flyball.otlp"
_MESSAGES: Final[dict[str, tuple[tuple[str, int, Any, bool, str], ...]]] = {
    "Resource": (("attributes", 1, _BYTES, True, ""),),
    "Scope": (("name", 1, _BYTES, False, ""),),
    "Span": (
        ("trace_id", 1, _BYTES, False, ""),
        ("span_id", 2, _BYTES, False, ""),
        ("parent_span_id", 4, _BYTES, False, ""),
        ("name", 5, _BYTES, False, ""),
        ("start_time_unix_nano", 7, _FIXED64, False, ""),
        ("end_time_unix_nano", 8, _FIXED64, False, ""),
        ("attributes", 9, _BYTES, True, ""),
        ("events", 11, _BYTES, True, ""),
        ("status", 15, _BYTES, False, ""),
    ),
    "ScopeSpans": (("scope", 1, _MESSAGE, False, "Scope"), ("spans", 2, _MESSAGE, True, "Span")),
    "ResourceSpans": (
        ("resource", 1, _MESSAGE, False, "Resource"),
        ("scope_spans", 2, _MESSAGE, True, "ScopeSpans"),
    ),
    "Request": (("resource_spans", 1, _MESSAGE, True, "ResourceSpans"),),
}
_DEEPEST: Final = 40
STATUS_OK: Final = b"\x18\x01"
"""A status that says OK and nothing else."""


def _request_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="flyball_otlp.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated, of in fields:
            label = _FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL
            added = message.field.add(name=field, number=number, type=kind, label=label)
            if of:
                added.type_name = f".{_PACKAGE}.{of}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Request"))


Request: Final[Any] = _request_class()


class WireError(ValueError):
    """Bytes that are not what the field says."""


def varint(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned number and where it ends. Raises: WireError."""
    number = shift = 0
    while shift < 70:
        try:
            byte = data[at]
        except IndexError as e:
            raise WireError("cut off") from e
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise WireError("no varint")


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a message: bytes for what has a length, else the number. Raises: WireError."""
    at, end = 0, len(data)
    while at < end:
        tag, at = varint(data, at)
        kind = tag & 7
        if kind == 2:
            size, at = varint(data, at)
            if at + size > end:
                raise WireError("cut off")
            yield tag >> 3, data[at : at + size]
            at += size
        elif kind == 0:
            number, at = varint(data, at)
            yield tag >> 3, number
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            if at + size > end:
                raise WireError("cut off")
            yield tag >> 3, data[at : at + size]
            at += size
        else:
            raise WireError("unknown wire type")


def attribute(data: bytes) -> tuple[bytes, Any]:
    """Name and value of one KeyValue of whatever layout. Raises: WireError."""
    key, value = b"", None
    for number, found in fields(data):
        if number == 1 and isinstance(found, bytes):
            key = found
        elif number == 2 and isinstance(found, bytes):
            value = any_value(found)
    return key, value


def value_in(data: bytes, at: int) -> Any:
    """The value of a KeyValue whose name ends at `at`: the usual layout, read in place. Raises: WireError."""
    try:
        if data[at] != 0x12:
            return attribute(data)[1]
        size = data[at + 1]
        at += 2
        if size >= 0x80:
            size, at = varint(data, at - 1)
        kind = data[at]
        if kind == 0x0A:  # string
            size = data[at + 1]
            at += 2
            if size >= 0x80:
                size, at = varint(data, at - 1)
            if at + size > len(data):
                raise WireError("cut off")
            return str(data[at : at + size], "utf-8", "replace")
        if kind == 0x18:  # int64
            number = data[at + 1]
            return number if number < 0x80 else _signed(varint(data, at + 1)[0])
        return any_value(data[at:])
    except IndexError:
        return None  # an AnyValue without a value


def any_value(data: bytes, depth: int = 0) -> Any:
    """An AnyValue as plain data: str (bytes too, in hex), int, float, bool, list, dict or None. Raises: WireError."""
    if depth > _DEEPEST:
        return None
    value: Any = None
    for number, found in fields(data):
        if number == 1:
            value = str(found, "utf-8", "replace") if isinstance(found, bytes) else None
        elif number == 2:
            value = bool(found)
        elif number == 3:
            value = _signed(found) if isinstance(found, int) else None
        elif number == 4:
            value = struct.unpack("<d", found)[0] if isinstance(found, bytes) and len(found) == 8 else None
        elif number == 5 and isinstance(found, bytes):
            value = [any_value(v, depth + 1) for n, v in fields(found) if n == 1 and isinstance(v, bytes)]
        elif number == 6 and isinstance(found, bytes):
            value = dict(_pair(v, depth + 1) for n, v in fields(found) if n == 1 and isinstance(v, bytes))
        elif number == 7 and isinstance(found, bytes):
            value = found.hex()  # bytes among a span's values are an attribute that was not read yet
    return value


def _pair(data: bytes, depth: int) -> tuple[str, Any]:
    key, value = "", None
    for number, found in fields(data):
        if number == 1 and isinstance(found, bytes):
            key = str(found, "utf-8", "replace")
        elif number == 2 and isinstance(found, bytes):
            value = any_value(found, depth)
    return key, value


def _signed(number: int) -> int:
    number &= 0xFFFFFFFFFFFFFFFF
    return number - (1 << 64) if number >= 1 << 63 else number


def text(data: bytes) -> str:
    return str(data, "utf-8", "replace")


class WireSpan:
    """What is read of a protobuf span besides its attributes."""

    hex = bytes.hex

    @staticmethod
    def name(span: Any) -> str:
        return text(span.name)

    @staticmethod
    def status(span: Any) -> tuple[bool, str]:
        """Failed or not, and the message."""
        data = span.status
        if not data:
            return False, ""
        code, message = 0, ""
        for number, found in fields(data):
            if number == 3:
                code = found
            elif number == 2 and isinstance(found, bytes):
                message = text(found)
        return code == 2, message

    @staticmethod
    def events(span: Any) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Name, time and attributes of each span event."""
        for data in span.events:
            name, at, attributes = "", 0, {}
            for number, found in fields(data):
                if number == 1 and isinstance(found, bytes) and len(found) == 8:
                    at = int.from_bytes(found, "little")
                elif number == 2 and isinstance(found, bytes):
                    name = text(found)
                elif number == 3 and isinstance(found, bytes):
                    key, value = attribute(found)
                    attributes[text(key)] = value
            yield name, at, attributes

    @staticmethod
    def keys(span: Any) -> list[str]:
        """Names of the attributes, for dead letters."""
        found = []
        for data in span.attributes:
            try:
                found.append(text(attribute(data)[0]))
            except WireError:
                found.append("?")
        return found
