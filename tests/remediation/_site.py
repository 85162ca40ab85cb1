"""A site with tenants, enforcement points that obey and a hook that answers as told; and plans to try on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from flyball.core.directives import (
    Approval,
    Directive,
    DirectiveChange,
    Enforced,
    Operation,
    OperationReport,
    Outcome,
    Release,
    StopChange,
)
from flyball.core.entities import Entity
from flyball.core.estate import Ratio
from flyball.core.incident import Incident, IncidentChange, RelatedChange, Severity
from flyball.core.incident import State as IncidentState
from flyball.core.plans import HookCall, Plan, PlanStep, Term, Verify, plan_hash
from flyball.remediation.executor import Executor, Moved, Told

T0 = 1_700_000_000.0
WINDOW_S = 10.0


@dataclass(frozen=True)
class Flow:
    """Calls of one set of labels in one window."""

    labels: Mapping[str, str]
    calls: int
    refused: int = 0
    bad: int = 0
    usd: float | None = None
    tokens: float | None = None
    latency_s: float | None = None


class Facts:
    """An estate of plain rows; any label can be asked for, also `run` and `key`."""

    def __init__(self) -> None:
        self.windows: list[tuple[float, tuple[Flow, ...]]] = []
        self.end = 0.0

    def add(self, end: float, flows: Sequence[Flow]) -> None:
        self.windows.append((end, tuple(flows)))
        self.end = end

    def _rows(self, scope: Mapping[str, str], span_s: float) -> list[Flow]:
        since = self.end - span_s - 1e-6
        found = [f for end, flows in self.windows if end - WINDOW_S >= since for f in flows]
        if not found and self.windows:
            found = list(self.windows[-1][1])
        return [f for f in found if all(f.labels.get(k) == v for k, v in scope.items())]

    def now(self) -> float:
        return self.end

    def calls(self, scope: Mapping[str, str], span_s: float) -> int:
        return sum(f.calls for f in self._rows(scope, span_s))

    def attempts(self, scope: Mapping[str, str], span_s: float) -> int:
        return sum(f.calls - f.refused for f in self._rows(scope, span_s))

    def errors(self, scope: Mapping[str, str], span_s: float) -> Ratio:
        rows = self._rows(scope, span_s)
        return Ratio(sum(f.bad for f in rows), sum(f.calls - f.refused for f in rows))

    def values(self, label: str, scope: Mapping[str, str], span_s: float) -> Sequence[str]:
        return sorted({f.labels[label] for f in self._rows(scope, span_s) if label in f.labels})

    def usd_per_hour(self, scope: Mapping[str, str], span_s: float) -> float | None:
        told = [f.usd for f in self._rows(scope, span_s) if f.usd is not None]
        return sum(told) * 3600.0 / max(span_s, WINDOW_S) if told else None

    def tokens_per_min(self, scope: Mapping[str, str], span_s: float) -> float | None:
        told = [f.tokens for f in self._rows(scope, span_s) if f.tokens is not None]
        return sum(told) * 60.0 / max(span_s, WINDOW_S) if told else None

    def latency_s(self, scope: Mapping[str, str], span_s: float) -> float | None:
        told = [
            (f.latency_s, f.calls - f.refused) for f in self._rows(scope, span_s) if f.latency_s is not None
        ]
        n = sum(calls for _, calls in told)
        return sum(seconds * calls for seconds, calls in told) / n if n else None

    def gpus(self, scope: Mapping[str, str], span_s: float) -> Sequence[str]:
        return []


@dataclass
class Customer:
    """What one set of labels asks for in a window, and what a call of it costs."""

    labels: dict[str, str]
    calls: int
    usd: float = 0.01
    tokens: float = 100.0
    fails: float = 0.0
    latency_s: float = 1.0


class Site:
    """Customers, an executor, points that obey and report, and a hook whose requests pile up in `sent`.

    `run` lets whole windows pass; `log` holds everything the executor said.
    """

    def __init__(self, *customers: Customer, executor: Executor | None = None, **more: Any) -> None:
        self.customers = list(customers) or [tenant("t1", 60), tenant("t2", 60)]
        self.executor = executor if executor is not None else Executor()
        self.facts = Facts()
        self.now = T0
        self.obeys: bool = more.get("obeys", True)
        self.reports: bool = more.get("reports", True)
        self.log: list[Moved] = []
        self.sent: list[Operation] = []
        self._pass(6)

    # --- time and news

    def feed(self, *items: Told) -> list[Moved]:
        return self._heard(self.executor.feed(items, self.facts, self.now))

    def run(self, windows: int) -> list[Moved]:
        said: list[Moved] = []
        for _ in range(windows):
            applied = self._pass(1)
            if self.reports and applied:
                said += self.feed(Enforced(point="gw", at=self.now, directives=applied))
            said += self.tick()
        return said

    def tick(self, later_s: float = 0.0) -> list[Moved]:
        self.now += later_s
        return self._heard(self.executor.tick(self.now, self.facts))

    def order(self, plan: Plan) -> list[Moved]:
        return self.feed(msgspec.structs.replace(plan, at=self.now))

    def stop(self, scope: str = "all", change: Any = "stop") -> list[Moved]:
        return self.feed(StopChange(change=change, scope=scope, by="ana", at=self.now))

    def release(self, subject: str = "") -> list[Moved]:
        return self.feed(Release(subject=subject, by="ana", at=self.now))

    def answer(self, approve: bool, by: str = "ana", waiting: str | None = None) -> list[Moved]:
        asked = waiting if waiting is not None else self.executor.waiting(self.now)[0].hash
        return self.feed(Approval(waiting=asked, approve=approve, by=by, at=self.now))

    def incident(
        self, state: str = "open", signal: str = "llm.cost", actor: str = "", id: str = "INC-1"
    ) -> list[Moved]:
        found = Incident(
            id=id, at=T0, since=T0, updated_at=self.now, root=Entity("tenant", "t1"), signal=signal,
            severity=Severity.HIGH, state=IncidentState(state),
            changes=(RelatedChange(T0, "deploy", "x", actor=actor),) if actor else (),
        )  # fmt: skip
        return self.feed(IncidentChange(incident=found, at=self.now, old="open", new=state, reason="test"))

    def reported(self, status: Any, order: Operation | None = None, **fields: Any) -> list[Moved]:
        """The hook's answer to a request, the newest unless another is given."""
        to = order if order is not None else self.sent[-1]
        given = {"id": to.id, "verb": to.verb, "attempt": to.attempt, "dry_run": to.dry_run, **fields}
        return self.feed(OperationReport(at=self.now, status=status, **given))

    # --- the world

    def _pass(self, windows: int) -> dict[str, int]:
        counts: dict[str, int] = {}
        for _ in range(windows):
            live = self.executor.directives(self.now) if self.obeys else []
            counts = {d.id: 0 for d in live}
            flows = [flow for c in self.customers for flow in _obey(c, live, counts)]
            self.now += WINDOW_S
            self.facts.add(self.now, flows)
        return counts

    def _heard(self, said: list[Moved]) -> list[Moved]:
        self.log += said
        self.sent += [m for m in said if isinstance(m, Operation)]
        return said

    # --- what was said

    @property
    def results(self) -> list[str]:
        return words(self.log)

    @property
    def ended(self) -> bool:
        return bool(outcomes(self.log)) and "plan_ended" in outcomes(self.log)[-1].values

    def live(self) -> list[Directive]:
        return self.executor.directives(self.now)


def _obey(customer: Customer, live: Sequence[Directive], counts: dict[str, int]) -> list[Flow]:
    calls, passed, usd, tokens = customer.calls, float(customer.calls), customer.usd, customer.tokens
    for d in sorted(
        live, key=lambda d: d.kind != "cap"
    ):  # a limit counts what calls cost once they are capped
        hit = all(customer.labels.get(k) == v for k, v in d.scope.items())
        left_out = any(all(customer.labels.get(k) == v for k, v in e.items()) for e in d.exempt)
        if not hit or left_out:
            continue
        if d.kind == "cap":
            usd = usd * 0.2 if "model" in d.params else usd
            tokens = min(tokens, d.params.get("output_tokens", tokens))
            counts[d.id] += calls
        if d.kind == "redirect":
            moved = round(calls * d.params["share"])
            counts[d.id] += moved
            elsewhere = Flow(
                {**customer.labels, **d.params["to"]}, moved, usd=moved * usd, tokens=moved * tokens
            )
            rest = replace(customer, calls=calls - moved)
            return [elsewhere, *_obey(rest, [other for other in live if other.kind != "redirect"], counts)]
        allowed = passed
        if d.kind == "block":
            allowed = 0.0
        if "requests_per_min" in d.params:
            allowed = min(allowed, d.params["requests_per_min"] * WINDOW_S / 60.0)
        if "usd_per_hour" in d.params:
            allowed = min(allowed, d.params["usd_per_hour"] * WINDOW_S / 3600.0 / usd)
        if "tokens_per_min" in d.params:
            allowed = min(allowed, d.params["tokens_per_min"] * WINDOW_S / 60.0 / tokens)
        counts[d.id] += 0 if d.kind == "cap" else round(passed - allowed)
        passed = allowed
    tried = round(passed)
    flow = Flow(
        labels=customer.labels,
        calls=calls,
        refused=calls - tried,
        bad=round(tried * customer.fails),
        usd=tried * usd if tried else None,
        tokens=tried * tokens if tried else None,
        latency_s=customer.latency_s if tried else None,
    )
    return [flow]


def tenant(name: str, calls: int, **more: Any) -> Customer:
    return Customer({"tenant": name, "provider": "a"}, calls, **more)


def outcomes(said: Sequence[Moved]) -> list[Outcome]:
    return [m for m in said if isinstance(m, Outcome)]


def words(said: Sequence[Moved]) -> list[str]:
    """`granted`, `verified`, `start`, … in the order they were said."""
    found = []
    for m in said:
        if isinstance(m, Operation):
            found.append(f"dry {m.verb}" if m.dry_run else m.verb)
        else:
            found.append(m.change if isinstance(m, DirectiveChange) else m.result)
    return found


CHEAPER = Verify(
    within_s=90.0, expect=(Term("usd_per_hour", "from", "<", 0.7, times_before=True),), against="nothing"
)


def step(kind: Any, *stages: dict[str, Any], id: str = "", scope: dict[str, str] | None = None, **more: Any) -> PlanStep:  # fmt: skip
    where = scope if scope is not None else {"tenant": "t1"}
    fields: dict[str, Any] = {
        "action": kind, "hold_s": 1800.0, "lease_s": 300.0, "timeout_s": 90.0 * max(1, len(stages)),
        "verify": CHEAPER, "source": where, "target": where,
    }  # fmt: skip
    fields.update(more)
    return PlanStep(id=id or f"{kind}_1", kind=kind, scope=where, stages=stages or ({},), **fields)


def limit(*usd_per_hour: float, **more: Any) -> PlanStep:
    return step("limit", *({"usd_per_hour": usd} for usd in usd_per_hour), **more)


def cap(**more: Any) -> PlanStep:
    return step("cap", {"model": "small"}, **more)


def block(scope: dict[str, str] | None = None, **more: Any) -> PlanStep:
    gone = Verify(within_s=60.0, expect=(Term("calls", "from", "<", 1.0),), against="nothing")
    return step("block", {"reason": "loop"}, scope=scope or {"run": "r1"}, **{"verify": gone, **more})


def redirect(*shares: float, **more: Any) -> PlanStep:
    """Leaves provider b for a."""
    source, target = {"provider": "b"}, {"provider": "a"}
    stages = [{"to": target, "share": share} for share in shares]
    fields = {
        "verify": Verify(),
        "target": target,
        "timeout_s": 180.0 * len(stages),
        "hold_s": 3600.0,
        **more,
    }
    return step("redirect", *stages, scope=source, **fields)


def drain(**more: Any) -> PlanStep:
    call = {"hook": "ops", "action": "drain", "targets": ("node:n1",), "dry_run_first": False}
    call.update({k: more.pop(k) for k in ("targets", "dry_run_first", "undoable") if k in more})
    well = Verify(within_s=60.0, expect=(Term("errors", "to", "<", 0.05),), against="nothing")
    fields: dict[str, Any] = {"verify": well, "release": "resolved", "timeout_s": 120.0, "action": "hook"}
    fields.update(more)
    return step("operation", hook=HookCall(**call), **fields)  # type: ignore[arg-type]


def plan(
    *steps: PlanStep, mode: Any = "auto", attempt: int = 1, incident: str = "INC-1", **more: Any
) -> Plan:
    return Plan(
        at=T0, incident=incident, runbook="a-runbook", mode=mode, steps=steps, root=Entity("tenant", "t1"),
        attempt=attempt, locks=more.pop("locks", ("tenant:t1",)), plan_hash=plan_hash(incident, "a-runbook", attempt, steps),
        **more,
    )  # fmt: skip
