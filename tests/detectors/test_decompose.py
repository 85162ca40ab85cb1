"""The split of a change in tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.detectors._decompose import Usage, split_tokens

amounts = st.one_of(st.just(0.0), st.floats(1e-3, 1e9))
sides = st.dictionaries(
    st.sampled_from(["small", "large", "new"]), st.builds(Usage, amounts, amounts, amounts), max_size=3
)


def total(side: dict[str, Usage]) -> float:
    return sum(u.input_tokens + u.output_tokens for u in side.values())


@given(sides, sides)
def test_the_parts_sum_to_the_change_and_the_shares_to_one(
    before: dict[str, Usage], now: dict[str, Usage]
) -> None:
    split = split_tokens(before, now)
    scale = max(total(before), total(now), 1.0)
    assert split.change == pytest.approx(total(now) - total(before), abs=1e-9 * scale)
    parts = split.prompt + split.output + split.calls + split.mix
    # Where the parts pull apart by far more than the change, their sum is known only as exactly as they are.
    scale = max(scale, *(abs(part) for part in (split.prompt, split.output, split.calls, split.mix)))
    assert parts == pytest.approx(split.change, abs=1e-6 * scale)
    if split.shares():
        largest = max(abs(s) for s in split.shares().values())
        assert sum(split.shares().values()) == pytest.approx(1.0, abs=1e-6 * max(1.0, largest) * 10)


def test_a_prompt_twice_as_long_is_prompt_growth_only() -> None:
    split = split_tokens({"m": Usage(60, 60_000, 6_000)}, {"m": Usage(60, 120_000, 6_000)})
    assert split.shares() == pytest.approx({"prompt": 1.0, "output": 0.0, "calls": 0.0, "mix": 0.0})


def test_twice_the_calls_are_calls_only() -> None:
    split = split_tokens({"m": Usage(60, 60_000, 6_000)}, {"m": Usage(120, 120_000, 12_000)})
    assert split.shares() == pytest.approx({"prompt": 0.0, "output": 0.0, "calls": 1.0, "mix": 0.0}, abs=1e-9)


def test_calls_that_move_to_the_wordy_model_are_mix_only() -> None:
    before = {"terse": Usage(90, 9_000, 900), "wordy": Usage(10, 10_000, 1_000)}
    now = {"terse": Usage(10, 1_000, 100), "wordy": Usage(90, 90_000, 9_000)}
    assert split_tokens(before, now).shares()["mix"] == pytest.approx(1.0)


def test_a_new_model_that_uses_what_the_others_use_changes_the_mix_by_nothing() -> None:
    before = {"a": Usage(100, 100_000, 10_000)}
    now = {"a": Usage(50, 50_000, 5_000), "b": Usage(150, 150_000, 15_000)}
    shares = split_tokens(before, now).shares()
    assert shares["calls"] == pytest.approx(1.0, abs=1e-6)


def test_no_change_has_no_shares() -> None:
    side = {"m": Usage(1, 2, 3)}
    assert split_tokens(side, side).shares() == {}
