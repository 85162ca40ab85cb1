"""The language of scenarios, with a governor small enough to check by eye."""

from __future__ import annotations

import pytest

from flyball.core.errors import ConfigError
from flyball.lab.scenario import Lab, incident, seconds
from tests.lab.simple_governor import SimpleGovernor, acting, watching


def test_an_outage_opens_one_incident_with_the_right_root() -> None:
    lab = Lab(watching, seed=1, warmup="2m")
    lab.at("90s").provider("b").fails(0.6)
    lab.expect("2m", incident(root="provider:b", signal="llm.errors"))
    lab.run("3m")
    assert [str(i.root) for i in lab.pages()] == ["provider:b"]


def test_a_quiet_stretch_wakes_nobody() -> None:
    lab = Lab(watching, seed=2, warmup="0s").run("8m")
    lab.no_pages()
    assert lab.incidents() == []
    assert lab.directives() == ()


def test_a_failed_expectation_shows_what_there_was_instead() -> None:
    lab = Lab(watching, seed=1, warmup="1m")
    lab.at("30s").provider("b").fails(0.9)
    with pytest.raises(AssertionError) as failed:
        lab.expect("90s", incident(root="provider:a", page=True))
    text = str(failed.value)
    assert "no incident(root='provider:a', page=True) by 90s" in text
    assert "provider_outage of provider:b from 30s" in text
    assert "provider:b llm.errors" in text


def test_an_expectation_of_nothing_shows_the_pages() -> None:
    lab = Lab(watching, seed=1, warmup="1m")
    lab.at("30s").provider("b").fails(0.9)
    lab.run("2m")
    with pytest.raises(AssertionError, match="expected no page"):
        lab.no_pages()


def test_an_incident_that_came_too_late_is_not_taken_for_one_in_time() -> None:
    lab = Lab(watching, seed=1, warmup="1m")
    lab.at("60s").provider("b").fails(0.9)
    lab.run("3m")
    with pytest.raises(AssertionError):
        lab.expect("61s", incident(root="provider:b"))


def test_the_gateway_obeys_what_the_governor_grants_and_calls_succeed_again() -> None:
    lab = Lab(acting, seed=3, warmup="2m")
    lab.at("30s").provider("b").fails(0.8)
    lab.run("2m")
    assert [d.kind for d in lab.directives()] == ["redirect"]
    governor = lab.governor
    assert isinstance(governor, SimpleGovernor)
    to_b = [e for b in governor.batches for e in b.events if getattr(e, "provider", "") == "b"]
    assert max(e.at for e in to_b) < lab.zero + 95
    lab.run("5m")
    assert lab.directives() == ()
    assert [c.change for c in lab.directive_changes()] == ["granted", "expired"]
    assert "directive" in lab.report()


def test_what_recovers_stops_failing() -> None:
    lab = Lab(watching, seed=4, warmup="1m")
    lab.at("30s").provider("c").fails(0.9)
    lab.at("60s").provider("c").recovers()
    lab.run("3m")
    assert lab.sim.faults[0].end == lab.zero + 60
    governor = lab.governor
    assert isinstance(governor, SimpleGovernor)
    late = [
        e
        for b in governor.batches
        for e in b.events
        if getattr(e, "provider", "") == "c" and e.at > lab.zero + 150
    ]
    assert sum(bool(getattr(e, "error", "")) for e in late) < 0.1 * len(late)


def test_a_governor_is_fed_in_order_of_arrival_and_ticked_each_second() -> None:
    lab = Lab(watching, seed=5, warmup="10s").run("20s")
    governor = lab.governor
    assert isinstance(governor, SimpleGovernor)
    assert governor.ticks == [lab.zero - 10 + i for i in range(1, 31)]
    arrivals = [b.received_at or 0.0 for b in governor.batches]
    assert arrivals == sorted(arrivals)


def test_every_sentence_of_the_language_makes_its_fault() -> None:
    lab = Lab(watching, seed=6, warmup="0s")
    lab.at("1s").tenant("t17").bad_key()
    lab.at("1s").prompt("checkout@4").doubles_tokens()
    lab.at("1s").agent("researcher").loops("cycle", lasts="1m")
    lab.at("1s").provider("b").slow(3.0)
    lab.at("1s").provider("a").quota_exhausted()
    lab.at("1s").app("search").retry_storm()
    lab.at("1s").gpu("node-1/gpu-3").xid(79)
    lab.at("1s").gpu("node-1/gpu-2").overheats()
    lab.at("1s").deployment("vllm-2").saturates()
    lab.at("1s").all_providers().fail(lasts="5s")
    lab.at("1s").provider("c").fails(0.5, on="20s", off="20s")
    lab.run("30s")
    assert [f.truth().kind for f in lab.sim.faults] == [
        "bad_key", "prompt_inflation", "agent_loop", "slow_provider", "quota_exhausted", "retry_storm", "gpu_xid",
        "gpu_throttle", "serving_saturated", "all_providers_down", "square_wave",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sentence", "answer"),
    [
        (lambda lab: lab.at("1s").provider("bb"), "no provider 'bb' in the estate"),
        (lambda lab: lab.at("1s").app("chekout"), "did you mean 'checkout'"),
        (lambda lab: lab.at("1s").prompt("chekout@4"), "did you mean 'checkout'"),
        (lambda lab: lab.at("1s").agent("researcher").loops("spiral"), "known: cycle, repeat"),
        (lambda lab: lab.at("1s").provider("b").recovers(), "no fault to recover from"),
        (lambda lab: lab.at("0s"), "has passed"),
        (lambda lab: lab.at("soon"), "is no duration"),
    ],
)
def test_a_sentence_that_makes_no_sense_is_refused_with_the_reason(sentence, answer) -> None:  # type: ignore[no-untyped-def]
    lab = Lab(watching, seed=1, warmup="1m")
    lab.run("1s")
    with pytest.raises(ConfigError, match=answer):
        sentence(lab)


@pytest.mark.parametrize(("text", "value"), [("90s", 90.0), ("1h30m", 5400.0), ("250ms", 0.25), (7, 7.0)])
def test_durations_read_as_people_write_them(text: str | float, value: float) -> None:
    assert seconds(text) == value
