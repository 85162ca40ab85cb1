"""Rehearsals: what a runbook's test says is read here, and what came of it is held against what was expected. Pure.

    - {lab: outage(provider="b", fails=0.6, gateway="deaf"), expect: [run, unverified, undone]}

What is wrong in the lab is a fault with its arguments, and options that every fault takes: how the gateway and the hooks take what
they are told, what people do. Nothing of it is evaluated: it is read as a call with literal arguments, and checked name by name.

Codes: RB121 no such fault, or it cannot be read; RB122 an argument that is unknown, missing or wrong.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from flyball.core.directives import Decision, DirectiveChange, Outcome, Verdict
from flyball.core.errors import ConfigError, did_you_mean
from flyball.core.plans import MODES, Mode, parse_duration
from flyball.core.stops import check_scope

Value = str | int | float | bool
Kind = Literal["name", "share", "times", "number", "duration", "flag", "stop"]


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a fault. `one_of`: the only words it takes; `default` None: it must be given."""

    kind: Kind
    default: Value | None = None
    one_of: tuple[str, ...] = ()
    says: str = ""


_PROVIDER: Final = Argument("name", "b", says="a, b or c")
_OTHERS: Final = Argument(
    "share", 0.0, says="share of the other providers' calls that has failed for two minutes before"
)
FAULTS: Final[Mapping[str, Mapping[str, Argument]]] = {
    "quiet": {},
    "outage": {
        "provider": _PROVIDER,
        "fails": Argument("share", 0.6, says="share of its calls"),
        "model": Argument("name", "", says="only this model"),
        "on": Argument("duration", "0s", says="with `off`: comes and goes"),
        "off": Argument("duration", "0s"),
        "others": _OTHERS,
        "all_providers": Argument(
            "flag", False, says="the same as others=0.06: nobody is well enough to take over"
        ),
    },
    "egress": {"fails": Argument("share", 0.95, says="share of all calls: our own way out is broken")},
    "rate_limit": {
        "provider": _PROVIDER,
        "refuses": Argument("share", 0.5, says="share of its calls"),
        "others": _OTHERS,
    },
    "quota_exhausted": {"provider": _PROVIDER, "others": _OTHERS},
    "slow": {"provider": _PROVIDER, "times": Argument("times", 4.0), "others": _OTHERS},
    "budget_burn": {"tenant": Argument("name", "t3"), "times": Argument("times", 8.0, says="its calls")},
    "inflation": {
        "prompt": Argument("name", "checkout@4", says="app@version"),
        "times": Argument("times", 2.5, says="input tokens"),
        "output_times": Argument("times", 1.0),
    },
    "loop": {
        "agent": Argument("name", "researcher"),
        "pattern": Argument("name", "repeat", ("repeat", "cycle")),
    },
    "look_alike": {
        "agent": Argument("name", "researcher"),
        "pattern": Argument("name", "pages", ("pages", "polls", "retests")),
    },
    "retry_storm": {"app": Argument("name", "checkout"), "fails": Argument("share", 0.75)},
    "bad_key": {"tenant": Argument("name", "t9")},
    "gpu_xid": {
        "gpu": Argument("name", "node-1/gpu-3"),
        "xid": Argument("number", 79),
        "fails": Argument("share", 0.4, says="share of its server's calls"),
    },
}
"""What can go wrong, and with which arguments."""

OPTIONS: Final[Mapping[str, Argument]] = {
    "lasts": Argument("duration", "4m", says="how long the fault stays"),
    "seed": Argument("number", 1, says="another seed is another day"),
    "rate": Argument("number", 20, says="calls a second of the whole estate"),
    "gateway": Argument("name", "well", ("well", "deaf", "half_deaf", "late", "hollow")),
    "target": Argument("name", "holds", ("holds", "collapses"), says="whoever takes over traffic"),
    "hook": Argument("name", "works", ("works", "fails", "half_done", "rejects", "silent")),
    "stopped": Argument("stop", "", says="the kill switch: all, tenant:NAME, runbook:NAME or action:KIND"),
    "mode": Argument("name", "auto", MODES),
    "person": Argument("name", "away", ("away", "approves", "denies"), says="who is asked"),
    "again": Argument("duration", "0s", says="the fault comes again this long after it ended"),
}
"""Arguments of every fault."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What happens in the lab. `given` are the arguments of the fault, those with a default included."""

    fault: str
    given: Mapping[str, Value]
    lasts_s: float = 240.0
    seed: int = 1
    rate: float = 20.0
    gateway: str = "well"
    target: str = "holds"
    hook: str = "works"
    stopped: str = ""
    mode: Mode = "auto"
    person: str = "away"
    again_s: float = 0.0

    def text(self, name: str) -> str:
        return str(self.given[name])

    def number(self, name: str) -> float:
        return float(self.given[name])

    def seconds(self, name: str) -> float:
        return parse_duration(self.given[name])


def parse_scenario(text: str, where: str = "lab") -> Scenario:
    """Reads `outage(provider="b", fails=0.6)`; a bare name as argument is a flag: `outage(all_providers)`.

    Raises: ConfigError with code RB121 or RB122, and what would be right.

    >>> parse_scenario("quota_exhausted(provider='c')").given
    {'provider': 'c'}
    """
    name, written = _read(text, where)
    if name not in FAULTS:
        raise ConfigError(
            f"no fault {name!r} in the lab{did_you_mean(name, FAULTS)}", where=where, code="RB121"
        )
    known = {**FAULTS[name], **OPTIONS}
    for given in written:
        if given not in known:
            raise ConfigError(
                f"{name} takes no {given!r}{did_you_mean(given, known)}", where=where, code="RB122"
            )
    values: dict[str, Value] = {}
    for arg, described in known.items():
        value = written.get(arg, described.default)
        if value is None:
            raise ConfigError(f"{name} needs {arg}", where=where, code="RB122")
        try:
            values[arg] = _checked(value, described)
        except (ValueError, ConfigError) as e:
            raise ConfigError(f"{arg}: {e}", where=where, code="RB122") from e
    mode: Mode = next(m for m in MODES if m == values["mode"])
    return Scenario(
        fault=name,
        given={arg: values[arg] for arg in FAULTS[name]},
        lasts_s=parse_duration(values["lasts"]),
        seed=int(values["seed"]),
        rate=float(values["rate"]),
        gateway=str(values["gateway"]),
        target=str(values["target"]),
        hook=str(values["hook"]),
        stopped=str(values["stopped"]),
        mode=mode,
        person=str(values["person"]),
        again_s=parse_duration(values["again"]),
    )


def _read(text: str, where: str) -> tuple[str, dict[str, Value]]:
    right = 'write for example outage(provider="b", fails=0.6)'
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise ConfigError(f"{text[:60]!r} cannot be read; {right}", where=where, code="RB121") from e
    if isinstance(tree, ast.Name):
        return tree.id, {}
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        raise ConfigError(f"{text[:60]!r} is no fault of the lab; {right}", where=where, code="RB121")
    values: dict[str, Value] = {}
    for flag in tree.args:
        if not isinstance(flag, ast.Name):
            what = f"an argument without a name is a flag such as all_providers; {right}"
            raise ConfigError(what, where=where, code="RB122")
        values[flag.id] = True
    for keyword in tree.keywords:
        if keyword.arg is None:
            raise ConfigError(f"** is not read here; {right}", where=where, code="RB122")
        try:
            value = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, RecursionError) as e:
            what = f"{keyword.arg} is no plain text or number; quote names: {right}"
            raise ConfigError(what, where=where, code="RB122") from e
        if not isinstance(value, str | int | float):
            raise ConfigError(f"{keyword.arg} is no plain text or number", where=where, code="RB122")
        values[keyword.arg] = value
    return tree.func.id, values


def _checked(value: Value, described: Argument) -> Value:
    """Raises: ValueError or ConfigError, with what would be right."""
    if described.kind in ("name", "stop"):
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is no text; write it in quotes")
        if described.one_of and value not in described.one_of:
            raise ValueError(f"{value[:40]!r} is none of {', '.join(described.one_of)}")
        return check_scope(value) if described.kind == "stop" and value else value
    if described.kind == "duration":
        parse_duration(value)
        return value
    if described.kind == "flag":
        if not isinstance(value, bool):
            raise ValueError("write the bare word")
        return value
    if isinstance(value, bool | str):
        raise ValueError(f"{value!r} is no number")
    low, high = {"share": (0.0, 1.0), "times": (0.1, 1000.0), "number": (0.0, 1e9)}[described.kind]
    if not low <= value <= high:
        raise ValueError(f"{value:g} does not lie between {low:g} and {high:g}")
    return value


# --- what came ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Happening:
    """One word of what came, as `expect` writes it, with its reason."""

    at: float
    word: str
    reason: str = ""
    detail: str = ""

    def fits(self, expected: str) -> bool:
        word, _, reason = expected.rstrip(")").partition("(")
        return self.word == word and reason in ("", self.reason)

    def __str__(self) -> str:
        return f"{self.word}({self.reason})" if self.reason else self.word


def happening_of(item: Decision | DirectiveChange | Outcome, at: float) -> Happening | None:
    """What `expect` calls it; None for what it has no word for."""
    if isinstance(item, Decision):
        return Happening(at, item.decision.value, item.reason, item.detail)
    if isinstance(item, DirectiveChange):
        return Happening(at, "granted", item.reason) if item.change == "granted" else None
    if item.result == "applied":
        return Happening(at, "in_force" if item.reason == "in_force" else "applied", item.reason)
    return Happening(at, item.result, item.reason)


_ACTED: Final = frozenset({Verdict.RUN.value, "granted", "in_force", "applied"})
_EFFECTS: Final = frozenset(
    {"run", "granted", "in_force", "verified", "unverified", "failed", "undone", "released", "expired", "cancelled",
     "waiting", "ambiguous", "not_accepted"}
)  # fmt: skip
_BAD: Final = frozenset({"unverified", "failed", "ambiguous", "undone"})


@dataclass(frozen=True, slots=True)
class Match:
    """How far what was expected has come. `missing`: the first word that did not come; `unwanted`: what must not have come."""

    found: int
    missing: str = ""
    unwanted: str = ""
    used: tuple[Happening, ...] = field(default=())

    @property
    def complete(self) -> bool:
        return not self.missing and not self.unwanted


def match(expect: Sequence[str], came: Sequence[Happening]) -> Match:
    """Whether the expected words came in their order; others may lie between them.

    What a test does not expect must not come where it would be a surprise: an action where none is expected; after everything
    that was expected, a failure. `nothing` is met when nothing was done or suggested, for whatever reason.

    >>> match(["run"], [Happening(1.0, "hold", "cooldown")]).missing
    'run'
    """
    wanted = [w for w in expect if w != "nothing"]
    used: list[Happening] = []
    position = 0
    for word in wanted:
        while position < len(came) and not came[position].fits(word):
            position += 1
        if position == len(came):
            return Match(len(used), missing=word, used=tuple(used), unwanted=_unwanted(expect, came))
        used.append(came[position])
        position += 1
    return Match(len(used), unwanted=_unwanted(expect, came), used=tuple(used))


def _unwanted(expect: Sequence[str], came: Sequence[Happening]) -> str:
    words = [w.partition("(")[0] for w in expect]
    if "nothing" in words:
        surprise = next((h for h in came if h.word in _ACTED or h.word == "suggest"), None)
    elif not _EFFECTS.intersection(words):
        surprise = next((h for h in came if h.word in _ACTED), None)
    elif "verified" in words and not _BAD.intersection(words):
        last = max((i for i, h in enumerate(came) if h.word == "verified"), default=-1)
        surprise = next((h for h in came[last + 1 :] if h.word in _BAD), None) if last >= 0 else None
    else:
        surprise = None
    return str(surprise) if surprise is not None else ""


def settles_early(expect: Sequence[str]) -> bool:
    """Whether a test is over as soon as its words have come; one that expects restraint must be watched to its end."""
    words = [w.partition("(")[0] for w in expect]
    return bool(_EFFECTS.intersection(words)) and "nothing" not in words
