"""One call, told twice, counts once: the first copy counts, later ones are dropped and counted.

What relates copies, in this order:

1. the same response id (gateway and SDK, repeated posts);
2. a model call inside a model call: an SDK that traces itself under an instrumentation. The innermost counts. Within one
   instrumentation only where both ended alike: a failed attempt under a call that went well is an attempt of its own;
3. between different instrumentation scopes only, likeness: the same model family, the same tokens (or both failed), and one
   inside the other in time. A match uses up its partner, so that two calls never absorb one copy each of the other.

Copies that arrive in one batch are merged: the innermost (or the gateway's) stays and takes from the other what it lacks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import compress
from operator import attrgetter
from typing import Any, Final

import msgspec
import numpy as np

from flyball.core.codec import decode_events, encode_events, pack_state, unpack_state
from flyball.core.events import AgentStep, Batch, Event, LlmCall
from flyball.streams._likeness import GATEWAYS, Half, Likeness, Told
from flyball.streams._seen import SeenIds, hashes

_VERSION: Final = 2
_RECENT_CALLS: Final = 1000
"""Calls held for the moment that a second scope shows up. Few, because they keep the next body out of the cache."""
_RUSH_CALLS: Final = 256
_RUSH_S: Final = 0.1
"""A batch of more calls than that within less time is not held: at such a rate a thousand calls pass in a moment, and their copies come
seconds later."""
_SAMPLE: Final = 64

_scope = attrgetter("scope")
_span = attrgetter("span")
_parent = attrgetter("parent")
_error = attrgetter("error")
_UNSPECIFIC: Final[frozenset[str]] = frozenset(
    {"unknown", "server_error", "rate_limited", "bad_request", "connection", "auth"}
)
"""Classes that a source without the provider's sentence falls back to; a copy that says something else knows more."""


class _Memory:
    """What is remembered of one half of the time: two of these take turns, so that memory is bounded without a clock.

    Spans and parents map to `scope␟error` of the call, or to its error alone where the only scope so far is meant; a span
    maps to None when a call inside it told the same call."""

    __slots__ = ("parents", "seen", "spans")

    def __init__(self, expected: int = 0) -> None:
        self.seen = SeenIds(expected)
        self.spans: dict[str, str | None] = {}
        self.parents: dict[str, str] = {}

    def size(self) -> int:
        return max(self.seen.n, len(self.spans))

    @property
    def ids(self) -> set[str]:
        """Every remembered id; made anew at every reading."""
        return self.seen.all()


class Deduplicator:
    """Drops copies of calls, in bounded memory; used before windows.

    With one reporter it costs set operations over whole batches only. From the moment a second instrumentation scope
    shows up, every call is looked at by itself (some µs each): only then can copies be told by likeness. In batches of more
    than 64 events the scope is sampled for that, so a rare second scope may be noticed a batch late.

    Misleads where two applications really make like calls at the same moment through different instrumentations: a pair
    of failures is only taken for one call when the two reporters have told the same call before, or both
    ends agree within 50 ms.

    Args:
        remember_s: how long copies are recognised, in event time; at least half of it is always remembered.
        max_calls: bound on remembered calls; about 130 bytes of memory and 45 bytes of snapshot each (twice that for calls
            with spans). Reached, the older half is forgotten early. An eighth as many are remembered for likeness, once
            there is a second scope, at about 700 bytes of memory and 200 of snapshot each.
        tolerance_s: how far the longer copy's interval is stretched when the other must lie within it; clocks differ.

    Not thread-safe. `duplicates` counts dropped calls, `duplicate_steps` dropped agent steps, since the snapshot's origin.
    """

    def __init__(
        self, remember_s: float = 600.0, max_calls: int = 1_000_000, tolerance_s: float = 0.5
    ) -> None:
        self._half_s = remember_s / 2
        self._half_calls = max(1, max_calls // 2)
        self.duplicates = 0
        self.duplicate_steps = 0
        self._new, self._old = _Memory(), _Memory()
        self._since = 0.0
        self._only = ""
        """The one scope so far; what spans without a scope are of."""
        self._many = False
        self._recent: deque[tuple[Sequence[Event], str]] = deque()
        self._recent_calls = 0
        self._batch = 0
        self.kept: list[int] | None = None
        """Positions of the newest batch's events that came through; None: all. For whoever feeds this; not part of the state."""
        self._likeness = Likeness(tolerance_s, max(1, max_calls // 16))

    @property
    def told_twice(self) -> dict[tuple[str, str], int]:
        """Pairs of reporters (`scope` or `scope of app`) that told the same calls, and how often: one of them can go."""
        found: dict[tuple[str, str], int] = {}
        for key, count in sorted(self._likeness.told_twice.items()):
            first, second = key.split("\x1e")
            pair = (_named(first), _named(second))
            found[pair] = found.get(pair, 0) + count
        return found

    def feed(self, batch: Batch) -> Batch:
        """The batch without copies of calls that were fed before, or earlier in it."""
        events = batch.events
        self.kept = None
        if not events:
            return batch
        self._batch += 1
        self._turn(events)
        if not self._many and self._quickly(events, batch.sender):
            return batch
        return self._carefully(batch)

    def _turn(self, events: Sequence[Event]) -> None:
        """Forgets the older half when its time, or its room, is up. Time is the batch's middle event's."""
        at = events[len(events) // 2].at
        if at < self._since - 2 * self._half_s or self._since == 0.0:
            self._since = at  # the first batch, or the clock that set `_since` was wrong
        late = at - self._since >= self._half_s
        if late or self._new.size() + len(events) > self._half_calls:
            self._old, self._new = self._new, _Memory(self._new.seen.n)
            self._since = at
            if late:
                self._likeness.turn()

    def _quickly(self, events: Sequence[Event], sender: str) -> bool:
        """All at once: True when there is one reporter, every event has an id of its own, and no id, span or parent was
        seen before. Nothing is changed otherwise."""
        new, old = self._new, self._old
        sample = events if len(events) <= _SAMPLE else events[:: len(events) // _SAMPLE]
        try:
            scopes = set(map(_scope, sample))
            spanned = any(map(_span, sample))
        except AttributeError:
            return False  # GPU samples and changes among them
        if len(scopes) != 1 or (self._only and not scopes <= {self._only}):
            return False
        try:
            ids = [event.id for event in events]  # type: ignore[union-attr]
        except AttributeError:
            return False
        keys = hashes(ids)
        ordered = np.sort(keys)
        if (
            (ordered[1:] == ordered[:-1]).any()
            or not keys.all()
            or old.seen.any_of(keys)
            or new.seen.any_of(keys)
        ):
            return False
        calls: Sequence[Event] = events
        if spanned:
            calls = [e for e in events if type(e) is LlmCall]
            if not self._unrelated(calls):
                return False
            new.spans.update(zip(map(_span, calls), map(_error, calls), strict=True))
            new.parents.update(zip(map(_parent, calls), map(_error, calls), strict=True))
        (self._only,) = scopes
        new.seen.add(ids, keys)
        self._keep_recent(calls, sender)
        return True

    def _unrelated(self, calls: Sequence[Event]) -> bool:
        """Whether no call of these is inside another of them or of those before. (Asked of the large side's keys: a set
        asked about a dict would walk through all of it.)"""
        new, old = self._new, self._old
        spans, parents = set(map(_span, calls)), set(map(_parent, calls))
        parents.discard("")
        spans.discard("")
        return (
            len(spans) >= len(calls)
            and parents.isdisjoint(spans)
            and new.spans.keys().isdisjoint(spans)
            and old.spans.keys().isdisjoint(spans)
            and new.parents.keys().isdisjoint(spans)
            and old.parents.keys().isdisjoint(spans)
            and new.spans.keys().isdisjoint(parents)
            and old.spans.keys().isdisjoint(parents)
        )

    def _keep_recent(self, events: Sequence[Event], sender: str) -> None:
        """Batches to look back at should a second scope appear: its copies may be of calls that just passed."""
        if len(events) > _RUSH_CALLS and abs(events[-1].at - events[0].at) < _RUSH_S:
            self._recent.clear()
            self._recent_calls = 0
            return
        self._recent.append((events, sender))
        self._recent_calls += len(events)
        while self._recent_calls > _RECENT_CALLS and len(self._recent) > 1:
            self._recent_calls -= len(self._recent.popleft()[0])

    def _carefully(self, batch: Batch) -> Batch:
        if not self._many and self._is_second(batch.events):
            self._look_back()
        work = _Work(self, batch.sender, _with_id(batch.events))
        kept: list[int] = []
        for place, event in enumerate(batch.events):
            kind = type(event)
            if kind is LlmCall:
                work.call(event)  # type: ignore[arg-type]
            elif kind is AgentStep:
                work.step(event)  # type: ignore[arg-type]
            else:
                work.out.append(event)
            if len(work.out) > len(kept):
                kept.append(place)
        work.remember()
        if len(kept) < len(batch.events):
            self.kept = kept
        if not self._many:
            self._keep_recent([e for e in work.out if type(e) is LlmCall], batch.sender)
        return msgspec.structs.replace(batch, events=work.out) if work.changed else batch

    def _is_second(self, events: Sequence[Event]) -> bool:
        for event in events:
            if type(event) is LlmCall:
                if not self._only:
                    self._only = event.scope
                elif event.scope != self._only:
                    return True
        return False

    def _look_back(self) -> None:
        """A second scope has come: from now on likeness is looked for, also with the calls that came before."""
        self._many = True
        for events, sender in self._recent:
            for event in events:
                if type(event) is LlmCall:
                    self._likeness.add(Told(event, _reporter(event, sender)))
        self._recent.clear()
        self._recent_calls = 0

    def snapshot(self) -> bytes:
        """Everything remembered, as one versioned blob: about 45 bytes a call (90 with spans), 200 more for each that is
        remembered for likeness. Ids are in order of arrival: equal histories give equal bytes."""
        state = (
            [(m.seen.state(), m.spans, m.parents) for m in (self._new, self._old)],
            [[t.packed() for t in half.told] for half in (self._likeness.new, self._likeness.old)],
            self._likeness.scopes,
            self._likeness.told_twice,
            [(encode_events(list(events)), sender) for events, sender in self._recent],
            (self._since, self._only, self._many, self.duplicates, self.duplicate_steps),
        )
        return pack_state("dedup", _VERSION, state)

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError when the bytes are not a snapshot of this stage."""
        memories, halves, scopes, told_twice, recent, rest = unpack_state(state, "dedup", _VERSION)
        for memory, (seen, spans, parents) in zip((self._new, self._old), memories, strict=True):
            memory.seen, memory.spans, memory.parents = SeenIds.restored(seen), spans, parents
        self._likeness.new, self._likeness.old = (_restored(half) for half in halves)
        self._likeness.scopes, self._likeness.told_twice = scopes, told_twice
        self._recent = deque((decode_events(events), sender) for events, sender in recent)
        self._recent_calls = sum(len(events) for events, _ in self._recent)
        self._since, self._only, self._many, self.duplicates, self.duplicate_steps = rest


class _Work:
    """One batch that is looked at call by call. Places are positions in `out`, to merge copies within the batch."""

    __slots__ = (
        "_child_places", "_dedup", "_fresh", "_id_places", "_in_new", "_in_old", "_new", "_number", "_old", "_reporters",
        "_sender", "_span_places", "changed", "out",
    )  # fmt: skip

    def __init__(self, dedup: Deduplicator, sender: str, ids: Sequence[str]) -> None:
        self._dedup, self._sender = dedup, sender
        self._new, self._old = dedup._new, dedup._old
        self._number = dedup._batch
        self.out: list[Event] = []
        self.changed = False
        keys = hashes(ids)
        self._in_new = set(compress(ids, self._new.seen.which(keys)))
        self._in_old = set(compress(ids, self._old.seen.which(keys)))
        self._fresh: dict[str, None] = {}
        """Ids to be remembered, in order."""
        self._id_places: dict[str, int] = {}
        self._span_places: dict[str, int] = {}
        self._child_places: dict[str, int] = {}
        self._reporters: dict[tuple[str, str], str] = {}

    def _known(self, event_id: str) -> bool:
        return event_id in self._fresh or event_id in self._in_new or event_id in self._in_old

    def remember(self) -> None:
        """The batch is through: its ids are known from now on."""
        ids = list(self._fresh)
        if ids:
            self._new.seen.add(ids, hashes(ids))

    def step(self, step: AgentStep) -> None:
        if step.id:
            if self._known(step.id):
                self._dedup.duplicate_steps += 1
                self.changed = True
                return
            self._fresh[step.id] = None
        self.out.append(step)

    def call(self, call: LlmCall) -> None:
        d = self._dedup
        told = Told(call, self._reporter(call.scope, call.app), self._number) if d._many else None
        place = self._copy_of(call, told)
        if place is None:
            place = len(self.out)
            self.out.append(call)
            if call.parent:
                self._child_places[call.parent] = place
            if told is not None:
                told.place = place
                d._likeness.add(told)
        else:
            d.duplicates += 1
            self.changed = True
        new = self._new
        if call.id:
            if call.id not in self._in_new:
                self._fresh[call.id] = None
            self._id_places.setdefault(call.id, place)
        if call.span:
            outcome = f"{call.scope}\x1f{call.error}"
            new.spans.setdefault(call.span, outcome)
            self._span_places[call.span] = place
            if call.parent:
                new.parents[call.parent] = outcome

    def _copy_of(self, call: LlmCall, told: Told | None) -> int | None:
        """None: no copy. -1: of a call of an earlier batch. Else the place of the call in this batch, merged with it."""
        likeness = self._dedup._likeness
        if call.id and self._known(call.id):
            place = self._id_places.get(call.id, -1)
            if told is not None:
                first = likeness.with_id(call.id)
                if first is not None and first.scope != call.scope:
                    first.used += (call.scope,)
                    likeness.note(first.reporter, told.reporter)
            self._merge(place, call, inner=None)
            return place
        if call.span:
            nested = self._nested(call)
            if nested is not None:
                return nested
        if told is not None:
            other = likeness.copy_of(told)
            if other is not None:
                other.used += (call.scope,)
                likeness.note(other.reporter, told.reporter)
                place = other.place if other.number == self._number else -1
                self._merge(place, call, inner=None)
                return place
        return None

    def _nested(self, call: LlmCall) -> int | None:
        new, old = self._new, self._old
        if call.span in new.spans or call.span in old.spans:
            return self._span_places.get(call.span, -1)  # the same span, posted again
        child = new.parents.get(call.span)
        if child is None:
            child = old.parents.get(call.span)
        if child is not None and self._same(child, call):
            new.spans[call.span] = None  # told by its child: another child is another attempt
            place = self._child_places.get(call.span, -1)
            self._merge(place, call, inner=False)
            return place
        if call.parent:
            for memory in (new, old):
                above = memory.spans.get(call.parent)
                if above is not None and self._same(above, call):
                    memory.spans[call.parent] = None  # told by this child: another is another attempt
                    place = self._span_places.get(call.parent, -1)
                    self._merge(place, call, inner=True)
                    return place
        return None

    def _same(self, outcome: str, call: LlmCall) -> bool:
        """Whether a call right around or inside this one tells the same: another instrumentation's does, one's own if
        it ended alike."""
        scope, known, error = outcome.rpartition("\x1f")
        if not known:
            scope = self._dedup._only
        if scope != call.scope:
            # The other one is of the same process, so of the same sender and application.
            note = self._dedup._likeness.note
            note(self._reporter(scope, call.app), self._reporter(call.scope, call.app))
            return True
        return (error == "") == (call.error == "")

    def _reporter(self, scope: str, app: str) -> str:
        key = (scope, app)
        found = self._reporters.get(key)
        if found is None:
            found = self._reporters[key] = _reported(scope, self._sender, app)
        return found

    def _merge(self, place: int, call: LlmCall, inner: bool | None) -> None:
        """Merges a copy with the call at `place` of this batch. `inner`: the copy is the one inside the other."""
        if place < 0:
            return
        there = self.out[place]
        if isinstance(there, LlmCall):
            if inner is None:
                inner = call.scope in GATEWAYS and there.scope not in GATEWAYS
            self.out[place] = _filled(call, there) if inner else _filled(there, call)


_KEPT: Final = ("at", "error", "error_code", "run", "stream", "trace", "span", "parent", "scope")
_FILLED: Final = tuple(f for f in LlmCall.__struct_fields__ if f not in _KEPT)


def _filled(call: LlmCall, other: LlmCall) -> LlmCall:
    """`call` with what it lacks taken from its copy."""
    changes: dict[str, Any] = {}
    for name in _FILLED:
        value = getattr(call, name)
        if value is None or value == "":
            found = getattr(other, name)
            if found is not None and found != "":
                changes[name] = found
    if call.model_served == call.model and other.model_served not in ("", call.model):
        changes["model_served"] = other.model_served  # the asked-for name again is no answer
    if call.run == call.trace and other.run != other.trace and other.run:
        changes["run"] = other.run
    if other.error and (not call.error or (call.error in _UNSPECIFIC and other.error not in _UNSPECIFIC)):
        changes["error"], changes["error_code"] = other.error, other.error_code or call.error_code
    if other.stream and not call.stream:
        changes["stream"] = True
    return msgspec.structs.replace(call, **changes) if changes else call


def _with_id(events: Sequence[Event]) -> list[str]:
    """Ids of the calls and steps that have one."""
    return [e.id for e in events if (type(e) is LlmCall or type(e) is AgentStep) and e.id]


def _restored(packed: list[Any]) -> Half:
    half = Half()
    for one in packed:
        half.add(Told.unpacked(one))
    return half


def _reporter(call: LlmCall, sender: str) -> str:
    return _reported(call.scope, sender, call.app)


def _reported(scope: str, sender: str, app: str) -> str:
    return f"{scope}\x1f{sender}\x1f{'' if scope in GATEWAYS else app}"


def _named(reporter: str) -> str:
    scope, _, rest = reporter.partition("\x1f")
    app = rest.partition("\x1f")[2]
    return f"{scope} of {app}" if app else scope
