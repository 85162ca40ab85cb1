"""A governor small enough to check by eye: the lab's tests must not depend on the real one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec

from flyball.core.directives import Directive, DirectiveChange, Enforced
from flyball.core.entities import Entity
from flyball.core.errorclass import NOT_ATTEMPTS
from flyball.core.estate import Emissions
from flyball.core.events import AgentStep, Batch, GpuSample, LlmCall
from flyball.core.ids import short_id
from flyball.core.incident import Incident, IncidentChange, Severity, State

WINDOW_S = 10.0
WAIT_S = 8.0


class SimpleGovernor:
    """Opens an incident where a provider or tenant fails more than 30 % of at least 12 calls in 10 s, a run repeats
    itself twelve times, or a GPU says XID 79; moves calls away from a failing provider when `acts`."""

    def __init__(self, acts: bool = False) -> None:
        self.acts = acts
        self.ticks: list[float] = []
        self.reports: list[Enforced] = []
        self.batches: list[Batch] = []
        self._calls: list[LlmCall] = []
        self._repeats: dict[str, tuple[str, int]] = {}
        self._open: dict[Entity, Incident] = {}
        self._leases: dict[str, Directive] = {}

    def feed(self, batch: Batch) -> Emissions:
        said = Emissions()
        self.batches.append(batch)
        for event in batch.events:
            if isinstance(event, LlmCall):
                self._calls.append(event)
            elif isinstance(event, AgentStep):
                what = event.args_hash + event.result_hash
                last, n = self._repeats.get(event.run, ("", 0))
                self._repeats[event.run] = (what, n + 1 if what == last else 1)
                if self._repeats[event.run][1] >= 12:
                    self._opened(said, Entity("run", event.run), event.at, "agent.loop", "repeat")
            elif isinstance(event, GpuSample) and event.values.get("xid") == 79:
                self._opened(said, Entity("gpu", event.gpu), event.at, "gpu.fault", "79")
        return said

    def enforced(self, report: Enforced) -> Emissions:
        self.reports.append(report)
        return Emissions()

    def tick(self, now: float) -> Emissions:
        said = Emissions()
        self.ticks.append(now)
        end = (now - WAIT_S) // WINDOW_S * WINDOW_S
        for kind in ("provider", "tenant"):
            self._judge(said, kind, end)
        self._calls = [c for c in self._calls if c.at >= end]
        for lease in [d for d in self._leases.values() if d.expires_at <= now]:
            del self._leases[lease.id]
            said.directives.append(DirectiveChange(directive=lease, at=now, change="expired", reason="time"))
        return said

    def _judge(self, said: Emissions, kind: str, end: float) -> None:
        found: dict[str, list[LlmCall]] = defaultdict(list)
        for call in self._calls:
            if call.at < end and call.error not in NOT_ATTEMPTS:
                found[getattr(call, kind)].append(call)
        for name, calls in sorted(found.items()):
            failed = [c.error for c in calls if c.error and c.error != "rate_limited"]
            if len(calls) < 12 or len(failed) < 0.3 * len(calls) or not name:
                continue
            root = Entity(kind, name)
            if kind == "tenant" and set(failed) != {"auth"}:
                continue
            if kind == "provider" and len({c.tenant for c in calls if c.error}) < 2:
                continue
            if self._opened(said, root, end, "llm.errors", max(set(failed), key=failed.count)) and self.acts:
                self._grant(said, root, end)

    def _opened(self, said: Emissions, root: Entity, at: float, signal: str, klass: str) -> bool:
        if root in self._open:
            return False
        made = Incident(
            id=short_id("INC", str(root), at), at=at, since=at, updated_at=at, root=root, signal=signal, klass=klass,
            severity=Severity.HIGH, state=State.OPEN, page=True,
        )  # fmt: skip
        self._open[root] = made
        said.changes.append(
            IncidentChange(incident=made, at=at, old="", new="open", reason="opened", notify=True)
        )
        return True

    def _grant(self, said: Emissions, root: Entity, at: float) -> None:
        to = "a" if root.name != "a" else "c"
        lease = Directive(
            id=short_id("DIR", str(root), at), kind="redirect", scope={root.label: root.name},
            params={"to": {"provider": to}, "share": 1.0}, granted_at=at, expires_at=at + 120.0, incident="INC",
            runbook="provider-failover", step="redirect",
        )  # fmt: skip
        self._leases[lease.id] = lease
        said.directives.append(
            DirectiveChange(directive=lease, at=at, change="granted", reason="when_matched")
        )

    def directives(self) -> Sequence[Directive]:
        return [self._leases[i] for i in sorted(self._leases)]


def watching() -> SimpleGovernor:
    return SimpleGovernor()


def acting() -> SimpleGovernor:
    return SimpleGovernor(acts=True)


def encoded(batches: Sequence[Batch]) -> bytes:
    """Every byte of what was delivered, for comparing two runs."""
    return msgspec.json.encode([(b.sender, b.received_at, list(b.events)) for b in batches])
