"""Whatever is handed to the loader, it answers: a runbook, or errors with code and place; never anything else, never for ever."""

from __future__ import annotations

import copy
import json
import re
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.errors import ConfigError
from flyball.core.plans import MODES, format_duration
from flyball.remediation.actions import registry
from flyball.runbooks import loader
from flyball.runbooks.condition_checks import SIGNALS
from flyball.runbooks.lint import lint_texts
from flyball.runbooks.loader import Runbook, check_runbook
from flyball.runbooks.template import new_runbook
from flyball.runbooks.yaml_nodes import MAX_BYTES, parse
from tests.runbooks.test_lint import FILES

ACTIONS = registry()
GOOD = new_runbook("first-steps")
SHIPPED = [p.read_text() for p in sorted((Path(loader.__file__).parent / "library").glob("*.yaml"))]
TEXTS = [GOOD, *SHIPPED, *(p.read_text() for p in FILES[:: len(FILES) // 12])]


def answer(text: str | bytes) -> Runbook | None:
    """What the loader made of it, after a look at its errors."""
    runbook, errors = check_runbook(text, "f.yaml", ACTIONS)
    assert (runbook is None) == bool(errors)
    assert len(errors) <= loader.MAX_ERRORS + 1
    lines = len((text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")).splitlines())
    for e in errors:
        assert re.fullmatch(r"RB\d{3}", e.code)
        assert "\n" not in e.what
        assert len(e.what) < 1000
        line, column = loader.place_of(e)
        assert 1 <= line <= lines + 1
        assert column >= 1
    return runbook


# --- bytes and damage ----------------------------------------------------------------------------------------------

SPICE = [
    "{", "}", "[", "]", ":", ": ", "&a ", "*a", "!!x ", "!", "|", ">", "'", '"', "%", "\n", "  ", "- ", "? ", "\t", "\x00",
    "\x85", "\u2028", "\ufeff", "é", "\ud800", "\U0001f600", "{{", "${", "<<", "---", "...", "#", "~", "\\", "1e999", "\r",
]  # fmt: skip


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_no_bytes_crash_the_loader(data: bytes) -> None:
    assert answer(data) is None


@given(
    st.sampled_from(TEXTS),
    st.floats(0, 1),
    st.integers(0, 40),
    st.lists(st.sampled_from(SPICE) | st.text(max_size=6), max_size=5),
)
@settings(max_examples=250, deadline=None)
def test_no_damage_to_a_runbook_crashes_the_loader(
    text: str, where: float, cut: int, spice: list[str]
) -> None:
    at = int(where * len(text))
    answer(text[:at] + "".join(spice) + text[at + cut :])


@given(
    st.sampled_from(TEXTS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4)
)
@settings(max_examples=150, deadline=None)
def test_no_flipped_bytes_crash_the_loader(text: str, flips: list[tuple[float, int]]) -> None:
    data = bytearray(text.encode())
    for where, byte in flips:
        data[int(where * (len(data) - 1))] = byte
    answer(bytes(data))


@given(st.sampled_from(TEXTS), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_no_piece_of_a_runbook_crashes_the_loader(text: str, start: float, end: float) -> None:
    low, high = sorted((int(start * len(text)), int(end * len(text))))
    answer(text[low:high])
    answer(text[high:] + text[:low])


# --- over the schema -----------------------------------------------------------------------------------------------

LINE = st.text(string.ascii_letters + string.digits + " .,-_éß", min_size=1, max_size=20).filter(str.strip)
NAMES = st.from_regex(r"[a-z][a-z0-9]{0,6}(-[a-z0-9]{1,5}){0,2}", fullmatch=True)
IDS = st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True)


def durations(low_s: int, high_s: int) -> st.SearchStrategy[str]:
    return st.integers(low_s, high_s).map(lambda s: format_duration(float(s)))


SHARES = st.integers(1, 100).map("{}%".format)
RATES = st.builds("{}/{}".format, st.integers(1, 9999), durations(1, 86400))
WHENS = st.one_of(
    st.builds('incident.signal == "{}"'.format, st.sampled_from(SIGNALS)),
    st.builds("incident.severity {} {}".format, st.sampled_from(["==", ">=", "<="]), st.sampled_from(["LOW", "HIGH"])),
    st.builds("incident.impact.failed_ratio_now > {:.3f}".format, st.floats(0, 0.99)),
    st.builds("incident.root.name == {}".format, LINE.map(lambda s: json.dumps(s, ensure_ascii=False))),
)  # fmt: skip
CHECKS = st.builds(
    '{}({{"tenant": incident.root.name}}, duration("{}s")) {} 0.5'.format,
    st.sampled_from(["errors", "usd_per_hour", "tokens_per_min", "latency_s"]), st.integers(1, 600), st.sampled_from("<>"),
)  # fmt: skip
TERMS = st.one_of(
    st.builds('errors("{}") < {}%'.format, st.sampled_from(["to", "from"]), st.integers(1, 99)),
    st.builds('usd_per_hour("{}") < {} * before'.format, st.sampled_from(["to", "from"]), st.floats(0.1, 5).map("{:.2f}".format)),
    st.builds('calls("to") > {}'.format, st.integers(0, 999)),
)  # fmt: skip


def falling(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, min_size=1, max_size=4, unique=True).map(lambda v: sorted(v, reverse=True))


SCOPES = st.just("$incident.root") | st.dictionaries(
    st.sampled_from(["tenant", "app", "provider", "run"]), LINE, min_size=1, max_size=2
)
FOR = {"for": durations(90_000, 200_000)}
LEASE = {"lease": durations(30, 600)}
CALLS: dict[str, st.SearchStrategy[Any]] = {
    "redirect": st.fixed_dictionaries(
        FOR, optional={**LEASE, "share": falling(st.integers(1, 100)).map(lambda v: [f"{x}%" for x in v[::-1]])}
    ),
    "limit": st.fixed_dictionaries(
        {**FOR, "requests_per_min": falling(st.integers(1, 10_000)) | SHARES}, optional={**LEASE, "scope": SCOPES}
    ),
    "cap": st.fixed_dictionaries(
        {**FOR, "output_tokens": falling(st.integers(1, 10_000))}, optional={**LEASE, "scope": SCOPES, "model": NAMES}
    ),
    "block": st.fixed_dictionaries(FOR, optional={"scope": st.builds(lambda n: {"tenant": n}, LINE)}),
    "hook": st.fixed_dictionaries(
        {**FOR, "name": NAMES, "action": NAMES},
        optional={
            "targets": st.lists(LINE, min_size=1, max_size=3, unique=True),
            "with": st.dictionaries(IDS, st.integers(-9, 9) | st.booleans() | LINE, max_size=3),
            "dry_run": st.booleans(),
        },
    ),
}  # fmt: skip


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(CALLS)))
    step = {kind: draw(CALLS[kind])}
    verify = {
        "within": durations(10, 86_400),
        "expect": TERMS,
        "against": st.sampled_from(["untouched", "nothing"]),
        "min_calls": st.integers(1, 1000),
    }
    step |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "verify": st.fixed_dictionaries({}, optional=verify),
                "timeout": durations(86_400, 200_000),
                "retry": st.fixed_dictionaries(
                    {}, optional={"count": st.integers(1, 5), "backoff": durations(1, 600)}
                ),
                "release": st.sampled_from(["recovered", "resolved", "expiry"]),
                "approval": st.fixed_dictionaries(
                    {}, optional={"expires": durations(30, 86_400), "on_expire": st.just("undo")}
                ),
            },
        )
    )
    if kind == "hook":
        step["undo"] = draw(st.sampled_from(["hook", "none"] if "approval" in step else ["hook"]))
    return step


BLASTS = {
    "traffic": SHARES,
    "tenants": st.integers(1, 10**7),
    "usd_per_hour": st.integers(1, 10**6) | st.floats(0.5, 1e6).map(lambda x: round(x, 2)),
    "tokens_per_min": st.integers(1, 10**9),
    "gpus": st.integers(1, 10_000),
    "gpu_share": SHARES,
}
LIMITS = {
    "cooldown": durations(0, 10**6),
    "runs": RATES,
    "attempts": st.integers(1, 10),
    "breaker": RATES,
    "blast": st.fixed_dictionaries({}, optional=BLASTS),
}


def unlike(items: list[dict[str, Any]]) -> bool:
    calls = [json.dumps({k: v for k, v in item.items() if k in CALLS}, sort_keys=True) for item in items]
    return len(set(calls)) == len(calls)


RUNBOOKS = st.fixed_dictionaries(
    {
        "runbook": st.just("v1"),
        "name": NAMES,
        "owner": LINE,
        "when": st.lists(WHENS, min_size=1, max_size=3).map(" || ".join),
        "steps": st.lists(steps(), min_size=1, max_size=3).filter(unlike),
        "max_age": durations(61, 10_000),
        "tests": st.just([{"lab": "outage(all_providers)", "expect": ["refuse(no_target)"]}]),
    },
    optional={
        "description": LINE,
        "hold": durations(0, 60),
        "mode": st.sampled_from(MODES),
        "approval": durations(30, 86_400),
        "ladder": st.booleans(),
        "on_failure": st.sampled_from(["undo_and_page", "undo", "page"]),
        "limits": st.fixed_dictionaries({}, optional=LIMITS),
        "preconditions": st.lists(
            st.fixed_dictionaries({"id": IDS, "check": CHECKS}), max_size=3, unique_by=lambda p: p["id"]
        ),
    },
)


def as_text(document: object) -> str:
    """JSON, which is YAML in which every text is quoted."""
    return json.dumps(document, ensure_ascii=False, indent=1)


@given(RUNBOOKS)
@settings(max_examples=80, deadline=None)
def test_a_runbook_made_by_the_rules_loads_and_is_without_a_finding(document: dict[str, Any]) -> None:
    text = as_text(document)
    assert [str(e) for e in lint_texts({"f.yaml": text.encode()}, actions=ACTIONS)] == []
    runbook = answer(text)
    assert runbook is not None
    assert [s.action for s in runbook.steps] == [next(k for k in s if k in CALLS) for s in document["steps"]]
    assert runbook.model.name == document["name"]


Path_ = tuple[Any, ...]


def places(value: object, path: Path_ = ()) -> Iterator[Path_]:
    """Paths of everything in a document, the free part of a hook's values aside."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "with":
                yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from places(inner, (*path, i))


def at(document: Any, path: Path_) -> Any:
    for part in path:
        document = document[part]
    return document


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(string.printable, max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_letters, max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(RUNBOOKS, st.data())
@settings(max_examples=80, deadline=None)
def test_one_misspelt_name_is_an_error(document: dict[str, Any], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([p for p in places(document) if p and isinstance(p[-1], str)]))
    broken = copy.deepcopy(document)
    parent, name = at(broken, path[:-1]), path[-1]
    parent[f"{name}x"] = parent.pop(name)
    assert answer(as_text(broken)) is None


@given(RUNBOOKS, st.data())
@settings(max_examples=80, deadline=None)
def test_one_value_of_the_wrong_kind_is_an_error(document: dict[str, Any], data: st.DataObject) -> None:
    path = data.draw(
        st.sampled_from([p for p in places(document) if p and not isinstance(at(document, p), dict)])
    )
    broken = copy.deepcopy(document)
    at(broken, path[:-1])[path[-1]] = {"x": {"y": [{}]}}
    assert answer(as_text(broken)) is None


@given(RUNBOOKS, st.data())
@settings(max_examples=80, deadline=None)
def test_what_is_required_cannot_be_left_out_or_empty(document: dict[str, Any], data: st.DataObject) -> None:
    broken = copy.deepcopy(document)
    name = data.draw(st.sampled_from(["runbook", "name", "owner", "when", "steps"]))
    if data.draw(st.booleans()):
        del broken[name]
    else:
        broken[name] = None
    assert answer(as_text(broken)) is None


@given(RUNBOOKS, st.data())
@settings(max_examples=150, deadline=None)
def test_no_value_anywhere_crashes_the_loader(document: dict[str, Any], data: st.DataObject) -> None:
    broken: Any = {"": copy.deepcopy(document)}
    path = data.draw(st.sampled_from([("", *p) for p in places(document)]))
    at(broken, path[:-1])[path[-1]] = data.draw(JSON)
    answer(as_text(broken[""]))


# --- nothing in a runbook becomes code -----------------------------------------------------------------------------

CODE = ["{{ x }}", "{% for x in y %}", "{# x #}", "${x}", "$(id)", "`id`", "<% x %>", "$incident.root.name", "a\nb", "\x1b[31m", "\u202ex"]  # fmt: skip


@given(RUNBOOKS, st.sampled_from(CODE), st.sampled_from(["", "a ", "tenant-"]), st.data())
@settings(max_examples=100, deadline=None)
def test_text_that_something_else_could_run_is_refused_in_every_parameter(
    document: dict[str, Any], code: str, before: str, data: st.DataObject
) -> None:
    calls = [
        ("steps", i, k, *p)
        for i, step in enumerate(document["steps"])
        for k in step
        if k in CALLS
        for p in places(step[k])
    ]
    path = data.draw(
        st.sampled_from([p for p in calls if not isinstance(at(document, p), dict | list)] or [("name",)])
    )
    broken = copy.deepcopy(document)
    at(broken, path[:-1])[path[-1]] = before + code
    assert answer(as_text(broken)) is None


@given(st.text(string.printable, max_size=60))
@settings(max_examples=100, deadline=None)
def test_a_param_is_a_value_and_never_source(value: str) -> None:
    """Whatever its text, a comparison with it is a comparison, and the parameter that takes it holds exactly it."""
    text = as_text(
        {
            "runbook": "v1",
            "name": "x",
            "owner": "y",
            "when": "incident.root.name == params.who",
            "params": {"who": value},
            "steps": [{"limit": {"scope": {"tenant": "$params.who"}, "requests_per_min": 5}}],
        }
    )
    runbook = answer(text)
    if runbook is not None:
        assert vars(runbook.steps[0].params)["scope"] == {"tenant": value}


# --- never for ever ------------------------------------------------------------------------------------------------

HEAD = "runbook: v1\nname: x\nowner: y\nwhen: incident.severity >= HIGH\n"
STEP = "steps:\n- limit: {requests_per_min: 1}\n"
HEAVY = {
    "unknown fields": HEAD + "".join(f"a{i}: 1\n" for i in range(7000)),
    "empty steps": HEAD + "steps:\n" + "- \n" * 20_000,
    "misspelt actions": HEAD + "steps:\n" + "- {redirec: 1}\n" * 4000,
    "steps without action": HEAD + "steps: [" + "{}," * 20_000 + "]",
    "long key": HEAD + "? " + "owner" * 12_000 + "\n: 1\n",
    "many terms": HEAD + STEP + "  verify: {expect: '" + 'errors("to") < 0.02 && ' * 2500 + "'}\n",
    "a bound of many digits": HEAD + STEP + "  verify: {expect: 'errors(\"to\") < " + "1" * 60_000 + "'}\n",
    "many params": HEAD + "params: {" + ", ".join(f"p{i}: 1" for i in range(6000)) + "}\n" + STEP,
    "many sums": HEAD + "preconditions:\n" + "".join(f"- {{id: a{i}, check: '{'incident.severity + ' * 90}1 > 2'}}\n" for i in range(20)) + STEP,
    "many templates": HEAD + "steps: [{hook: {name: a, action: b, with: {a: [" + '"{{",' * 10_000 + "]}}}]",
    "many targets": HEAD + "steps: [{hook: {name: a, action: b, targets: [" + '"x",' * 15_000 + "]}}]",
    "many shares": HEAD + "steps: [{redirect: {share: [" + "1%," * 15_000 + "]}}]",
    "long duration": HEAD + "hold: " + "1s" * 30_000 + "\n" + STEP,
    "long fault": HEAD + STEP + 'tests: [{lab: "' + "a" * 60_000 + '(", expect: [run]}]',
    "long name": HEAD.replace("name: x", "name: " + "a-" * 30_000) + STEP,
    "alternatives within alternatives": HEAD.replace("incident.severity >= HIGH", "(incident.age_s > 1.0 || (incident.severity > LOW && " * 25 + "true" + "))" * 25) + STEP,
    "brackets": "[" * 60_000,
    "dashes": "- " * 30_000,
    "keys": "? " * 30_000,
    "line breaks": "\n" * 60_000 + "a: b: c",
}  # fmt: skip


@pytest.mark.parametrize("name", HEAVY)
def test_the_heaviest_documents_take_a_bounded_number_of_calls(name: str) -> None:
    """Counted in function calls, Python's and C's, because a time would depend on the machine."""
    text = HEAVY[name][:MAX_BYTES]
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    answer(GOOD)  # what is made once is not of this document
    sys.setprofile(count)
    try:
        answer(text)
    finally:
        sys.setprofile(None)
    assert calls < 60 * MAX_BYTES


def test_what_is_too_long_is_not_looked_at() -> None:
    with pytest.raises(ConfigError, match="RB001 longer than"):
        parse("a: " + "[" * 10_000_000, "f.yaml")
