"""The error tree. Foreign errors are translated once, at the rim, into one of these.

FlyballError
├── ConfigError      a person wrote something wrong; says what, where, and what would be right
├── DecodeError      bytes from outside that cannot be read; carries the reason the dead letter is filed under
└── EffectError      an effect on the outside world
    ├── NotAccepted  nothing happened: the other side was not reached or refused; may be retried
    ├── Failed       the other side took it and says that it failed
    └── Ambiguous    sent, no answer: it may or may not have happened; never retried by itself
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlyballError(Exception):
    """Base of every error that Flyball raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 2


class ConfigError(FlyballError):
    """Something a person wrote is wrong. The text reads `where: what; what would be right`.

    Args:
        what: what is wrong, and after a semicolon what would be right.
        where: file, or `file:line:column`, or the setting's name; empty when there is no place.
        code: stable short code such as `RB104`, for tools and tests.
    """

    def __init__(self, what: str, *, where: str = "", code: str = "") -> None:
        self.what, self.where, self.code = what, where, code
        super().__init__(": ".join(p for p in (where, f"{code} {what}" if code else what) if p))


class DecodeError(FlyballError):
    """Bytes that cannot be read as an event. `reason` is a low-cardinality word for metrics and dead letters."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


class EffectError(FlyballError):
    """An effect on the outside world did not come about as wanted."""


class NotAccepted(EffectError):
    """Nothing happened; it may be tried again. `retry_after_s` is what the other side asked for, if it did."""

    def __init__(self, what: str, *, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(what)


class Failed(EffectError):
    """The other side took the request and reports that it failed or will never work (a 4xx, say)."""


class Ambiguous(EffectError):
    """Sent, but no answer: the effect may be there. Never retried by itself."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` when a known word is close to `word`, else `; known: a, b, …`.

    >>> did_you_mean("sigal", ["signal", "root"])
    "; did you mean 'signal'?"
    >>> did_you_mean("zzz", ["b", "a"])
    '; known: a, b'
    """
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(words)}"
