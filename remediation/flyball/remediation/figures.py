"""Figures as people read them: the filters of the alerts' templates. Whatever comes in, something short and clean goes out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime

from flyball.remediation.notifiers._text import fit


class Fitted(str):
    """Text that a filter already cleaned and shortened; it is not shortened again."""

    __slots__ = ()


def duration(seconds: float) -> str:
    """A span of time in at most two units.

    >>> duration(45), duration(200), duration(4800), duration(180000)
    ('45 s', '3 min', '1 h 20 min', '2 d 2 h')
    """
    if not math.isfinite(seconds):
        return "?"
    s = round(abs(seconds))
    if s < 90:
        return f"{s} s"
    minutes = s // 60
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    hours = minutes // 60
    if hours >= 24 * 10_000:
        return "> 10,000 d"
    return f"{hours // 24} d {hours % 24} h" if hours % 24 else f"{hours // 24} d"


def money(usd: float) -> str:
    """Dollars with as many places as say something.

    >>> money(6.8), money(1912.4), money(0.0042), money(2.5e6), money(-3)
    ('$6.80', '$1,912', '$0.0042', '$2.5 M', '-$3.00')
    """
    if not math.isfinite(usd):
        return "$?"
    sign, x = ("-" if usd < 0 else ""), abs(usd)
    if x >= 1e12:
        return f"{sign}$> 1 T"
    if x >= 1e6:
        return f"{sign}${x / 1e6:,.1f} M"
    if x >= 1000:
        return f"{sign}${x:,.0f}"
    if x >= 0.01 or x == 0:
        return f"{sign}${x:,.2f}"
    return f"{sign}${x:.2g}" if x >= 1e-4 else f"{sign}$<0.0001"


def ratio(value: float) -> str:
    """A share as percent.

    >>> ratio(0.61), ratio(0.012), ratio(0.0004), ratio(1)
    ('61 %', '1.2 %', '0.04 %', '100 %')
    """
    if not math.isfinite(value):
        return "?"
    percent = value * 100
    if abs(percent) >= 1e6:
        return "> 1,000,000 %"
    if abs(percent) >= 10 or percent == 0:
        return f"{percent:,.0f} %"
    if abs(percent) >= 0.1:
        return f"{percent:.1f} %".replace(".0 ", " ")
    return f"{percent:.2f} %" if abs(percent) >= 0.01 else "<0.01 %"


def count(n: float) -> str:
    """A number of things.

    >>> count(1912), count(1_240_000), count(3)
    ('1,912', '1.2 M', '3')
    """
    if not math.isfinite(n):
        return "?"
    if abs(n) < 1e6:
        return f"{n:,.0f}"
    for size, sign in ((1e6, "M"), (1e9, "G"), (1e12, "T")):
        if abs(n) < size * 1000:
            return f"{n / size:,.1f} {sign}"
    return "> 1,000 T"


def clock(at: float, now: float | None = None) -> str:
    """Time of day in UTC, with the day where it is another day than that of `now`.

    >>> clock(1700000000.0), clock(1700000000.0, 1700090000.0)
    ('22:13', 'Nov 14 22:13')
    """
    try:
        when = datetime.fromtimestamp(at, UTC)
        today = datetime.fromtimestamp(now, UTC).date() if now is not None else when.date()
    except (ValueError, OverflowError, OSError):
        return "?"
    return f"{when:%H:%M}" if when.date() == today else f"{when:%b} {when.day} {when:%H:%M}"


def confidence(value: float) -> str:
    """A confidence in [0, 1] with two places.

    >>> confidence(0.9444)
    '0.94'
    """
    return f"{min(max(value, 0.0), 1.0):.2f}" if math.isfinite(value) else "?"


def limit(value: object, units: int) -> Fitted:
    """The value as clean text of at most `units` UTF-16 units."""
    return Fitted(fit(text_of(value), units))


def listed(items: Iterable[object], most: int, units: int, separator: str = ", ") -> Fitted:
    """The first `most` items, each at most `units` long, and how many more there are.

    >>> listed(["a", "b", "c"], 2, 10)
    'a, b (+1)'
    """
    every = list(items)
    shown = separator.join(fit(text_of(x), units) for x in every[:most])
    return Fitted(f"{shown} (+{len(every) - most})" if len(every) > most else shown)


def text_of(value: object) -> str:
    return "" if value is None else str(value)
