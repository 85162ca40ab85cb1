"""Which remembered call of another reporter a call is like: the last resort for telling copies."""

from __future__ import annotations

import re
from typing import Any, Final

from flyball.core.events import LlmCall

GATEWAYS: Final[frozenset[str]] = frozenset({"litellm"})
"""Scopes whose copy knows best who served the call, and whose apps are named by keys, not by services."""

_TIGHT_S: Final = 0.05
"""How near both ends must be where nothing but time relates two calls."""
_BUCKET_S: Final = 0.5
_LOOKED_AT: Final = 32
"""Candidates looked at per key, the newest: an outage makes many calls alike, and this a bounded effort."""
_DATED: Final = re.compile(r"([-@:](20\d{6}|20\d\d-\d\d-\d\d|\d{4}|latest|v\d+(:\d+)?))+$")

Key = tuple[str, str, str, bool, int | None, int]
"""Scope, application, model family, failed, output tokens, and a bucket of time where no tokens tell calls apart."""


class Told:
    """What likeness needs of a counted call."""

    __slots__ = (
        "app", "end", "failed", "families", "id", "input", "klass", "number", "output", "place", "provider", "reporter",
        "scope", "start", "used",
    )  # fmt: skip

    def __init__(self, call: LlmCall, reporter: str, number: int = -1, place: int = -1) -> None:
        self.start = call.at - (call.latency_s or 0.0)
        self.end = call.at
        self.input = call.input_tokens
        self.output = call.output_tokens or None  # some write an embedding's 0, some leave it out
        self.failed = call.error != ""
        self.klass = call.error
        self.id = call.id
        self.scope = call.scope
        self.app = "" if call.scope in GATEWAYS else call.app
        self.provider = call.provider
        self.families = families(call)
        self.reporter = reporter
        self.used: tuple[str, ...] = ()
        """Scopes that told the same call."""
        self.number, self.place = number, place
        """Batch and place in it, to merge copies of one batch."""

    def packed(self) -> list[Any]:
        return [
            self.start, self.end, self.input, self.output, self.klass, self.id, self.scope, self.app, self.provider,
            self.families, self.reporter, self.used,
        ]  # fmt: skip

    @classmethod
    def unpacked(cls, packed: list[Any]) -> Told:
        told = cls.__new__(cls)
        (
            told.start, told.end, told.input, told.output, told.klass, told.id, told.scope, told.app, told.provider,
            found, told.reporter, told.used,
        ) = packed  # fmt: skip
        told.families, told.used = tuple(found), tuple(told.used)
        told.failed = told.klass != ""
        told.number = told.place = -1
        return told


class Half:
    """Calls of one half of the remembered time."""

    __slots__ = ("by_id", "index", "told")

    def __init__(self) -> None:
        self.told: list[Told] = []
        self.by_id: dict[str, Told] = {}
        self.index: dict[Key, list[Told]] = {}

    def add(self, told: Told) -> None:
        self.told.append(told)
        if told.id:
            self.by_id[told.id] = told
        bucket = int(told.end / _BUCKET_S) if told.output is None else 0
        names = told.families or ("",)
        if told.failed and told.families:
            names = (*names, "*")
        index = self.index
        for app in (told.app, "*") if told.app else ("",):
            for name in names:
                key = (told.scope, app, name, told.failed, told.output, bucket)
                found = index.get(key)
                if found is None:
                    index[key] = [told]
                else:
                    found.append(told)


class Likeness:
    """Remembered calls, findable by scope, application, model family, outcome and tokens.

    Bounded by `half_calls` for each of two halves that take turns; about 700 bytes a call.
    """

    def __init__(self, tolerance_s: float, half_calls: int) -> None:
        self._tolerance_s = tolerance_s
        self._half_calls = half_calls
        self._reach = int(tolerance_s / _BUCKET_S) + 1
        self.new, self.old = Half(), Half()
        self.scopes: list[str] = []
        self.told_twice: dict[str, int] = {}
        """Pairs of reporters → how often they told the same call."""

    def turn(self) -> None:
        self.old, self.new = self.new, Half()

    def add(self, told: Told) -> None:
        if len(self.new.told) >= self._half_calls:
            self.turn()
        if told.scope not in self.scopes:
            self.scopes.append(told.scope)
        self.new.add(told)

    def with_id(self, response_id: str) -> Told | None:
        return self.new.by_id.get(response_id) or self.old.by_id.get(response_id)

    def note(self, first: str, second: str) -> None:
        """Two reporters told the same call."""
        key = _pair(first, second)
        if key in self.told_twice or len(self.told_twice) < 1000:
            self.told_twice[key] = self.told_twice.get(key, 0) + 1

    def copy_of(self, mine: Told) -> Told | None:
        """The remembered call of another scope that this one is a copy of, the nearest in time."""
        names = mine.families or (("*", "") if mine.failed else ())
        if mine.failed and mine.families:
            names = (*names, "")
        apps = ("", mine.app) if mine.app else ("", "*")
        near: tuple[int, ...] = (0,)
        if mine.output is None:
            bucket = int(mine.end / _BUCKET_S)
            near = tuple(range(bucket - self._reach, bucket + self._reach + 1))
        best: Told | None = None
        least = 0.0
        new, old = self.new.index, self.old.index
        for scope in self.scopes:
            if scope == mine.scope:
                continue
            for app in apps:
                for name in names:
                    for bucket in near:
                        key = (scope, app, name, mine.failed, mine.output, bucket)
                        for index in (new, old):
                            found = index.get(key)
                            if found is None:
                                continue
                            for other in found[-_LOOKED_AT:]:
                                distance = self._distance(mine, other)
                                if distance is not None and (best is None or distance < least):
                                    best, least = other, distance
        return best

    def _distance(self, mine: Told, other: Told) -> float | None:
        """How far apart two like calls are, seconds (and more where their classes differ); None: not the same call."""
        if mine.scope in other.used:
            return None
        if mine.input is not None and other.input is not None and mine.input != other.input:
            return None
        starts, ends = abs(mine.start - other.start), abs(mine.end - other.end)
        slack = self._tolerance_s
        inside = mine.start >= other.start - slack and mine.end <= other.end + slack
        outside = other.start >= mine.start - slack and other.end <= mine.end + slack
        if not (inside or outside) or _ids_differ(mine.id, other.id):
            return None
        gateway = mine.scope in GATEWAYS or other.scope in GATEWAYS
        if not gateway and mine.provider and other.provider and mine.provider != other.provider:
            return None
        said = mine.input and mine.output and other.input
        if (
            not said
            and (starts > _TIGHT_S or ends > _TIGHT_S)
            and _pair(mine.reporter, other.reporter) not in self.told_twice
        ):
            return None
        return starts + ends + (1.0 if mine.klass != other.klass else 0.0)


_family_cache: dict[str, str] = {}
_families_cache: dict[tuple[str, str, str], tuple[str, ...]] = {}


def _family(model: str) -> str:
    """The model without provider prefix and date: `openai/gpt-4.1-mini-2025-04-14` → `gpt-4.1-mini`."""
    found = _family_cache.get(model)
    if found is None:
        found = _DATED.sub("", model.rpartition("/")[2].lower())
        if len(_family_cache) < 10_000:
            _family_cache[model] = found
    return found


def families(call: LlmCall) -> tuple[str, ...]:
    """Every name this call's model goes by: as asked for, as served, and the gateway's group."""
    group = call.deployment.partition("/")[0] if call.scope in GATEWAYS else ""
    key = (call.model, call.model_served, group)
    found = _families_cache.get(key)
    if found is None:
        found = tuple(dict.fromkeys(_family(name) for name in key if name))
        if len(_families_cache) < 10_000:
            _families_cache[key] = found
    return found


def _pair(first: str, second: str) -> str:
    return f"{first}\x1e{second}" if first <= second else f"{second}\x1e{first}"


def _ids_differ(first: str, second: str) -> bool:
    """Two real response ids of one kind that differ are two calls; LiteLLM makes up ids of its own, which say nothing."""
    if not first or not second or first == second or "/" in first or "/" in second:
        return False
    return first[:5] == second[:5]
