"""Silences: who is not to be woken by what, and until when. They stop pages, never detection, incidents or actions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal

import msgspec

from flyball.core.errors import ConfigError
from flyball.core.ids import short_id

_MATCHER: Final = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_.]*)\s*(=~|!~|!=|=)\s*(.*?)\s*", re.DOTALL)
_MAX_TEXT: Final = 512


class Matcher(msgspec.Struct, frozen=True):
    """One condition on one label. A label that is not there is the empty string, as with Alertmanager."""

    label: str
    op: Literal["=", "!=", "=~", "!~"]
    value: str

    def matches(self, labels: Mapping[str, str]) -> bool:
        found = labels.get(self.label, "")
        if self.op in ("=", "!="):
            return (found == self.value) == (self.op == "=")
        return (re.fullmatch(self.value, found[:_MAX_TEXT]) is not None) == (self.op == "=~")

    def __str__(self) -> str:
        return f"{self.label}{self.op}{self.value}"


def parse_matcher(text: str) -> Matcher:
    """`label=value`, `label!=value`, `label=~regex` or `label!~regex` (the whole value must match).

    Raises: ConfigError when the text is none of these, or the regular expression is wrong.

    >>> str(parse_matcher("provider =~ a|b"))
    'provider=~a|b'
    """
    found = _MATCHER.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"{text!r} is no matcher; write label=value, label!=value, label=~regex or label!~regex"
        )
    label, op, value = found.groups()
    value = value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
    if len(value) > _MAX_TEXT:
        raise ConfigError(f"matcher on {label}: value of {len(value)} characters; at most {_MAX_TEXT}")
    if op in ("=~", "!~"):
        try:
            re.compile(value)
        except re.error as e:
            raise ConfigError(f"matcher {text!r}: not a regular expression: {e}") from e
    return Matcher(label, op, value)  # type: ignore[arg-type]  # the pattern admits only the four


class Silence(msgspec.Struct, frozen=True, kw_only=True):
    """All matchers must hold. In force from `at` until `until` (event time), then gone by itself."""

    id: str
    matchers: tuple[Matcher, ...]
    at: float
    until: float
    by: str
    comment: str = ""

    def covers(self, labels: Mapping[str, str], now: float) -> bool:
        return self.at <= now < self.until and all(m.matches(labels) for m in self.matchers)


class Silences:
    """The silences in force. Bounded: the oldest end first when there are too many."""

    def __init__(self, limit: int = 1_000) -> None:
        self._limit = limit
        self._by_id: dict[str, Silence] = {}

    def add(
        self, matchers: Iterable[Matcher | str], *, at: float, until: float, by: str, comment: str = ""
    ) -> Silence:
        """Raises: ConfigError without matchers (that would silence everything), without end in the future, or over the bound."""
        parsed = tuple(parse_matcher(m) if isinstance(m, str) else m for m in matchers)
        if not parsed:
            raise ConfigError("a silence needs at least one matcher; provider=b, say")
        if until <= at:
            raise ConfigError(f"the silence ends at {until:.0f}, not after now ({at:.0f}); give a later end")
        silence_id = short_id("SIL", [str(m) for m in parsed], at, until, by)
        self.expire(at)
        if len(self._by_id) >= self._limit and silence_id not in self._by_id:
            raise ConfigError(f"there are {self._limit} silences already; remove one first")
        silence = Silence(id=silence_id, matchers=parsed, at=at, until=until, by=by, comment=comment)
        self._by_id[silence_id] = silence
        return silence

    def remove(self, silence_id: str) -> bool:
        return self._by_id.pop(silence_id, None) is not None

    def expire(self, now: float) -> None:
        for key in [k for k, s in self._by_id.items() if s.until <= now]:
            del self._by_id[key]

    def covering(self, labels: Mapping[str, str], now: float) -> Silence | None:
        """The silence that covers these labels longest, if any."""
        found = [s for s in self._by_id.values() if s.covers(labels, now)]
        return max(found, key=lambda s: (s.until, s.id), default=None)

    def all(self) -> list[Silence]:
        return sorted(self._by_id.values(), key=lambda s: (s.until, s.id))

    def state(self) -> list[Silence]:
        return list(self._by_id.values())

    def load(self, silences: Iterable[Silence]) -> None:
        self._by_id = {s.id: s for s in silences}
