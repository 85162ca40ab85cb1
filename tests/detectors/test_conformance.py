"""Every detector in the folder keeps the rules, by being there."""

from __future__ import annotations

import math
import pkgutil

import pytest

import flyball.detectors
from flyball.core.anomaly import Anomaly, Phase
from flyball.detectors import registry
from flyball.detectors.conformance import Check, Nonconformity, check_detector

KINDS = sorted(
    m.name
    for m in pkgutil.iter_modules(flyball.detectors.__path__)
    if not m.name.startswith("_") and m.name != "conformance"
)
CASES = [(kind, check) for kind in KINDS for check in check_detector(registry().get(kind))]


@pytest.mark.parametrize(("kind", "check"), CASES, ids=[f"{kind}-{check}" for kind, check in CASES])
def test_every_detector_keeps_the_rules(kind: str, check: Check) -> None:
    check()


class Talker:
    """A detector that breaks most rules: says something about everything, with `off` first and no evidence."""

    kind = "talker"
    reads = "windows"

    def __init__(self) -> None:
        self.said = 0

    def feed(self, batch: object) -> list[Anomaly]:
        self.said += 1
        phase: Phase = "off" if self.said % 2 else "on"
        return [
            Anomaly(
                id="x",
                detector="talker",
                signal="s",
                labels={},
                at=1.0,
                since=2.0,
                phase=phase,
                score=math.nan,
            )
        ]

    def tick(self, now: float) -> list[Anomaly]:
        return []

    def snapshot(self) -> bytes:
        return b"nothing"

    def restore(self, state: bytes) -> None:
        return None


@pytest.mark.parametrize(
    "name",
    [
        "silent_on_empty_input",
        "foreign_snapshots_are_refused",
        "phases_follow_each_other",
        "evidence_is_given",
        "quiet_on_quiet_data",
        "quiet_on_constant_data",
    ],
)
def test_a_detector_that_breaks_a_rule_is_told_which(name: str) -> None:
    checks = {str(check): check for check in check_detector(Talker)}
    with pytest.raises(Nonconformity):
        checks[name]()


def test_checks_have_names_and_say_their_rule() -> None:
    checks = list(check_detector(Talker))
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.rule for check in checks)
