"""Conditions: typed values in, true or false out; what is unknown is never true."""

from __future__ import annotations

import typing
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core import anomaly
from flyball.core.incident import Severity
from flyball.core.plans import Measure, Term
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
    params = {"at_least": 3} | params
    return compile_condition(source, params).ask(variables_of(incident(), T0 + 60.0), world.estate).true


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('incident.root.kind == "provider" && incident.root.name == "b"', True),
        ("incident.severity >= HIGH", True),
        ("incident.severity >= CRITICAL", False),
        ("incident.age_s > 59.0 && incident.age_s < 61.0", True),
        ('incident.scope["provider"] == "b"', True),
        ('incident.scope["tenant"] == "b"', False),
        ('!(incident.scope["tenant"] == "b")', False),
        (
            '"provider" in incident.scope && has(incident.scope.provider) && !("tenant" in incident.scope)',
            True,
        ),
        ('"x" in incident.impact.models', False),
        ('errors({"provider": incident.root.name}, duration("30s")) > 0.4', True),
        ('errors({"provider": "nobody"}, duration("30s")) < 0.4', False),
        ('!(errors({"provider": "nobody"}, duration("30s")) > 0.4)', False),
        ('calls({"provider": "a"}, duration("30s")) == 300', True),
        ('usd_per_hour({"provider": "a"}, duration("30s")) > 1.0', True),
        ('attempts({"provider": "a"}, duration("30s")) == 300', True),
        ('incident.root.name.matches(incident.root.name + "((")', False),
        ('incident.signal in ["llm.errors", "llm.cost"] && incident.klass != "auth"', True),
        ("incident.severity >= params.at_least", True),
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


NEVER = [
    # condition, offset of the error, code, part of the text
    ('incident.signal == "llm.eror"', 20, "RB107", "'llm.errors'"),
    ('"llm.eror" == incident.signal', 1, "RB107", "'llm.errors'"),
    ('incident.signal in ["llm.cost", "llm.costs"]', 33, "RB107", "'llm.cost'"),
    ('incident.root.kind != "tennant"', 23, "RB107", "'tenant'"),
    ('incident.state == "closed"', 19, "RB107", "known: "),
    ('incident.signal == "llm.errors" && incident.klass == "overlaoded"', 54, "RB107", "'overloaded'"),
    ('incident.signal == "llm.errors" && (incident.klass == "x" || incident.age_s > 1.0)', 55, "RB107", "error class"),
    ('incident.scope["tenat"] == "x"', 16, "RB107", "'tenant'"),
    ('incident.scope.tenat == "x"', 15, "RB107", "'tenant'"),
    ('has(incident.scope.tenat)', 19, "RB107", "'tenant'"),
    ('"tenat" in incident.scope', 1, "RB107", "'tenant'"),
    ('errors({"providr": "a"}, duration("1m")) > 0.1', 9, "RB107", "'provider'"),
    ('usd_per_hour({"key": incident.root.name}, duration("1m")) > 1.0', 15, "RB107", "unknown label 'key'"),
    ('errors({"provider": "a"}, duration("2min")) > 0.1', 36, "RB119", "write for example 30s or 2m"),
    ('calls({}, duration("1d")) > 1', 20, "RB119", "CEL knows no days"),
    ('calls({}, duration("0s")) > 1', 19, "RB119", "no time"),
    ('calls({}, duration("1h")) > 1', 19, "RB119", "reaches back 10m"),
    ('incident.root.name.matches("(")', 28, "RB119", "missing )"),
    ('errors({}, duration("1m")) > 20.0', 29, "RB107", "write 0.2 for 20 %"),
    ("incident.impact.failed_ratio_now > 1.0", 35, "RB107", "never above 1"),
    ("incident.severity > CRITICAL", 20, "RB107", "LOW, MEDIUM"),
    ("incident.severity >= 5", 21, "RB107", "LOW, MEDIUM"),
    ("incident.n_anomalies < 0", 23, "RB107", "below 0"),
    ("true", 0, "RB115", "every incident"),
    ("params.at_least > 2", 0, "RB115", "every incident"),
    ('incident.signal == "llm.cost" && incident.signal == "llm.errors"', 52, "RB115", "||"),
    ('incident.signal in ["llm.cost"] && incident.signal != "llm.cost"', 54, "RB115", "never true"),
    ("incident.severity >= HIGH && incident.severity < MEDIUM", 49, "RB115", "never true"),
    ("incident.severity >= params.at_least && incident.severity < HIGH", 60, "RB115", "never true"),
    ("incident.age_s > 5.0 && 5.0 >= incident.age_s", 24, "RB115", "never true"),
    ('calls({}, duration("1m")) > 5 && calls({}, duration("1m")) < 3', 61, "RB115", "never true"),
    ("incident.signal in []", 19, "RB115", "empty list"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "offset", "code", "part"), NEVER)
def test_what_can_never_match_is_refused_at_its_place(source: str, offset: int, code: str, part: str) -> None:
    with pytest.raises(ConditionError) as caught:
        compile_condition(source, {"at_least": 3})
    assert (caught.value.code, caught.value.offset) == (code, offset), caught.value.what
    assert part in caught.value.what


@pytest.mark.parametrize(
    "source",
    [
        'incident.signal == "llm.cost" || incident.signal == "llm.errors"',
        "incident.root.name == \"incident.signal == 'llm.eror'\"",
        "incident.severity >= MEDIUM && incident.severity <= MEDIUM",
        'incident.klass == "xid_79" && incident.signal == "gpu.fault"',
        '(incident.signal == "llm.errors" || incident.signal == "gpu.fault") && incident.klass == "xid_79"',
        'errors(incident.scope, duration("1m30s")) >= 0.0',
        "!(incident.severity >= HIGH && incident.severity < MEDIUM)",
        'incident.impact.tenants.exists(t, t.startsWith("é")) && incident.scope["tenant"] != "é"',
    ],
)
def test_what_may_match_is_left_alone(source: str) -> None:
    compile_condition(source)


def test_offsets_count_characters_also_after_an_accent() -> None:
    source = 'incident.root.name != "é" && incident.signal == "x"'
    with pytest.raises(ConditionError) as caught:
        compile_condition(source)
    assert source[caught.value.offset] == "x"


def test_conditions_that_share_an_environment_may_be_asked_by_several_threads() -> None:
    world = World({"a": 100})
    world.advance(windows=3)
    condition = compile_condition('calls({"provider": "a"}, duration("30s")) == 300')
    values = variables_of(incident(), T0)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: condition.ask(values, world.estate), range(400)))
    assert {a.true for a in answers} == {True}


EXPECTATIONS = [
    ('erors("to") < 0.02', "RB110", "did you mean 'errors'?"),
    ('errors("too") < 0.02', "RB110", "measured nowhere"),
    ('errors(to) < 0.02', "RB110", "cannot read"),
    ('errors("to") < 2', "RB110", "write 0.02 or 2%"),
    ('calls("to") > 5%', "RB110", "5% * before"),
    ('!(errors("to") > 0.5)', "RB110", "cannot read"),
    ('errors("to") < 0.02 || calls("to") > 5', "RB110", "cannot read"),
    ('errors("to") < 0.02 &&', "RB110", "cannot read"),
    ('errors("to") <= 100%', "RB115", "cannot fail"),
    ('calls("to") >= 0', "RB115", "cannot fail"),
    ('usd_per_hour("to") < 0', "RB115", "never"),
    ('errors("to") > 100%', "RB115", "never"),
    ('errors("to") < 0.02 && errors("to") > 0.5', "RB115", "never"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "code", "part"), EXPECTATIONS)
def test_an_expectation_that_proves_nothing_is_refused(source: str, code: str, part: str) -> None:
    with pytest.raises(ConditionError) as caught:
        compile_expectation(source)
    assert caught.value.code == code
    assert part in caught.value.what


def test_an_expectation_takes_every_measure_and_what_was_before() -> None:
    text = " && ".join(f'{m}("from") < 70% * before' for m in typing.get_args(Measure))
    assert [str(t) for t in compile_expectation(text)] == [
        f'{m}("from") < 0.7 * before' for m in typing.get_args(Measure)
    ]
    (term,) = compile_expectation("usd_per_hour('from') <= 0.7*before")
    assert term == Term("usd_per_hour", "from", "<=", 0.7, True)
    assert (term.holds(69.0, before=100.0), term.holds(71.0, before=100.0)) == (True, False)
