"""The kill switch as a value: what is stopped, and whether it stops a given effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from flyball.core.directives import StopChange
from flyball.core.errors import ConfigError, did_you_mean

SCOPES: Final = ("all", "tenant", "runbook", "action")


def check_scope(scope: str) -> str:
    """`all`, `tenant:NAME`, `runbook:NAME` or `action:KIND`, as it is given.

    Raises: ConfigError, with what would be right.
    """
    kind, _, name = scope.partition(":")
    if scope == "all" or (kind in SCOPES[1:] and name):
        return scope
    if kind in SCOPES[1:]:
        raise ConfigError(f"{scope!r} names no {kind}; write {kind}:NAME")
    raise ConfigError(
        f"{scope!r} is nothing that can be stopped{did_you_mean(kind, SCOPES)}; write all, tenant:NAME, runbook:NAME or action:KIND"
    )


class Stops(msgspec.Struct):
    """What is stopped now, by scope. Recovery is never asked about it."""

    live: dict[str, StopChange] = {}

    def take(self, change: StopChange) -> None:
        if change.change == "stop":
            self.live.setdefault(change.scope, change)
        elif change.change == "resume":
            self.live.pop(change.scope, None)

    def against(
        self, runbook: str, actions: Iterable[str] = (), scopes: Iterable[Mapping[str, str]] = ()
    ) -> StopChange | None:
        """The stop that forbids what this runbook wants to do with these actions in these scopes; None when none does.

        A stop for a tenant forbids what is aimed at that tenant. What is aimed wider goes on without it: see `exempt`.
        """
        wanted = ["all", f"runbook:{runbook}", *(f"action:{a}" for a in actions)]
        wanted += [f"tenant:{scope['tenant']}" for scope in scopes if "tenant" in scope]
        return next((self.live[scope] for scope in wanted if scope in self.live), None)

    def exempt(self) -> tuple[dict[str, str], ...]:
        """Scopes that no directive may apply to."""
        names = sorted(s.partition(":")[2] for s in self.live if s.startswith("tenant:"))
        return tuple({"tenant": name} for name in names)
