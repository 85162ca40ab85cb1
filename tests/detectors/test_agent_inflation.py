"""Runs that grow out of proportion, against other runs of the same agent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from flyball.core.anomaly import Anomaly
from flyball.core.errors import ConfigError
from flyball.core.events import AgentStep, Event, LlmCall
from flyball.detectors._traffic import noise
from flyball.detectors.agent_inflation import AgentInflation, Params

T0 = 1_700_000_000.0


def run(
    name: str, steps: int = 30, *, start: float = 0.0, growth: float = 0.4, usd: float | None = 0.01, gap_s: float = 8.0, big: float = 1.0,
    from_step: int = 0, app: str = "coder",
) -> list[Event]:  # fmt: skip
    """A run whose prompt grows in proportion to its steps (thirteenfold over 30), as good coding runs do."""
    seed = sum(map(ord, name))
    level = math.exp(0.3 * noise(seed))
    out: list[Event] = []
    for k in range(steps):
        tokens = (
            2000
            * level
            * (1 + growth * k)
            * math.exp(0.2 * noise(seed, k))
            * (big if k >= from_step else 1.0)
        )
        cost = (
            None
            if usd is None
            else usd * level * math.exp(0.2 * noise(seed, k, 2)) * (big if k >= from_step else 1.0)
        )
        out.append(
            LlmCall(at=T0 + start + gap_s * (k + 1), run=name, app=app, agent="worker", input_tokens=int(tokens), output_tokens=100,
                    cost_usd=cost, id=f"{name}-{k}")
        )  # fmt: skip
    return out


def peers(n: int = 40, **how: Any) -> list[Event]:
    return [e for i in range(n) for e in run(f"peer{i}", start=300.0 * i, **how)]


def edges(said: Sequence[Anomaly]) -> list[tuple[str, str, str]]:
    return [(a.signal, a.labels["run"], a.phase) for a in said if a.phase != "still"]


def test_growth_that_every_run_shows_is_normal() -> None:
    assert AgentInflation().feed(peers(60)) == []


def test_a_prompt_far_above_other_runs_at_the_same_step_is_told() -> None:
    said = AgentInflation().feed([*peers(), *run("bloat", start=20_000.0, big=8.0, from_step=10, usd=None)])
    assert ("agent.context", "bloat", "on") in edges(said)
    on = next(a for a in said if a.signal == "agent.context")
    assert on.evidence["call_of_run"] == 13
    assert on.since == T0 + 20_000.0 + 8.0 * 11
    assert on.observed > 4 * on.expected
    assert on.score >= on.threshold


def test_nothing_is_told_before_enough_runs_came() -> None:
    assert AgentInflation().feed([*peers(10), *run("bloat", start=20_000.0, big=20.0)]) == []


def test_a_run_longer_than_any_before_is_judged_by_the_trend() -> None:
    assert AgentInflation().feed([*peers(), *run("long", 120, start=20_000.0)]) == []
    said = AgentInflation().feed(
        [*peers(), *run("bloat", 120, start=20_000.0, big=12.0, from_step=60, usd=None)]
    )
    assert any(a.signal == "agent.context" and a.evidence.get("extended_from_call") for a in said)


def test_money_that_runs_faster_than_in_other_runs_is_told() -> None:
    said = AgentInflation().feed([*peers(), *run("burner", 60, start=20_000.0, usd=0.15)])
    assert edges(said) == [("agent.spend", "burner", "on")]
    assert said[0].unit == "usd/min"


def test_without_costs_tokens_a_minute_are_judged() -> None:
    said = AgentInflation().feed(
        [*peers(usd=None), *run("burner", 1500, start=20_000.0, usd=None, gap_s=0.1, growth=0.0)]
    )
    assert [(a.signal, a.unit) for a in said if a.phase == "on"] == [("agent.spend", "tokens/min")]


def test_a_change_that_hits_every_run_becomes_the_new_normal() -> None:
    d = AgentInflation()
    d.feed(peers())
    later = [e for i in range(60) for e in run(f"new{i}", start=20_000.0 + 300.0 * i, big=6.0, usd=None)]
    said = d.feed(later)
    told = {a.labels["run"] for a in said if a.phase == "on" and a.signal == "agent.context"}
    assert "new0" in told
    assert not told & {f"new{i}" for i in range(45, 60)}


def test_one_anomalous_run_does_not_teach() -> None:
    d = AgentInflation()
    d.feed([*peers(), *run("bloat", start=20_000.0, big=10.0, usd=None)])
    again = d.feed(run("bloat2", start=21_000.0, big=10.0, usd=None))
    assert any(a.phase == "on" for a in again)


def children(parent: str, n: int, start: float) -> list[Event]:
    return [
        AgentStep(
            at=T0 + start + i,
            run=f"{parent}/{i}",
            parent_run=parent,
            app="coder",
            agent="sub",
            tool="t",
            args_hash=str(i),
        )
        for i in range(n)
    ]


def test_a_run_with_far_more_children_than_others_is_told() -> None:
    d = AgentInflation()
    for i in range(30):
        d.feed(children(f"parent{i}", 3 + i % 3, 100.0 * i))
    d.tick(T0 + 10_000.0)
    said = d.feed(children("wide", 80, 20_000.0))
    assert edges(said) == [("agent.fan_out", "wide", "on")]
    assert said[0].observed < 40


def test_without_other_runs_only_very_many_children_are_told() -> None:
    assert AgentInflation().feed(children("wide", 99, 0.0)) == []
    said = AgentInflation().feed(children("wide", 110, 0.0))
    assert said[0].evidence["limit_without_baseline"] == 100


def test_an_episode_ends_with_its_run() -> None:
    d = AgentInflation()
    d.feed([*peers(), *run("bloat", start=20_000.0, big=8.0, usd=None)])
    ended = d.tick(T0 + 30_000.0)
    assert [(a.phase, a.evidence["why"]) for a in ended] == [("off", "the run ended")]


def test_runs_without_the_run_label_and_without_tokens_say_nothing() -> None:
    assert AgentInflation().feed([LlmCall(at=T0 + i, app="a", input_tokens=10**6) for i in range(100)]) == []
    assert AgentInflation().feed([LlmCall(at=T0 + i, run="r", app="a") for i in range(100)]) == []


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError):
        Params(factor=1.0)
    with pytest.raises(ConfigError):
        Params(warmup_runs=0)
