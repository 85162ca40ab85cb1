"""A compiled condition as a tree, so that it can be judged by what it means and not by how it is spelt.

CEL's library gives its checked tree only as protocol buffer bytes (`cel.expr.CheckedExpr`); of them the few fields
needed here are read. Names come resolved (`incident.root.kind` is one name), and every part knows its offset in the source.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

Kind = Literal["constant", "name", "select", "call", "list", "map", "fold", "other"]

MAX_DEPTH: Final = 200


class Places:
    """Where the parts stand. Read only when asked: what is right has no place to tell."""

    def __init__(self, source_info: bytes) -> None:
        self._source_info = source_info
        self._offsets: dict[int, int] | None = None

    def of(self, part: int) -> int:
        if self._offsets is None:
            pairs = [_grouped(entry) for entry in _grouped(self._source_info).get(4, [])]
            self._offsets = {pair[1][0]: pair[2][0] if 2 in pair else 0 for pair in pairs}
        return self._offsets.get(part, 0)


class TooDeep(ValueError):
    """A tree that is deeper than MAX_DEPTH."""


@dataclass(frozen=True, slots=True)
class Expr:
    """One part of a condition.

    name: of a name, a selected field or a called function (`_==_`, `_&&_`, `@in`, `matches`, …).
    value: of a constant: str, int, float, bool, bytes or None.
    args: operands; of a method its target first; of a map keys and values in turn.
    """

    kind: Kind
    id: int
    places: Places
    name: str = ""
    value: Any = None
    args: tuple[Expr, ...] = ()

    @property
    def offset(self) -> int:
        """Where it stands, in characters of the source; of a dotted name its last dot, of a call its parenthesis or operator."""
        return self.places.of(self.id)

    def walk(self) -> Iterator[Expr]:
        """This part and all in it, from left to right."""
        yield self
        for arg in self.args:
            yield from arg.walk()

    def text(self) -> str:
        """The same for what means the same: what a comparison is about."""
        if self.kind == "constant":
            return repr(self.value)
        inner = ", ".join(a.text() for a in self.args)
        return f"{self.name}({inner})" if self.args or self.kind != "name" else self.name


def read_tree(serialized: bytes) -> Expr:
    """The tree of `Expression.serialize()`.

    Raises: TooDeep; ValueError for bytes that are no such message.
    """
    checked = _grouped(_grouped(serialized)[2][0])  # within google.protobuf.Any
    return _Reader(Places(checked[5][0])).expr(checked[4][0], 0)


class _Reader:
    def __init__(self, places: Places) -> None:
        self._places = places

    def expr(self, data: bytes, depth: int) -> Expr:
        if depth > MAX_DEPTH:
            raise TooDeep(f"nested deeper than {MAX_DEPTH} levels")
        fields = _grouped(data)
        part, places = fields[2][0], self._places
        if 3 in fields:
            return Expr("constant", part, places, value=_constant(fields[3][0]))
        if 4 in fields:
            return Expr("name", part, places, name=_text(_grouped(fields[4][0]), 1))
        if 5 in fields:
            inner = _grouped(fields[5][0])
            return Expr(
                "select", part, places, name=_text(inner, 2), args=(self.expr(inner[1][0], depth + 1),)
            )
        if 6 in fields:
            inner = _grouped(fields[6][0])
            args = [*inner.get(1, []), *inner.get(3, [])]
            return Expr("call", part, places, name=_text(inner, 2), args=self._all(args, depth))
        if 7 in fields:
            return Expr("list", part, places, args=self._all(_grouped(fields[7][0]).get(1, []), depth))
        if 8 in fields:
            entries = [_grouped(e) for e in _grouped(fields[8][0]).get(2, [])]
            parts = [part for e in entries for part in (*e.get(3, []), *e.get(4, []))]
            return Expr("map", part, places, args=self._all(parts, depth))
        if 9 in fields:  # exists, all, filter, …: the range, then what is asked of each
            inner = _grouped(fields[9][0])
            return Expr("fold", part, places, args=self._all([inner[2][0], inner[6][0]], depth))
        return Expr("other", part, places)

    def _all(self, parts: list[bytes], depth: int) -> tuple[Expr, ...]:
        return tuple(self.expr(p, depth + 1) for p in parts)


def _text(fields: dict[int, list[Any]], number: int) -> str:
    found: bytes = fields.get(number, [b""])[0]
    return found.decode()


def _constant(data: bytes) -> Any:
    for number, (value, *_) in _grouped(data).items():
        if number == 2:
            return bool(value)
        if number == 3:
            return value - (1 << 64) if value >> 63 else value
        return value.decode() if number == 6 else value
    return None


def _grouped(data: bytes) -> dict[int, list[Any]]:
    """Fields of a message in wire format, by number: a float for 64 bits, bytes for what has a length, else an int."""
    out: dict[int, list[Any]] = {}
    i, n = 0, len(data)
    value: Any
    while i < n:
        key, i = _varint(data, i)
        wire = key & 7
        if wire == 2:
            length = data[i]
            i += 1
            if length > 127:  # most are short: no call for those
                length, i = _varint(data, i - 1)
            value = data[i : i + length]
            i += length
        elif wire == 0:
            value, i = _varint(data, i)
        elif wire == 1:
            value = struct.unpack_from("<d", data, i)[0]
            i += 8
        else:
            raise ValueError(f"wire type {wire}")
        key >>= 3
        if key in out:
            out[key].append(value)
        else:
            out[key] = [value]
    return out


def _varint(data: bytes, i: int) -> tuple[int, int]:
    byte = data[i]
    if byte < 128:
        return byte, i + 1
    value, shift = byte & 127, 7
    while True:
        i += 1
        byte = data[i]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, i + 1
        shift += 7
