"""Traffic must be as unpleasant as the real thing: bursty, heavy-tailed, daily, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from flyball.lab.estate import default_estate
from flyball.lab.sim import START_AT
from flyball.lab.traffic import BLOCK_S, Traffic

FIRST = int(START_AT // BLOCK_S)


@pytest.fixture(scope="module")
def four_hours() -> np.ndarray:
    traffic = Traffic(default_estate(), seed=5, rate=5.0)
    return np.concatenate([traffic.block(FIRST + i) for i in range(240)])


def dispersion(starts: np.ndarray, span_s: float) -> float:
    counts = np.bincount(((starts - FIRST * BLOCK_S) // span_s).astype(int))[:-1]
    return float(counts.var() / counts.mean())


def test_arrivals_are_far_from_poisson(four_hours: np.ndarray) -> None:
    """The public recordings show 3 to 164 at 60 s; a Poisson process has 1 at any span."""
    assert 12 < dispersion(four_hours["start"], 60.0) < 200
    assert dispersion(four_hours["start"], 60.0) > dispersion(four_hours["start"], 10.0) > 2


def test_prompts_have_heavy_tails(four_hours: np.ndarray) -> None:
    estate = default_estate()
    for app, lowest_ratio in (("assistant", 5), ("autocomplete", 8), ("summarize", 8)):
        tokens = four_hours["input"][four_hours["app"] == estate.app_index[app]]
        p50, p99 = np.quantile(tokens, [0.5, 0.99])
        assert p99 / p50 > lowest_ratio, app


def test_few_tenants_make_most_calls(four_hours: np.ndarray) -> None:
    counts = np.sort(np.bincount(four_hours["tenant"]))[::-1]
    assert counts[:10].sum() > 0.3 * counts.sum()
    assert (counts > 0).sum() > 200


def test_the_rate_is_what_was_asked_for_on_average_over_days() -> None:
    traffic = Traffic(default_estate(), seed=2, rate=2.0)
    blocks = [len(traffic.block(FIRST + i)) for i in range(0, 3 * 1440, 7)]
    assert np.mean(blocks) / BLOCK_S == pytest.approx(2.0, rel=0.12)


def test_days_have_a_shape() -> None:
    traffic = Traffic(default_estate(), seed=2, rate=2.0)
    night, afternoon = traffic.daily(4 * 3600.0), traffic.daily(16 * 3600.0)
    assert night < 0.7 < 1.3 < afternoon


def test_a_block_depends_on_seed_and_number_alone() -> None:
    one, two = (Traffic(default_estate(), seed=9, rate=5.0) for _ in range(2))
    one.block(FIRST)
    assert one.block(FIRST + 7).tobytes() == two.block(FIRST + 7).tobytes()
    assert (
        one.block(FIRST + 7).tobytes()
        != Traffic(default_estate(), seed=10, rate=5.0).block(FIRST + 7).tobytes()
    )


def test_every_call_has_a_number_of_its_own(four_hours: np.ndarray) -> None:
    assert len(np.unique(four_hours["uid"])) == len(four_hours)


def test_calls_go_only_where_their_model_is_served(four_hours: np.ndarray) -> None:
    estate = default_estate()
    for provider, model in {
        (int(p), int(m)) for p, m in zip(four_hours["provider"], four_hours["model"], strict=True)
    }:
        assert estate.models[model].name in estate.providers[provider].models
