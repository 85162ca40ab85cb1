"""River models by name, under Flyball's protection."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("river")

from flyball.core.anomaly import Anomaly
from flyball.core.errors import ConfigError
from flyball.detectors._traffic import Cell, Windows, noise
from flyball.detectors.river import Params, RiverDetector

ROLLUPS = [("app",)]


def drive(
    d: RiverDetector, made: Windows, start: int, n: int, factor: float = 1.0, failed: int = 0
) -> list[Anomaly]:
    out: list[Anomaly] = []
    for i in range(start, start + n):
        means = {"input_tokens": 1000.0 * factor * math.exp(0.2 * noise(i))}
        failures = {"overloaded": failed} if failed else {}
        out += d.feed([made.next([Cell({"app": "shop", "tenant": "t"}, 50, failures, means)])])
    return out


@pytest.mark.parametrize(
    "model",
    [
        "anomaly.GaussianScorer",
        "anomaly.HalfSpaceTrees",
        "anomaly.StandardAbsoluteDeviation",
        "drift.ADWIN",
        "drift.PageHinkley",
    ],
)
def test_a_lasting_rise_is_told_and_quiet_before_it_is_not(model: str) -> None:
    d, made = RiverDetector(Params(model=model)), Windows(ROLLUPS)
    assert drive(d, made, 0, 700) == []
    said = drive(d, made, 700, 150, factor=3.0)
    assert said[0].phase == "on"
    assert said[0].signal == "llm.input_tokens"
    assert said[0].labels == {"app": "shop"}
    assert said[0].observed > 2 * said[0].expected


def test_one_extreme_window_wakes_nobody() -> None:
    d, made = RiverDetector(), Windows(ROLLUPS)
    drive(d, made, 0, 400)
    assert drive(d, made, 400, 1, factor=50.0) == []
    assert drive(d, made, 401, 50) == []


def test_what_is_anomalous_does_not_teach() -> None:
    d, made = RiverDetector(), Windows(ROLLUPS)
    drive(d, made, 0, 400)
    drive(d, made, 400, 100, factor=3.0)
    said = drive(d, made, 500, 30)
    assert [a.phase for a in said if a.phase == "off"] == ["off"]
    assert drive(d, made, 530, 40, factor=3.0)[0].phase == "on"


def test_a_fall_is_told_only_when_asked_for() -> None:
    for direction, expected in (("up", False), ("both", True), ("down", True)):
        d, made = RiverDetector(Params(direction=direction)), Windows(ROLLUPS)
        drive(d, made, 0, 400)
        assert bool(drive(d, made, 400, 60, factor=0.3)) is expected


def test_the_error_ratio_can_be_watched() -> None:
    d, made = RiverDetector(Params(column="error_ratio", model="drift.ADWIN")), Windows(ROLLUPS)
    assert drive(d, made, 0, 300, failed=1) == []
    said = drive(d, made, 300, 100, failed=40)
    assert said[0].signal == "llm.errors"
    assert said[0].unit == "ratio"


@pytest.mark.parametrize("model", ["anomaly.GaussianScorer", "anomaly.HalfSpaceTrees", "drift.ADWIN"])
def test_restoring_rebuilds_the_models_and_changes_nothing(model: str) -> None:
    params = Params(model=model, memory=64)
    whole, made = RiverDetector(params), Windows(ROLLUPS)
    for start in range(0, 500, 97):
        drive(whole, made, start, 97)
        copy = RiverDetector(params)
        copy.restore(whole.snapshot())
        a, b = Windows(ROLLUPS), Windows(ROLLUPS)
        other = RiverDetector(params)
        other.restore(whole.snapshot())
        assert drive(copy, a, 0, 40, factor=2.0) == drive(other, b, 0, 40, factor=2.0)
    copy = RiverDetector(params)
    copy.restore(whole.snapshot())
    windows = [
        made.next([Cell({"app": "shop"}, 50, {}, {"input_tokens": 1000.0 * (1 + i % 7)})]) for i in range(150)
    ]
    assert whole.feed(windows) == copy.feed(windows)
    assert whole.snapshot() == copy.snapshot()


def test_a_snapshot_of_another_model_is_refused() -> None:
    state = RiverDetector().snapshot()
    with pytest.raises(ConfigError, match="GaussianScorer"):
        RiverDetector(Params(model="drift.ADWIN")).restore(state)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"model": "drift.ADWINN"}, "did you mean 'ADWIN'"),
        ({"model": "nowhere.Model"}, "no module"),
        ({"model": "drift.ADWIN", "arguments": {"detla": 0.1}}, "did you mean 'delta'"),
        ({"model": "preprocessing.StandardScaler"}, "neither"),
        ({"column": "input_token"}, "did you mean 'input_tokens'"),
        ({"by": ("aap",)}, "did you mean 'app'"),
        ({"direction": "sideways"}, "direction"),
        ({"memory": 3}, "memory"),
    ],
)
def test_wrong_settings_are_refused_with_what_would_be_right(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        RiverDetector(Params(**wrong))


def test_series_over_the_limit_are_forgotten() -> None:
    d, made = RiverDetector(Params(max_series=3)), Windows(ROLLUPS)
    for i in range(20):
        d.feed([made.next([Cell({"app": f"app{i}"}, 50)])])
    assert len(d.snapshot()) < 2_000
