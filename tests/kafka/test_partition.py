"""Copies of one call meet in one partition, everything else spreads, and every process agrees on where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.core.events import AgentStep, Change, Evaluation, Event, GpuSample, LlmCall
from flyball.streams.kafka.partition import CALLS, CHANGES, SAMPLES, STEPS, Router, key_of, partition_of

PARTITIONS = {CALLS: 16, STEPS: 16, SAMPLES: 16, CHANGES: 1}
NOW = 1_800_000_000.0

names = st.text("abcdef0123456789", min_size=1, max_size=12)
maybe = st.one_of(st.just(""), names)


def places(router: Router, *bodies: Sequence[Event]) -> list[int]:
    """The partition of every call, body after body, in order."""
    found = []
    for body in bodies:
        split = router.split(body, PARTITIONS)
        of = {id(e): partition for (topic, partition), events in split.items() for e in events}
        found += [of[id(e)] for e in body]
    return found


def call(**of: object) -> LlmCall:
    return LlmCall(at=NOW, **of)  # type: ignore[arg-type]


# --- copies meet ----------------------------------------------------------------------------------------------------


@given(names, maybe, maybe, st.booleans())
def test_copies_with_one_response_id_meet_whoever_tells_them(
    id: str, trace: str, span: str, together: bool
) -> None:
    gateway = call(id=id, scope="litellm", app="key-1")
    sdk = call(id=id, scope="openai", trace=trace, span=span, parent="p" if span else "")
    bodies = [[gateway, sdk]] if together else [[gateway], [sdk]]
    assert len(set(places(Router(), *bodies))) == 1


@given(
    st.lists(maybe, min_size=2, max_size=5),
    maybe, st.data(),
)  # fmt: skip
def test_calls_inside_each_other_meet_whatever_ids_they_carry(
    ids: list[str], trace: str, data: st.DataObject
) -> None:
    nested = [
        call(id=id, trace=trace, span=f"s{i}", parent=f"s{i - 1}" if i else "", scope=f"scope-{i}")
        for i, id in enumerate(ids)
    ]
    body = data.draw(st.permutations(nested))
    assert len(set(places(Router(), body))) == 1


@given(maybe, maybe, maybe, st.booleans())
def test_a_call_and_the_one_around_it_meet_over_two_bodies(
    inner_id: str, outer_id: str, trace: str, inner_first: bool
) -> None:
    inner = call(id=inner_id, trace=trace, span="in", parent="out", scope="openai")
    outer = call(id=outer_id, trace=trace, span="out", parent="request", scope="langchain")
    bodies = [[inner], [outer]] if inner_first else [[outer], [inner]]
    assert len(set(places(Router(), *bodies))) == 1


@given(st.lists(st.tuples(maybe, maybe, maybe, maybe), min_size=1, max_size=8), st.integers(0, 7))
def test_a_body_that_is_sent_again_goes_where_it_went(
    told: list[tuple[str, str, str, str]], others: int
) -> None:
    body = [call(id=i, trace=t, span=s, parent=p) for i, t, s, p in told]
    router = Router()
    first = places(router, body)
    for n in range(others):
        router.split([call(id=f"x{n}", span=f"x{n}")], PARTITIONS)
    assert places(router, body) == first


def test_the_innermost_id_counts_so_that_the_gateways_copy_meets_both() -> None:
    around = call(id="run-17", trace="t", span="out", scope="langchain")
    inside = call(id="chatcmpl-1", trace="t", span="in", parent="out", scope="openai")
    gateway = call(id="chatcmpl-1", scope="litellm")
    assert len(set(places(Router(), [around, inside], [gateway]))) == 1


def test_what_was_forgotten_goes_by_its_own_id() -> None:
    router = Router(remember_calls=2)
    router.split([call(id="chatcmpl-1", span="in", parent="out")], PARTITIONS)
    for n in range(6):
        router.split([call(id=f"x{n}", span=f"x{n}")], PARTITIONS)
    late = [call(id="run-17", span="out")]
    assert places(router, late) == places(Router(), late)


def test_spans_that_claim_to_be_inside_each_other_have_places_too() -> None:
    assert (
        len(places(Router(), [call(id="a", span="1", parent="2"), call(id="b", span="2", parent="1")])) == 2
    )


# --- the rest -------------------------------------------------------------------------------------------------------


@given(names, st.lists(names, min_size=2, max_size=6))
def test_steps_of_one_run_stay_together_and_in_order(run: str, tools: list[str]) -> None:
    steps = [AgentStep(at=NOW, run=run, tool=t, id=f"{i}") for i, t in enumerate(tools)]
    ((place, found),) = Router().split(steps, PARTITIONS).items()
    assert place[0] == STEPS
    assert found == steps


@pytest.mark.parametrize(
    ("events", "topic"),
    [
        ([GpuSample(at=NOW, node="n1", gpu=str(g)) for g in range(8)], SAMPLES),
        ([GpuSample(at=NOW + t, deployment="vllm-1") for t in range(8)], SAMPLES),
        ([Change(at=NOW, kind="deploy", id=str(i)) for i in range(8)], CHANGES),
        ([Evaluation(at=NOW, name="x", score=0.5, run="r", id=str(i)) for i in range(8)], CALLS),
    ],
    ids=["gpus of a node", "an inference server", "changes", "evaluations of a run"],
)  # fmt: skip
def test_what_is_judged_together_stays_together(events: list[Event], topic: str) -> None:
    ((place, found),) = Router().split(events, PARTITIONS).items()
    assert place[0] == topic
    assert found == events


events = st.one_of(
    st.builds(LlmCall, at=st.just(NOW), id=maybe, trace=maybe, span=maybe, parent=maybe),
    st.builds(AgentStep, at=st.just(NOW), run=maybe, id=maybe),
    st.builds(GpuSample, at=st.just(NOW), node=maybe),
    st.builds(Evaluation, at=st.just(NOW), name=st.just("q"), score=st.just(1.0), id=maybe),
    st.builds(Change, at=st.just(NOW), kind=st.just("deploy")),
)


@given(st.lists(events, max_size=40), st.integers(1, 20))
def test_every_event_has_exactly_one_place_that_exists(body: list[Event], partitions: int) -> None:
    counts = {**PARTITIONS, CALLS: partitions, STEPS: partitions}
    split = Router().split(body, counts)
    assert sorted(map(repr, body)) == sorted(repr(e) for found in split.values() for e in found)
    assert all(0 <= partition < counts[topic] for topic, partition in split)


@pytest.mark.parametrize("partitions", [2, 3, 8, 12, 20])
@pytest.mark.parametrize(
    "make",
    [lambda i: f"call-{i}", lambda i: f"chatcmpl-{i:012x}", lambda i: f"{i:08d}", lambda i: f"{i * 7919:032x}"],
    ids=["numbers", "hexadecimal", "padded", "traces"],
)  # fmt: skip
def test_calls_spread_evenly(make: object, partitions: int) -> None:
    assert callable(make)
    split = Router().split([call(id=make(i)) for i in range(8000)], {CALLS: partitions})
    sizes = [len(found) for found in split.values()]
    assert len(sizes) == partitions
    assert max(sizes) < 1.25 * 8000 / partitions
    assert min(sizes) > 0.75 * 8000 / partitions


def test_calls_without_any_identity_spread_too() -> None:
    many = [LlmCall(at=NOW + i / 7, model="m") for i in range(4000)]
    sizes = Counter(p for _, p in Router().split(many, PARTITIONS))
    assert len(sizes) == PARTITIONS[CALLS]


def test_calls_of_one_agents_run_do_not_pile_up() -> None:
    """They share a parent that is no call; only ids tell them apart."""
    many = [call(id=f"c{i}", trace="t", span=f"s{i}", parent="agent") for i in range(200)]
    assert len(set(places(Router(), *[[c] for c in many]))) == PARTITIONS[CALLS]


def test_places_are_the_same_in_every_process_and_version() -> None:
    """These figures are in the topics of those who run it: changing them parts copies during an upgrade."""
    assert [key_of(x) for x in ("", "chatcmpl-1", "é")] == [0, 2_386_798_241, 235_179_326]
    assert [partition_of(key_of(f"call-{i}"), 8) for i in range(6)] == [2, 0, 5, 5, 7, 3]
