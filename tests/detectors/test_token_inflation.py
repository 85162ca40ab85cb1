"""Tokens per call against each series' own normal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.anomaly import Anomaly
from flyball.core.columns import Window
from flyball.detectors._budget import PageBudget
from flyball.detectors.token_inflation import Params, TokenInflation
from tests.detectors._windows import START, Calls, Traffic, calls, rollup


def usual(
    n: int = 200, *, tokens: float = 1000, answer: float = 200, prompt: str = "cart@1", agent: str = ""
) -> Calls:
    return calls(
        n,
        app="shop",
        model="m",
        prompt=prompt,
        agent=agent,
        input_tokens=tokens,
        output_tokens=answer,
        spread=1.0,
    )


def on(found: list[Anomaly], signal: str = "llm.input_tokens", **labels: str) -> list[Anomaly]:
    return [a for a in found if a.phase == "on" and a.signal == signal and (not labels or a.labels == labels)]


def test_a_doubled_prompt_is_said_within_four_windows_with_its_reason() -> None:
    traffic, detector = Traffic(), TokenInflation()
    detector.feed(traffic.windows(60, usual()))
    found = detector.feed(traffic.windows(4, usual(tokens=2000)))
    (app,) = on(found, app="shop")
    assert app.at - app.since <= 40
    assert app.expected == pytest.approx(1000, rel=0.05)
    assert app.observed == pytest.approx(2000, rel=0.3)
    assert app.evidence["split_prompt"] == pytest.approx(1.0, abs=0.01)
    shares = [app.evidence[f"split_{k}"] for k in ("prompt", "output", "calls", "mix")]
    assert sum(s for s in shares if isinstance(s, float)) == pytest.approx(1)
    assert app.evidence["baseline_tokens_per_min"] == pytest.approx(1200 * 1200, rel=0.01)
    assert app.evidence["tokens_per_min"] == pytest.approx(1200 * 2200, rel=0.01)


def test_longer_answers_are_told_from_longer_prompts() -> None:
    traffic, detector = Traffic(), TokenInflation()
    detector.feed(traffic.windows(60, usual()))
    found = detector.feed(traffic.windows(3, usual(answer=800)))
    assert on(found, "llm.input_tokens") == []
    (app,) = on(found, "llm.output_tokens", app="shop")
    assert app.evidence["split_output"] == pytest.approx(1.0, abs=0.01)


def test_more_calls_alone_are_no_inflation() -> None:
    traffic, detector = Traffic(), TokenInflation()
    detector.feed(traffic.windows(60, usual()))
    assert detector.feed(traffic.windows(60, usual(n=4000))) == []


def test_a_new_prompt_version_is_judged_by_its_predecessor_at_once() -> None:
    traffic, detector = Traffic(), TokenInflation()
    other = usual(tokens=9000, prompt="search@4")
    detector.feed(traffic.windows(60, usual(), other))
    found = detector.feed(traffic.windows(4, usual(tokens=2000, prompt="cart@2"), other))
    (version,) = on(found, app="shop", prompt="cart@2")
    assert version.expected == pytest.approx(1000, rel=0.05)
    assert version.evidence["split_prompt"] == pytest.approx(1.0, abs=0.01)


def test_a_new_version_needs_half_the_evidence_of_an_old_one() -> None:
    def seconds(prompt: str) -> float:
        traffic, detector = Traffic(), TokenInflation()
        detector.feed(traffic.windows(60, usual(20)))
        (found,) = on(
            detector.feed(traffic.windows(30, usual(20, tokens=1800, prompt=prompt))),
            prompt=prompt,
            app="shop",
        )
        return found.at - found.since

    assert seconds("cart@2") <= 0.7 * seconds("cart@1")


def test_a_new_version_like_the_old_one_is_not_suspected_for_long() -> None:
    traffic, detector = Traffic(), TokenInflation()
    detector.feed(traffic.windows(60, usual(20)))
    for version in range(2, 8):
        assert detector.feed(traffic.windows(12, usual(20, tokens=1100, prompt=f"cart@{version}"))) == []


def test_a_new_prompt_without_predecessor_is_judged_by_its_app() -> None:
    traffic, detector = Traffic(), TokenInflation()
    detector.feed(traffic.windows(60, usual()))
    found = detector.feed(traffic.windows(3, usual(tokens=3000, prompt="basket@1")))
    assert on(found, app="shop", prompt="basket@1")


def test_a_new_prompt_of_an_app_whose_prompts_differ_much_is_given_room() -> None:
    traffic, detector = Traffic(), TokenInflation()
    various = [usual(tokens=t, prompt=f"p{t}@1") for t in (200, 1000, 5000, 20000)]
    detector.feed(traffic.windows(60, *various))
    found = detector.feed(traffic.windows(6, *various, usual(tokens=6000, prompt="fresh@1")))
    assert on(found, app="shop", prompt="fresh@1") == []


def test_one_giant_prompt_wakes_nobody() -> None:
    traffic, detector = Traffic(), TokenInflation()
    detector.feed(traffic.windows(60, usual()))
    giant = calls(
        1, app="shop", model="m", prompt="cart@1", tenant="t1", input_tokens=1_000_000, output_tokens=200
    )
    for _ in range(5):
        assert detector.feed([traffic.window(usual(n=20), giant), *traffic.windows(6, usual())]) == []


def test_growing_prompts_of_agent_runs_are_left_to_the_run_detectors() -> None:
    traffic, detector = Traffic(), TokenInflation()
    grown = 1000.0
    detector.feed(traffic.windows(60, usual(), usual(tokens=1000, agent="coder")))
    for _ in range(60):
        grown *= 1.043  # x12.7 over ten minutes
        assert detector.feed([traffic.window(usual(), usual(n=200, tokens=grown, agent="coder"))]) == []


def test_agents_are_judged_where_asked_for() -> None:
    traffic, detector = Traffic(), TokenInflation(Params(judge_agents=True))
    detector.feed(traffic.windows(60, usual(agent="coder")))
    assert on(detector.feed(traffic.windows(3, usual(tokens=3000, agent="coder"))), app="shop", agent="coder")


def test_nothing_is_said_before_warm_up() -> None:
    traffic, detector = Traffic(), TokenInflation()
    detector.feed(traffic.windows(20, usual()))
    assert detector.feed(traffic.windows(3, usual(tokens=8000))) == []


def test_an_episode_ends_when_the_tokens_are_back() -> None:
    traffic, detector = Traffic(), TokenInflation()
    detector.feed(traffic.windows(60, usual()))
    detector.feed(traffic.windows(10, usual(tokens=3000)))
    found = [a for a in detector.feed(traffic.windows(10, usual())) if a.labels == {"app": "shop"}]
    assert found[-1].phase == "off"
    assert detector.feed(traffic.windows(10, usual())) == []


parts = st.lists(
    st.tuples(st.integers(1, 40), st.sampled_from([100.0, 1000.0, 5000.0]), st.sampled_from(["cart@1", "cart@2", "x"]),
              st.sampled_from(["", "coder"])),
    max_size=3,
)  # fmt: skip


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(parts, min_size=5, max_size=30), st.integers(0, 30))
def test_a_restart_at_any_point_changes_nothing(
    plan: list[list[tuple[int, float, str, str]]], cut: int
) -> None:
    traffic = Traffic()
    windows = [traffic.window(*(usual(n, tokens=t, prompt=p, agent=a) for n, t, p, a in w)) for w in plan]
    quick = Params(warmup_windows=3, min_calls=5)
    whole = TokenInflation(quick, PageBudget(floor_series=1))
    expected = [whole.feed([w]) for w in windows]
    first, second = (TokenInflation(quick, PageBudget(floor_series=1)) for _ in range(2))
    found = [first.feed([w]) for w in windows[:cut]]
    second.restore(first.snapshot())
    found += [second.feed([w]) for w in windows[cut:]]
    assert found == expected
    assert second.snapshot() == whole.snapshot()


def test_quiet_heavy_tailed_traffic_stays_within_the_page_budget() -> None:
    """200 apps, 3,000 windows: ln-sd 1.1 per call, scatter between windows that is correlated, a daily cycle."""
    rng = np.random.default_rng(11)
    n_series, n_windows = 200, 3000
    labels = [(f"a{i}",) for i in range(n_series)]
    size, level = np.exp(rng.normal(3.0, 1.3, n_series)), rng.normal(7.0, 1.0, n_series)
    between, memory = rng.uniform(0.02, 0.2, n_series), rng.uniform(0.0, 0.7, n_series)
    detector, empty, found, wander = TokenInflation(), Traffic().window().cells, [], np.zeros(n_series)
    for i in range(n_windows):
        n = rng.negative_binomial(1.5, 1.5 / (1.5 + size))
        wander = memory * wander + between * np.sqrt(1 - memory**2) * rng.normal(size=n_series)
        mean = level + 0.25 * np.sin(2 * np.pi * i / 8640) + wander
        xbar = mean + rng.normal(size=n_series) * 1.1 / np.sqrt(np.maximum(n, 1))
        inside = 1.21 * rng.chisquare(np.maximum(n - 1, 1)) / np.maximum(n, 1)
        by_class = np.zeros((n_series, 16), np.int64)
        by_class[:, 0] = n
        sums = {
            "input_tokens": n * np.exp(xbar),
            "log_input_tokens": n * xbar,
            "log2_input_tokens": n * (xbar**2 + inside),
        }
        there = n > 0
        made = rollup(
            ["app"], labels, by_class[there], ids=np.flatnonzero(there), born=np.full(int(there.sum()), START),
            sums={k: v[there] for k, v in sums.items()}, counts={"input_tokens": n[there]},
        )  # fmt: skip
        at = START + 10 * i
        found += detector.feed([Window(at, at + 10, empty, {("app",): made}, {})])
    assert [a for a in found if a.phase == "on"] == []
