"""Inference servers at their limit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from flyball.core.anomaly import Anomaly
from flyball.core.errors import ConfigError
from flyball.core.events import GpuSample
from flyball.detectors._gates import Counter, Dwell, Gate
from flyball.detectors.serving_saturation import Params, ServingSaturation

T0 = 1_700_000_000.0


def sample(i: int, **values: float) -> GpuSample:
    return GpuSample(
        at=T0 + 15.0 * i,
        deployment="vllm-0",
        model="llama",
        node="n1",
        values={k: float(v) for k, v in values.items()},
    )


def told(samples: Sequence[GpuSample], params: Params | None = None) -> list[Anomaly]:
    return ServingSaturation(params).feed(samples)


def edges(said: Sequence[Anomaly]) -> list[tuple[str, str, str]]:
    return [(a.signal, a.klass, a.phase) for a in said if a.phase != "still"]


def test_waiting_at_the_plateau_is_told_after_the_dwell_and_ends() -> None:
    said = told(
        [sample(i, requests_running=64, requests_waiting=20 if 10 <= i < 30 else 0) for i in range(50)]
    )
    assert edges(said) == [("serving.queue", "saturated", "on"), ("serving.queue", "saturated", "off")]
    assert said[0].at == T0 + 15.0 * 14
    assert said[0].since == T0 + 15.0 * 10
    assert said[0].labels == {"deployment": "vllm-0", "model": "llama", "node": "n1"}


def test_waiting_while_the_batch_still_fills_is_nothing() -> None:
    full = [sample(i, requests_running=64, requests_waiting=0) for i in range(5)]
    filling = [sample(5 + i, requests_running=20, requests_waiting=3) for i in range(30)]
    assert told(full + filling) == []


def test_requests_that_wait_while_none_runs_are_a_stall() -> None:
    said = told([sample(i, requests_running=0, requests_waiting=5) for i in range(10)])
    assert edges(said) == [("serving.queue", "stalled", "on")]
    assert said[0].impact == 1.0


def test_waiting_now_and_then_is_nothing() -> None:
    assert (
        told([sample(i, requests_running=64, requests_waiting=5 if i % 3 == 0 else 0) for i in range(80)])
        == []
    )


def test_a_full_kv_cache_is_told_and_ends_below_the_lower_threshold() -> None:
    ratios = [0.5] * 5 + [0.95] * 10 + [0.85] * 20 + [0.6] * 10
    said = told([sample(i, kv_cache_ratio=r) for i, r in enumerate(ratios)])
    assert edges(said) == [("serving.kv_cache", "full", "on"), ("serving.kv_cache", "full", "off")]
    assert said[-1].at >= T0 + 15.0 * 35


def test_preemptions_above_what_is_usual_are_told_and_restarts_are_not() -> None:
    total, samples = 0.0, []
    for i in range(120):
        total = 0.0 if i == 60 else total + (10.0 if i >= 80 else 0.2)
        samples.append(sample(i, preemptions_total=total))
    assert edges(told(samples)) == [("serving.preemptions", "preempted", "on")]
    assert edges(told(samples[:80])) == []


def ttft_samples(levels: Sequence[float], n: float = 20.0) -> list[GpuSample]:
    total, count, out = 0.0, 0.0, []
    for i, level in enumerate(levels):
        total, count = total + level * n, count + n
        out.append(sample(i, ttft_s_sum=total, ttft_s_count=count))
    return out


def test_first_tokens_that_come_late_are_told_against_the_servers_own_level() -> None:
    usual = [0.3 * math.exp(0.15 * math.sin(7.0 * i)) for i in range(60)]
    said = told(ttft_samples([*usual, *([1.5] * 20), *([0.3] * 20)]))
    assert edges(said) == [("serving.ttft", "slow", "on"), ("serving.ttft", "slow", "off")]
    assert said[0].observed == pytest.approx(1.5)
    assert said[0].expected == pytest.approx(0.3, rel=0.1)
    assert said[0].score >= said[0].threshold


def test_a_server_that_was_always_slow_is_not_told() -> None:
    assert told(ttft_samples([5.0] * 100)) == []


def test_a_mean_of_few_requests_is_not_judged() -> None:
    assert told(ttft_samples([0.3] * 60 + [3.0] * 3, n=1.0)) == []


def test_a_level_that_stays_becomes_the_new_normal() -> None:
    usual = [0.3 * math.exp(0.1 * math.sin(7.0 * i)) for i in range(60)]
    said = told(ttft_samples([*usual, *([1.5] * 200)]), Params(relearn_s=600.0))
    assert edges(said) == [("serving.ttft", "slow", "on"), ("serving.ttft", "slow", "off")]
    assert "new normal" in str(said[-1].evidence["over"])


def test_samples_of_gpus_are_passed_over_and_silence_says_nothing() -> None:
    d = ServingSaturation()
    d.feed([sample(i, requests_running=0, requests_waiting=5) for i in range(10)])
    assert d.tick(T0 + 1e6) == []
    assert told([GpuSample(at=T0, gpu="GPU-1", values={"requests_waiting": 9.0})] * 20) == []


def test_thresholds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ConfigError, match="kv_off_ratio"):
        Params(kv_on_ratio=0.7, kv_off_ratio=0.8)
    with pytest.raises(ConfigError):
        Dwell(samples=0)


def test_samples_too_far_apart_do_not_add_up_to_a_dwell() -> None:
    gate, rule = Gate(), Dwell(dwell_s=60.0, samples=3, gap_s=100.0)
    assert [gate.step(at, True, False, rule) for at in (0.0, 30.0, 500.0, 530.0, 560.0)] == [
        None,
        None,
        None,
        None,
        "on",
    ]


def test_a_counter_that_fell_counts_from_zero() -> None:
    counter = Counter()
    assert counter.step(100.0, 0.0) is None
    assert counter.step(110.0, 10.0) == (10.0, 10.0)
    assert counter.step(4.0, 20.0) == (4.0, 10.0)
    assert counter.step(5.0, 15.0) is None
