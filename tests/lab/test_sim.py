"""The simulator: the same course for the same seed, nothing lost, and faults that show where they should."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from flyball.core.entities import Entity
from flyball.core.errors import ConfigError
from flyball.core.events import EARLIEST, AgentStep, Change, Evaluation, GpuSample, LlmCall
from flyball.lab.agents import coder_turns, looping_turns, researcher_turns
from flyball.lab.estate import Estate, default_estate
from flyball.lab.faults import (
    AgentLoop,
    AllProvidersDown,
    AnyFault,
    BadKey,
    GpuThrottle,
    GpuXid,
    PromptInflation,
    ProviderOutage,
    QuotaExhausted,
    RetryStorm,
    ServingSaturated,
    SlowProvider,
)
from flyball.lab.sim import START_AT, Simulator
from tests.lab.helpers import calls_of, events_of, stepped
from tests.lab.simple_governor import encoded

T0 = START_AT + 120.0


def small(**changes: object) -> Estate:
    estate = default_estate(10.0)
    return Estate(**{**vars_of(estate), **changes})  # type: ignore[arg-type]


def vars_of(estate: Estate) -> dict[str, object]:
    return {name: getattr(estate, name) for name in estate.__dataclass_fields__}


def run_with(
    fault: AnyFault, seconds: float = 300.0, seed: int = 3, rate: float = 15.0
) -> tuple[Simulator, list[LlmCall]]:
    sim = Simulator(default_estate(rate), seed)
    sim.add_fault(fault)
    return sim, calls_of(stepped(sim, seconds))


def test_the_same_seed_gives_the_same_bytes() -> None:
    one, two, other = (encoded(stepped(Simulator(default_estate(8.0), s), 240.0)) for s in (1, 1, 2))
    assert one == two
    assert one != other


@pytest.mark.parametrize("step_s", [1.0, 7.3, 240.0])
def test_the_size_of_the_steps_changes_nothing(step_s: float) -> None:
    def course(step: float) -> bytes:
        sim = Simulator(default_estate(8.0), 4)
        sim.add_fault(ProviderOutage("b", 0.5, T0, T0 + 60))
        sim.add_fault(AgentLoop("researcher", T0))
        sim.add_fault(GpuXid("node-2/gpu-1", 79, T0 + 30))
        return encoded(stepped(sim, 240.0, step))

    assert course(step_s) == course(10.0)


def test_every_call_that_goes_in_comes_out_once() -> None:
    sim = Simulator(default_estate(12.0), 5)
    sim.add_fault(ProviderOutage("b", 0.7, T0, T0 + 120))
    calls = calls_of(stepped(sim, 400.0))
    assert sim.totals.calls == sim.totals.answered + sim.totals.failed + pending_retries(sim)
    ends = Counter(c.id.partition("-")[0] for c in calls)
    # A call's attempts carry on from nought without a gap, each once.
    attempts = defaultdict(list)
    for call in calls:
        attempts[call.id.rpartition("-")[0]].append(call.retries or 0)
    late = [a for a in attempts.values() if sorted(a) != list(range(len(a)))]
    assert ends
    assert late == []


def pending_retries(sim: Simulator) -> int:
    return sum(int((chunk["attempt"] > 0).sum()) for chunk in sim._pending)


def test_batches_arrive_in_order_and_never_before_their_events() -> None:
    batches = stepped(Simulator(default_estate(10.0), 6), 200.0, 1.0)
    arrivals = [b.received_at or 0.0 for b in batches]
    assert arrivals == sorted(arrivals)
    for batch in batches:
        assert batch.sender
        assert max(e.at for e in batch.events) <= (batch.received_at or 0.0) + 0.5  # clocks differ by less


def test_gateway_pods_hold_events_for_at_most_five_seconds() -> None:
    batches = [
        b for b in stepped(Simulator(default_estate(10.0), 6), 200.0) if b.sender.startswith("gateway")
    ]
    assert len({b.sender for b in batches}) == 4
    held = [(b.received_at or 0.0) - min(e.at for e in b.events) for b in batches]
    assert 3.0 < max(held) <= 5.6


def test_all_kinds_of_events_are_there_and_sane() -> None:
    events = events_of(stepped(Simulator(small(deploys_per_day=2000.0), 7), 900.0))
    assert {type(e) for e in events} == {LlmCall, AgentStep, GpuSample, Change, Evaluation}
    assert all(e.at > EARLIEST for e in events)
    for call in [e for e in events if isinstance(e, LlmCall)]:
        assert (call.cache_read_tokens or 0) <= (call.input_tokens or 0)
        assert call.error or (call.output_tokens or 0) > 0
        assert call.ttft_s is None or call.latency_s is None or call.ttft_s <= call.latency_s + 1e-3


def test_the_quiet_floor_of_errors_is_low_and_of_many_classes() -> None:
    calls = calls_of(stepped(Simulator(default_estate(15.0), 8), 1800.0, 30.0))
    classes = Counter(c.error for c in calls)
    failed = 1 - classes[""] / len(calls)
    assert 0.005 < failed < 0.03
    assert {"rate_limited", "bad_request", "content_filter", "cancelled"} <= set(classes)
    assert "auth" not in classes
    assert "quota_exhausted" not in classes


def test_copies_carry_the_id_of_the_call_they_copy() -> None:
    calls = calls_of(stepped(Simulator(small(copies=1.0), 9), 300.0))
    told_by_sdk = {c.id for c in calls if c.scope == "lab.sdk"}
    assert told_by_sdk
    assert told_by_sdk <= {c.id for c in calls if c.scope == "lab.gateway"}


# -- agents ---------------------------------------------------------------------------------------------------------


def test_prompts_of_good_coding_runs_grow_about_thirteenfold() -> None:
    growth, calls = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        first = 1640.0
        turns = list(coder_turns(rng))
        growth.append((first + sum(t.grow for t in turns[:-1])) / first)
        calls.append(len(turns))
    assert 10 < np.median(growth) < 16
    assert np.quantile(growth, 0.9) > 18
    assert 28 < np.median(calls) < 45


def test_two_in_three_good_coding_runs_repeat_an_action_with_other_results() -> None:
    often, different = 0, 0.0
    for seed in range(200):
        turns = list(coder_turns(np.random.default_rng(seed)))
        tests = [t for t in turns if t.tool == "bash.test"]
        often += len(tests) >= 3
        assert len({t.args for t in tests}) == 1
        different += len({t.result for t in tests}) / len(tests)
    assert 0.55 < often / 200 < 0.78
    assert 0.85 < different / 200 < 1.0


def test_polling_repeats_call_and_result_but_its_gaps_grow() -> None:
    for seed in range(200):
        polls = [t for t in researcher_turns(np.random.default_rng(seed)) if t.tool == "export.status"]
        if len(polls) > 4:
            gaps = [t.think_s for t in polls[:-1]]
            assert gaps == sorted(gaps)
            assert gaps[-1] >= 8 * gaps[0]
            assert len({(t.args, t.result) for t in polls[:-1]}) == 1
            return
    pytest.fail("no run polled")


def test_pages_never_repeat_their_arguments() -> None:
    pages = [t for t in researcher_turns(np.random.default_rng(3)) if t.tool == "records.list"]
    assert len({t.args for t in pages}) == len(pages) >= 2


@pytest.mark.parametrize(("pattern", "distinct"), [("repeat", 1), ("cycle", 2)])
def test_loops_repeat_call_and_result_without_end(pattern: str, distinct: int) -> None:
    turns = looping_turns(np.random.default_rng(1), pattern)
    stuck = [next(turns) for _ in range(203)][3:]
    assert len({(t.tool, t.args, t.result) for t in stuck}) == distinct


def test_a_looping_run_has_a_name_ends_with_its_fault_and_is_the_root() -> None:
    sim = Simulator(default_estate(5.0), 3)
    number = sim.add_fault(AgentLoop("concierge", T0, T0 + 120))
    run = sim.faults[number].truth().root
    assert run is not None
    steps = [e for e in events_of(stepped(sim, 400.0)) if isinstance(e, AgentStep) and e.run == run.name]
    assert len(steps) > 20
    assert steps[0].at >= T0
    assert max(s.at for s in steps) < T0 + 130
    evidence = sim.evidence_at(number)
    assert evidence is not None
    assert evidence == pytest.approx(steps[3 + 5].at, abs=0.2)  # three good steps, then six that go round


# -- faults ---------------------------------------------------------------------------------------------------------


def test_an_outage_fails_the_share_of_its_provider_and_nobody_else() -> None:
    _, calls = run_with(ProviderOutage("b", 0.6, T0, T0 + 120))
    inside = [c for c in calls if T0 + 5 < c.at - (c.latency_s or 0) < T0 + 115]
    mine = [c for c in inside if c.provider == "b"]
    assert sum(bool(c.error) for c in mine) / len(mine) == pytest.approx(0.61, abs=0.05)
    others = [c for c in inside if c.provider != "b"]
    assert sum(bool(c.error) for c in others) / len(others) < 0.06
    assert {"529", "500", "429", "503"} <= {c.error_code for c in mine}
    after = [c for c in calls if c.provider == "b" and c.at - (c.latency_s or 0) > T0 + 121]
    assert sum(bool(c.error) for c in after) / len(after) < 0.06


def test_quota_exhaustion_refuses_every_call_of_the_account_as_such() -> None:
    _, calls = run_with(QuotaExhausted("a", T0))
    mine = [c for c in calls if c.provider == "a" and c.at - (c.latency_s or 0) > T0 + 1]
    assert {(c.error, c.error_code) for c in mine} == {("quota_exhausted", "insufficient_quota")}


def test_a_bad_key_fails_one_tenant_everywhere() -> None:
    _, calls = run_with(BadKey("t3", T0))
    refused = [c for c in calls if c.error == "auth"]
    assert {c.tenant for c in refused} == {"t3"}
    assert len({c.provider for c in refused}) > 1
    assert not [c for c in calls if c.tenant == "t3" and c.at - (c.latency_s or 0) > T0 + 1 and not c.error]


def test_a_prompt_version_that_doubles_tokens_is_announced_and_rolled_back() -> None:
    sim = Simulator(default_estate(15.0), 3)
    sim.add_fault(PromptInflation("checkout@4", 2.0, T0, T0 + 200))
    events = events_of(stepped(sim, 420.0))
    calls = [e for e in events if isinstance(e, LlmCall) and e.app == "checkout" and e.input_tokens]
    old, new = ([c.input_tokens or 0 for c in calls if c.prompt == p] for p in ("checkout@3", "checkout@4"))
    assert np.median(new) / np.median(old) == pytest.approx(2.0, rel=0.1)
    changes = [e for e in events if isinstance(e, Change) and e.labels["app"] == "checkout"]
    assert [(c.labels["prompt"], c.at) for c in changes] == [("checkout@4", T0), ("checkout@3", T0 + 200)]


def test_a_retry_storm_multiplies_the_attempts_of_its_app() -> None:
    _, calls = run_with(RetryStorm("search", T0))
    rate = Counter((c.app, c.at > T0) for c in calls)
    assert rate["search", True] / 180 > 2.5 * rate["search", False] / 120
    assert max(c.retries or 0 for c in calls if c.app == "search") >= 6


def test_a_slow_provider_is_slow_by_its_factor_and_fails_nothing() -> None:
    _, calls = run_with(SlowProvider("c", 3.0, T0))
    mine = [(c.at - (c.latency_s or 0) > T0, c.ttft_s) for c in calls if c.provider == "c" and c.ttft_s]
    before, after = (float(np.median([s for late, s in mine if late == x])) for x in (False, True))
    assert after / before == pytest.approx(3.0, rel=0.25)
    assert sum(bool(c.error) for c in calls if c.provider == "c" and c.at > T0) < 0.06 * len(calls)


def test_a_failing_gpu_says_its_xid_and_its_server_fails() -> None:
    sim = Simulator(default_estate(30.0), 3)
    sim.add_fault(GpuXid("node-1/gpu-3", 79, T0))
    events = events_of(stepped(sim, 500.0))
    said = [e for e in events if isinstance(e, GpuSample) and e.values.get("xid") == 79]
    assert {e.gpu for e in said} == {"node-1/gpu-3"}
    assert all(set(e.values) == {"xid"} for e in said)
    own = [e for e in events if isinstance(e, LlmCall) and e.deployment and e.at > T0 + 5]
    failed = {d: np.mean([bool(c.error) for c in own if c.deployment == d]) for d in ("vllm-1", "vllm-2")}
    assert failed["vllm-1"] > 0.25 > 0.1 > failed["vllm-2"]


def test_a_hot_gpu_clocks_down_and_its_counter_says_so() -> None:
    sim = Simulator(default_estate(2.0), 3)
    sim.add_fault(GpuThrottle("node-2/gpu-0", T0))
    samples = [
        e for e in events_of(stepped(sim, 400.0)) if isinstance(e, GpuSample) and e.gpu == "node-2/gpu-0"
    ]
    cool, hot = ([s for s in samples if (s.at >= T0) == late] for late in (False, True))
    assert max(s.values["sm_clock_hz"] for s in hot) < min(s.values["sm_clock_hz"] for s in cool)
    assert (
        hot[-1].values["thermal_violation_s_total"] > 100 > cool[-1].values["thermal_violation_s_total"] == 0
    )


def test_a_saturated_server_queues_and_preempts() -> None:
    sim = Simulator(default_estate(2.0), 3)
    sim.add_fault(ServingSaturated("vllm-2", T0))
    samples = [
        e
        for e in events_of(stepped(sim, 400.0))
        if isinstance(e, GpuSample) and e.deployment == "vllm-2" and "requests_waiting" in e.values
    ]
    assert samples[-1].values["requests_waiting"] > 100
    assert samples[-1].values["kv_cache_ratio"] > 0.95
    assert samples[-1].values["preemptions_total"] > samples[-5].values["preemptions_total"] > 0


def test_counters_of_gpus_and_servers_never_run_back() -> None:
    last: dict[tuple[str, str, str], float] = {}
    for event in events_of(stepped(Simulator(default_estate(1.0), 3), 900.0)):
        if isinstance(event, GpuSample):
            for name, value in event.values.items():
                if name.endswith(("_total", "_sum", "_count")):
                    key = (event.gpu, event.deployment, name)
                    assert value >= last.get(key, 0.0), key
                    last[key] = value


def test_when_our_own_way_out_breaks_every_provider_fails() -> None:
    sim, calls = run_with(AllProvidersDown(T0))
    late = [c for c in calls if c.at - (c.latency_s or 0) > T0]
    for provider in ("a", "b", "c", "own"):
        failed = [bool(c.error) for c in late if c.provider == provider]
        assert np.mean(failed) > 0.85
    assert sim.faults[0].truth().root is None


def test_a_square_wave_comes_and_goes() -> None:
    _, calls = run_with(ProviderOutage("b", 0.9, T0, on_s=20.0, off_s=20.0))
    started = [(c.at - (c.latency_s or 0) - T0, bool(c.error)) for c in calls if c.provider == "b"]
    on = [bad for t, bad in started if t > 0 and t % 40 < 19]
    off = [bad for t, bad in started if t > 0 and 21 < t % 40 < 39]
    assert np.mean(on) > 0.8 > 0.1 > np.mean(off)


def test_evidence_counts_the_fault_s_own_events_of_enough_tenants() -> None:
    sim, calls = run_with(ProviderOutage("b", 0.6, T0))
    evidence = sim.evidence_at(0)
    assert evidence is not None
    assert T0 < evidence < T0 + 30
    truth = sim.faults[0].truth()
    assert truth.root == Entity("provider", "b")
    failed = sorted(c.at for c in calls if c.provider == "b" and c.error_code == "529" and c.at > T0)
    assert failed[2] < evidence < failed[14]


def test_a_fault_of_what_the_estate_has_not_is_refused() -> None:
    sim = Simulator(default_estate(), 1)
    with pytest.raises(ConfigError, match="no GPU 'node-9/gpu-0'"):
        sim.add_fault(GpuXid("node-9/gpu-0", 79, T0))
    with pytest.raises(ConfigError, match="no agent 'nobody'"):
        sim.add_fault(AgentLoop("nobody", T0))


def test_time_does_not_run_back() -> None:
    sim = Simulator(default_estate(), 1)
    with pytest.raises(ValueError, match="forward"):
        sim.step(START_AT - 1)
