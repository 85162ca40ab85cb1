"""Text from events made fit to show: cleaned, cut between graphemes, and escaped for each channel.

Names, messages and labels come from other people's traffic. They may hold terminal escapes, text that turns the reading
direction around, markup that pings a whole company, or a million characters. What leaves here is one line of plain text.

Lengths are UTF-16 code units: never fewer than what any of the receiving sides counts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Final

ELLIPSIS: Final = "…"
_ZWJ: Final = "\u200d"
_KEPT_FORMAT: Final = {_ZWJ, "\u200c"}
"""Joiners that emoji and several scripts need; every other format character is invisible or turns text around."""
MAX_CLUSTER: Final = 16
"""Code points that may share one grapheme; more is stacking of marks, not writing."""
_GRAPHEMES_READ: Final = 8
"""How many code points are looked at per unit of limit: enough for any writing, and bounded for hostile input."""

_VIRAMA_CLASS: Final = 9


def width(text: str) -> int:
    """Length in UTF-16 code units.

    >>> width("ab"), width("🙂")
    (2, 2)
    """
    return len(text) + sum(c > "\uffff" for c in text)


def clean(text: str) -> str:
    """One line without control, bidirectional and other invisible characters, and without stacks of marks.

    Line breaks and tabs become single spaces; lone surrogates and private-use characters become U+FFFD.

    >>> clean("a\\x1b[31mb\\u202ec\\n d")
    'a[31mbc d'
    """
    if text.isascii() and text.isprintable():
        return " ".join(text.split()) if "  " in text or text[:1] == " " or text[-1:] == " " else text
    out: list[str] = []
    stacked = 0
    for c in text:
        category = unicodedata.category(c)
        if c.isspace() or category in ("Zl", "Zp", "Zs"):
            c, category = " ", "Zs"
        elif category == "Cc" or (category == "Cf" and c not in _KEPT_FORMAT):
            continue
        elif category in ("Cs", "Co"):
            c = "\ufffd"
        if category[0] == "M" or c in _KEPT_FORMAT:
            stacked += 1
            if stacked >= MAX_CLUSTER // 2 or not out or out[-1] == " ":
                continue
        elif out and out[-1] == _ZWJ:
            stacked += 1
            if stacked >= MAX_CLUSTER // 2:
                # A chain of joined emoji without end: cut the chain, keep the sign.
                out.pop()
                stacked = 0
        else:
            stacked = 0
        if c == " " and (not out or out[-1] == " "):
            continue
        out.append(c)
    return "".join(out).rstrip(" " + _ZWJ)


def graphemes(text: str) -> Iterator[str]:
    """The user-perceived characters, by the main rules of UAX #29.

    Joins marks, joiners, emoji modifiers, pairs of regional indicators, Hangul syllables and conjuncts. Where it is
    coarser than the standard (it joins any letter to a virama before it), a cut comes a little early, never inside.

    >>> list(graphemes("e\\u0301x🇩🇪🇫🇷")) == ["e\\u0301", "x", "🇩🇪", "🇫🇷"]
    True
    """
    cluster = ""
    flags = 0
    for c in text:
        if cluster and _joins(cluster[-1], c, flags):
            cluster += c
        else:
            if cluster:
                yield cluster
            cluster, flags = c, 0
        flags = flags + 1 if _is_regional(c) else 0
    if cluster:
        yield cluster


def _is_regional(c: str) -> bool:
    return "\U0001f1e6" <= c <= "\U0001f1ff"


def _joins(before: str, c: str, regional_before: int) -> bool:
    if c < "\u0300":
        return before == "\r" and c == "\n"
    if c in _KEPT_FORMAT or "\U0001f3fb" <= c <= "\U0001f3ff" or "\U000e0020" <= c <= "\U000e007f":
        return True
    category = unicodedata.category(c)
    if category[0] == "M" or before == _ZWJ:
        return True
    if _is_regional(c):
        return regional_before % 2 == 1
    if category == "Lo" and unicodedata.combining(before) == _VIRAMA_CLASS:
        return True
    return _hangul_joins(before, c)


def _hangul_joins(before: str, c: str) -> bool:
    leading = "\u1100" <= before <= "\u115f" or "\ua960" <= before <= "\ua97c"
    syllable = "\uac00" <= before <= "\ud7a3"
    jamo_after = "\u1160" <= c <= "\u11ff" or "\ud7b0" <= c <= "\ud7fb"
    if leading:
        return jamo_after or "\u1100" <= c <= "\u115f" or "\uac00" <= c <= "\ud7a3"
    return jamo_after and (syllable or "\u1160" <= before <= "\u11ff" or "\ud7b0" <= before <= "\ud7fb")


def plain(text: str) -> str:
    return text


def fit(text: str, limit: int, escape: Callable[[str], str] = plain) -> str:
    """`clean` text of at most `limit` units after escaping; cut between graphemes, with an ellipsis where it was cut.

    `escape` must work on the whole text (it may look at neighbours) and never shorten it.

    >>> fit("overloaded", 6)
    'overl…'
    """
    if limit <= 0:
        return ""
    room = limit * _GRAPHEMES_READ + 64
    cut_short = len(text) > room
    text = clean(text[:room])
    if not cut_short and len(text) * 2 <= limit and width(escape(text)) <= limit:
        return text if escape is plain else escape(text)
    parts = list(graphemes(text))
    if cut_short and len(parts) > 1:
        # The last one read may go on behind the place where reading stopped.
        parts.pop()
    escaped = escape("".join(parts))
    if width(escaped) <= (limit - 1 if cut_short else limit):
        return escaped + ELLIPSIS if cut_short else escaped
    low, high = 0, len(parts)
    while low < high:
        middle = (low + high + 1) // 2
        if width(escape("".join(parts[:middle]))) <= limit - 1:
            low = middle
        else:
            high = middle - 1
    return escape("".join(parts[:low]).rstrip()) + ELLIPSIS


_AT: Final = re.compile(r"(?<![^\W_])@")
_MARKER_START: Final = re.compile(r"(?<![^\W_])[*_~`]+|[*_~`]+(?![^\W_])")
_LOOKALIKE: Final = str.maketrans({"*": "∗", "_": "＿", "~": "∼", "`": "ˋ"})
_ANGLES: Final = str.maketrans({"<": "‹", ">": "›"})


def _unlinked(text: str) -> str:
    """`@name` that would ping and `[text](address)` that would hide an address, made harmless; `model@version` stays."""
    return _AT.sub("＠", text).replace("](", "] (")


def slack_mrkdwn(text: str) -> str:
    """For Slack's mrkdwn and what is compatible with it: no mention, link, formatting or quote comes out of the text.

    `&`, `<` and `>` are escaped as Slack asks. Formatting signs at the edge of a word become look-alikes; inside a word
    (`claude_sonnet`) they format nothing and stay, so that names can be copied.

    >>> slack_mrkdwn("<!channel> *b* a_b @here")
    '&lt;!channel&gt; ∗b∗ a_b ＠here'
    """
    text = _MARKER_START.sub(lambda m: m.group().translate(_LOOKALIKE), _unlinked(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def slack_plain(text: str) -> str:
    """For Slack's `plain_text`, where it is not said what becomes of an entity: angle brackets become look-alikes.

    >>> slack_plain("<@U1> & co")
    '‹@U1› & co'
    """
    return text.translate(_ANGLES)


def forwarded(text: str) -> str:
    """For sides that pass text on to a chat (PagerDuty, Alertmanager, a hook): nothing in it works as chat markup.

    >>> forwarded("<!here> [a](http://x) @all")
    '‹!here› [a] (http://x) ＠all'
    """
    return _unlinked(text).translate(_ANGLES)
