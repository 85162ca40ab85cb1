"""A span's attributes, gathered into slots: where nearly all the time of reading OTLP goes.

Three ways, from the quickest to the most patient:

- by layout: spans of one instrumentation repeat each other. Attributes that were the same in an earlier span of the group,
  in the same places, are compared all at once and need no reading; only the others are read, each where it is expected;
- by name: short attributes with few different values are remembered by their bytes, the others read in place;
- carefully: any layout of the bytes that protobuf allows. Raises for what is damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any, Final

from flyball.streams.formats import _otlp_wire as wire
from flyball.streams.formats._otlp_keys import KeyMap

_NEW, _SKIPPED = -1, -2
_SHORT: Final = 80
_KNOWN: Final = 8192
_VARIETY: Final = 64
"""Attributes remembered by their bytes: only short ones, so many in all, so many of one name."""
_STEADY: Final = 8
"""Of how many values a name may be for its attribute to be part of a layout."""
_LAYOUTS: Final = 4
"""Layouts kept for spans of one number of attributes."""
_PATIENCE: Final = 100
"""Spans that fit no layout, after which a group gets no new ones."""

_starts_with = bytes.startswith


class Layout:
    """What one span looked like: the attributes that repeat, and what the others are.

    The others are picked in the order: left unread, to be read, to be skipped; each begins with its `heads` (tag, length and
    name). `reads` are (where the name ends, slot, whether it may be remembered)."""

    __slots__ = ("heads", "lazy", "pick_rest", "pick_same", "plan", "reads", "same", "slots", "touched")

    def __init__(self, attributes: list[bytes], same: list[int], rest: list[int], slots: list[Any]) -> None:
        self.pick_same, self.pick_rest = itemgetter(*same), itemgetter(*rest)
        self.same = self.pick_same(attributes)
        self.heads = tuple(data[: data[1] + 2] for data in self.pick_rest(attributes))
        self.lazy: list[int] = []
        self.reads: list[tuple[int, int, bool]] = []
        self.slots = slots
        self.touched = 0
        self.plan: Any = None
        """What the reader of the slots concluded from those that repeat, and keeps here."""


class Layouts:
    """The layouts of one group of spans (one resource, one scope)."""

    __slots__ = ("by_size", "misses", "template")

    def __init__(self, template: list[Any]) -> None:
        self.template = template
        self.by_size: dict[int, list[Layout]] = {}
        self.misses = 0


class Gatherer:
    """Attributes → (values by slot, what they have a say in), for one `KeyMap`. What it remembers is only what bytes
    read as: it changes how fast, never what. `simplify(slot, value)` is applied to what is remembered."""

    def __init__(self, keys: KeyMap, simplify: Callable[[int, Any], Any]) -> None:
        self._keys = keys
        self._simplify = simplify
        self._codes = dict(keys.wire_codes)
        self._constant = list(keys.constant)
        self._known: dict[bytes, tuple[int, Any, int]] = {}
        self._variety: dict[bytes, int] = {}

    def gather(self, attributes: list[bytes], layouts: Layouts) -> tuple[list[Any], int, Layout | None]:
        """Slots, what they have a say in, and the layout that they were read by.

        Raises: WireError, IndexError or UnicodeDecodeError when an attribute is damaged or laid out unusually."""
        found = layouts.by_size.get(len(attributes))
        if found is not None:
            for layout in found:
                if layout.pick_same(attributes) == layout.same:
                    rest = layout.pick_rest(attributes)
                    if all(map(_starts_with, rest, layout.heads)):
                        return self._expected(layout, rest), layout.touched, layout
        slots = layouts.template[:]
        touched = self._by_name(attributes, slots)
        if layouts.misses < _PATIENCE:
            layouts.misses += 1
            self._keep(attributes, layouts)
        return slots, touched, None

    def _expected(self, layout: Layout, rest: tuple[bytes, ...]) -> list[Any]:
        """The slots of a span of this layout. Values in the usual form (a short string, a number below 16,384) are read
        in line: a call for each would cost a third more."""
        slots = layout.slots[:]
        for code, data in zip(layout.lazy, rest, strict=False):
            slots[code] = data
        known = self._known.get
        for (end, code, remembered), data in zip(layout.reads, rest[len(layout.lazy) :], strict=False):
            if remembered:
                found = known(data)
                if found is not None:
                    slots[code] = found[1]
                    continue
            kind, length = data[end + 2], data[end + 3]
            if kind == 0x18:
                if length < 0x80:
                    slots[code] = length
                elif data[end + 4] < 0x80:
                    slots[code] = length & 0x7F | data[end + 4] << 7
                else:
                    slots[code] = wire.value_in(data, end)
            elif kind == 0x0A and length < 0x80 and len(data) == end + 4 + length:
                slots[code] = data[end + 4 :].decode()
            else:
                slots[code] = wire.value_in(data, end)
        return slots

    def _by_name(self, attributes: list[bytes], slots: list[Any]) -> int:
        keys, known, code_of, constant = self._keys, self._known.get, self._codes.get, self._constant
        bits, lazy = keys.bits, keys.lazy
        touched = 0
        for data in attributes:
            size = len(data)
            if size < _SHORT:
                found = known(data)
                if found is not None:
                    code, value, bit = found
                    slots[code] = value
                    touched |= bit
                    continue
            end = data[1] + 2
            code = code_of(data[2:end], _NEW)
            if code < 0:
                if code == _NEW:
                    self._learn(data, end, keys.unread, None)
                continue
            touched |= bits[code]
            if lazy[code]:
                slots[code] = data  # read when it turns out to be needed
                continue
            value = wire.value_in(data, end)
            slots[code] = value
            if constant[code] and value is not None:
                self._learn(data, end, code, value)
        return touched

    def carefully(self, pairs: Iterable[tuple[str, Any]], template: list[Any]) -> tuple[list[Any], int]:
        """The same from names and values that were read already: JSON, resources' attributes, unusual protobuf."""
        slots, touched = template[:], 0
        for key, value in pairs:
            code = self._keys.codes.get(key)
            if code is None or value is None:
                continue
            slots[code] = value
            touched |= self._keys.bits[code]
        return slots, touched

    def _learn(self, data: bytes, end: int, code: int, value: Any) -> None:
        """Remembers what an attribute reads as, or that it is skipped: short ones, some values a name. A name with more
        values than that is looked up by name from then on."""
        value = self._simplify(code, value)
        name = data[2:end]
        count = self._variety.get(name, 0)
        if len(data) < _SHORT and count < _VARIETY and len(self._known) < _KNOWN:
            self._variety[name] = count + 1
            self._known[data] = (code, value, self._keys.bits[code])
        elif code != self._keys.unread:
            self._constant[code] = False
        elif len(self._codes) < _KNOWN:
            self._codes[name] = _SKIPPED

    def _keep(self, attributes: list[bytes], layouts: Layouts) -> None:
        """Makes a layout of a span that fitted none."""
        kept = layouts.by_size.setdefault(len(attributes), [])
        if len(kept) >= _LAYOUTS:
            return
        keys = self._keys
        same: list[int] = []
        lazy: list[int] = []
        reads: list[int] = []
        skipped: list[int] = []
        codes: dict[int, int] = {}
        for place, data in enumerate(attributes):
            name = data[2 : data[1] + 2]
            if data in self._known and self._variety.get(name, 0) <= _STEADY:
                same.append(place)
                continue
            code = codes[place] = self._codes.get(name, _SKIPPED)
            (skipped if code < 0 else lazy if keys.lazy[code] else reads).append(place)
        rest = lazy + reads + skipped
        if len(same) < 2 or len(rest) < 2:
            return  # too few to be worth it, and picked one by one they would not be tuples
        layout = Layout(attributes, same, rest, layouts.template[:])
        for place in same:
            code, value, bit = self._known[attributes[place]]
            layout.slots[code] = value
            layout.touched |= bit
        for place in lazy + reads:
            layout.touched |= keys.bits[codes[place]]
        layout.lazy = [codes[place] for place in lazy]
        layout.reads = [(attributes[p][1] + 2, codes[p], self._constant[codes[p]]) for p in reads]
        kept.append(layout)
