"""Rehearsals in the lab and back-tests on recorded events, through the command line and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flyball.app.cli import app
from flyball.app.cli.rehearse import backtest_lines
from flyball.app.rehearse import SWITCHES, Backtest, Rehearsed, quiet_pipeline, rehearse
from flyball.core.errors import ConfigError
from flyball.lab.estate import default_estate
from flyball.lab.export import write_ndjson
from flyball.lab.faults import ProviderOutage
from flyball.lab.sim import START_AT, Simulator
from flyball.lab.warm import Warm
from flyball.remediation import actions
from flyball.runbooks.loader import library
from flyball.runbooks.rehearsal import FAULTS
from flyball.runbooks.schema import Rehearsal

SHIPPED = library(actions=actions.registry()).by_name


@pytest.fixture(scope="module")
def warm() -> Warm:
    return Warm(quiet_pipeline)


def tried(warm: Warm, runbook: str, lab: str, *expect: str) -> Rehearsed:
    return rehearse(SHIPPED[runbook], Rehearsal(lab=lab, expect=list(expect)), warm)


def test_every_fault_that_a_rehearsal_may_name_can_be_switched_on() -> None:
    assert set(SWITCHES) == set(FAULTS)


def test_a_runbook_is_rehearsed_and_what_came_is_told(warm: Warm) -> None:
    found = tried(warm, "provider-failover", 'outage(provider="b", fails=0.6)', "run", "verified", "released")
    assert found.passed, found.came
    assert found.as_dict()["passed"] is True
    assert [h.word for h in found.matched.used] == ["run", "verified", "released"]


def test_the_same_rehearsal_comes_out_the_same(warm: Warm) -> None:
    twice = [
        tried(warm, "runaway-agent", 'loop(agent="researcher", lasts="60s")', "run", "in_force")
        for _ in range(2)
    ]
    assert twice[0] == twice[1]
    assert twice[0].came


def test_a_rehearsal_that_fails_says_what_is_missing(warm: Warm) -> None:
    found = tried(warm, "provider-failover", 'outage(provider="b", lasts="30s")', "refuse(no_candidate)")
    assert not found.passed
    assert (found.matched.missing, found.matched.unwanted.partition("(")[0]) == (
        "refuse(no_candidate)",
        "run",
    )


def test_in_mode_approve_a_person_decides(warm: Warm) -> None:
    asked = 'loop(agent="researcher", mode="approve", person="approves", lasts="2m")'
    assert tried(warm, "runaway-agent", asked, "suggest", "run", "verified").passed
    denied = 'loop(agent="researcher", mode="approve", person="denies", lasts="60s")'
    found = tried(warm, "runaway-agent", denied, "suggest", "refuse(denied)")
    assert found.passed, found.came


def test_a_rehearsal_that_names_what_the_lab_has_not_is_refused(warm: Warm) -> None:
    with pytest.raises(ConfigError, match=r"no provider 'z' in the estate"):
        tried(warm, "provider-failover", 'outage(provider="z")', "nothing")


@pytest.mark.soak
@pytest.mark.parametrize("name", SHIPPED)
def test_every_rehearsal_of_the_library_passes(warm: Warm, name: str) -> None:
    for test in SHIPPED[name].model.tests:
        found = rehearse(SHIPPED[name], test, warm)
        assert found.passed, (found.name, found.matched, found.came)


def test_the_command_exits_with_1_when_a_test_fails(tmp_path: Path) -> None:
    text = SHIPPED["runaway-agent"].text
    head, _, _ = text.partition("tests:")
    path = tmp_path / "agent.yaml"
    path.write_text(
        head
        + 'tests:\n  - {name: wrong, lab: quiet(lasts="20s"), expect: [run]}\n'
        "  - {name: right, lab: 'quiet(lasts=\"20s\")', expect: [nothing]}\n".replace("\\'", "'"),
        "utf-8",
    )
    result = CliRunner().invoke(app, ["runbook", "test", str(path), "--only", "right", "--json"])
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [(t["name"], t["passed"]) for t in told] == [("right", True)]
    result = CliRunner().invoke(app, ["runbook", "test", str(path), "--only", "wrong"])
    assert result.exit_code == 1
    assert "missing   run" in result.stdout


def test_a_backtest_says_how_often_how_wide_and_how_fast(tmp_path: Path) -> None:
    sim = Simulator(default_estate(15.0), 3)
    sim.add_fault(ProviderOutage("b", 0.7, START_AT + 700, START_AT + 850))
    path = tmp_path / "outage.ndjson"
    write_ndjson(sim, path, 1000.0)
    result = CliRunner().invoke(app, ["runbook", "backtest", "provider-failover", str(path), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["ran"] == 1
    assert 0.1 < told["widest_traffic"] <= 0.75
    assert told["most_tenants"] > 10
    assert 0 < told["mean_to_act_s"] < 120
    again = CliRunner().invoke(app, ["runbook", "backtest", "provider-failover", str(path), "--json"])
    assert again.stdout == result.stdout


def test_a_backtest_reads_as_one_line() -> None:
    found = Backtest("x", first=0.0, last=14 * 86400.0)
    found.events["llm_call"] = 61_200_000
    found.held["cooldown"] = 1
    assert backtest_lines(found)[0] == (
        "14 d, 61.2 M calls: would have run 0 times, held 1 (cooldown), refused 0"
    )


def test_what_is_neither_file_nor_shipped_runbook_is_refused_in_one_line() -> None:
    result = CliRunner().invoke(app, ["runbook", "test", "provider-failovr"])
    assert "did you mean 'provider-failover'" in str(result.exception)
