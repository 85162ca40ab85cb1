"""The breaker opens at a number of failures in a span, and only a person closes it."""

from __future__ import annotations

import pytest

from flyball.runbooks.breaker import Breaker


def failing(
    *at: float, runbook: str = "a", actions: tuple[str, ...] = ("redirect",), count: int = 3
) -> Breaker:
    breaker = Breaker()
    for moment in at:
        breaker.failed(runbook, actions, moment, count=count, per_s=3600.0)
    return breaker


def test_one_below_the_limit_leaves_it_closed() -> None:
    assert failing(0.0, 1.0).against("a", ["redirect"]) is None


def test_at_the_limit_it_opens_for_the_runbook_and_its_actions() -> None:
    breaker = failing(0.0, 1.0, 2.0)
    own, others = breaker.against("a", []), breaker.against("b", ["redirect"])
    assert own is not None
    assert others is not None
    assert (own.key, others.key, others.runbooks) == ("runbook:a", "action:redirect", ("a",))
    assert breaker.against("b", ["limit"]) is None


def test_failures_that_are_older_than_the_span_do_not_count() -> None:
    assert failing(0.0, 1.0, 3600.0).against("a", ["redirect"]) is None
    assert failing(0.0, 1.0, 3599.0).against("a", ["redirect"]) is not None


def test_several_runbooks_open_the_breaker_of_their_action_together() -> None:
    breaker = Breaker()
    for name in ("a", "b", "c"):
        breaker.failed(name, ["redirect"], 0.0, count=3, per_s=3600.0)
    assert breaker.against("a", []) is None
    found = breaker.against("a", ["redirect"])
    assert found is not None
    assert found.runbooks == ("a", "b", "c")


@pytest.mark.parametrize("scope", ["all", "runbook:a", "action:redirect"])
def test_a_person_closes_it(scope: str) -> None:
    breaker = failing(0.0, 1.0, 2.0)
    breaker.reset(scope)
    assert breaker.against("b", ["redirect"]) is None
    assert (breaker.against("a", []) is None) == (scope != "action:redirect")


def test_a_reset_of_another_runbook_changes_nothing() -> None:
    breaker = failing(0.0, 1.0, 2.0)
    breaker.reset("runbook:b")
    assert breaker.against("a", []) is not None


def test_after_a_reset_it_takes_the_whole_number_again() -> None:
    breaker = failing(0.0, 1.0, 2.0)
    breaker.reset("runbook:a")
    for at in (3.0, 4.0):
        breaker.failed("a", ["redirect"], at, count=3, per_s=3600.0)
    assert breaker.against("a", ["redirect"]) is None
    breaker.failed("a", ["redirect"], 5.0, count=3, per_s=3600.0)
    assert breaker.against("a", ["redirect"]) is not None
