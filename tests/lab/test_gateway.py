"""The simulated gateway obeys leases while they live, exactly within their scope, and lets go by itself."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest

from flyball.core.directives import Directive
from flyball.core.events import LlmCall
from flyball.lab.agents import KNOCKS
from flyball.lab.estate import default_estate
from flyball.lab.sim import START_AT, Simulator
from tests.lab.helpers import calls_of, lease, stepped


def start_of(call: LlmCall) -> float:
    return call.at - (call.latency_s or 0.0)


def run_with(
    *directives: Directive, seconds: float = 240.0, rate: float = 20.0
) -> tuple[Simulator, list[LlmCall]]:
    sim = Simulator(default_estate(rate), 11)
    sim.set_directives(directives)
    return sim, calls_of(stepped(sim, seconds))


def counted(sim: Simulator) -> dict[str, int]:
    report = sim.enforced()
    assert report is not None
    return report.directives


def by_call(calls: list[LlmCall]) -> dict[str, LlmCall]:
    return {c.id: c for c in calls}


def test_a_whole_redirect_leaves_the_provider_without_calls() -> None:
    sim, calls = run_with(lease("redirect", {"provider": "b"}, START_AT, to={"provider": "a"}))
    assert {c.provider for c in calls} == {"a", "c", "own"}
    assert counted(sim)["redirect-1"] > 100


def test_a_share_moves_about_that_share_and_never_half_a_run() -> None:
    _, before = run_with()
    _, after = run_with(lease("redirect", {"provider": "b"}, START_AT, to={"provider": "a"}, share=0.25))
    was = {i: c.provider for i, c in by_call(before).items()}
    mine = [c for c in after if was.get(c.id) == "b" and not c.run]
    moved = sum(c.provider == "a" for c in mine) / len(mine)
    assert moved == pytest.approx(0.25, abs=0.04)
    providers = defaultdict(set)
    for call in after:
        if call.run and call.provider:
            providers[call.run].add(call.provider)
    assert all(len(p) == 1 for p in providers.values())


def test_the_same_calls_move_at_a_larger_share_and_more_of_them() -> None:
    moved = {}
    for share in (0.1, 0.5):
        _, calls = run_with(lease("redirect", {"provider": "b"}, START_AT, to={"provider": "a"}, share=share))
        _, plain = run_with()
        was = {i: c.provider for i, c in by_call(plain).items()}
        moved[share] = {c.id for c in calls if was.get(c.id) == "b" and c.provider == "a" and not c.run}
    assert moved[0.1] < moved[0.5]


def test_a_lease_ends_by_itself() -> None:
    end = START_AT + 100.0
    _, calls = run_with(lease("redirect", {"provider": "b"}, START_AT, lasts_s=100.0, to={"provider": "a"}))
    assert not [c for c in calls if c.provider == "b" and start_of(c) < end - 0.5]
    assert [c for c in calls if c.provider == "b" and start_of(c) > end]


def test_a_redirect_to_a_provider_without_the_model_moves_nothing() -> None:
    sim, calls = run_with(lease("redirect", {"provider": "own"}, START_AT, to={"provider": "a"}))
    assert [c for c in calls if c.provider == "own"]
    assert counted(sim) == {"redirect-1": 0}


def test_a_redirect_may_name_another_model() -> None:
    _, calls = run_with(
        lease("redirect", {"provider": "own"}, START_AT, to={"provider": "a", "model": "wren"})
    )
    assert not [c for c in calls if c.provider == "own"]


def test_caches_are_cold_after_a_failover() -> None:
    def cached(calls: list[LlmCall]) -> float:
        told = [c for c in calls if c.app == "checkout" and c.input_tokens and c.provider == "a"]
        return sum(c.cache_read_tokens or 0 for c in told) / sum(c.input_tokens or 0 for c in told)

    _, warm = run_with(seconds=60.0)
    _, cold = run_with(lease("redirect", {"provider": "b"}, START_AT, to={"provider": "a"}), seconds=60.0)
    assert cached(cold) < 0.8 * cached(warm)


def test_a_block_refuses_its_scope_only_and_as_the_gateway_s_own() -> None:
    _, calls = run_with(lease("block", {"tenant": "t2"}, START_AT))
    mine = [c for c in calls if c.tenant == "t2"]
    assert {(c.error, c.error_code, c.provider) for c in mine} == {("gateway_local", "403_blocked", "")}
    assert not [c for c in calls if c.tenant != "t2" and c.error == "gateway_local"]


def test_a_blocked_run_stops() -> None:
    sim = Simulator(default_estate(10.0), 11)
    runs = [c.run for c in calls_of(stepped(sim, 120.0)) if c.run]
    run = runs[-1]
    sim.set_directives([lease("block", {"run": run}, sim.now)])
    later = [c for c in calls_of(stepped(sim, 200.0)) if c.run == run and start_of(c) > START_AT + 121.0]
    assert len(later) <= 1 + KNOCKS
    assert all(c.error == "gateway_local" for c in later)


def test_a_limit_lets_through_no_more_than_it_says() -> None:
    sim, calls = run_with(lease("limit", {"app": "assistant"}, START_AT, requests_per_min=60.0))
    mine = [c for c in calls if c.app == "assistant"]
    passed = [c for c in mine if c.error != "gateway_local"]
    # One a second, and what may go at once after a pause.
    assert len(passed) <= 241 + 10
    refused = [c for c in mine if c.error_code == "429_limited"]
    assert len(refused) > 100
    # What the last senders hold back is refused, and not delivered yet.
    assert counted(sim)["limit-1"] >= len(refused)
    assert not [c for c in calls if c.app != "assistant" and c.error == "gateway_local"]


def test_a_cap_shortens_answers() -> None:
    _, calls = run_with(lease("cap", {"app": "summarize"}, START_AT, output_tokens=100))
    assert max(c.output_tokens or 0 for c in calls if c.app == "summarize") <= 100
    assert max(c.output_tokens or 0 for c in calls if c.app == "translate") > 100


def test_an_unknown_label_matches_nothing() -> None:
    _, calls = run_with(
        lease("block", {"planet": "mars"}, START_AT), lease("limit", {"tenant": "t9999"}, START_AT)
    )
    assert not [c for c in calls if c.error == "gateway_local"]


@pytest.mark.parametrize(
    "scope",
    [{"team": "payments"}, {"prompt": "checkout@3"}, {"key": "key-t1"}, {"region": "eu"}, {"agent": "coder"}],
)
def test_scopes_match_the_labels_that_events_carry(scope: dict[str, str]) -> None:
    _, plain = run_with(seconds=400.0)  # what is blocked ends sooner than what is answered
    _, blocked = run_with(lease("block", scope, START_AT), seconds=120.0)
    ((label, value),) = scope.items()
    refused = {c.id for c in blocked if c.error == "gateway_local"}
    expected = {c.id for c in plain if getattr(c, label) == value}
    assert refused
    # A run that was blocked stops or knocks again; its later calls, and retries of what is now refused, never come.
    assert all(by_call(blocked)[i].run for i in refused - expected)
    assert len(refused & expected) > 0.5 * len(refused)
    firsts = {c.id for c in plain if getattr(c, label) == value and not c.run and not c.retries}
    assert {i for i in firsts if i in by_call(blocked)} <= refused


def test_of_two_leases_with_one_id_the_higher_epoch_counts() -> None:
    old = lease("redirect", {"provider": "b"}, START_AT, to={"provider": "a"})
    new = Directive(
        **{f: getattr(old, f) for f in old.__struct_fields__}
        | {"epoch": 2, "params": {"to": {"provider": "c"}}}
    )
    for order in ((old, new), (new, old)):
        _, calls = run_with(*order, seconds=60.0)
        assert not [c for c in calls if c.provider == "b"]
        assert len([c for c in calls if c.provider == "c"]) > len([c for c in calls if c.provider == "a"])


def test_retries_go_to_another_provider_where_the_estate_falls_back() -> None:
    sim = Simulator(replace(default_estate(20.0), fallback=True), 11)
    calls = calls_of(stepped(sim, 600.0))
    first = {c.id.partition("-")[0]: c for c in calls if not c.retries}
    again = [c for c in calls if c.retries and not c.run]
    assert again
    assert all(c.provider != first[c.id.partition("-")[0]].provider for c in again if c.retries == 1)
