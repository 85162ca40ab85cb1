"""Conditions: CEL expressions, compiled and type-checked when a runbook is loaded, evaluated on typed values only.

Text of events reaches a condition as a value and never as source. `compile_condition` names the place of an error
as an offset into the expression; the loader turns it into a line and column of the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, Final, get_args

from cel_expr_python import cel

from flyball.core.entities import ENTITY_KINDS
from flyball.core.errorclass import ErrorClass
from flyball.core.errors import ConfigError, did_you_mean
from flyball.core.estate import Estate
from flyball.core.incident import Incident, Severity, State
from flyball.core.plans import Measure, Term

MAX_LENGTH: Final = 2000

SIGNALS: Final[tuple[str, ...]] = (
    "llm.errors", "llm.input_tokens", "llm.output_tokens", "llm.latency", "llm.ttft", "llm.cost", "llm.cache", "llm.retries",
    "agent.loop", "agent.spend", "agent.context", "agent.fan_out", "gpu.fault", "gpu.throttle", "serving.queue",
    "serving.kv_cache", "serving.preemptions", "serving.ttft", "stream.silent", "stream.poison",
)  # fmt: skip
"""Signals that a condition may be compared with; `Anomaly.signal` documents them (a test holds the two together)."""

_KNOWN_VALUES: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "incident.signal": ("signal", SIGNALS),
    "incident.root.kind": ("root kind", ENTITY_KINDS),
    "incident.state": ("state", tuple(s.value for s in State)),
}
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
_FUNCTIONS: Final = ("errors", "calls", "usd_per_hour")
_BUILT_IN: Final = (
    "contains", "startsWith", "endsWith", "matches", "size", "duration", "int", "double", "string", "exists", "all",
    "in", "has",
)  # fmt: skip


class ConditionError(Exception):
    """A condition that cannot be compiled. `offset` is the character it begins at."""

    def __init__(self, code: str, what: str, offset: int) -> None:
        self.code, self.what, self.offset = code, what, offset
        super().__init__(what)


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


class _Asker:
    """Holds the estate that the functions ask, while one condition is evaluated."""

    def __init__(self) -> None:
        self.estate: Estate | None = None

    def _live(self) -> Estate:
        if self.estate is None:
            raise NoData("no live traffic to ask here")
        return self.estate

    def errors(self, scope: Mapping[str, str], span: timedelta) -> float:
        seen = self._live().errors(scope, span.total_seconds())
        if not seen.n:
            raise NoData(f"no calls in {dict(scope)}")
        return seen.value

    def calls(self, scope: Mapping[str, str], span: timedelta) -> int:
        return self._live().calls(scope, span.total_seconds())

    def usd_per_hour(self, scope: Mapping[str, str], span: timedelta) -> float:
        usd = self._live().usd_per_hour(scope, span.total_seconds())
        if usd is None:
            raise NoData(f"no cost is told in {dict(scope)}")
        return usd


class Condition:
    """A compiled condition. `source` is what the person wrote."""

    def __init__(self, source: str, expression: Any, params: Mapping[str, Any], asker: _Asker) -> None:
        self.source = source
        self._expression = expression
        self._params = {f"params.{k}": v for k, v in params.items()}
        self._asker = asker

    def __repr__(self) -> str:
        return f"Condition({self.source!r})"

    def ask(self, values: Mapping[str, Any], estate: Estate | None = None) -> Answer:
        """Evaluates it. What cannot be evaluated (no data, a broken pattern) is not true, and says why."""
        self._asker.estate = estate
        try:
            result = self._expression.eval(data={**values, **self._params})
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
    span = cel.Type.DURATION

    def declare(name: str, returns: Any, work: Callable[..., Any]) -> Any:
        return cel.FunctionDecl(
            name, [cel.Overload(f"{name}_scope_span", returns, [_SCOPE, span], False, work)]
        )

    functions = [
        declare("errors", cel.Type.DOUBLE, asker.errors),
        declare("calls", cel.Type.INT, asker.calls),
        declare("usd_per_hour", cel.Type.DOUBLE, asker.usd_per_hour),
    ]
    return cel.NewEnv(variables=types, functions=functions), asker


def compile_condition(source: str, params: Mapping[str, str | int | float | bool] | None = None) -> Condition:
    """Compiles and type-checks a condition.

    Names: `incident.id`, `.root.kind`, `.root.name`, `.signal`, `.klass`, `.state`, `.severity` (compare with LOW, MEDIUM,
    HIGH, CRITICAL), `.confidence`, `.age_s`, `.lasted_s`, `.scope`, `.impact.…`; `params.…` of the runbook.
    Functions: `errors(scope, span)`, `calls(scope, span)`, `usd_per_hour(scope, span)` over live traffic, e.g.
    `errors({"provider": incident.root.name}, duration("2m")) > 0.2`.

    Raises: ConditionError: RB103 syntax, RB104 unknown name, RB105 types that do not fit, RB106 not true or false,
        RB107 a value that can never occur (an unknown signal, root kind or state).
    """
    params = params or {}
    if len(source) > MAX_LENGTH:
        raise ConditionError("RB103", f"the condition is longer than {MAX_LENGTH} characters", 0)
    for offset, char in enumerate(source):
        if 0xD800 <= ord(char) <= 0xDFFF or char == "\x00":
            raise ConditionError(
                "RB103", f"character U+{ord(char):04X} is not allowed in a condition", offset
            )
    env, asker = _environment(tuple((k, type(v).__name__) for k, v in sorted(params.items())))
    try:
        expression = env.compile(source)
    except RuntimeError as e:
        raise _explain(str(e), source, params) from e
    if expression.return_type() != cel.Type.BOOL:
        kind = expression.return_type().name().lower()
        raise ConditionError("RB106", f"the condition is a {kind}; it must be true or false", 0)
    _check_values(source)
    return Condition(source, expression, params, asker)


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
        hint = ""
        if sorted(types.split(", ")) == ["double", "int"]:
            hint = "; write the whole number with a point, such as 1.0"
        return ConditionError("RB105", f"{operator} does not take ({types}){hint}", offset)
    if "operand of a select" in message:
        return ConditionError("RB105", f"{message}; a plain value has no fields", offset)
    if "recursion" in message:
        return ConditionError("RB103", "the condition is nested too deep; split it into preconditions", 0)
    message = re.sub(r" expecting \{.*\}", "", message).removeprefix("Syntax error: ")
    return ConditionError("RB103", f"the condition cannot be read here: {message[:160]}", offset)


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
            f"unknown function {name!r} in the condition{did_you_mean(name, [*_FUNCTIONS, *_BUILT_IN])}",
            offset,
        )
    if name.upper() in _CONSTANTS or name.startswith(("incident.", "params.")):
        hint = did_you_mean(name.upper() if name.upper() in _CONSTANTS else name, known)
    else:
        hint = did_you_mean(f"incident.{name}" if f"incident.{name}" in known else name, known)
    return ConditionError("RB104", f"unknown name {name!r} in the condition{hint}", offset)


_LITERAL: Final = r"(?:\"([^\"\\\n]*)\"|'([^'\\\n]*)')"


def _check_values(source: str) -> None:
    """Refuses comparisons with words that the left side can never be: they would silently never match."""
    for variable, (what, known) in _KNOWN_VALUES.items():
        name = re.escape(variable) + r"(?![\w.])"
        patterns = (rf"{name}\s*[!=]=\s*{_LITERAL}", rf"{_LITERAL}\s*[!=]=\s*(?<![\w.]){name}")
        for pattern in patterns:
            for found in re.finditer(pattern, source):
                _check_value(found, what, known)
        for found in re.finditer(rf"{name}\s+in\s+\[([^\]]*)\]", source):
            for literal in re.finditer(_LITERAL, found[1]):
                _check_value(literal, what, known, found.start(1))
    for found in re.finditer(rf"incident\.klass(?![\w.])\s*[!=]=\s*{_LITERAL}", source):
        word = found[1] if found[1] is not None else found[2]
        if word and re.search(r"incident\.signal\s*==\s*[\"']llm\.errors[\"']", source):
            _check_value(found, "error class", tuple(c.value for c in ErrorClass))


def _check_value(found: re.Match[str], what: str, known: tuple[str, ...], base: int = 0) -> None:
    group = 1 if found[1] is not None else 2
    word = found[group]
    if word not in known:
        raise ConditionError(
            "RB107", f"unknown {what} {word!r}{did_you_mean(word, known)}", base + found.start(group)
        )


_TERM: Final = re.compile(
    rf"\s*({'|'.join(get_args(Measure))})\s*\(\s*(?:\"(to|from)\"|'(to|from)')\s*\)\s*(<=|>=|<|>)"
    r"\s*(\d{1,15}(?:\.\d{1,15})?)(%?)\s*(\*\s*before\s*)?",
    re.ASCII,
)


def compile_expectation(source: str) -> tuple[Term, ...]:
    """What verification expects: comparisons such as `errors("to") < 0.02` or `usd_per_hour("from") < 0.6 * before`, joined by `&&`.

    Kept this small so that "not enough data" is a third answer beside true and false: a general expression could
    turn it into true by negation.

    Raises: ConditionError RB110.
    """
    terms: list[Term] = []
    offset = 0
    for part in source.split("&&"):
        place = offset + len(part) - len(part.lstrip())
        found = _TERM.fullmatch(part)
        if not found:
            raise _unreadable(part.strip(), place)
        measure: Any = found[1]
        of: Any = found[2] or found[3]
        op: Any = found[4]
        bound = float(found[5]) / (100.0 if found[6] else 1.0)
        relative = found[7] is not None
        if measure == "errors" and not relative and not 0.0 < bound <= 1.0:
            raise ConditionError("RB110", f"an error share lies in (0, 1]; {found[5]} does not", place)
        if found[6] and not relative and measure != "errors":
            raise ConditionError(
                "RB110", f"{measure} is no share; write a number, or {found[5]}% * before", place
            )
        terms.append(Term(measure, of, op, bound, relative))
        offset += len(part) + 2
    return tuple(terms)


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


def as_config_error(error: ConditionError, where: str) -> ConfigError:
    return ConfigError(error.what, where=where, code=error.code)
