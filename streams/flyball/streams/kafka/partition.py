"""Which topic and partition an event goes to, so that the copies of one call meet where they are told apart.

Each partition has a deduplicator of its own, so two copies of a call in two partitions count twice. What a call is known by
(`streams.dedup`), and what becomes of it here:

- response id: the copies of gateway and SDK, and repeated posts, carry the same one and go by it;
- a call inside a call (spans): both carry the trace, but only one may carry the id, so neither will do alone. Calls of one body that
  enclose each other go by one key: the innermost id among them. Across bodies the router remembers by which key a span
  went, so what encloses it later, or is enclosed by it, follows;
- likeness (no id, no common trace; failures that a gateway and an SDK both told): nothing in the event says where the other copy is.
  These meet by chance only, and count twice otherwise: let one of the two reporters go, or give the topic one partition.

Also not met: an enclosing call that another ingest process took, or that comes after the router has forgotten; and copies on both sides of a
change in the number of partitions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Final
from zlib import crc32

from flyball.core.events import AgentStep, Change, Evaluation, Event, GpuSample, LlmCall

CALLS: Final = "llm-calls"
STEPS: Final = "agent-steps"
SAMPLES: Final = "gpu-samples"
CHANGES: Final = "changes"
TOPIC_OF: Final[Mapping[type, str]] = {
    LlmCall: CALLS, AgentStep: STEPS, GpuSample: SAMPLES, Change: CHANGES, Evaluation: CALLS,
}  # fmt: skip
"""Event type → topic, without prefix. Evaluations are as many as calls, and are counted in windows beside them."""

_MIX: Final = 0x9E3779B1
_32_BITS: Final = 0xFFFFFFFF
_DEEPEST: Final = 16
_span = attrgetter("span")

Placed = dict[tuple[str, int], list[Event]]
"""(topic without prefix, partition) → events, in the order in which they came."""


def key_of(text: str) -> int:
    """A number of 32 bits that is the same in every process and version.

    >>> key_of("chatcmpl-1")
    2386798241
    """
    return crc32(text.encode())


def partition_of(key: int, partitions: int) -> int:
    """0 … partitions - 1. The multiplication spreads keys that differ in a digit only, which CRC leaves near each other.

    >>> [partition_of(key_of(f"call-{i}"), 8) for i in range(6)]
    [2, 0, 5, 5, 7, 3]
    """
    return ((key * _MIX & _32_BITS) * partitions) >> 32


def own_key(event: Event) -> int:
    """The key of an event by itself, without what is known of others."""
    if type(event) is LlmCall:
        text = (
            event.id or event.trace or event.run or event.span or f"{event.at!r}{event.tenant}{event.model}"
        )
    elif type(event) is AgentStep:
        text = event.run or event.parent_run or event.trace or event.id or event.agent
    elif type(event) is GpuSample:
        text = event.node or event.deployment or event.pod or event.gpu
    elif type(event) is Evaluation:
        text = event.run or event.id or f"{event.app}{event.prompt}{event.model}{event.at!r}"
    else:
        text = ""  # changes are few, and their order tells a story: all by one key
    return key_of(text)


class Router:
    """Splits bodies by topic and partition. The same bodies in the same order give the same places; any thread may ask.

    Args:
        remember_calls: with spans, at least; twice as many at most. About 350 bytes each.
    """

    def __init__(self, remember_calls: int = 50_000) -> None:
        self._most = max(1, remember_calls)
        self._new, self._old = _Memory(), _Memory()
        self._lock = threading.Lock()

    def split(self, events: Sequence[Event], partitions: Mapping[str, int]) -> Placed:
        """Args:
        partitions: topic without prefix → how many it has.

        Raises: KeyError when a topic of these events is not among `partitions`.
        """
        if set(map(type, events)) == {LlmCall} and not any(map(_span, events)):
            return self._quickly(events, partitions[CALLS])
        placed: Placed = {}
        related = self._related(events)
        for event in events:
            key = None
            if type(event) is LlmCall and event.span:
                key = related[event.span]
            topic = TOPIC_OF[type(event)]
            place = (topic, partition_of(own_key(event) if key is None else key, partitions[topic]))
            found = placed.get(place)
            if found is None:
                placed[place] = [event]
            else:
                found.append(event)
        return placed

    def _quickly(self, calls: Sequence[Event], n: int) -> Placed:
        """The same for calls without spans: what a gateway tells."""
        keys = [crc32(c.id.encode()) if c.id else own_key(c) for c in calls]  # type: ignore[union-attr]
        buckets: list[list[Event]] = [[] for _ in range(n)]
        for call, key in zip(calls, keys, strict=True):
            buckets[((key * _MIX & _32_BITS) * n) >> 32].append(call)
        return {(CALLS, p): found for p, found in enumerate(buckets) if found}

    def _related(self, events: Sequence[Event]) -> dict[str, int]:
        """Span → key of every call that has a span."""
        calls = {e.span: e for e in events if type(e) is LlmCall and e.span}
        if not calls:
            return {}
        with self._lock:
            if self._unrelated(calls):
                keys = {s: key_of(c.id) if c.id else own_key(c) for s, c in calls.items()}
            else:
                keys = self._joined(calls)
            self._remember(calls, keys)
        return keys

    def _unrelated(self, calls: Mapping[str, LlmCall]) -> bool:
        """Whether none of the calls is inside another of them, or related to one that went before."""
        parents = {c.parent for c in calls.values()}
        return parents.isdisjoint(calls) and all(
            m.spans.keys().isdisjoint(calls)
            and m.inside.keys().isdisjoint(calls)
            and m.spans.keys().isdisjoint(parents)
            for m in (self._new, self._old)
        )

    def _joined(self, calls: Mapping[str, LlmCall]) -> dict[str, int]:
        keys: dict[str, int] = {}
        for group in _groups(calls):
            key = self._remembered(group)
            if key is None:
                key = next((key_of(c.id) for c in group if c.id), None)
            if key is None:
                key = own_key(group[0])
            for call in group:
                keys[call.span] = key
        return keys

    def _remembered(self, group: Iterable[LlmCall]) -> int | None:
        """The key by which a call of these, or one that it encloses or is enclosed by, went before."""
        for call in group:
            for memory in (self._new, self._old):
                for key in (
                    memory.spans.get(call.span),
                    memory.inside.get(call.span),
                    memory.spans.get(call.parent),
                ):
                    if key is not None:
                        return key
        return None

    def _remember(self, calls: Mapping[str, LlmCall], keys: Mapping[str, int]) -> None:
        if len(self._new.spans) + len(calls) > self._most and self._new.spans:
            self._old, self._new = self._new, _Memory()
        self._new.spans.update(keys)
        inside = self._new.inside
        for span, call in calls.items():
            if call.parent:
                inside.setdefault(call.parent, keys[span])


class _Memory:
    """Keys that calls went by: under their own span, and under the span around them."""

    __slots__ = ("inside", "spans")

    def __init__(self) -> None:
        self.spans: dict[str, int] = {}
        self.inside: dict[str, int] = {}


def _groups(calls: Mapping[str, LlmCall]) -> Iterable[list[LlmCall]]:
    """The calls, those that enclose each other together, innermost first."""
    depths: dict[str, list[tuple[int, LlmCall]]] = {}
    for call in calls.values():
        top, depth = call, 0
        while top.parent in calls and depth < _DEEPEST:  # spans that claim to be inside each other end too
            top, depth = calls[top.parent], depth + 1
        depths.setdefault(top.span, []).append((-depth, call))
    return ([c for _, c in sorted(group, key=lambda of: of[0])] for group in depths.values())
