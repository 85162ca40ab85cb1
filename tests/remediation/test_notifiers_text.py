"""Text from strangers is harmless, and is never cut inside what a reader takes for one character."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.remediation.notifiers._text import (
    ELLIPSIS,
    clean,
    fit,
    forwarded,
    graphemes,
    plain,
    slack_mrkdwn,
    slack_plain,
    width,
)
from tests.remediation._incidents import NASTY, text

ESCAPES = [plain, slack_mrkdwn, slack_plain, forwarded]


@settings(deadline=None)
@given(text)
def test_clean_text_is_one_line_without_invisible_or_control_characters(value: str) -> None:
    out = clean(value)
    for c in out:
        assert unicodedata.category(c) not in ("Cc", "Cs", "Co", "Zl", "Zp")
        assert c not in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200b\u200e\u200f\u061c\ufeff"
    assert "  " not in out
    assert out == out.strip(" ")
    out.encode()


@settings(deadline=None)
@given(text)
def test_cleaning_twice_is_cleaning_once(value: str) -> None:
    assert clean(clean(value)) == clean(value)


@settings(deadline=None)
@given(text, st.integers(1, 120), st.sampled_from(ESCAPES))
def test_fitted_text_keeps_its_limit_and_whole_graphemes(value: str, limit: int, escape: object) -> None:
    assert callable(escape)
    out = fit(value, limit, escape)
    assert width(out) <= limit
    whole = clean(value[:5000])
    kept = fit(value, limit)
    if kept.endswith(ELLIPSIS):
        kept = kept[:-1]
    parts = list(graphemes(whole))
    prefixes = {""}
    so_far = ""
    for part in parts:
        so_far += part
        prefixes.update((so_far, so_far.rstrip()))
        if len(so_far) > len(kept):
            break
    assert kept in prefixes or whole.endswith(ELLIPSIS)


@pytest.mark.parametrize(
    "one",
    ["👩‍👩‍👧‍👦", "🇩🇪", "e\u0301", "👍🏽", "각", "\u1100\u1161\u11a8", "क्ष", "ก็", "❤\ufe0f", "1\ufe0f\u20e3"],
)
def test_a_grapheme_is_kept_or_left_out_as_a_whole(one: str) -> None:
    assert list(graphemes("a" + one + "b")) == ["a", one, "b"]
    for limit in range(1, 40):
        left = fit(one * 30, limit).removesuffix(ELLIPSIS)
        assert left == one * (len(left) // len(one))


def test_two_flags_beside_each_other_stay_two() -> None:
    assert list(graphemes("🇩🇪🇫🇷🇩")) == ["🇩🇪", "🇫🇷", "🇩"]


@pytest.mark.parametrize("value", NASTY)
def test_nothing_from_an_event_is_markup_in_slack(value: str) -> None:
    out = fit(value, 3000, slack_mrkdwn)
    assert "<" not in out
    assert ">" not in out
    assert "](" not in out
    assert "@here" not in out
    for sign in "*_~`":
        for before, c, after in zip(" " + out, out, out[1:] + " ", strict=False):
            if c == sign:
                assert before.isalnum() or after.isalnum()


def test_names_of_models_and_people_stay_as_they_are() -> None:
    name = "claude-3-5-sonnet@20240620 gpt_4o mini_swe ann@example.com"
    assert fit(name, 200, slack_mrkdwn) == name


def test_an_entity_is_never_cut_in_the_middle() -> None:
    for limit in range(1, 60):
        out = fit("&<>" * 40, limit, slack_mrkdwn).removesuffix(ELLIPSIS)
        assert out.replace("&amp;", "").replace("&lt;", "").replace("&gt;", "") == ""


def test_a_stack_of_marks_is_cut_down_to_writing() -> None:
    assert len(clean("e" + "\u0301" * 1000)) < 20


def test_a_million_characters_cost_no_more_than_the_place_they_get() -> None:
    assert fit("x" * 1_000_000, 10) == "x" * 9 + ELLIPSIS
    assert fit("\u202e" * 1_000_000 + "end", 10) in ("", ELLIPSIS)
