"""Runbooks act in the lab: nothing flaps, nobody innocent is touched, what only looks like a loop goes on."""

from __future__ import annotations

import pytest

from flyball.app.rehearse import acting_pipeline, quiet_pipeline
from flyball.lab.acting import Tally
from flyball.lab.scenario import Lab
from flyball.lab.warm import Warm


@pytest.fixture(scope="module")
def warm() -> Warm:
    return Warm(quiet_pipeline)


def acting(warm: Warm, tally: Tally | None = None, warmup_s: float = 720.0) -> Lab:
    return warm.lab(acting_pipeline(), 1, 12.0, warmup_s, hear=tally.hear if tally else None)


def grants(lab: Lab) -> int:
    return sum(c.change == "granted" for c in lab.directive_changes())


def test_a_square_wave_of_twenty_seconds_does_not_flap(warm: Warm) -> None:
    lab = acting(warm)
    lab.at(0).provider("b").fails(0.6, on="20s", off="20s", lasts="10m")
    lab.run("13m")
    assert grants(lab) <= 2, lab.report()
    assert len(lab.pages()) == 1, lab.report()


def test_with_all_providers_down_nothing_is_done_and_flyball_suspects_its_own_way_out(warm: Warm) -> None:
    lab = acting(warm)
    lab.at(0).all_providers().fail(lasts="4m")
    lab.run("6m")
    assert grants(lab) == 0, lab.report()
    assert [str(i.root) for i in lab.pages()] == ["stream:egress"]


@pytest.mark.parametrize(
    ("agent", "pattern"), [("researcher", "pages"), ("researcher", "polls"), ("coder", "retests")]
)
def test_a_run_that_only_looks_like_a_loop_is_not_touched(warm: Warm, agent: str, pattern: str) -> None:
    lab = acting(warm)
    lab.at(0).agent(agent).goes_on_rightly(pattern)
    lab.run("10m")
    assert grants(lab) == 0, lab.report()


@pytest.mark.parametrize("pattern", ["repeat", "cycle"])
def test_a_loop_is_blocked_within_one_step_of_the_evidence_and_let_go(warm: Warm, pattern: str) -> None:
    lab = acting(warm)
    lab.at(0).agent("researcher").loops(pattern, lasts="5m")
    lab.run("6m")
    opened = [at for at, c in lab.seen.changes if not c.old and c.incident.signal == "agent.loop"]
    blocked = [at for at, c in lab.seen.directives if c.change == "granted" and c.directive.kind == "block"]
    assert len(blocked) == len(opened) == 1, lab.report()
    # A step takes some three seconds, and the SDK holds its reports for five.
    assert blocked[0] - opened[0] <= 3.0
    assert lab.directives() == ()


def test_a_burn_is_degraded_and_released_and_nobody_else_s_calls_are_touched(warm: Warm) -> None:
    zero = acting(warm, warmup_s=2160.0).zero
    with_it, without = Tally(zero), Tally(zero)
    lab = acting(warm, with_it, warmup_s=2160.0)
    lab.at(0).tenant("t3").burns(10.0, lasts="7m")
    lab.run("12m")
    quiet = warm.lab(quiet_pipeline(), 1, 12.0, 2160.0, hear=without.hear).run("12m")
    assert {c.directive.scope["tenant"] for c in lab.directive_changes()} == {"t3"}, lab.report()
    assert "verified" in [o.result for o in lab.outcomes("budget-throttle")], lab.report()
    assert lab.directives() == ()
    assert quiet.directives() == ()
    others = {n: f for n, f in without.fates.items() if f.tenant != "t3"}
    assert len(others) > 5000
    assert {n: f for n, f in with_it.fates.items() if f.tenant != "t3"} == others


@pytest.mark.parametrize("manner", ["deaf", "hollow"])
def test_a_gateway_that_does_nothing_is_found_out_and_everything_is_taken_back(
    warm: Warm, manner: str
) -> None:
    lab = acting(warm).gateway(manner)
    lab.at(0).provider("b").fails(0.6, lasts="7m")
    lab.run("8m")
    assert lab.outcomes("provider-failover")[-1].result == "undone", lab.report()
    assert lab.directives() == ()
    assert len(lab.pages()) == 1
