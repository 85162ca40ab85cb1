"""Portions as bytes: what goes in comes out, damaged bytes are told."""

from __future__ import annotations

import contextlib

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.codec import pack_state
from flyball.core.events import AgentStep, Batch, Event, LlmCall
from flyball.streams.front import Front
from flyball.streams.portion import Portion, PortionError, decode_portion, encode_portion
from flyball.streams.windows import WindowSettings, merge_windows
from tests.streams.test_windows_properties import signature, streams


def portion_of(events: list[LlmCall], runs: bool = True) -> Portion:
    some: list[Event] = [msgspec.structs.replace(e, run="r") if runs else e for e in events]
    front = Front("t/0", WindowSettings(max_cells=2000))
    front.feed(Batch(events=[*some, AgentStep(at=1000.0, run="r")]), np.arange(len(some) + 1), len(some))
    front.flush()
    made = front.cut(sources=("t/0", "t/1"))
    assert made is not None
    return made


@settings(max_examples=60, deadline=None)
@given(streams)
def test_a_portion_comes_out_of_its_bytes_as_it_went_in(events: list[LlmCall]) -> None:
    made = portion_of(sorted(events, key=lambda e: e.at))
    read = decode_portion(encode_portion(made))
    assert read.singles == made.singles
    assert len(read.partials) == len(made.partials)
    for a, b in zip(read.partials, made.partials, strict=True):
        assert (a.number, a.first, a.last, a.calls) == (b.number, b.first, b.last, b.calls)
        assert signature([merge_windows([a.window])]) == signature([merge_windows([b.window])])
    bare = [msgspec.structs.replace(p, partials=(), singles=()) for p in (read, made)]
    assert msgspec.structs.replace(bare[0], sources=("t/0", "t/1")) == bare[1]
    assert encode_portion(read) == encode_portion(made), "a second journey changes nothing"


def test_a_cell_costs_little_on_the_wire() -> None:
    calls = [
        LlmCall(
            at=1000.0, id=str(i), provider="openai", model="gpt-4o", app=f"app-{i % 20}", tenant=f"tenant-{i % 500}", latency_s=1.0,
            input_tokens=100, output_tokens=50, cost_usd=0.01,
        )
        for i in range(5000)
    ]  # fmt: skip
    made = portion_of(calls, runs=False)
    cells = len(made.partials[0].window.cells)
    assert cells == 500
    assert len(encode_portion(made)) / cells < 250


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2000), st.integers(1, 255))
def test_damaged_bytes_are_an_error_that_says_so_or_another_portion(place: int, change: int) -> None:
    calls = [
        LlmCall(at=1000.0 + i, id=str(i), provider="p", error="timeout" if i % 3 else "") for i in range(20)
    ]
    raw = bytearray(encode_portion(portion_of(calls)))
    raw[place % len(raw)] ^= change
    # Any other error would end a consumer.
    with contextlib.suppress(PortionError):
        decode_portion(bytes(raw))


@pytest.mark.parametrize(
    "raw", [b"", b"{}", pack_state("portion", 99, []), pack_state("other", 1, [])], ids=["empty", "json", "version", "kind"]
)  # fmt: skip
def test_what_is_no_portion_is_refused(raw: bytes) -> None:
    with pytest.raises(PortionError):
        decode_portion(raw)
