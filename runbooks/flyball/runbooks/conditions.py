"""Conditions: CEL expressions, compiled and type-checked when a runbook is loaded, evaluated on typed values only.

Text of events reaches a condition as a value and never as source. `compile_condition` names the place of an error
as an offset into the expression; the loader turns it into a line and column of the file.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, Final, get_args

from cel_expr_python import cel

from flyball.core.errors import did_you_mean
from flyball.core.estate import Estate
from flyball.core.incident import Incident, Severity
from flyball.core.plans import Measure, Term
from flyball.runbooks.cel_tree import TooDeep, read_tree
from flyball.runbooks.condition_checks import FUNCTIONS, SIGNALS, ConditionError, check_meaning

MAX_LENGTH: Final = 2000

_CONSTANTS: Final[dict[str, int]] = {s.name: int(s) for s in Severity}
_IMPACT_INTS: Final = ("calls", "failed_calls", "n_apps", "n_tenants")
_IMPACT_FLOATS: Final = (
    "failed_ratio_now", "failed_ratio_baseline", "usd_per_min_now", "usd_per_min_baseline", "usd_since_start", "usd_wasted",
    "tokens_per_min_now",
)  # fmt: skip
_STRINGS: Final = ("id", "root.kind", "root.name", "signal", "klass", "state")
_INTS: Final = ("severity", "n_anomalies", "reopened", *(f"impact.{n}" for n in _IMPACT_INTS))
_FLOATS: Final = ("confidence", "age_s", "lasted_s", *(f"impact.{n}" for n in _IMPACT_FLOATS))
_LISTS: Final = ("impact.models", "impact.regions", "impact.apps", "impact.tenants")

_SCOPE: Final = cel.Type.Map(cel.Type.STRING, cel.Type.STRING)
_BUILT_IN: Final = (
    "contains", "startsWith", "endsWith", "matches", "size", "duration", "int", "double", "string", "exists", "all",
    "in", "has",
)  # fmt: skip


class NoData(ValueError):
    """A function was asked about traffic that there is none of."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a condition said. `error` is set when it could not be evaluated, which is never true."""

    true: bool
    error: str = ""


def variables_of(incident: Incident, now: float) -> dict[str, Any]:
    """The values of every `incident.…` name."""
    impact = incident.impact
    values: dict[str, Any] = {
        "incident.id": incident.id,
        "incident.root.kind": incident.root.kind,
        "incident.root.name": incident.root.name,
        "incident.signal": incident.signal,
        "incident.klass": incident.klass,
        "incident.state": incident.state.value,
        "incident.severity": int(incident.severity),
        "incident.n_anomalies": incident.n_anomalies,
        "incident.reopened": incident.reopened,
        "incident.confidence": float(incident.confidence),
        "incident.age_s": float(now - incident.at),
        "incident.lasted_s": float(now - incident.since),
        "incident.scope": dict(incident.scope),
        "incident.impact.models": list(impact.models),
        "incident.impact.regions": list(impact.regions),
        "incident.impact.apps": [name for name, _, _ in impact.apps],
        "incident.impact.tenants": [name for name, _, _ in impact.tenants],
        **_CONSTANTS,
    }
    values.update({f"incident.impact.{n}": int(getattr(impact, n)) for n in _IMPACT_INTS})
    values.update({f"incident.impact.{n}": float(getattr(impact, n)) for n in _IMPACT_FLOATS})
    return values


def _incident_types() -> dict[str, Any]:
    types: dict[str, Any] = {f"incident.{n}": cel.Type.STRING for n in _STRINGS}
    types.update({f"incident.{n}": cel.Type.INT for n in _INTS})
    types.update({f"incident.{n}": cel.Type.DOUBLE for n in _FLOATS})
    types.update({f"incident.{n}": cel.Type.List(cel.Type.STRING) for n in _LISTS})
    types["incident.scope"] = _SCOPE
    types.update(dict.fromkeys(_CONSTANTS, cel.Type.INT))
    return types


class _Asker(threading.local):
    """Holds the estate that the functions ask while one condition is evaluated; one for each thread, since environments are shared."""

    estate: Estate | None = None

    def _live(self) -> Estate:
        if self.estate is None:
            raise NoData("no live traffic to ask here")
        return self.estate

    def errors(self, scope: Mapping[str, str], span: timedelta) -> float:
        seen = self._live().errors(scope, span.total_seconds())
        if not seen.n:
            raise NoData(f"no calls in {dict(scope)}")
        return seen.value

    def attempts(self, scope: Mapping[str, str], span: timedelta) -> int:
        return self._live().attempts(scope, span.total_seconds())

    def tokens_per_min(self, scope: Mapping[str, str], span: timedelta) -> float:
        return self._told("tokens", scope, self._live().tokens_per_min(scope, span.total_seconds()))

    def latency_s(self, scope: Mapping[str, str], span: timedelta) -> float:
        return self._told("latency", scope, self._live().latency_s(scope, span.total_seconds()))

    def calls(self, scope: Mapping[str, str], span: timedelta) -> int:
        return self._live().calls(scope, span.total_seconds())

    def usd_per_hour(self, scope: Mapping[str, str], span: timedelta) -> float:
        return self._told("cost", scope, self._live().usd_per_hour(scope, span.total_seconds()))

    @staticmethod
    def _told(what: str, scope: Mapping[str, str], value: float | None) -> float:
        if value is None:
            raise NoData(f"no {what} told in {dict(scope)}")
        return value


_KINDS: Final = {
    "int": "a whole number",
    "double": "a number",
    "string": "text",
    "list": "a list",
    "map": "a mapping",
}


class Condition:
    """A compiled condition. `source` is what the person wrote."""

    def __init__(
        self, source: str, expression: Any, params: Mapping[str, Any], asker: _Asker, reads: Iterable[str]
    ) -> None:
        self.source = source
        self.reads = frozenset(reads)
        """The names that it reads. Only their values are handed to CEL: all would take five times as long."""
        self._expression = expression
        self._params = {f"params.{k}": v for k, v in params.items() if f"params.{k}" in self.reads}
        self._asker = asker

    def __repr__(self) -> str:
        return f"Condition({self.source!r})"

    def ask(self, values: Mapping[str, Any], estate: Estate | None = None) -> Answer:
        """Evaluates it. What cannot be evaluated (no data, a broken pattern) is not true, and says why."""
        self._asker.estate = estate
        try:
            data = {name: values[name] for name in self.reads if name in values}
            result = self._expression.eval(data={**data, **self._params})
        finally:
            self._asker.estate = None
        value = result.value()
        if value is True or value is False:
            return Answer(value)
        return Answer(False, str(value))


@lru_cache(maxsize=64)
def _environment(params: tuple[tuple[str, str], ...]) -> tuple[Any, _Asker]:
    types = _incident_types()
    kinds = {"str": cel.Type.STRING, "int": cel.Type.INT, "float": cel.Type.DOUBLE, "bool": cel.Type.BOOL}
    types.update({f"params.{name}": kinds[kind] for name, kind in params})
    asker = _Asker()
    overloads = dict.fromkeys(FUNCTIONS, cel.Type.DOUBLE) | {"calls": cel.Type.INT, "attempts": cel.Type.INT}
    functions = [
        cel.FunctionDecl(
            name,
            [
                cel.Overload(
                    f"{name}_scope_span", returns, [_SCOPE, cel.Type.DURATION], False, getattr(asker, name)
                )
            ],
        )
        for name, returns in overloads.items()
    ]
    return cel.NewEnv(variables=types, functions=functions), asker


def compile_condition(source: str, params: Mapping[str, str | int | float | bool] | None = None) -> Condition:
    """Compiles and type-checks a condition.

    Names: `incident.id`, `.root.kind`, `.root.name`, `.signal`, `.klass`, `.state`, `.severity` (compare with LOW, MEDIUM,
    HIGH, CRITICAL), `.confidence`, `.age_s`, `.lasted_s`, `.scope`, `.impact.…`; `params.…` of the runbook.
    Functions over live traffic, each of `(scope, span)`: `errors`, `calls`, `attempts`, `tokens_per_min`, `usd_per_hour`, `latency_s`, e.g.
    `errors({"provider": incident.root.name}, duration("2m")) > 0.2`.

    Raises: ConditionError: RB103 syntax, RB104 unknown name, RB105 types that do not fit, RB106 not true or false,
        RB107 a value that can never occur (an unknown signal, root kind, label), RB115 never or always true,
        RB119 a duration or pattern that cannot be read.
    """
    params = params or {}
    if len(source) > MAX_LENGTH:
        raise ConditionError(
            "RB103",
            f"the condition is longer than {MAX_LENGTH} characters; move parts of it to preconditions",
            0,
        )
    for offset, char in enumerate(source):
        if 0xD800 <= ord(char) <= 0xDFFF or char == "\x00":
            raise ConditionError(
                "RB103",
                f"character U+{ord(char):04X} is not allowed in a condition; write plain text",
                offset,
            )
    env, asker = _environment(tuple((k, type(v).__name__) for k, v in sorted(params.items())))
    try:
        expression = env.compile(source)
    except RuntimeError as e:
        raise _explain(str(e), source, params) from e
    if expression.return_type() != cel.Type.BOOL:
        kind = expression.return_type().name().lower()
        what = f"the condition is {_KINDS.get(kind, f'of type {kind}')}, not true or false; compare it with something"
        raise ConditionError("RB106", what, 0)
    try:
        tree = read_tree(expression.serialize())
    except TooDeep as e:
        raise ConditionError(
            "RB103", "the condition is nested too deep; split it into preconditions", 0
        ) from e
    check_meaning(tree, params)
    reads = [part.name for part in tree.walk() if part.kind == "name"]
    return Condition(source, expression, params, asker, reads)


_POSITION: Final = re.compile(r"ERROR: <input>:(-?\d+):(-?\d+): (.*)")
_UNDECLARED: Final = re.compile(r"undeclared reference to '([^']*)'")
_OVERLOAD: Final = re.compile(r"found no matching overload for '([^']*)' applied to '\((.*)\)'")


def _explain(text: str, source: str, params: Mapping[str, Any]) -> ConditionError:
    """The first error of CEL's text, with its place as an offset and in words that say what would be right."""
    found = _POSITION.search(text)
    if not found:
        return ConditionError("RB103", f"the condition cannot be read: {text.splitlines()[0][:160]}", 0)
    line, column, message = max(int(found[1]), 1), max(int(found[2]), 1), found[3]
    lines = source.split("\n")
    offset = min(sum(len(part) + 1 for part in lines[: line - 1]) + column - 1, len(source))
    unknown = _UNDECLARED.search(message)
    if unknown:
        return _unknown_name(unknown[1], source, offset, params)
    overload = _OVERLOAD.search(message)
    if overload:
        operator, types = overload[1].strip("_"), overload[2]
        hint = "; compare values of one type"
        if sorted(types.split(", ")) == ["double", "int"]:
            hint = "; write the whole number with a point, such as 1.0, or the other without"
        elif re.match(r"incident\.severity\s*$", source[:offset].rpartition("&& ")[2].lstrip("( ")):
            hint = f"; a severity is {', '.join(_CONSTANTS)}, without quotes"
        return ConditionError("RB105", f"{operator} does not take ({types}){hint}", offset)
    if "operand of a select" in message:
        return ConditionError("RB105", f"{message}; a plain value has no fields", offset)
    if "recursion" in message:
        return ConditionError("RB103", "the condition is nested too deep; split it into preconditions", 0)
    return ConditionError(
        "RB103", f"the condition cannot be read here{_slip(source, offset, message)}", offset
    )


_SLIPS: Final = (
    ("and", "&&"),
    ("or", "||"),
    ("not", "!"),
    ("=", "=="),
    ("&", "&&"),
    ("|", "||"),
    ("if", "… ? … : …"),
)


def _slip(source: str, offset: int, message: str) -> str:
    """What was probably meant where CEL could not read on; else CEL's own words."""
    rest = source[offset:].lstrip()
    if not rest:
        return ": it ends too early; write what it is compared with"
    for wrong, right in _SLIPS:
        if re.match(rf"{re.escape(wrong)}(?![\w=&|])", rest):
            return f": {wrong!r} is not CEL; write {right}"
    told = re.sub(r" expecting .*", "", message).removeprefix("Syntax error: ")
    return f" ({told[:120]}); conditions are CEL, such as incident.severity >= HIGH"


def _unknown_name(name: str, source: str, offset: int, params: Mapping[str, Any]) -> ConditionError:
    known = [*_incident_types(), *(f"params.{p}" for p in params)]
    head = name.rpartition(".")[0]
    if head and source[:offset].endswith(head):  # CEL points at the last dot
        offset -= len(head)
    called = source[offset : offset + 1] == "(" and source[:offset].endswith(name)
    if called:  # and of a call, at the parenthesis
        offset -= len(name)
    if called or re.match(r"\s*\(", source[offset + len(name) :]):
        return ConditionError(
            "RB104",
            f"unknown function {name[:64]!r} in the condition{did_you_mean(name, [*FUNCTIONS, *_BUILT_IN])}",
            offset,
        )
    if name.upper() in _CONSTANTS or name.startswith(("incident.", "params.")):
        hint = did_you_mean(name.upper() if name.upper() in _CONSTANTS else name, known)
    else:
        hint = did_you_mean(f"incident.{name}" if f"incident.{name}" in known else name, known)
    return ConditionError("RB104", f"unknown name {name[:64]!r} in the condition{hint}", offset)


_TERM: Final = re.compile(
    rf"\s*({'|'.join(get_args(Measure))})\s*\(\s*(?:\"(to|from)\"|'(to|from)')\s*\)\s*(<=|>=|<|>)"
    r"\s*(\d{1,15}(?:\.\d{1,15})?)(%?)\s*(\*\s*before\s*)?",
    re.ASCII,
)


def compile_expectation(source: str) -> tuple[Term, ...]:
    """What verification expects: comparisons such as `errors("to") < 0.02` or `usd_per_hour("from") < 0.6 * before`, joined by `&&`.

    Kept this small so that "not enough data" is a third answer beside true and false: a general expression could
    turn it into true by negation.

    Raises: ConditionError RB110 for what cannot be read, RB115 for what cannot fail or can never hold.
    """
    terms: list[Term] = []
    offset = 0
    for part in source.split("&&"):
        place = offset + len(part) - len(part.lstrip())
        found = _TERM.fullmatch(part)
        if not found:
            raise _unreadable(part.strip(), place)
        term = _term(found, place)
        _check_term(term, terms, place)
        terms.append(term)
        offset += len(part) + 2
    return tuple(terms)


def _term(found: re.Match[str], place: int) -> Term:
    measure: Any = found[1]
    of: Any = found[2] or found[3]
    op: Any = found[4]
    bound = float(found[5]) / (100.0 if found[6] else 1.0)
    relative = found[7] is not None
    if measure == "errors" and not relative and bound > 1.0:
        raise ConditionError("RB110", f"{found[5]} is no share of errors; write 0.02 or 2%", place)
    if found[6] and not relative and measure != "errors":
        raise ConditionError(
            "RB110", f"{measure} is no share; write a number, or {found[5]}% * before", place
        )
    return Term(measure, of, op, bound, relative)


def _check_term(term: Term, others: Sequence[Term], place: int) -> None:
    """Refuses what holds whatever happens: it proves nothing, and what comes after it is never reached; and what can never hold."""
    high = 1.0 if term.measure == "errors" and not term.times_before else math.inf
    always = (term.op == ">=" and term.bound <= 0.0) or (term.op == "<=" and term.bound >= high)
    never = (term.op == "<" and term.bound <= 0.0) or (term.op == ">" and term.bound >= high)
    if always:
        raise ConditionError(
            "RB115", f"{term} cannot fail, so it proves nothing; write a bound that can be missed", place
        )
    same = (term.measure, term.of, term.times_before)
    for other in others:
        if (other.measure, other.of, other.times_before) != same or other.op[0] == term.op[0]:
            continue
        below, above = (term, other) if term.op[0] == "<" else (other, term)
        closed = below.op == "<=" and above.op == ">="
        never = never or below.bound < above.bound or (below.bound == above.bound and not closed)
    if never:
        raise ConditionError(
            "RB115",
            f"{term} can never hold here, so the step always fails; write a bound that can be met",
            place,
        )


def _unreadable(part: str, offset: int) -> ConditionError:
    """Why a comparison cannot be read: the measure, the side, or its whole form."""
    called = re.match(r"(\w+)\s*\(\s*[\"']?(\w*)", part)
    if called and called[1] not in get_args(Measure):
        hint = did_you_mean(called[1], get_args(Measure))
        return ConditionError("RB110", f"nothing is measured as {called[1][:40]!r}{hint}", offset)
    if called and called[2] not in ("to", "from"):
        what = f'{called[1]}({called[2][:40]!r}) is measured nowhere; write {called[1]}("to") or {called[1]}("from")'
        return ConditionError("RB110", what, offset)
    what = f'cannot read {part[:60]!r}; write comparisons such as errors("to") < 0.02, joined by &&'
    return ConditionError("RB110", what, offset)


__all__ = [
    "SIGNALS", "Answer", "Condition", "ConditionError", "NoData", "compile_condition", "compile_expectation", "variables_of",
]  # fmt: skip
