"""Copies of one call count once, true calls are never dropped for being alike, and a restart changes nothing."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.codec import SnapshotError
from flyball.core.events import AgentStep, Batch, Event, GpuSample, LlmCall
from flyball.streams.dedup import Deduplicator

AT = 1_800_000_000.0


def call(**fields: object) -> LlmCall:
    base: dict[str, object] = {
        "at": AT,
        "latency_s": 1.0,
        "provider": "openai",
        "model": "gpt-4.1",
        "scope": "sdk",
    }
    return LlmCall(**{**base, **fields})  # type: ignore[arg-type]


def feed(dedup: Deduplicator, *events: Event, sender: str = "") -> list[Event]:
    return list(dedup.feed(Batch(events, sender=sender)).events)


def test_a_call_with_the_same_response_id_counts_once() -> None:
    dedup = Deduplicator()
    first, copy = call(id="r1"), call(id="r1", scope="gateway", at=AT + 1)
    assert feed(dedup, first) == [first]
    assert feed(dedup, copy) == []
    assert dedup.duplicates == 1


def test_the_same_body_posted_again_adds_nothing() -> None:
    dedup = Deduplicator()
    body = [call(id=f"r{i}") for i in range(10)] + [AgentStep(at=AT, id="s1", tool="t")]
    assert feed(dedup, *body) == body
    assert feed(dedup, *body) == []
    assert (dedup.duplicates, dedup.duplicate_steps) == (10, 1)


def test_calls_without_id_and_span_pass_untouched() -> None:
    dedup = Deduplicator()
    same = [call(), call(), call()]
    assert feed(dedup, *same) == same
    assert feed(dedup, *same) == same


def test_other_events_pass_in_their_order() -> None:
    dedup = Deduplicator()
    events: list[Event] = [GpuSample(at=AT, gpu="0"), call(id="a"), GpuSample(at=AT, gpu="0"), call(id="a")]
    assert feed(dedup, *events) == events[:3]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("child_first", [True, False])
def test_a_call_inside_a_call_is_one(child_first: bool, together: bool) -> None:
    outer = call(
        span="o", trace="t", scope="outer", error="rate_limited", error_code="RateLimitError", run="s"
    )
    inner = call(span="i", parent="o", trace="t", scope="inner", error="rate_limited")
    order = [inner, outer] if child_first else [outer, inner]
    dedup = Deduplicator()
    out = feed(dedup, *order) if together else [e for one in order for e in feed(dedup, one)]
    assert len(out) == 1
    assert dedup.duplicates == 1


def test_in_one_batch_the_innermost_stays_and_takes_what_it_lacks() -> None:
    inner = call(
        span="i", parent="o", trace="t", run="t", scope="inner", error="rate_limited", input_tokens=5
    )
    outer = call(
        span="o", trace="t", scope="outer", error="quota_exhausted", run="conv-1", agent="a", input_tokens=9
    )
    for order in ([inner, outer], [outer, inner]):
        (kept,) = feed(Deduplicator(), *order)
        assert isinstance(kept, LlmCall)
        assert (kept.scope, kept.span, kept.run, kept.agent) == ("inner", "i", "conv-1", "a")
        assert (kept.error, kept.input_tokens) == ("quota_exhausted", 5), (
            "the copy with the sentence knows the class"
        )


def test_a_failed_attempt_under_a_call_that_went_well_is_a_call_of_its_own() -> None:
    attempt = call(span="a", parent="c", trace="t", error="overloaded")
    went_well = call(span="c", trace="t", id="r1")
    assert len(feed(Deduplicator(), attempt, went_well)) == 2
    assert len(feed(Deduplicator(), went_well, attempt)) == 2


def test_two_attempts_inside_one_call_are_two() -> None:
    outer = call(span="o", trace="t", scope="outer", id="")
    first = call(span="a", parent="o", trace="t", scope="inner", error="overloaded")
    second = call(span="b", parent="o", trace="t", scope="inner", at=AT + 1)
    for order in ([first, second, outer], [outer, first, second], [first, outer, second]):
        dedup = Deduplicator()
        assert len(feed(dedup, *order)) == 2
        assert dedup.duplicates == 1


def test_three_reporters_of_one_call_are_one() -> None:
    chain = [
        call(span="c", parent="b", trace="t", scope="3"),
        call(span="b", parent="a", trace="t", scope="2"),
        call(span="a", trace="t", scope="1"),
    ]
    for order in (chain, chain[::-1], [chain[1], chain[0], chain[2]]):
        assert len(feed(Deduplicator(), *order)) == 1


def test_likeness_relates_copies_of_different_scopes_only() -> None:
    one = call(scope="a", input_tokens=100, output_tokens=20)
    assert len(feed(Deduplicator(), one, call(scope="b", input_tokens=100, output_tokens=20))) == 1
    assert len(feed(Deduplicator(), one, one)) == 2


@pytest.mark.parametrize(
    "different",
    [
        {"input_tokens": 101},
        {"output_tokens": 21},
        {"model": "o4-mini"},
        {"at": AT + 30},
        {"error": "overloaded"},
        {"app": "other"},
        {"provider": "anthropic"},
    ],
)
def test_what_differs_is_another_call(different: dict[str, object]) -> None:
    one = call(scope="a", app="shop", input_tokens=100, output_tokens=20)
    other = {"scope": "b", "app": "shop", "input_tokens": 100, "output_tokens": 20, **different}
    assert len(feed(Deduplicator(), one, call(**other))) == 2


def test_models_are_compared_by_family_and_by_the_gateways_group() -> None:
    gateway = call(
        scope="litellm", model="claude-sonnet-4-5", deployment="chat-claude/dep-1", provider="anthropic",
        input_tokens=100, output_tokens=20, app="key-alias",
    )  # fmt: skip
    sdk = call(
        scope="sdk",
        model="chat-claude",
        latency_s=1.2,
        at=AT + 0.1,
        input_tokens=100,
        output_tokens=20,
        app="shop",
    )
    dated = call(scope="a", model="gpt-4.1", input_tokens=7, output_tokens=8)
    served = call(scope="b", model="openai/gpt-4.1-2025-04-14", input_tokens=7, output_tokens=8)
    assert len(feed(Deduplicator(), gateway, sdk)) == 1
    assert len(feed(Deduplicator(), dated, served)) == 1


def test_in_one_batch_the_gateways_copy_stays() -> None:
    sdk = call(
        scope="sdk", model="chat-claude", input_tokens=100, output_tokens=20, app="shop", provider="openai"
    )
    gateway = call(
        scope="litellm", model="claude-sonnet-4-5", deployment="chat-claude/d", provider="anthropic", input_tokens=100,
        output_tokens=20,
    )  # fmt: skip
    (kept,) = feed(Deduplicator(), sdk, gateway)
    assert isinstance(kept, LlmCall)
    assert (kept.provider, kept.app) == ("anthropic", "shop")


def test_two_like_calls_told_twice_each_are_two() -> None:
    told = [
        call(scope=s, input_tokens=5, output_tokens=6, at=AT + i / 100) for s in ("a", "b") for i in range(2)
    ]
    assert len(feed(Deduplicator(), *told)) == 2


def test_an_outage_seen_by_two_unrelated_applications_is_not_halved() -> None:
    """Failures have nothing but time in common: without an earlier sign that both reporters tell the same calls, they stand."""
    dedup = Deduplicator()
    failures = [
        call(scope=s, app="", error="overloaded", at=AT + i + offset, latency_s=0.5)
        for i in range(20)
        for s, offset in (("a", 0.0), ("b", 0.2))
    ]
    assert len(feed(dedup, *failures)) == 40


def test_reporters_that_told_the_same_call_before_are_believed_about_failures() -> None:
    dedup = Deduplicator()
    feed(dedup, call(scope="sdk", id="r1"))
    feed(dedup, call(scope="litellm", id="r1"))
    feed(dedup, call(scope="litellm", error="overloaded", at=AT + 10, latency_s=0.3))
    assert feed(dedup, call(scope="sdk", error="overloaded", at=AT + 10.2, latency_s=0.55)) == []
    assert dedup.told_twice == {("litellm", "sdk"): 2}


def test_different_response_ids_of_one_kind_are_different_calls() -> None:
    alike = {"input_tokens": 5, "output_tokens": 6}
    assert (
        len(
            feed(
                Deduplicator(),
                call(scope="a", id="chatcmpl-1", **alike),
                call(scope="b", id="chatcmpl-2", **alike),
            )
        )
        == 2
    )
    made_up = call(scope="b", id="chatcmpl-3f", **alike)
    assert len(feed(Deduplicator(), call(scope="a", id="msg_1", **alike), made_up)) == 1


def test_calls_that_came_before_the_second_scope_are_looked_back_at() -> None:
    dedup = Deduplicator()
    feed(
        dedup,
        *[
            call(scope="litellm", id=f"r{i}", input_tokens=i, output_tokens=7, at=AT + i)
            for i in range(1, 20)
        ],
    )
    assert feed(dedup, call(scope="sdk", input_tokens=5, output_tokens=7, at=AT + 5)) == []


def test_memory_is_bounded_by_time_and_by_number() -> None:
    by_time = Deduplicator(remember_s=100)
    feed(by_time, call(id="old"))
    for i in range(4):
        feed(by_time, call(id=f"n{i}", at=AT + 60 * (i + 1)))
    assert len(feed(by_time, call(id="old", at=AT + 300))) == 1, "forgotten after its time"
    by_number = Deduplicator(max_calls=100)
    for i in range(50):
        feed(by_number, *[call(id=f"{i}-{j}") for j in range(10)])
    assert len(by_number._new.ids) + len(by_number._old.ids) <= 120
    assert feed(by_number, call(id="49-9")) == []


def test_one_wrong_clock_does_not_stop_the_forgetting() -> None:
    dedup = Deduplicator(remember_s=100)
    feed(dedup, call(id="far", at=AT + 10**8))
    feed(dedup, call(id="a", at=AT))
    feed(dedup, call(id="b", at=AT + 60))
    feed(dedup, call(id="c", at=AT + 120))
    assert "far" not in dedup._new.ids | dedup._old.ids


def test_a_snapshot_of_something_else_is_refused() -> None:
    with pytest.raises(SnapshotError):
        Deduplicator().restore(b"junk")


def test_equal_histories_give_equal_snapshots() -> None:
    def history() -> Deduplicator:
        dedup = Deduplicator()
        for i in range(30):
            feed(dedup, call(id=f"r{i}", scope="ab"[i % 2], span=f"s{i}", input_tokens=i))
        return dedup

    assert history().snapshot() == history().snapshot()


SCOPES = st.sampled_from(["litellm", "sdk", "framework"])
CALLS = st.builds(
    lambda scope, id, span, parent, out, failed, at: call(
        scope=scope,
        id=id,
        span=span,
        parent="" if not span else parent,
        input_tokens=None if failed else 10,
        output_tokens=None if failed else out,
        error="overloaded" if failed else "",
        at=AT + at / 10,
    ),
    SCOPES,
    st.sampled_from(["", "r1", "r2", "chatcmpl-3"]),
    st.sampled_from(["", "s1", "s2", "s3"]),
    st.sampled_from(["", "s1", "s2", "s3"]),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 30),
)
BATCHES = st.lists(st.lists(CALLS, min_size=1, max_size=5), min_size=1, max_size=8)


@given(BATCHES)
@settings(max_examples=200)
def test_every_call_is_kept_or_counted_as_a_duplicate(batches: list[list[LlmCall]]) -> None:
    dedup = Deduplicator()
    kept = sum(len(feed(dedup, *batch)) for batch in batches)
    assert kept + dedup.duplicates == sum(map(len, batches))


@given(BATCHES, st.integers(0, 8))
@settings(max_examples=200)
def test_a_restart_at_any_point_changes_nothing_after(batches: list[list[LlmCall]], at: int) -> None:
    straight = Deduplicator()
    expected = [feed(straight, *batch) for batch in batches]
    before = Deduplicator()
    got = [feed(before, *batch) for batch in batches[:at]]
    after = Deduplicator()
    after.restore(before.snapshot())
    got += [feed(after, *batch) for batch in batches[at:]]
    assert got == expected
    assert after.duplicates == straight.duplicates
    assert after.snapshot() == straight.snapshot()


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_two_reporters_shuffled_over_bodies_are_told_apart_from_other_calls(seed: int) -> None:
    """Calls with ids, nested spans and likeness, in bodies of any order: each counts once."""
    rng = random.Random(seed)
    copies: list[LlmCall] = []
    for i in range(60):
        inner = call(
            scope="inner",
            trace=f"t{i}",
            span=f"i{i}",
            parent=f"o{i}",
            at=AT + i,
            input_tokens=i + 1,
            output_tokens=3,
        )
        copies += [
            inner,
            msgspec.structs.replace(
                inner, scope="outer", span=f"o{i}", parent="", latency_s=1.1, at=AT + i + 0.05
            ),
        ]
    rng.shuffle(copies)
    dedup = Deduplicator()
    kept = sum(len(feed(dedup, *copies[k : k + 7])) for k in range(0, len(copies), 7))
    assert (kept, dedup.duplicates) == (60, 60)
