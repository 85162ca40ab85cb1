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

import re
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from operator import attrgetter
from typing import Any, Final

import msgspec

from flyball.core.codec import decode_events, encode_events, pack_state, unpack_state
from flyball.core.events import AgentStep, Batch, Event, LlmCall

GATEWAYS: Final[frozenset[str]] = frozenset({"litellm"})
"""Scopes whose copy knows best who served the call, and whose apps are named by keys, not by services."""

_VERSION: Final = 1
_RECENT_CALLS: Final = 10_000
_TIGHT_S: Final = 0.05
_BUCKET_S: Final = 0.5

_id = attrgetter("id")
_scope = attrgetter("scope")
_span = attrgetter("span")
_DATED: Final = re.compile(r"([-@:](20\d{6}|20\d\d-\d\d-\d\d|\d{4}|latest|v\d+(:\d+)?))+$")
_UNSPECIFIC: Final[frozenset[str]] = frozenset(
    {"unknown", "server_error", "rate_limited", "bad_request", "connection", "auth"}
)
"""Classes that a source without the provider's sentence falls back to; a copy that says something else knows more."""

Entry = list[Any]
"""[start, end, input, output, failed, families, id, scope, reporter, provider, app, error, scopes that matched, batch, place]"""
(
    _START,
    _END,
    _IN,
    _OUT,
    _FAILED,
    _FAMILIES,
    _RID,
    _SCOPE,
    _REPORTER,
    _PROVIDER,
    _APP,
    _CLASS,
    _USED,
    _BATCH,
    _PLACE,
) = range(15)


class _Memory:
    """What is remembered of one half of the time: two of these take turns, so that memory is bounded without a clock."""

    __slots__ = ("by_id", "entries", "ids", "index", "parents", "spans")

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.spans: dict[str, tuple[str, bool]] = {}
        """Model-call spans that were fed: (scope, failed); without a scope when a call inside them told the same call."""
        self.parents: dict[str, list[tuple[str, bool]]] = {}
        """Parents of counted calls: (scope, failed) of each child."""
        self.entries: list[Entry] = []
        self.index: dict[tuple[str, bool, int | None, int], list[Entry]] = {}
        self.by_id: dict[str, Entry] = {}

    def enter(self, entry: Entry) -> None:
        """Makes a counted call findable by what it is like, and its reporter by its id."""
        self.entries.append(entry)
        if entry[_RID]:
            self.by_id[entry[_RID]] = entry
        bucket = int(entry[_END] / _BUCKET_S)
        for family in (*entry[_FAMILIES], "*") if entry[_FAILED] else entry[_FAMILIES]:
            self.index.setdefault((family, entry[_FAILED], entry[_OUT], bucket), []).append(entry)

    def size(self) -> int:
        return max(len(self.ids), len(self.spans), len(self.entries))


class Deduplicator:
    """Drops copies of calls, in bounded memory; used before windows.

    With one reporter and response ids it costs set operations over whole batches only. From the moment a second
    instrumentation scope shows up, every call is looked at (a few µs each): only then can copies be told by likeness.
    In batches of more than 64 events the scope is sampled for that, so a rare second scope may be noticed a batch late.

    Misleads where two applications really make like calls at the same moment through different instrumentations: a pair
    of failures is only taken for one call when the two reporters have told the same call before, or both
    ends agree within 50 ms.

    Args:
        remember_s: how long copies are recognised, in event time; at least half of it is always remembered.
        max_calls: bound on remembered calls; about 130 bytes of memory and 45 bytes of snapshot each (300 once
            there is a second scope). Reached, the older half is forgotten early.
        tolerance_s: how far the longer copy's interval is stretched when the other must lie within it; clocks differ.

    Not thread-safe. `duplicates` counts dropped calls, `duplicate_steps` dropped agent steps, since the snapshot's origin.
    """

    def __init__(
        self, remember_s: float = 600.0, max_calls: int = 1_000_000, tolerance_s: float = 0.5
    ) -> None:
        self._half_s = remember_s / 2
        self._half_calls = max(1, max_calls // 2)
        self._tolerance_s = tolerance_s
        self.duplicates = 0
        self.duplicate_steps = 0
        self._new, self._old = _Memory(), _Memory()
        self._since = 0.0
        self._scope_seen = ""
        self._many = False
        self._recent: deque[tuple[Sequence[Event], str]] = deque()
        self._recent_calls = 0
        self._batch = 0
        self._told_twice: dict[str, int] = {}

    @property
    def told_twice(self) -> dict[tuple[str, str], int]:
        """Pairs of reporters (`scope` or `scope of app`) that told the same calls, and how often: one of them can go."""
        found: dict[tuple[str, str], int] = {}
        for key, count in sorted(self._told_twice.items()):
            first, second = key.split("\x1e")
            pair = (_named(first), _named(second))
            found[pair] = found.get(pair, 0) + count
        return found

    def feed(self, batch: Batch) -> Batch:
        """The batch without copies of calls that were fed before, or earlier in it."""
        events = batch.events
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
        if at - self._since >= self._half_s or self._new.size() + len(events) > self._half_calls:
            self._old, self._new = self._new, _Memory()
            self._since = at

    def _quickly(self, events: Sequence[Event], sender: str) -> bool:
        """All at once: True when every event has an id of its own that was never seen, and there is one reporter."""
        count = len(events)
        sample = events if count <= 64 else list(islice(events, 0, None, max(8, count // 64)))
        try:
            scopes = set(map(_scope, sample))
            if len(scopes) != 1 or any(map(_span, sample)):
                return False
            ids = set(map(_id, events))
        except AttributeError:
            return False  # GPU samples and changes among them
        if len(ids) != count or "" in ids:
            return False
        (scope,) = scopes
        if self._scope_seen and scope != self._scope_seen:
            return False
        if not (ids.isdisjoint(self._new.ids) and ids.isdisjoint(self._old.ids)):
            return False
        self._scope_seen = scope
        self._new.ids |= ids
        self._keep_recent(events, sender)
        return True

    def _keep_recent(self, events: Sequence[Event], sender: str) -> None:
        """Batches to look back at should a second scope appear: its copies may be of calls that just passed."""
        self._recent.append((events, sender))
        self._recent_calls += len(events)
        while self._recent_calls > _RECENT_CALLS and len(self._recent) > 1:
            self._recent_calls -= len(self._recent.popleft()[0])

    def _carefully(self, batch: Batch) -> Batch:
        if not self._many and self._is_second(batch.events):
            self._look_back()
        work = _Work(self, batch)
        for event in batch.events:
            kind = type(event)
            if kind is LlmCall:
                work.call(event)  # type: ignore[arg-type]
            elif kind is AgentStep:
                work.step(event)  # type: ignore[arg-type]
            else:
                work.out.append(event)
        if not self._many:
            self._keep_recent([e for e in work.out if type(e) is LlmCall], batch.sender)
        return (
            batch if len(work.out) == len(batch.events) else msgspec.structs.replace(batch, events=work.out)
        )

    def _is_second(self, events: Sequence[Event]) -> bool:
        for event in events:
            if type(event) is LlmCall:
                if not self._scope_seen:
                    self._scope_seen = event.scope
                elif event.scope != self._scope_seen:
                    return True
        return False

    def _look_back(self) -> None:
        """A second scope has come: from now on likeness is looked for, also with the calls that came before."""
        self._many = True
        for events, sender in self._recent:
            for event in events:
                if type(event) is LlmCall:
                    self._new.enter(_entry(event, sender, -1, -1))
        self._recent.clear()
        self._recent_calls = 0

    def _alike(self, call: LlmCall, sender: str) -> Entry | None:
        """The remembered call of another scope that this one is a copy of, the nearest in time; None when there is none."""
        mine = _entry(call, sender, -1, -1)
        bucket = int(mine[_END] / _BUCKET_S)
        reach = int(self._tolerance_s / _BUCKET_S) + 1
        best: Entry | None = None
        best_distance = 0.0
        for family in mine[_FAMILIES] or ("*",):
            for near in range(bucket - reach, bucket + reach + 1):
                key = (family, mine[_FAILED], mine[_OUT], near)
                for memory in (self._new, self._old):
                    for other in memory.index.get(key, ()):
                        distance = self._distance(mine, other)
                        if distance is not None and (best is None or distance < best_distance):
                            best, best_distance = other, distance
        return best

    def _distance(self, mine: Entry, other: Entry) -> float | None:
        """How far apart two like calls are, seconds (plus a bit where their classes differ); None: not the same call."""
        if mine[_SCOPE] == other[_SCOPE] or mine[_SCOPE] in other[_USED]:
            return None
        if mine[_IN] is not None and other[_IN] is not None and mine[_IN] != other[_IN]:
            return None
        if _ids_differ(mine[_RID], other[_RID]):
            return None
        gateway = mine[_SCOPE] in GATEWAYS or other[_SCOPE] in GATEWAYS
        if not gateway and (
            _contradict(mine[_PROVIDER], other[_PROVIDER]) or _contradict(mine[_APP], other[_APP])
        ):
            return None
        starts, ends = abs(mine[_START] - other[_START]), abs(mine[_END] - other[_END])
        slack = self._tolerance_s
        inside = mine[_START] >= other[_START] - slack and mine[_END] <= other[_END] + slack
        outside = other[_START] >= mine[_START] - slack and other[_END] <= mine[_END] + slack
        if not (inside or outside):
            return None
        said = bool(mine[_IN] and mine[_OUT] and other[_IN])
        known = self._told_twice.get(_pair(mine[_REPORTER], other[_REPORTER]), 0)
        if not said and not known and (starts > _TIGHT_S or ends > _TIGHT_S):
            return None
        return float(starts + ends + (1.0 if mine[_CLASS] != other[_CLASS] else 0.0))

    def snapshot(self) -> bytes:
        """Everything remembered, as one versioned blob: about 45 bytes a call, 300 once there is a second scope;
        at most `max_calls` of them. Ids are sorted, so that equal states give equal bytes."""
        memories = [
            (sorted(m.ids), m.spans, m.parents, [[*e[:_USED], sorted(e[_USED])] for e in m.entries])
            for m in (self._new, self._old)
        ]
        recent = [(encode_events(list(events)), sender) for events, sender in self._recent]
        state = (
            memories, recent, self._since, self._scope_seen, self._many, self.duplicates, self.duplicate_steps,
            self._told_twice,
        )  # fmt: skip
        return pack_state("dedup", _VERSION, state)

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError when the bytes are not a snapshot of this stage."""
        memories, recent, since, scope_seen, many, duplicates, duplicate_steps, told_twice = unpack_state(
            state, "dedup", _VERSION
        )
        self._new, self._old = (_restored(m) for m in memories)
        self._recent = deque((decode_events(events), sender) for events, sender in recent)
        self._recent_calls = sum(len(events) for events, _ in self._recent)
        self._since, self._scope_seen, self._many = since, scope_seen, many
        self.duplicates, self.duplicate_steps, self._told_twice = duplicates, duplicate_steps, told_twice


class _Work:
    """One batch that is looked at call by call. `places` are positions in `out`, to merge copies within the batch."""

    __slots__ = ("_child_places", "_dedup", "_id_places", "_number", "_sender", "_span_places", "out")

    def __init__(self, dedup: Deduplicator, batch: Batch) -> None:
        self._dedup, self._sender = dedup, batch.sender
        self._number = dedup._batch
        self.out: list[Event] = []
        self._id_places: dict[str, int] = {}
        self._span_places: dict[str, int] = {}
        self._child_places: dict[str, int] = {}

    def step(self, step: AgentStep) -> None:
        d = self._dedup
        if step.id:
            if step.id in d._new.ids or step.id in d._old.ids:
                d.duplicate_steps += 1
                return
            d._new.ids.add(step.id)
        self.out.append(step)

    def call(self, call: LlmCall) -> None:
        d = self._dedup
        place = self._copy_of(call)
        self._remember(call)
        if place is None:
            place = len(self.out)
            self.out.append(call)
            if call.span and call.parent:
                self._child_places[call.parent] = place
            if d._many:
                d._new.enter(_entry(call, self._sender, self._number, place))
        else:
            d.duplicates += 1
        if place >= 0:
            if call.id:
                self._id_places.setdefault(call.id, place)
            if call.span:
                self._span_places[call.span] = place

    def _copy_of(self, call: LlmCall) -> int | None:
        """None: no copy. -1: of a call of an earlier batch. Else the place of the call in this batch, merged with it."""
        d = self._dedup
        if call.id and (call.id in d._new.ids or call.id in d._old.ids):
            place = self._id_places.get(call.id, -1)
            first = d._new.by_id.get(call.id) or d._old.by_id.get(call.id)
            if first is not None:
                first[_USED].add(call.scope)
                if first[_SCOPE] != call.scope:
                    self._note(first[_REPORTER], call)
            self._merge(place, call, inner=None)
            return place
        if call.span:
            nested = self._nested(call)
            if nested is not None:
                return nested
        if d._many:
            other = d._alike(call, self._sender)
            if other is not None:
                other[_USED].add(call.scope)
                self._note(other[_REPORTER], call)
                place = other[_PLACE] if other[_BATCH] == self._number else -1
                self._merge(place, call, inner=None)
                return int(place)
        return None

    def _nested(self, call: LlmCall) -> int | None:
        d = self._dedup
        failed = bool(call.error)
        if call.span in d._new.spans or call.span in d._old.spans:
            return self._span_places.get(call.span, -1)  # the same span, posted again
        children = d._new.parents.get(call.span) or d._old.parents.get(call.span)
        if children and any(
            scope != call.scope or child_failed == failed for scope, child_failed in children
        ):
            d._new.spans[call.span] = ("", failed)  # told by its child: another child is another attempt
            self._note(self._neighbour(children[0][0], call), call)
            place = self._child_places.get(call.span, -1)
            self._merge(place, call, inner=False)
            return place
        if call.parent:
            for memory in (d._new, d._old):
                above = memory.spans.get(call.parent)
                if above is None or above[0] == "":
                    continue
                if above[0] != call.scope or above[1] == failed:
                    memory.spans[call.parent] = (
                        "",
                        above[1],
                    )  # told by this child: another is another attempt
                    self._note(self._neighbour(above[0], call), call)
                    place = self._span_places.get(call.parent, -1)
                    self._merge(place, call, inner=True)
                    return place
        return None

    def _remember(self, call: LlmCall) -> None:
        new = self._dedup._new
        if call.id:
            new.ids.add(call.id)
        if call.span:
            new.spans.setdefault(call.span, (call.scope or "-", bool(call.error)))
            if call.parent:
                new.parents.setdefault(call.parent, []).append((call.scope, bool(call.error)))

    def _neighbour(self, scope: str, call: LlmCall) -> str:
        """The reporter of a span around or inside the call's: of the same process, so of its sender and application."""
        return _reporter(msgspec.structs.replace(call, scope=scope), self._sender)

    def _note(self, other: str, call: LlmCall) -> None:
        """Counts that two reporters told the same call."""
        told = self._dedup._told_twice
        key = _pair(other, _reporter(call, self._sender))
        if key in told or len(told) < 1000:
            told[key] = told.get(key, 0) + 1

    def _merge(self, place: int, call: LlmCall, inner: bool | None) -> None:
        """Merges a copy with the call at `place` of this batch. `inner`: the copy is the one inside the other."""
        if place < 0:
            return
        there = self.out[place]
        if not isinstance(there, LlmCall):
            return
        if inner is None:
            inner = call.scope in GATEWAYS and there.scope not in GATEWAYS
        self.out[place] = _filled(call, there) if inner else _filled(there, call)


_FILLED: Final = tuple(
    f
    for f in LlmCall.__struct_fields__
    if f not in ("at", "error", "error_code", "run", "stream", "trace", "span", "parent", "scope")
)


def _filled(call: LlmCall, other: LlmCall) -> LlmCall:
    """`call` with what it lacks taken from its copy; tokens only when the copy tells all of them the same way."""
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


def _entry(call: LlmCall, sender: str, batch: int, place: int) -> Entry:
    return [
        call.at - (call.latency_s or 0.0), call.at, call.input_tokens, call.output_tokens or None, bool(call.error),
        _families(call), call.id, call.scope, _reporter(call, sender), call.provider, call.app, call.error, set(), batch,
        place,
    ]  # fmt: skip


def _restored(packed: Any) -> _Memory:
    ids, spans, parents, entries = packed
    memory = _Memory()
    memory.ids = set(ids)
    memory.spans = {k: (scope, failed) for k, (scope, failed) in spans.items()}
    memory.parents = {k: [(scope, failed) for scope, failed in v] for k, v in parents.items()}
    for entry in entries:
        entry[_FAMILIES] = tuple(entry[_FAMILIES])
        entry[_USED] = set(entry[_USED])
        entry += [-1, -1]
        memory.enter(entry)
    return memory


_family_cache: dict[str, str] = {}


def _family(model: str) -> str:
    """The model without provider prefix and date: `openai/gpt-4.1-mini-2025-04-14` → `gpt-4.1-mini`."""
    found = _family_cache.get(model)
    if found is None:
        found = _DATED.sub("", model.rpartition("/")[2].lower())
        if len(_family_cache) < 10_000:
            _family_cache[model] = found
    return found


def _families(call: LlmCall) -> tuple[str, ...]:
    """Every name this call's model goes by: as asked for, as served, and the gateway's group."""
    group = call.deployment.partition("/")[0] if call.scope in GATEWAYS else ""
    names: Iterable[str] = (call.model, call.model_served, group)
    return tuple(dict.fromkeys(_family(n) for n in names if n))


def _reporter(call: LlmCall, sender: str) -> str:
    return f"{call.scope}\x1f{sender}\x1f{'' if call.scope in GATEWAYS else call.app}"


def _named(reporter: str) -> str:
    scope, _, rest = reporter.partition("\x1f")
    app = rest.partition("\x1f")[2]
    return f"{scope} of {app}" if app else scope


def _pair(first: str, second: str) -> str:
    return f"{first}\x1e{second}" if first <= second else f"{second}\x1e{first}"


def _ids_differ(first: str, second: str) -> bool:
    """Two real response ids of one kind that differ are two calls; LiteLLM makes up ids of its own, which say nothing."""
    if not first or not second or first == second or "/" in first or "/" in second:
        return False
    return first[:5] == second[:5]


def _contradict(first: str, second: str) -> bool:
    return bool(first and second and first != second)
