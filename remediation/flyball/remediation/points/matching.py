"""What directives mean for one call: matching by scope, shares by stable hash, one order. Standard library only.

For every call in this order: `block` (then nothing else is looked at), `limit` (all that match must admit it), `redirect` (at most
one, the most specific), `cap` (on where the call now goes; the tightest of all that match). What is not understood is not obeyed:
the call goes where it would have gone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeGuard

KINDS: Final = frozenset({"block", "limit", "redirect", "cap"})
LIMITS: Final = ("requests_per_min", "tokens_per_min", "usd_per_hour")
"""Params of a limit, in the order in which they are judged."""
_LEAST: Final = 1e-6
_LONGEST_WAIT_S: Final = 3600.0
BLOCKED, LIMITED = 403, 429
_WORDS: Final = {
    "requests_per_min": "requests per minute",
    "tokens_per_min": "tokens per minute",
    "usd_per_hour": "dollars per hour",
}


class DirectiveLike(Protocol):
    """What is read of a directive: `core.directives.Directive` and the client's own `Lease` both are."""

    @property
    def id(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def scope(self) -> dict[str, str]: ...
    @property
    def params(self) -> dict[str, Any]: ...
    @property
    def expires_at(self) -> float: ...
    @property
    def exempt(self) -> tuple[dict[str, str], ...]: ...


class Gate(Protocol):
    """Who keeps count for limits: `points.buckets.Buckets` for one process, or a gateway's own counters."""

    def admit(self, directives: Sequence[DirectiveLike]) -> tuple[str, str, float] | None:
        """Takes one call out of all of them, or out of none.

        Returns: None when it is admitted; else the id of the limit that refuses, which of LIMITS, and seconds to wait.
        """
        ...


@dataclass(slots=True)
class Effect:
    """What is to be done with one call.

    labels: where it goes: its own labels, changed by redirects and caps. applied: ids of the directives that had a part in it.
    refused: why it is stopped, for the caller; empty when it goes on. status: HTTP status of the refusal.
    max_output_tokens: what the call may produce at most; a smaller wish of its own stays.
    charges: limits that are to be charged when its tokens and dollars are known (`PointClient.charge`).
    """

    labels: Mapping[str, str]
    applied: tuple[str, ...] = ()
    redirected: bool = False
    why: Mapping[str, str] = field(default_factory=dict)
    """directive id → what it did, for logs."""
    refused: str = ""
    status: int = 0
    retry_after_s: float = 0.0
    max_output_tokens: int | None = None
    charges: tuple[str, ...] = ()


Reachable = Callable[[Mapping[str, str]], bool]
"""Whether the gateway can send a call to where these labels say. What it cannot do is not done, and not reported as done."""


def matches(scope: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a call carries all labels of a scope. An empty scope matches nothing: it is never "all"."""
    return bool(scope) and all(labels.get(k) == v for k, v in scope.items())


def chosen(directive_id: str, share: float, key: str) -> bool:
    """Whether a call with this key is in the share, the same at every point and after every restart.

    Nested: whoever is in a share of 25 % is also in every larger share of the same directive, so a ramp never
    takes a session back. Different directives choose independently.

    >>> chosen("DIR-1", 1.0, "any"), chosen("DIR-1", 0.0, "any")
    (True, False)
    """
    if share >= 1.0:
        return True
    raw = hashlib.blake2b(f"{directive_id}\x00{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(raw, "big") < share * 2.0**64


class Index:
    """Directives by the labels of their scopes, so that a call meets only those that select it.

    A look-up costs one dictionary access per distinct set of label names among the scopes, however many directives there are.
    """

    __slots__ = ("_many", "_single", "directives")

    def __init__(self, directives: Iterable[DirectiveLike]) -> None:
        self.directives: tuple[DirectiveLike, ...] = tuple(
            sorted((d for d in directives if d.scope), key=lambda d: (-len(d.scope), d.id))
        )
        single: dict[str, dict[str, list[DirectiveLike]]] = {}
        many: dict[tuple[str, ...], dict[tuple[str | None, ...], list[DirectiveLike]]] = {}
        for d in self.directives:
            names = tuple(sorted(d.scope))
            if len(names) == 1:
                single.setdefault(names[0], {}).setdefault(d.scope[names[0]], []).append(d)
            else:
                values = tuple(d.scope[n] for n in names)
                many.setdefault(names, {}).setdefault(values, []).append(d)
        self._single = tuple(single.items())
        self._many = tuple(many.items())

    def matching(self, labels: Mapping[str, str]) -> list[DirectiveLike]:
        """Those whose scope selects the call, the most specific first, then by id."""
        found: list[DirectiveLike] = []
        get = labels.get
        for names, by_values in self._many:
            hit = by_values.get(tuple([get(n) for n in names]))
            if hit:
                found += hit
        for name, by_value in self._single:
            value = get(name)
            if value is not None and (one := by_value.get(value)):
                found += one
        if len(found) > 1:
            found.sort(key=lambda d: (-len(d.scope), d.id))
        return found


def apply(
    directives: Index | Iterable[DirectiveLike],
    labels: Mapping[str, str],
    key: str,
    now: float | None = None,
    *,
    gate: Gate | None = None,
    reachable: Reachable | None = None,
    kinds: Container[str] = KINDS,
) -> Effect:
    """What the live directives make of one call.

    Blocks and limits look at the call as it was asked for, caps at where it goes. A call is redirected at most once: two
    redirects that lead to each other cannot send it in a circle. A directive never applies within its `exempt` scopes.

    Args:
        directives: those that are held; expired ones are skipped when `now` is given.
        labels: of the call, as base labels: `{"provider": "b", "model": …, "app": …}`.
        key: what shares are chosen by: the session or run where there is one, else the call's own id.
        gate: counts for limits; without one no limit is enforced.
        kinds: of directives that are looked at; for a gateway that decides in several places.
    """
    index = directives if isinstance(directives, Index) else Index(directives)
    if not index.directives:
        return Effect(labels)
    found = _selected(index, labels, labels, now, kinds)
    limits = []
    for d in found:
        if d.kind == "block":
            return _blocked(d, labels)
        if d.kind == "limit" and gate is not None and limits_of(d.params):
            limits.append(d)
    if limits and gate is not None:
        over = gate.admit(limits)
        if over is not None:
            return _limited(over, limits, labels)
    effect = Effect(labels, charges=tuple(d.id for d in limits if _is_charged(d.params)))
    _redirect(effect, found, key, reachable)
    if effect.redirected:
        found = _selected(index, effect.labels, labels, now, kinds)
    _cap(effect, [d for d in found if d.kind == "cap"], reachable)
    return effect


def _selected(
    index: Index,
    labels: Mapping[str, str],
    asked: Mapping[str, str],
    now: float | None,
    kinds: Container[str],
) -> list[DirectiveLike]:
    """Who a call is decides on exemptions, wherever it goes: `asked` are its labels before any redirect."""
    return [
        d
        for d in index.matching(labels)
        if d.kind in kinds and (now is None or d.expires_at > now) and not _exempt(d, asked)
    ]


def _exempt(directive: DirectiveLike, labels: Mapping[str, str]) -> bool:
    return bool(directive.exempt) and any(matches(scope, labels) for scope in directive.exempt)


# --- refusals ----------------------------------------------------------------------------------------------------


def _blocked(d: DirectiveLike, labels: Mapping[str, str]) -> Effect:
    reason = d.params.get("reason")
    said = reason if isinstance(reason, str) and reason else f"{_scope_text(d.scope)} is blocked"
    # Flyball's own reader knows these refusals by their first words: they are no failures of a provider.
    text = f"stopped by directive {d.id}: {said[:300]}"
    return Effect(labels, applied=(d.id,), refused=text, status=BLOCKED, why={d.id: "blocked"})


def _limited(
    over: tuple[str, str, float], limits: Sequence[DirectiveLike], labels: Mapping[str, str]
) -> Effect:
    identity, name, wait_s = over
    wait_s = min(wait_s, _LONGEST_WAIT_S)
    scope = next((d.scope for d in limits if d.id == identity), {})
    text = (
        f"stopped by directive {identity}: {_scope_text(scope)} is over its limit of {_WORDS[name]};"
        f" come back in {max(1, math.ceil(wait_s))} s"
    )
    return Effect(
        labels,
        applied=(identity,),
        refused=text,
        status=LIMITED,
        retry_after_s=wait_s,
        why={identity: f"over {name}"},
    )


def _scope_text(scope: Mapping[str, str]) -> str:
    return ",".join(f"{k}={v}" for k, v in sorted(scope.items()))


# --- params ------------------------------------------------------------------------------------------------------


def limits_of(params: Mapping[str, Any]) -> dict[str, float]:
    """The limits that are understood: numbers over zero. A limit of nothing would be a block, and is no limit.

    >>> limits_of({"requests_per_min": 60, "usd_per_hour": 0, "x": 1})
    {'requests_per_min': 60.0}
    """
    found = {}
    for name in LIMITS:
        value = params.get(name)
        if is_number(value) and value >= _LEAST:
            found[name] = float(value)
    return found


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether JSON gave a number that can be reckoned with: neither yes or no, nor endless, nor of 400 digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e15 < value < 1e15


def _is_charged(params: Mapping[str, Any]) -> bool:
    return any(name != "requests_per_min" for name in limits_of(params))


def _redirect(effect: Effect, found: Sequence[DirectiveLike], key: str, reachable: Reachable | None) -> None:
    for d in found:
        if d.kind != "redirect":
            continue
        to, share = d.params.get("to"), d.params.get("share", 1.0)
        if not isinstance(to, Mapping) or not to or not is_number(share):
            continue
        if not chosen(d.id, float(share), key):
            continue
        target = {**effect.labels, **{str(k): str(v) for k, v in to.items()}}
        if reachable is not None and not reachable(target):
            continue
        text = ",".join(f"{k}={v}" for k, v in sorted(to.items()))
        effect.labels, effect.redirected, effect.applied = target, True, (d.id,)
        effect.why = {d.id: f"redirect to {text}"}
        return


def _cap(effect: Effect, caps: Sequence[DirectiveLike], reachable: Reachable | None) -> None:
    """The fewest tokens of all caps; the model of the most specific one that the gateway can send the call to."""
    model = ""
    for d in caps:
        done = []
        tokens, wanted = d.params.get("output_tokens"), d.params.get("model")
        if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 1:
            effect.max_output_tokens = min(tokens, effect.max_output_tokens or tokens)
            done.append(f"at most {tokens} output tokens")
        if isinstance(wanted, str) and wanted and not model and effect.labels.get("model") != wanted:
            target = {**effect.labels, "model": wanted}
            if reachable is None or reachable(target):
                effect.labels, model = target, wanted
                done.append(f"model {wanted}")
        if done:
            effect.applied = (*effect.applied, d.id)
            effect.why = {**effect.why, d.id: "cap to " + " and ".join(done)}
