"""What directives mean for one call: matching by scope, shares by stable hash. Pure; standard library only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


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


@dataclass(frozen=True, slots=True)
class Effect:
    """What is to be done with one call.

    labels: where it goes: its own labels, changed by redirects. applied: ids of the directives that had a part in it.
    """

    labels: dict[str, str]
    applied: tuple[str, ...] = ()
    redirected: bool = False
    why: dict[str, str] = field(default_factory=dict)
    """directive id → what it did, for logs."""


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


def apply(
    directives: Iterable[DirectiveLike], labels: Mapping[str, str], key: str, now: float | None = None
) -> Effect:
    """What the live directives make of one call.

    A call is redirected at most once: two redirects that lead to each other cannot send it in a circle. Where
    several match, the one with the most specific scope acts, then the smallest id.

    Args:
        directives: those that are held; expired ones are skipped when `now` is given.
        labels: of the call, as base labels: `{"provider": "b", "model": …, "app": …}`.
        key: what shares are chosen by: the session or run where there is one, else the call's own id.
    """
    found = [
        d
        for d in directives
        if d.kind == "redirect" and (now is None or d.expires_at > now) and matches(d.scope, labels)
    ]
    for directive in sorted(found, key=lambda d: (-len(d.scope), d.id)):
        to, share = directive.params.get("to"), directive.params.get("share", 1.0)
        if not isinstance(to, Mapping) or not to or not isinstance(share, int | float):
            continue  # not understood is not obeyed: the call goes where it would have gone
        if chosen(directive.id, float(share), key):
            target = {**labels, **{str(k): str(v) for k, v in to.items()}}
            text = ",".join(f"{k}={v}" for k, v in sorted(to.items()))
            return Effect(target, (directive.id,), True, {directive.id: f"redirect to {text}"})
    return Effect(dict(labels))
