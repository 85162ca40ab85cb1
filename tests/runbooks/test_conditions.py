"""Conditions: typed values in, true or false out; what is unknown is never true."""

from __future__ import annotations

import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core import anomaly
from flyball.core.incident import Severity
from flyball.runbooks.conditions import (
    SIGNALS,
    ConditionError,
    compile_condition,
    compile_expectation,
    variables_of,
)
from tests.remediation._estate import T0, World, incident


def ask(source: str, **params: str | int | float | bool) -> bool:
    world = World({"a": 100, "b": 100})
    world.fails["b"] = 0.5
    world.advance(windows=3)
    return compile_condition(source, params).ask(variables_of(incident(), T0 + 60.0), world.estate).true


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('incident.root.kind == "provider" && incident.root.name == "b"', True),
        ("incident.severity >= HIGH", True),
        ("incident.severity >= CRITICAL", False),
        ("incident.age_s > 59.0 && incident.age_s < 61.0", True),
        ('incident.scope["provider"] == "b"', True),
        ('incident.scope["nothing"] == "b"', False),
        ('!(incident.scope["nothing"] == "b")', False),
        ('"x" in incident.impact.models', False),
        ('errors({"provider": incident.root.name}, duration("30s")) > 0.4', True),
        ('errors({"provider": "nobody"}, duration("30s")) < 0.4', False),
        ('!(errors({"provider": "nobody"}, duration("30s")) > 0.4)', False),
        ('calls({"provider": "a"}, duration("30s")) == 300', True),
        ('usd_per_hour({"provider": "a"}, duration("30s")) > 1.0', True),
        ('incident.root.name.matches("((")', False),
    ],
)
def test_a_condition_says_what_it_means(source: str, expected: bool) -> None:
    assert ask(source) is expected


def test_params_are_typed_values_and_never_source() -> None:
    assert ask("params.who == incident.root.name", who="b")
    assert not ask("params.who == incident.root.name", who='b" || true || "')


def test_a_name_of_an_event_is_never_evaluated() -> None:
    evil = incident('b" || true || "')
    condition = compile_condition('incident.root.name == "b"')
    assert not condition.ask(variables_of(evil, T0)).true


def test_a_condition_without_live_traffic_to_ask_is_not_true_and_says_so() -> None:
    answer = compile_condition('calls({}, duration("1m")) >= 0').ask(variables_of(incident(), T0))
    assert not answer.true
    assert "no live traffic" in answer.error


def test_the_known_signals_are_those_that_anomalies_document() -> None:
    source = typing.cast(str, anomaly.__spec__.loader.get_source(anomaly.__name__))  # type: ignore[union-attr]
    documented = source.split("What departed: ")[1].split('"""')[0]
    assert [s for s in SIGNALS if f"`{s}`" not in documented] == []
    assert documented.count("`") == 2 * len(SIGNALS)


def test_every_severity_has_its_word() -> None:
    assert all(ask(f"incident.severity >= {s.name} || true") for s in Severity)


@pytest.mark.parametrize(
    "source", ["(" * 4000, "!" * 1999 + "true", "1+" * 900 + "1 == 1", "\x00", "\ud800", "é == 1"]
)
def test_what_no_parser_likes_is_a_condition_error(source: str) -> None:
    try:
        compile_condition(source)
    except ConditionError as e:
        assert e.code in ("RB103", "RB104")  # noqa: PT017 - some of them are right in some versions of CEL


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_text_crashes_the_compiler(source: str) -> None:
    try:
        compile_condition(source)
    except ConditionError as e:
        assert 0 <= e.offset <= len(source)  # noqa: PT017


def test_an_expectation_is_a_list_of_comparisons() -> None:
    terms = compile_expectation('errors("to") < 2% && calls("from") >= 5')
    assert [str(t) for t in terms] == ['errors("to") < 0.02', 'calls("from") >= 5']
