"""The kill switch where it acts at once: what people stopped, as the writer, the board and the hooks' dispatcher see it.

The stages learn of a stop when they reach its record, which may be a long way behind. Until then, and from the moment at which
the stop is on disk, nothing that the stages still want to begin reaches the world: not a new lease, nor a wider or longer one,
nor a request to a hook. What lets go always passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from flyball.core.directives import Directive, DirectiveChange, Operation, StopChange
from flyball.core.stops import Stops


class Switchboard:
    """What is stopped. Written by the writer's thread after a commit, read from any."""

    def __init__(self, stops: Stops | None = None) -> None:
        self._stops = stops or Stops()

    @property
    def stops(self) -> Stops:
        """Not to be changed: another one takes its place."""
        return self._stops

    def set(self, stops: Stops) -> None:
        self._stops = stops

    def stop_of(self, operation: Operation) -> StopChange | None:
        """What forbids to send this to a hook. A cancel or an undo is never forbidden."""
        if operation.verb != "start":
            return None
        tenants = [t.removeprefix("tenant:") for t in operation.targets if t.startswith("tenant:")]
        return self._stops.against(
            operation.runbook, ("hook", operation.action), [{"tenant": t} for t in tenants]
        )


@dataclass(slots=True)
class Draft:
    """Stops and leases while a transaction is being written.

    Args:
        live: the leases as the stages have them, by id.
        shown: as enforcement points see them, but for expiry and exemptions.
    """

    stops: Stops
    live: dict[str, Directive]
    shown: dict[str, Directive]
    changed: bool = False

    def switch(self, change: StopChange) -> None:
        """A person's word. When it takes back a stop, what was held back is seen."""
        self.changed = True
        stops = Stops(dict(self.stops.live))
        stops.take(change)
        self.stops = stops
        if change.change == "resume":
            for name, directive in self.live.items():
                if not self._stopped(directive):
                    self.shown[name] = directive

    def move(self, moved: DirectiveChange) -> Directive | None:
        """What enforcement points see of a lease after a change: under a stop no new one, and of a live one what they saw before."""
        self.changed = True
        directive, name = moved.directive, moved.directive.id
        if moved.change not in ("granted", "renewed"):
            self.live.pop(name, None)
            self.shown.pop(name, None)
            return None
        self.live[name] = directive
        if not self._stopped(directive):
            self.shown[name] = directive
        return self.shown.get(name)

    def _stopped(self, directive: Directive) -> bool:
        return self.stops.against(directive.runbook, (directive.kind,), (directive.scope,)) is not None


def exempted(directive: Directive, stops: Stops) -> Directive:
    """The lease without the tenants for whom somebody stopped Flyball."""
    tenant = directive.scope.get("tenant")
    more = tuple(
        scope
        for scope in stops.exempt()
        if scope not in directive.exempt and tenant in (None, scope["tenant"])
    )
    return msgspec.structs.replace(directive, exempt=(*directive.exempt, *more)) if more else directive
