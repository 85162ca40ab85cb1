"""The page budget, episodes and the shared cool-down."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.core.anomaly import Anomaly, Phase, anomaly_id
from flyball.core.codec import SnapshotError
from flyball.core.errors import ConfigError
from flyball.detectors import CoolDown, PageBudget, default_detectors, registry
from flyball.detectors._episodes import Episodes, KeyedEpisodes


def test_the_threshold_shares_the_weeks_pages_over_series_and_windows() -> None:
    budget = PageBudget(false_pages_per_week=2.0)
    assert budget.threshold(n_series=100, window_s=10.0) == pytest.approx(math.log(100 * 60_480 / 2))


def test_series_of_all_detectors_count_and_are_never_forgotten() -> None:
    budget = PageBudget(floor_series=1)
    budget.register("a", 60)
    budget.register("b", 50)
    budget.register("b", 10)
    assert budget.n_series == 110
    assert budget.nats(10.0) == budget.threshold(1_000, 10.0)


def test_small_estates_all_have_the_same_threshold() -> None:
    small, smaller = PageBudget(), PageBudget()
    small.register("a", 9_000)
    smaller.register("a", 3)
    assert small.nats(10.0) == smaller.nats(10.0)


@pytest.mark.parametrize("pages", [0.0, -1.0, float("nan")])
def test_a_budget_without_pages_is_refused(pages: float) -> None:
    with pytest.raises(ConfigError, match="false_pages_per_week"):
        PageBudget(pages)


def test_an_e_cusum_under_its_null_keeps_the_promised_run_length() -> None:
    """Mean run length to a false alarm at A = 50 windows is at least 50: 2,000 streams of Bernoulli calls."""
    rng = np.random.default_rng(3)
    m, age, ages = np.ones(2_000), np.zeros(2_000), []
    for _ in range(2_000):
        x = rng.random(2_000) < 0.1
        m = np.maximum(m, 1) * np.where(x, 0.3 / 0.1, 0.7 / 0.9)
        age += 1
        done = m >= 50
        ages += age[done].tolist()
        m[done], age[done] = 1.0, 0
    assert np.mean(ages) >= 50


def test_episodes_open_go_on_and_end_with_hysteresis() -> None:
    episodes, slot, yes, no = Episodes(off_after=2), np.array([4]), np.array([True]), np.array([False])

    def step(alarm: bool, away: bool) -> str:
        found = episodes.step(
            slot, yes if alarm else no, yes if away else no, no if away else yes, np.array([7.0])
        )
        said = "on" if len(found.on) else "still" if len(found.still) else "off" if len(found.off) else ""
        if said == "off":
            episodes.close(slot[found.off])
        return said

    plan = [
        (False, True),
        (True, True),
        (False, True),
        (False, False),
        (False, True),
        (False, False),
        (False, False),
        (False, False),
    ]
    assert [step(*p) for p in plan] == ["", "on", "still", "", "still", "", "off", ""]


def test_recovery_needs_enough_events() -> None:
    episodes, slot, yes, no = (
        Episodes(off_after=1, off_events=10),
        np.array([0]),
        np.array([True]),
        np.array([False]),
    )
    episodes.step(slot, yes, yes, no, np.array([0.0]))
    assert len(episodes.step(slot, no, no, yes, np.array([0.0]), np.array([9.0])).off) == 0
    assert len(episodes.step(slot, no, no, yes, np.array([0.0]), np.array([1.0])).off) == 1


def test_keyed_episodes_say_nothing_without_data_and_survive_packing() -> None:
    episodes: KeyedEpisodes[tuple[str, int]] = KeyedEpisodes(off_after=2)
    assert episodes.step(("gpu", 0), at=10, away=True, since=5.0) == "on"
    assert episodes.step(("gpu", 0), at=20, away=None) is None
    assert episodes.step(("gpu", 0), at=30, away=False) is None
    other: KeyedEpisodes[tuple[str, int]] = KeyedEpisodes(off_after=2)
    other.load([[list(key), since, quiet] for key, since, quiet in episodes.pack()])
    assert other.step(("gpu", 0), at=40, away=False) == "off"
    assert other.since(("gpu", 0)) == 5.0
    assert not other.is_open(("gpu", 0))


def statement(at: float, phase: Phase, since: float, provider: str = "b") -> Anomaly:
    labels = {"provider": provider}
    return Anomaly(
        id=anomaly_id("x", "llm.errors", "overloaded", labels, since), detector="x", signal="llm.errors", labels=labels,
        at=at, since=since, phase=phase, klass="overloaded",
    )  # fmt: skip


def test_what_comes_back_within_the_cooldown_is_the_same_episode() -> None:
    cooldown = CoolDown(cooldown_s=300)
    first = cooldown.feed([statement(10, "on", 0), statement(40, "off", 0)])
    again = cooldown.feed(
        [statement(200, "on", 190), statement(210, "still", 190), statement(240, "off", 190)]
    )
    assert {a.id for a in again} == {first[0].id}
    assert [a.phase for a in again] == ["on", "still", "off"]
    assert {a.since for a in again} == {0}
    assert [a.evidence["reopened"] for a in again] == [1, 1, 1]
    third = cooldown.feed([statement(300, "on", 290)])
    assert (third[0].id, third[0].evidence["reopened"]) == (first[0].id, 2)


def test_what_comes_back_later_or_elsewhere_is_a_new_episode() -> None:
    cooldown = CoolDown(cooldown_s=300)
    cooldown.feed([statement(10, "on", 0), statement(40, "off", 0)])
    elsewhere = statement(50, "on", 45, provider="c")
    later = statement(341, "on", 335)
    assert cooldown.feed([elsewhere, later]) == [elsewhere, later]


@given(
    st.lists(
        st.tuples(st.sampled_from(["on", "still", "off"]), st.integers(0, 3), st.integers(0, 400)),
        max_size=20,
    ),
    st.integers(0, 20),
)
def test_a_restart_of_the_cooldown_changes_nothing(plan: list[tuple[Phase, int, int]], cut: int) -> None:
    at, batch = 0.0, []
    for phase, since, gap in plan:
        at += gap
        batch.append(statement(at, phase, float(since)))
    whole, first, second = CoolDown(300), CoolDown(300), CoolDown(300)
    expected = whole.feed(batch)
    found = first.feed(batch[:cut])
    second.restore(first.snapshot())
    assert found + second.feed(batch[cut:]) == expected
    whole.tick(at)
    second.tick(at)
    assert second.snapshot() == whole.snapshot()


def test_a_snapshot_of_something_else_is_refused() -> None:
    with pytest.raises(SnapshotError):
        CoolDown().restore(b"nonsense")


def test_every_detector_in_the_folder_is_on_by_default_but_river() -> None:
    budget = PageBudget()
    found = default_detectors(budget)
    assert [d.kind for d in found] == [kind for kind in registry().kinds() if kind != "river"]
    assert {"error_ratio", "token_inflation", "latency", "retry_storm", "spend"} <= {d.kind for d in found}
