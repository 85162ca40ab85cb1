"""What compiles and still cannot be meant: values that never occur, labels that nothing carries, conditions that are never true.

CEL's type checker refuses unknown names and types that do not fit. These checks refuse the rest of what would silently never
(or always) match: a misspelt signal or label, a share written as a percentage, a duration or pattern that CEL cannot read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from cel_expr_python import cel

from flyball.core.columns import BASE_LABELS
from flyball.core.entities import ENTITY_KINDS
from flyball.core.errorclass import CLASSES
from flyball.core.errors import did_you_mean
from flyball.core.incident import Severity, State
from flyball.core.plans import format_duration
from flyball.runbooks.cel_tree import Expr
from flyball.runbooks.estate import KEEP_S

SIGNALS: Final[tuple[str, ...]] = (
    "llm.errors", "llm.input_tokens", "llm.output_tokens", "llm.latency", "llm.ttft", "llm.cost", "llm.cache", "llm.retries",
    "agent.loop", "agent.spend", "agent.context", "agent.fan_out", "gpu.fault", "gpu.throttle", "serving.queue",
    "serving.kv_cache", "serving.preemptions", "serving.ttft", "stream.silent", "stream.poison",
)  # fmt: skip
"""Signals that a condition may be compared with; `Anomaly.signal` documents them (a test holds the two together)."""

SCOPE_LABELS: Final[tuple[str, ...]] = (
    *BASE_LABELS, "run", "tool", "gpu", "node", "pod", "namespace", "hardware", "key", "sender",
)  # fmt: skip
"""Labels that an incident's scope can have."""

FUNCTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "errors": BASE_LABELS,
    "calls": (*BASE_LABELS, "run"),
    "attempts": (*BASE_LABELS, "run"),
    "tokens_per_min": BASE_LABELS,
    "usd_per_hour": BASE_LABELS,
    "latency_s": BASE_LABELS,
}
"""Functions over live traffic, with the labels that their scope may have: others are carried by no window."""

_WORDS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "incident.signal": ("signal", SIGNALS),
    "incident.root.kind": ("root kind", ENTITY_KINDS),
    "incident.state": ("state", tuple(s.value for s in State)),
}
_LEVELS: Final[dict[str, int]] = {s.name: int(s) for s in Severity}
_RANGES: Final[dict[str, tuple[float, float]]] = {
    "incident.severity": (min(_LEVELS.values()), max(_LEVELS.values())),
    "incident.confidence": (0.0, 1.0),
    "incident.impact.failed_ratio_now": (0.0, 1.0),
    "incident.impact.failed_ratio_baseline": (0.0, 1.0),
    "errors": (0.0, 1.0),
}
"""What a number can be; all others are at least zero."""

_SPAN: Final = re.compile(r"(?:\d{1,9}(?:\.\d{1,9})?(?:ms|s|m|h))+", re.ASCII)
_SPAN_PART: Final = re.compile(r"([\d.]+)(ms|s|m|h)")
_UNIT_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_MIRROR: Final = {"_<_": "_>_", "_<=_": "_>=_", "_>_": "_<_", "_>=_": "_<=_", "_==_": "_==_", "_!=_": "_!=_"}


class ConditionError(Exception):
    """A condition that cannot be compiled. `offset` is the character it begins at."""

    def __init__(self, code: str, what: str, offset: int) -> None:
        self.code, self.what, self.offset = code, what, offset
        super().__init__(what)


def check_meaning(root: Expr, params: Mapping[str, Any]) -> None:
    """Raises: ConditionError: RB107 a value or label that never occurs; RB115 never or always true; RB119 a duration or
    pattern that cannot be read."""
    parts = list(root.walk())
    for part in parts:
        _check_part(part)
    if not any((p.kind == "name" and p.name.startswith("incident.")) or p.name in FUNCTIONS for p in parts):
        raise ConditionError(
            "RB115",
            "the same for every incident; say which it is for, by incident.signal or incident.root.kind",
            0,
        )
    _check_conjunction(root, params, errors_only=False)


# --- single parts --------------------------------------------------------------------------------------------------


def _check_part(part: Expr) -> None:
    if part.kind == "select" and part.args[0].name == "incident.scope":
        # Of `has(incident.scope.x)` CEL tells the place of `has`; the name before it is told at its last dot.
        _check_word(part.name, "label", SCOPE_LABELS, part.args[0], len(".scope."))
    if part.kind != "call":
        return
    if part.name == "_[_]" and part.args[0].name == "incident.scope":
        _check_constant(part.args[1], "label", SCOPE_LABELS)
    elif part.name == "@in":
        _check_membership(*part.args)
    elif part.name in FUNCTIONS:
        _check_question(part)
    elif part.name == "duration":
        _span_s(part.args[0])
    elif part.name == "matches":
        _check_pattern(part.args[1])
    elif part.name in ("_==_", "_!=_"):
        for left, right in (part.args, part.args[::-1]):
            if left.kind == "name" and left.name in _WORDS:
                _check_constant(right, *_WORDS[left.name])


def _check_word(word: str, what: str, known: tuple[str, ...], at: Expr, shift: int = 1) -> None:
    if word not in known:
        hint = did_you_mean(word, known)
        raise ConditionError("RB107", f"unknown {what} {word[:60]!r}{hint}", at.offset + shift)


def _check_constant(part: Expr, what: str, known: tuple[str, ...]) -> None:
    if part.kind == "constant" and isinstance(part.value, str):
        _check_word(part.value, what, known, part)


def _check_membership(item: Expr, container: Expr) -> None:
    if container.name == "incident.scope":
        _check_constant(item, "label", SCOPE_LABELS)
    if container.kind != "list":
        return
    if not container.args:
        raise ConditionError("RB115", "nothing is in an empty list; name what may match", container.offset)
    for word in container.args:
        if item.name in _WORDS:
            _check_constant(word, *_WORDS[item.name])


def _check_question(call: Expr) -> None:
    """`errors({"provider": …}, duration("2m"))`: labels that windows carry, a span that they reach back."""
    scope, span = call.args
    if scope.kind == "map":
        for key in scope.args[::2]:
            _check_constant(key, "label", FUNCTIONS[call.name])
    if span.kind == "call" and span.name == "duration" and (seconds := _span_s(span.args[0])) is not None:
        if seconds <= 0.0:
            raise ConditionError("RB119", "a span over no time; write for example 2m", span.args[0].offset)
        if seconds > KEEP_S:
            what = f"live traffic reaches back {format_duration(KEEP_S)}; ask about at most that"
            raise ConditionError("RB119", what, span.args[0].offset)


def _span_s(part: Expr) -> float | None:
    """Seconds of a literal duration; None when it is not literal."""
    if part.kind != "constant" or not isinstance(part.value, str):
        return None
    if not _SPAN.fullmatch(part.value):
        days = (
            "; CEL knows no days, write hours"
            if part.value.endswith("d")
            else "; write for example 30s or 2m"
        )
        raise ConditionError("RB119", f"{part.value[:40]!r} is not a duration{days}", part.offset + 1)
    return sum(float(n) * _UNIT_S[unit] for n, unit in _SPAN_PART.findall(part.value))


@lru_cache(maxsize=1)
def _matcher() -> Any:
    return cel.NewEnv(variables={"pattern": cel.Type.STRING}).compile('"".matches(pattern)')


def _check_pattern(part: Expr) -> None:
    """By CEL's own regular expressions (RE2), which are not Python's."""
    if part.kind != "constant" or not isinstance(part.value, str):
        return
    said = _matcher().eval(data={"pattern": part.value}).value()
    if not isinstance(said, bool):
        why = str(said).rpartition("invalid regular expression: ")[2].split("\n")[0][:80]
        raise ConditionError(
            "RB119", f"a pattern that cannot be read ({why}); write an RE2 pattern", part.offset + 1
        )


# --- what must hold together ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Bounds:
    """What one subject may still be, under the comparisons read so far."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    words: frozenset[Any] | None = None
    not_words: set[Any] = field(default_factory=set)

    def number(self, op: str, bound: float) -> bool:
        """Narrows; False when nothing is left."""
        if op in ("_>_", "_>=_", "_==_") and (bound, op == "_>_") > (self.low, self.low_open):
            self.low, self.low_open = bound, op == "_>_"
        if op in ("_<_", "_<=_", "_==_") and (bound, op != "_<_") < (self.high, not self.high_open):
            self.high, self.high_open = bound, op == "_<_"
        return self.low < self.high or (self.low == self.high and not (self.low_open or self.high_open))

    def among(self, allowed: frozenset[Any]) -> bool:
        self.words = allowed if self.words is None else self.words & allowed
        return bool(self.words - self.not_words)

    def excluded(self, word: Any) -> bool:
        self.not_words.add(word)
        return self.words is None or bool(self.words - self.not_words)


def _check_conjunction(root: Expr, params: Mapping[str, Any], errors_only: bool) -> None:
    """Everything that is joined by `&&` at this level must be able to hold at once; each branch of an `||` on its own.

    errors_only: whether all this stands beside `incident.signal == "llm.errors"`, where `klass` is an error class.
    """
    conditions = _flat(root, "_&&_")
    comparisons = [c for part in conditions if (c := _comparison(part, params)) is not None]
    errors_only = errors_only or any(
        c.subject == "incident.signal" and c.op in ("_==_", "@in") and set(c.values) == {"llm.errors"}
        for c in comparisons
    )
    known: dict[str, _Bounds] = {}
    for c in comparisons:
        if errors_only and c.subject == "incident.klass":
            for word, part in zip(c.values, c.parts, strict=True):
                _check_word(str(word), "error class", CLASSES, part)
        _narrow(known, c)
    for condition in conditions:
        for branch in _flat(condition, "_||_") if condition.name == "_||_" else ():
            _check_conjunction(branch, params, errors_only)


@dataclass(frozen=True, slots=True)
class _Comparison:
    subject: str
    range: tuple[float, float]
    op: str
    values: tuple[Any, ...]
    parts: tuple[Expr, ...]


def _narrow(known: dict[str, _Bounds], c: _Comparison) -> None:
    bounds = known.setdefault(c.subject, _Bounds())
    numbers = [v for v in c.values if isinstance(v, int | float) and not isinstance(v, bool)]
    if c.op == "@in" or (c.op == "_==_" and not numbers):
        possible = bounds.among(frozenset(c.values))
    elif c.op == "_!=_":
        possible = bounds.excluded(c.values[0])
    elif numbers:
        _check_range(c, numbers[0])
        possible = bounds.number(c.op, numbers[0])
    else:
        return
    if not possible:
        about = c.subject.partition("(")[0]
        what = f"never true together with what is said of {about} before; join alternatives by ||"
        raise ConditionError("RB115", what, c.parts[0].offset)


def _check_range(c: _Comparison, number: float) -> None:
    """A bound that the value can never reach, such as a share over 1."""
    low, high = c.range
    never = not _Bounds(low, high).number(c.op, number)
    about = c.subject.partition("(")[0]
    if never and high == 1.0 and number > 1.0:
        what = f"{about} is a share from 0 to 1; write {number / 100:g} for {number:g} %"
    elif never and c.subject == "incident.severity":
        what = f"this is never true; a severity is one of {', '.join(_LEVELS)}"
    elif never:
        what = (
            f"{c.subject} is never {'below' if number <= low else 'above'} {low if number <= low else high:g}"
        )
    else:
        return
    raise ConditionError("RB107", what, c.parts[0].offset)


def _flat(root: Expr, operator: str) -> list[Expr]:
    if root.name != operator:
        return [root]
    return [part for arg in root.args for part in _flat(arg, operator)]


def _comparison(part: Expr, params: Mapping[str, Any]) -> _Comparison | None:
    """`subject OP constant`, either way round, or `subject in [constants]`; None for anything else."""
    if part.kind != "call" or len(part.args) != 2:
        return None
    left, right = part.args
    if part.name == "@in" and right.kind == "list":
        values = [_value(v, params) for v in right.args]
        if _subject(left) and all(v is not None for v in values):
            return _Comparison(left.text(), _range_of(left), "@in", tuple(values), right.args)
        return None
    if part.name not in _MIRROR:
        return None
    for subject, other, op in ((left, right, part.name), (right, left, _MIRROR[part.name])):
        value = _value(other, params)
        if value is not None and _subject(subject):
            return _Comparison(subject.text(), _range_of(subject), op, (value,), (other,))
    return None


def _subject(part: Expr) -> bool:
    return part.name.startswith("incident.") if part.kind == "name" else part.name in FUNCTIONS


def _value(part: Expr, params: Mapping[str, Any]) -> Any:
    if part.kind == "constant":
        return part.value
    if part.kind != "name":
        return None
    return _LEVELS.get(part.name, params.get(part.name.removeprefix("params.")))


def _range_of(part: Expr) -> tuple[float, float]:
    return _RANGES.get(part.name, (0.0, math.inf))
