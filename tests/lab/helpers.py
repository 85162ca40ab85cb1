"""What the lab's tests share."""

from __future__ import annotations

from flyball.core.directives import Directive
from flyball.core.events import Batch, Event, LlmCall
from flyball.lab.sim import Simulator


def stepped(sim: Simulator, seconds: float, step_s: float = 10.0) -> list[Batch]:
    batches: list[Batch] = []
    until = sim.now + seconds
    while sim.now < until:
        batches += sim.step(min(sim.now + step_s, until))
    return batches


def events_of(batches: list[Batch]) -> list[Event]:
    return [e for b in batches for e in b.events]


def calls_of(batches: list[Batch]) -> list[LlmCall]:
    return [e for e in events_of(batches) if isinstance(e, LlmCall)]


def lease(
    kind: str, scope: dict[str, str], start: float, *, lasts_s: float = 1e6, **params: object
) -> Directive:
    return Directive(
        id=f"{kind}-1", kind=kind, scope=scope, params=params, granted_at=start, expires_at=start + lasts_s,  # type: ignore[arg-type]
        incident="INC-1", runbook="test", step="1",
    )  # fmt: skip
