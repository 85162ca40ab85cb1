"""The runbooks that are shipped: complete, careful, and each rehearsed; and how a rehearsal is read and matched."""

from __future__ import annotations

import pytest

from flyball.core.directives import Decision, Directive, DirectiveChange, Outcome, Verdict
from flyball.core.errors import ConfigError
from flyball.remediation import actions
from flyball.runbooks.lint import lint_texts
from flyball.runbooks.loader import Runbook, library
from flyball.runbooks.rehearsal import (
    FAULTS,
    OPTIONS,
    Happening,
    happening_of,
    match,
    parse_scenario,
    settles_early,
)

WANTED = (
    "budget-throttle", "gpu-fault", "provider-failover", "quota-exhausted", "rate-limit-shed", "retry-storm",
    "runaway-agent", "slow-provider", "token-inflation",
)  # fmt: skip
SHIPPED = {r.name: r for r in library(actions=actions.registry())}


def test_the_library_has_every_runbook_that_the_guides_name() -> None:
    assert tuple(SHIPPED) == WANTED


@pytest.mark.parametrize("runbook", SHIPPED.values(), ids=lambda r: r.name)
def test_a_shipped_runbook_only_suggests_and_lint_finds_nothing(runbook: Runbook) -> None:
    assert runbook.mode == "suggest"
    assert lint_texts({runbook.path: runbook.text.encode()}, actions=actions.registry()) == []


@pytest.mark.parametrize("runbook", SHIPPED.values(), ids=lambda r: r.name)
def test_a_shipped_runbook_has_a_test_that_acts_a_refusal_and_a_failed_verification(runbook: Runbook) -> None:
    words = [[w.partition("(")[0] for w in t.expect] for t in runbook.model.tests]
    assert any("verified" in w for w in words)
    assert any({"refuse", "hold"} & set(w) for w in words)
    assert any({"unverified", "failed", "ambiguous"} & set(w) for w in words)


@pytest.mark.parametrize("runbook", SHIPPED.values(), ids=lambda r: r.name)
def test_every_rehearsal_of_a_shipped_runbook_can_be_read(runbook: Runbook) -> None:
    for test in runbook.model.tests:
        assert parse_scenario(test.lab).fault in FAULTS


def test_a_scenario_is_read_with_its_arguments_and_options() -> None:
    read = parse_scenario('outage(provider="c", fails=0.4, gateway="deaf", lasts="90s", seed=7)')
    assert (read.fault, read.text("provider"), read.number("fails")) == ("outage", "c", 0.4)
    assert (read.gateway, read.lasts_s, read.seed, read.mode) == ("deaf", 90.0, 7, "auto")
    assert parse_scenario("outage(all_providers)").given["all_providers"] is True
    assert parse_scenario("quiet").fault == "quiet"


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("outtage()", "RB121", "did you mean 'outage'"),
        ("outage(", "RB121", "cannot be read"),
        ("1 + 1", "RB121", "is no fault of the lab"),
        ("os.system('x')", "RB121", "is no fault of the lab"),
        ('outage(provder="b")', "RB122", "did you mean 'provider'"),
        ("outage(provider=b)", "RB122", "quote names"),
        ('outage("b")', "RB122", "flag such as all_providers"),
        ("outage(fails=60)", "RB122", "does not lie between 0 and 1"),
        ('outage(fails="0.6")', "RB122", "is no number"),
        ("outage(provider=3)", "RB122", "is no text"),
        ('outage(gateway="mute")', "RB122", "none of well, deaf"),
        ('outage(lasts="5")', "RB122", "is not a duration"),
        ('outage(stopped="everything")', "RB122", "nothing that can be stopped"),
        ("outage(**{})", "RB122", "is not read here"),
        ("outage(fails=[1])", "RB122", "no plain text or number"),
        ("outage(fails=f())", "RB122", "quote names"),
        ('loop(pattern="spiral")', "RB122", "none of repeat, cycle"),
    ],
)  # fmt: skip
def test_a_scenario_that_makes_no_sense_is_refused_with_its_code(text: str, code: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        parse_scenario(text, "x.yaml")
    assert (refused.value.code, refused.value.where) == (code, "x.yaml")


def test_no_option_is_hidden_by_an_argument_of_a_fault() -> None:
    assert not [name for described in FAULTS.values() for name in described if name in OPTIONS]


def came(*words: str) -> list[Happening]:
    return [Happening(float(i), *w.rstrip(")").partition("(")[::2]) for i, w in enumerate(words)]


def test_expected_words_are_found_in_their_order_among_others() -> None:
    seen = came("hold(hold)", "run", "granted", "in_force", "verified", "released(recovered)")
    assert match(["run", "verified", "released"], seen).complete
    assert match(["verified", "run"], seen).missing == "run"


def test_a_reason_in_brackets_must_be_the_reason() -> None:
    assert match(["refuse(no_candidate)"], came("refuse(no_candidate)")).complete
    assert match(["refuse(blast_radius)"], came("refuse(no_candidate)")).missing == "refuse(blast_radius)"


def test_a_test_of_restraint_fails_when_something_was_done_all_the_same() -> None:
    assert match(["refuse(cooldown)"], came("refuse(cooldown)", "run", "granted")).unwanted == "run"
    assert match(["nothing"], came("suggest")).unwanted == "suggest"
    assert match(["nothing"], came("hold(cooldown)")).complete


def test_a_failure_after_what_was_expected_is_not_passed_over() -> None:
    assert match(["run", "verified"], came("run", "verified", "failed(target_harmed)")).unwanted
    assert match(["run", "verified"], came("run", "unverified", "verified")).complete  # a rung of a ladder


def test_what_expects_an_effect_is_over_when_it_came_and_restraint_is_watched_to_the_end() -> None:
    assert settles_early(["run", "verified"])
    assert not settles_early(["nothing"])
    assert not settles_early(["refuse(no_candidate)"])


def test_decisions_leases_and_outcomes_have_their_words() -> None:
    lease = Directive(
        id="D", kind="block", scope={"run": "r"}, params={}, granted_at=0.0, expires_at=1.0, incident="I", runbook="r",
        step="s",
    )  # fmt: skip
    decision = Decision(at=0.0, incident="I", runbook="r", decision=Verdict.REFUSE, reason="no_candidate")
    granted = DirectiveChange(directive=lease, at=0.0, change="granted", reason="stage")
    gone = DirectiveChange(directive=lease, at=0.0, change="released", reason="recovered")
    told = Outcome(
        at=0.0, incident="I", runbook="r", step="s", action="block", result="applied", reason="in_force"
    )
    words = [happening_of(x, 0.0) for x in (decision, granted, gone, told)]
    assert [w and w.word for w in words] == ["refuse", "granted", None, "in_force"]
