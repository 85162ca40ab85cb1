"""Figures as people read them. Pure: the same number gives the same text everywhere, whatever the locale."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

_MAX_NAME: Final = 80


def clock(at: float) -> str:
    """Hours and minutes of event time, UTC.

    >>> clock(1_700_000_000.0)
    '22:13'
    """
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M")


def percent(ratio: float) -> str:
    """Whole percents from 10 % on, one decimal below; never "100 %" for what is not all, nor "0 %" for what is not none.

    >>> percent(0.614), percent(0.012), percent(0.9996), percent(0.0)
    ('61 %', '1.2 %', '99.9 %', '0 %')
    """
    value = 100.0 * ratio
    if value in (0.0, 100.0):
        return f"{value:.0f} %"
    if value >= 99.5:
        return "99.9 %" if value >= 99.9 else f"{value:.1f} %"
    if value >= 9.95:
        return f"{value:.0f} %"
    return f"{value:.1f} %" if value >= 0.1 else "<0.1 %"


def usd(value: float) -> str:
    """For a line of text.

    >>> usd(6.8), usd(1234.5), usd(0.004), usd(0)
    ('$6.80', '$1,234', '$0.004', '$0')
    """
    if value == 0:
        return "$0"
    if abs(value) >= 1000:
        return f"${value:,.0f}"
    return f"${value:.2f}" if abs(value) >= 0.1 else f"${value:.3f}"


def count(n: int, one: str, many: str = "") -> str:
    """For a line of text.

    >>> count(1, "app"), count(1912, "failed call")
    ('1 app', '1,912 failed calls')
    """
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def seconds(value: float) -> str:
    """For a line of text.

    >>> seconds(0.25), seconds(12.41), seconds(340.0)
    ('250 ms', '12.4 s', '5.7 min')
    """
    if value < 1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def factor(value: float) -> str:
    """For a line of text.

    >>> factor(2.04), factor(12.3)
    ('×2.0', '×12')
    """
    return f"×{value:.1f}" if value < 10 else f"×{value:,.0f}"


def name(text: str) -> str:
    """A label's value for a line of text: no control characters, bounded. Escaping is the renderer's.

    >>> name("a\\nb")
    'a b'
    """
    clean = "".join(c if c.isprintable() else " " for c in text)
    return clean if len(clean) <= _MAX_NAME else clean[: _MAX_NAME - 1] + "…"
