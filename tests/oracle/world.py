"""A small world around the real planner and executor: traffic, an enforcement point, a hook, people, and a clock that jumps.

Everything that moves it goes through `give`, as it goes through the log in the runtime; a crash restores an older snapshot
and gives the same records again, which must lead to the same words.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from flyball.core.directives import (
    Approval,
    Decision,
    Directive,
    Enforced,
    Operation,
    OperationReport,
    Release,
    StopChange,
)
from flyball.core.entities import Entity
from flyball.core.estate import Ratio
from flyball.core.incident import Impact, Incident, IncidentChange, RelatedChange, Severity, State
from flyball.core.plans import Plan, Waiting
from flyball.remediation.actions import registry
from flyball.remediation.executor import Executor
from flyball.remediation.points.matching import matches
from flyball.runbooks.loader import RunbookSet, load_texts
from flyball.runbooks.planner import Planner
from tests.oracle.oracle import Oracle, Said, Violation

T0 = 1_700_000_000.0
HOSTILE = ("{{7*7}}", "$(touch /tmp/owned)", "'; drop table ledger; --", "t9\r\nX: y")

_LIMITS = "{cooldown: 2m, runs: 6/1h, attempts: 2, breaker: 3/1h, blast: {traffic: 45%, tenants: 50}}"
TEXTS: Mapping[str, str] = {
    "failover.yaml": f"""
runbook: v1
name: failover
owner: platform
when: incident.root.kind == "provider" && incident.severity >= HIGH
max_age: 3m
mode: auto
limits: {_LIMITS}
steps:
  - redirect: {{from: $incident.root, to: best_healthy, share: [25%, 50%], for: 20m, lease: 3m}}
    verify: {{within: 1m, expect: errors("to") < 0.05, against: untouched}}
""",
    "rival.yaml": f"""
runbook: v1
name: rival
owner: platform
when: incident.root.kind == "provider" && incident.signal == "llm.errors"
max_age: 3m
mode: auto
limits: {_LIMITS}
steps:
  - redirect: {{from: $incident.root, to: best_healthy, share: 50%, for: 20m, lease: 3m}}
    verify: {{within: 1m, expect: errors("to") < 0.05, against: untouched}}
""",
    "throttle.yaml": f"""
runbook: v1
name: throttle
owner: finance
when: incident.root.kind == "tenant"
max_age: 3m
mode: approve
ladder: true
limits: {_LIMITS}
steps:
  - limit: {{scope: $incident.root, requests_per_min: 30, for: 20m, lease: 3m}}
    verify: {{within: 1m, expect: calls_per_min("from") <= 40, against: nothing}}
  - id: harder
    limit: {{scope: $incident.root, requests_per_min: 5, for: 20m, lease: 3m}}
    verify: {{within: 1m, expect: calls_per_min("from") <= 40, against: nothing}}
    approval: {{expires: 5m, on_expire: hold}}
""",
    "stopper.yaml": f"""
runbook: v1
name: stopper
owner: agents
when: incident.root.kind == "run"
max_age: 3m
mode: auto
limits: {_LIMITS}
steps:
  - block: {{scope: $incident.root, for: 20m, lease: 3m}}
    verify: {{within: 1m, expect: calls("from") <= 0, against: nothing}}
""",
    "drain.yaml": """
runbook: v1
name: drain
owner: gpu
when: incident.root.kind == "gpu"
max_age: 3m
mode: auto
limits: {cooldown: 2m, runs: 6/1h, attempts: 2, breaker: 3/1h, blast: {traffic: 45%, gpus: 1, gpu_share: 50%}}
steps:
  - hook: {name: nodes, action: drain, targets: $incident.root, for: 20m, dry_run: false}
    retry: {count: 2, backoff: 5s}
    timeout: 5m
    verify: {within: 1m, expect: errors("from") < 0.5, against: nothing}
""",
}


def runbooks(texts: Mapping[str, str] = TEXTS) -> RunbookSet:
    return load_texts(texts, actions=registry())


@dataclass
class World:
    """Live traffic as the estate shows it; deep-copied with every record, because a crash reads it again."""

    fresh_at: float = T0
    providers: dict[str, tuple[float, float]] = field(
        default_factory=lambda: {"a": (600.0, 0.0), "b": (600.0, 0.0), "c": (300.0, 0.0)}
    )
    """calls a minute, share that fails."""
    tenants: dict[str, float] = field(default_factory=lambda: {f"t{i}": 0.1 for i in range(10)})
    runs: dict[str, float] = field(default_factory=dict)
    gpu_names: tuple[str, ...] = ("n1/g0", "n1/g1", "n2/g0", "n2/g1")
    broken_gpus: bool = False
    held: tuple[Directive, ...] = ()
    """What the enforcement point obeys: what it heard last, without what has expired."""

    # --- core.estate.Estate

    def now(self) -> float:
        return self.fresh_at

    def _per_min(self, scope: Mapping[str, str]) -> tuple[float, float]:
        """Calls a minute and share that fails, as the point leaves it."""
        if "run" in scope:
            blocked = any(d.kind == "block" and matches(d.scope, scope) for d in self.held)
            return (0.0 if blocked else self.runs.get(scope["run"], 0.0)), 0.0
        if "gpu" in scope or "node" in scope:
            return 60.0, 0.9 if self.broken_gpus else 0.0
        flow = {p: rate for p, (rate, _) in self.providers.items()}
        for d in self.held:
            if d.kind == "redirect":
                source, to = d.scope["provider"], d.params["to"]["provider"]
                moved = flow[source] * float(d.params["share"])
                flow[source] -= moved
                flow[to] += moved
        bad = {p: flow[p] * self.providers[p][1] for p in flow}
        if "provider" in scope:
            p = scope["provider"]
            return flow.get(p, 0.0), self.providers.get(p, (0.0, 0.0))[1]
        total = sum(flow.values())
        share = self.tenants.get(scope["tenant"], 0.0) if "tenant" in scope else 1.0
        if scope and "tenant" not in scope:
            return 0.0, 0.0
        rate = total * share
        for d in self.held:
            if d.kind == "limit" and matches(d.scope, scope):
                rate = min(rate, float(d.params["requests_per_min"]))
        return rate, sum(bad.values()) / total if total else 0.0

    def errors(self, scope: Mapping[str, str], span_s: float) -> Ratio:
        rate, share = self._per_min(scope)
        n = int(rate * span_s / 60.0)
        return Ratio(round(n * share), n)

    def calls(self, scope: Mapping[str, str], span_s: float) -> int:
        return self.errors(scope, span_s).n

    attempts = calls

    def values(self, label: str, scope: Mapping[str, str], span_s: float) -> Sequence[str]:
        if label == "provider":
            return [scope["provider"]] if "provider" in scope else sorted(self.providers)
        if label == "tenant":
            return [scope["tenant"]] if "tenant" in scope else sorted(self.tenants)
        return ["m"] if label in ("model", "app") else []

    def usd_per_hour(self, scope: Mapping[str, str], span_s: float) -> float | None:
        return self._per_min(scope)[0] * 0.6

    def tokens_per_min(self, scope: Mapping[str, str], span_s: float) -> float | None:
        return self._per_min(scope)[0] * 1000.0

    def latency_s(self, scope: Mapping[str, str], span_s: float) -> float | None:
        return 1.0 if self._per_min(scope)[0] else None

    def gpus(self, scope: Mapping[str, str], span_s: float) -> Sequence[str]:
        if "gpu" in scope:
            return [g for g in self.gpu_names if scope["gpu"] in (g, g.partition("/")[2])]
        return [g for g in self.gpu_names if scope.get("node", g.partition("/")[0]) == g.partition("/")[0]]


@dataclass(frozen=True)
class Record:
    """One input as the log would hold it, and what it led to."""

    item: Any
    now: float
    delayed: bool
    world: World
    said: tuple[Said, ...]


class Rig:
    """Planner and executor, wired as the pipeline wires them, with a judge beside them."""

    def __init__(
        self,
        *,
        ceiling: str = "auto",
        texts: Mapping[str, str] = TEXTS,
        planner: Callable[[RunbookSet, str], Planner] = Planner,
        executor: Callable[[], Executor] = Executor,
    ) -> None:
        self.books = runbooks(texts)
        self._make = (lambda: planner(self.books, ceiling), executor)
        self.planner, self.executor = self._make[0](), self._make[1]()
        self.oracle = Oracle(self.books, HOSTILE)
        self.world = World()
        self.now = T0 + 600.0
        self.world.fresh_at = self.now
        self.silent = False
        self.delayed = False
        """Whether plans wait on their way to the executor, until `hand_over`."""
        self.under_way: list[Plan] = []
        self.incidents: dict[str, Incident] = {}
        self.queue: list[Operation] = []
        self.started: dict[str, int] = {}
        """Operation id → how often the hook began it."""
        self._saved = (self.planner.snapshot(), self.executor.snapshot())
        self._journal: list[Record] = []
        self.trace: list[Record] = []

    # --- records ------------------------------------------------------------------------------------------------------

    def give(self, item: Any) -> list[Said]:
        """One record: handled, judged, remembered."""
        self.oracle.told(item, self.waiting(), self.now)
        said = self._handle(item, self.now, self.delayed)
        record = Record(item, self.now, self.delayed, copy.deepcopy(self.world), tuple(said))
        self._journal.append(record)
        self.trace.append(record)
        self.oracle.said(item, said, self.executor.directives(self.now), self.world, self.now)
        self.queue += [s for s in said if isinstance(s, Operation)]
        if self.delayed:
            self.under_way += [s for s in said if isinstance(s, Plan)]
        return said

    def hand_over(self) -> list[Said]:
        """What was under way reaches the executor."""
        plans, self.under_way = self.under_way, []
        return [said for plan in plans for said in self.give(plan)]

    def _handle(self, item: Any, now: float, delayed: bool) -> list[Said]:
        said: list[Said] = []
        planned: list[tuple[Decision, Plan | None]] = []
        moved: list[Any] = []
        if isinstance(item, IncidentChange | Approval | StopChange):
            planned += self.planner.feed([item], self.world, now)
        elif item is None:
            planned += self.planner.tick(now, self.world)
        for decision, plan in planned:
            said.append(decision)
            if plan is not None:
                said.append(plan)
        orders: list[Any] = [plan for _, plan in planned if plan is not None and not delayed]
        if item is not None:
            orders.append(item)
        if orders:
            moved += self.executor.feed(orders, self.world, now)
        if item is None:
            moved += self.executor.tick(now, self.world)
        said += moved
        news = [m for m in moved if not isinstance(m, Operation)]
        if news:
            for decision, plan in self.planner.feed(news, self.world, now):
                said.append(decision)
                if plan is not None:
                    said.append(plan)
        return said

    def waiting(self) -> list[Waiting]:
        return [*self.planner.waiting(self.now), *self.executor.waiting(self.now)]

    # --- what happens -------------------------------------------------------------------------------------------------

    def incident(self, kind: str, name: str, *, actor: str = "", severity: Severity = Severity.HIGH, updated: bool = False) -> list[Said]:  # fmt: skip
        root = Entity(kind, name)
        identity = f"INC-{kind}-{re.sub(r'[^a-z0-9]', '', name)}"  # ids are never made of what events say
        known = self.incidents.get(identity)
        changes = (RelatedChange(self.now - 60.0, "deploy", "a new prompt", actor=actor),) if actor else ()
        if known is not None and known.state is not State.RESOLVED and not updated:
            return self.update(identity)
        signal = {"provider": "llm.errors", "tenant": "llm.cost", "run": "agent.loop", "gpu": "gpu.fault"}[
            kind
        ]
        scope = {root.label: name}
        if kind == "run":
            scope["tenant"] = "t1"
        found = Incident(
            id=identity, at=self.now, since=self.now - 20.0, updated_at=self.now, root=root, signal=signal, klass="overloaded", severity=severity,
            scope=scope, page=True, changes=changes, impact=Impact(usd_per_min_baseline=1.0, usd_per_min_now=9.0),
        )  # fmt: skip
        self.incidents[identity] = found
        return self.give(
            IncidentChange(incident=found, at=self.now, old="", new="open", reason="opened", notify=True)
        )

    def update(self, identity: str) -> list[Said]:
        return self._change(identity, State.OPEN, "still there")

    def resolve(self, identity: str) -> list[Said]:
        return self._change(identity, State.RESOLVED, "over")

    def _change(self, identity: str, state: State, reason: str) -> list[Said]:
        old = self.incidents[identity]
        new = msgspec.structs.replace(old, state=state, updated_at=self.now, revision=old.revision + 1)
        self.incidents[identity] = new
        return self.give(
            IncidentChange(incident=new, at=self.now, old=old.state.value, new=state.value, reason=reason)
        )

    def pass_time(self, seconds: float, *, step: float = 10.0) -> list[Said]:
        """Windows close (unless telemetry is silent), the point lets go by its own clock, and everything is ticked."""
        said: list[Said] = []
        until = self.now + seconds
        while self.now < until:
            self.now = min(self.now + step, until)
            if not self.silent:
                self.world.fresh_at = self.now
            self.world.held = tuple(d for d in self.world.held if d.expires_at > self.now)
            said += self.give(None)
        return said

    def hear(self) -> None:
        """The point reads the set of directives, as the board shows it."""
        exempt = self.oracle.stops.exempt()
        self.world.held = tuple(
            msgspec.structs.replace(d, exempt=exempt) for d in self.executor.directives(self.now)
        )

    def report(self) -> list[Said]:
        counts = {d.id: 1 for d in self.world.held}
        return self.give(Enforced(point="point", at=self.now, directives=counts))

    def obey(self, seconds: float) -> list[Said]:
        """Time passes with a point that hears and reports."""
        said: list[Said] = []
        for _ in range(max(1, int(seconds // 10))):
            self.hear()
            if self.world.held:
                said += self.report()
            said += self.pass_time(10.0)
        return said

    def deliver(self, status: str, *, transient: bool = False) -> list[Said]:
        """The oldest request to the hook goes out and comes back with `status`; one that is no longer wanted is not sent."""
        op = self.queue.pop(0)
        if op.verb == "start" and not self.executor.wanted(op.id):
            status = "not_reached"
        elif op.verb == "start" and status not in ("not_reached", "rejected", "unsupported"):
            self.started[op.id] = self.started.get(op.id, 0) + 1
            if self.started[op.id] > 1:
                raise Violation(7, f"the hook began {op.id} twice")
            if self.now > op.deadline:
                raise Violation(2, f"{op.id} was sent {self.now - op.deadline:.0f} s past its deadline")
        report: Any = OperationReport(id=op.id, verb=op.verb, at=self.now, status=status, attempt=op.attempt, transient=transient)  # type: ignore[arg-type]  # fmt: skip
        return self.give(report)

    def late(self, op: Operation, status: str) -> list[Said]:
        """A report that comes once more, or long after."""
        report: Any = OperationReport(id=op.id, verb=op.verb, at=self.now, status=status, attempt=op.attempt)  # type: ignore[arg-type]  # fmt: skip
        return self.give(report)

    def answer(self, hash_: str, approve: bool, by: str = "kim") -> list[Said]:
        return self.give(Approval(waiting=hash_, approve=approve, by=by, at=self.now))

    def stop(self, scope: str = "all", change: Any = "stop") -> list[Said]:
        return self.give(StopChange(change=change, scope=scope, by="kim", at=self.now))

    def release(self, subject: str = "") -> list[Said]:
        return self.give(Release(subject=subject, by="kim", at=self.now))

    # --- crashes ------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        self._saved = (self.planner.snapshot(), self.executor.snapshot())
        self._journal.clear()

    def crash(self) -> None:
        """`kill -9` and a start: the last snapshot, and the log behind it read again, which must say the same."""
        self.planner, self.executor = self._make[0](), self._make[1]()
        self.planner.restore(self._saved[0])
        self.executor.restore(self._saved[1])
        now_world = self.world
        for record in self._journal:
            self.world = record.world
            again = self._handle(record.item, record.now, record.delayed)
            if tuple(again) != record.said:
                raise Violation(
                    7, f"after a crash {record.item!r} led to {again}, before it to {record.said}"
                )
        self.world = now_world

    # --- the end ------------------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Everything gets well, everybody answers, and a long time passes."""
        self.silent = self.delayed = False
        self.hand_over()
        for scope in list(self.oracle.stops.live):
            self.stop(scope, "resume")
        for identity, found in list(self.incidents.items()):
            if found.state is not State.RESOLVED:
                self.resolve(identity)
        self.world.providers = {p: (rate, 0.0) for p, (rate, _) in self.world.providers.items()}
        self.world.runs = {}
        self.world.broken_gpus = False
        for _ in range(12):
            while self.queue:
                self.deliver("succeeded")
            self.obey(20.0)
            self.pass_time(580.0, step=145.0)
        self.oracle.at_rest(self.executor.directives(self.now), self.waiting(), self.now)
