"""Scenarios in virtual time, for tests: what goes wrong when, and what the governor should make of it.

    lab = Lab(make_governor, seed=1)
    lab.at("90s").provider("b").fails(0.6)
    lab.expect("2m", incident(root="provider:b"))
    lab.at("6m").provider("b").recovers()
    lab.run("10m")
    assert len(lab.pages()) == 1

Times count from the lab's zero, which lies `warmup` after the simulation began, so that the governor knows what is normal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, runtime_checkable

from flyball.core.directives import Decision, Directive, DirectiveChange, Operation, OperationReport, Outcome
from flyball.core.entities import Entity
from flyball.core.errors import ConfigError, did_you_mean
from flyball.core.estate import Emissions, Governor
from flyball.core.events import Batch
from flyball.core.incident import Incident, IncidentChange
from flyball.lab.enforcement import MANNERS
from flyball.lab.estate import Estate, default_estate
from flyball.lab.faults import (
    OUTAGE_MIX,
    AgentLoop,
    AllProvidersDown,
    AnyFault,
    BadKey,
    BudgetBurn,
    GpuThrottle,
    GpuXid,
    LookAlike,
    Mix,
    PromptInflation,
    ProviderOutage,
    QuotaExhausted,
    RetryStorm,
    ServingSaturated,
    SlowProvider,
    TargetCollapse,
)
from flyball.lab.hooks import HOOKS, Hooks
from flyball.lab.sim import START_AT, Simulator

GovernorFactory = Callable[[], Governor]
_UNITS_S: Final[dict[str, float]] = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
FOREVER: Final = float("inf")
REPORT_S: Final = 2.0
"""How often the gateway tells what it enforced."""


def seconds(duration: str | float) -> float:
    """`"90s"`, `"1h30m"`, `"250ms"`, or a number of seconds. Raises: ConfigError for anything else.

    >>> seconds("1m30s")
    90.0
    """
    if isinstance(duration, int | float):
        return float(duration)
    parts = _DURATION.findall(duration)
    if not parts or "".join(n + u for n, u in parts) != duration:
        raise ConfigError(f"{duration!r} is no duration; write it like '90s', '2m' or '1h30m'", where="lab")
    return sum(float(n) * _UNITS_S[u] for n, u in parts)


@dataclass(frozen=True)
class incident:
    """What an incident should look like; what is left out may be anything. `root` reads `kind:name` or only `kind`."""

    root: str = ""
    signal: str = ""
    klass: str = ""
    state: str = ""
    page: bool | None = None

    def fits(self, found: Incident) -> bool:
        return (
            self.root in ("", str(found.root), found.root.kind)
            and self.signal in ("", found.signal)
            and self.klass in ("", found.klass)
            and self.state in ("", found.state.value)
            and self.page in (None, found.page)
        )

    def __str__(self) -> str:
        said = {k: v for k, v in vars(self).items() if v not in ("", None)}
        return f"incident({', '.join(f'{k}={v!r}' for k, v in said.items())})"


@dataclass
class Seen:
    """What the governor said, in order, each with the virtual time at which it said so."""

    changes: list[tuple[float, IncidentChange]] = field(default_factory=list)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)
    directives: list[tuple[float, DirectiveChange]] = field(default_factory=list)
    outcomes: list[tuple[float, Outcome]] = field(default_factory=list)
    operations: list[tuple[float, Operation]] = field(default_factory=list)

    def add(self, now: float, said: Emissions) -> None:
        self.changes += ((now, c) for c in said.changes)
        self.decisions += ((now, d) for d in said.decisions)
        self.directives += ((now, d) for d in said.directives)
        self.outcomes += ((now, o) for o in said.outcomes)
        self.operations += ((now, o) for o in said.operations)


@runtime_checkable
class Commanded(Protocol):
    """A governor that takes what people, hooks and the kill switch say; `flyball.app.pipeline.Pipeline` does."""

    def take(self, order: Any) -> Emissions: ...


class Lab:
    """A simulated estate and a governor over it, in virtual time.

    Args:
        governor_factory: makes the pipeline under test.
        seed: of the simulation.
        estate: what there is; `default_estate()` with `rate` calls a second unless given.
        warmup: quiet traffic before the lab's zero.
        tick_s: how often the governor is ticked and its directives are read back.
        sim: a simulator that the governor has followed so far, instead of one that begins; the lab's zero is then its now.
        hear: called with every batch, before the governor gets it.
    """

    def __init__(
        self,
        governor_factory: GovernorFactory,
        *,
        seed: int = 1,
        estate: Estate | None = None,
        rate: float = 20.0,
        warmup: str | float = "10m",
        tick_s: float = 1.0,
        start_at: float = START_AT,
        sim: Simulator | None = None,
        hear: Callable[[Batch], None] | None = None,
    ) -> None:
        self.governor = governor_factory()
        self.sim = sim or Simulator(estate if estate is not None else default_estate(rate), seed, start_at)
        self.zero = sim.now if sim is not None else start_at + seconds(warmup)
        self.hooks = Hooks(self.sim)
        self.tick_s = tick_s
        self._hear = hear
        self.seen = Seen()
        self.calls_redirected = 0
        self._directives: tuple[Directive, ...] = ()
        self._reported = self.sim.now

    # -- what goes wrong ----------------------------------------------------------------------------------------

    def at(self, when: str | float) -> Moment:
        """A moment of lab time, at which something can be switched. Raises: ConfigError when it has passed."""
        at = self.zero + seconds(when)
        if at < self.sim.now:
            raise ConfigError(f"{when} has passed: it is {self.now:.0f}s in the lab", where="lab")
        return Moment(self, at)

    # -- time ---------------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Lab time in seconds; negative during the warm-up."""
        return self.sim.now - self.zero

    def gateway(self, manner: str) -> Lab:
        """How the gateway takes directives from now on: one of MANNERS. Raises: ConfigError for another word."""
        if manner not in MANNERS:
            raise ConfigError(f"no gateway is {manner!r}{did_you_mean(manner, MANNERS)}", where="lab")
        self.sim.gateway.enforcement.manner = MANNERS[manner]
        return self

    def hook(self, manner: str) -> Lab:
        """How remediation hooks go from now on: one of HOOKS. Raises: ConfigError for another word."""
        if manner not in HOOKS:
            raise ConfigError(f"no hook {manner!r}{did_you_mean(manner, HOOKS)}", where="lab")
        self.hooks.manner = manner
        return self

    def order(self, order: Any) -> Lab:
        """A person's word to the governor, now. Raises: ConfigError when it takes none."""
        if not isinstance(self.governor, Commanded):
            raise ConfigError("this governor takes no orders", where="lab")
        self._heard(self.sim.now, self.governor.take(order))
        return self

    def run(self, to: str | float) -> Lab:
        """Goes on until lab time `to`: batches in order of arrival, then a tick; directives go back to the gateway."""
        until = self.zero + seconds(to)
        while self.sim.now < until:
            now = min(self.sim.now + self.tick_s, until)
            for batch in self.sim.step(now):
                if self._hear is not None:
                    self._hear(batch)
                arrived = batch.received_at if batch.received_at is not None else now
                self._heard(arrived, self.governor.feed(batch))
            self._heard(now, self.governor.tick(now))
            self._hooks_tell(self.hooks.reports(now))
            self._directives = tuple(self.governor.directives())
            self.sim.set_directives(self._directives)
            if self._directives and now - self._reported >= REPORT_S:
                self._reported = now
                report = self.sim.enforced()
                if report is not None:
                    self._heard(now, self.governor.enforced(report))
        return self

    def _heard(self, at: float, said: Emissions) -> None:
        """Keeps what the governor said; its requests go to the hooks, and their answers come back at once."""
        self.seen.add(at, said)
        self._hooks_tell([self.hooks.send(op, self.sim.now) for op in said.operations])

    def _hooks_tell(self, reports: Sequence[OperationReport]) -> None:
        for report in reports:
            if isinstance(self.governor, Commanded):
                self._heard(report.at, self.governor.take(report))

    # -- what came of it ----------------------------------------------------------------------------------------

    def incidents(self) -> list[Incident]:
        """Every incident as it stands now, in the order of opening."""
        latest: dict[str, Incident] = {}
        for _, change in self.seen.changes:
            latest[change.incident.id] = change.incident
        return list(latest.values())

    def opened_at(self, incident_id: str) -> float:
        """Lab time at which the governor said that an incident opened. Raises: KeyError when it never did."""
        for said_at, change in self.seen.changes:
            if change.incident.id == incident_id:
                return said_at - self.zero
        raise KeyError(incident_id)

    def pages(self) -> list[Incident]:
        """The incidents that woke somebody, as they were when they did; one each."""
        return [found for _, found in self.paged()]

    def paged(self) -> list[tuple[float, Incident]]:
        """`pages`, each with the lab time of the page. One that opens again counts again where people are told of it."""
        pages, awake = [], set()
        for said_at, change in self.seen.changes:
            found = change.incident
            again = change.old == "resolved" and change.new != "resolved" and change.notify
            if found.page and (found.id not in awake or again):
                awake.add(found.id)
                pages.append((said_at - self.zero, found))
        return pages

    def decisions(self, root: str = "", runbook: str = "") -> list[Decision]:
        """What the planner decided, about incidents with this root (`provider:b`) and by this runbook, if given."""
        roots = {i.id: str(i.root) for i in self.incidents()}
        return [
            d
            for _, d in self.seen.decisions
            if (not root or roots.get(d.incident) == root) and runbook in ("", d.runbook)
        ]

    def directives(self) -> tuple[Directive, ...]:
        """Leases in force now."""
        return self._directives

    def directive_changes(self) -> list[DirectiveChange]:
        return [d for _, d in self.seen.directives]

    def outcomes(self, runbook: str = "") -> list[Outcome]:
        """What actions really did, by this runbook if given."""
        return [o for _, o in self.seen.outcomes if runbook in ("", o.runbook)]

    # -- expectations -------------------------------------------------------------------------------------------

    def expect(self, by: str | float, wanted: incident) -> Incident:
        """The first incident that fits, which must have shown by lab time `by`; runs up to there when need be.

        Raises: AssertionError that shows what there was instead.
        """
        deadline = seconds(by)
        if self.now < deadline:
            self.run(deadline)
        for said_at, change in self.seen.changes:
            if said_at - self.zero <= deadline and wanted.fits(change.incident):
                return change.incident
        raise AssertionError(f"no {wanted} by {by}\n{self.report()}")

    def no_pages(self) -> None:
        """Raises: AssertionError when somebody was woken."""
        if self.pages():
            raise AssertionError(f"expected no page\n{self.report()}")

    def report(self) -> str:
        """What happened so far, in lines: faults and their evidence, incidents, decisions, directives."""
        lines = [f"lab time {self.now:.0f}s, seed {self.sim.seed}, {self.sim.totals.calls} calls"]
        for i, fault in enumerate(self.sim.faults):
            evidence = self.sim.evidence_at(i)
            lines.append(
                f"  fault     {fault.kind} of {fault.target} from {fault.start - self.zero:.0f}s to {fault.end - self.zero:.0f}s, "
                f"{self.sim.shown[i].count} events show it, "
                + (f"enough at {evidence - self.zero:.1f}s" if evidence is not None else "never enough")
            )
        for said_at, c in self.seen.changes:
            if c.old != c.new:
                lines.append(
                    f"  incident  {said_at - self.zero:.0f}s {c.incident.id} {c.incident.root} {c.incident.signal} "
                    f"{c.incident.klass} {c.old or '-'} → {c.new} page={c.incident.page} ({c.reason})"
                )
        for said_at, d in self.seen.decisions:
            lines.append(
                f"  decision  {said_at - self.zero:.0f}s {d.runbook} {d.decision.value} ({d.reason}) {d.detail}"
            )
        for said_at, x in self.seen.directives:
            lines.append(
                f"  directive {said_at - self.zero:.0f}s {x.change} {x.directive.kind} {x.directive.scope} {x.directive.params}"
            )
        for said_at, o in self.seen.outcomes:
            lines.append(
                f"  outcome   {said_at - self.zero:.0f}s {o.runbook} {o.step} {o.result} ({o.reason})"
            )
        for said_at, op in self.seen.operations:
            lines.append(
                f"  operation {said_at - self.zero:.0f}s {op.hook} {op.verb} {', '.join(op.targets)}"
            )
        if len(lines) == 1 + len(self.sim.faults):
            lines.append("  the governor said nothing")
        return "\n".join(lines)


@dataclass(frozen=True)
class Moment:
    """`lab.at("90s")`: choose what it is about."""

    lab: Lab
    time: float

    def provider(self, name: str) -> ProviderSwitch:
        self._known("provider", name, self.lab.sim.estate.provider_index)
        return ProviderSwitch(self.lab, self.time, Entity("provider", name))

    def targets_collapse(self, share: float = 0.5, *, from_share: float = 0.2) -> Lab:
        """From this moment on, whoever takes over `from_share` of somebody's calls fails `share` of all its own."""
        self.lab.sim.add_fault(TargetCollapse(self.time, FOREVER, share, from_share))
        return self.lab

    def all_providers(self) -> AllProvidersSwitch:
        return AllProvidersSwitch(self.lab, self.time, Entity("provider", "*"))

    def tenant(self, name: str) -> TenantSwitch:
        self._known("tenant", name, self.lab.sim.estate.tenant_index)
        return TenantSwitch(self.lab, self.time, Entity("tenant", name))

    def prompt(self, name: str) -> PromptSwitch:
        self._known("app", name.partition("@")[0], self.lab.sim.estate.app_index)
        return PromptSwitch(self.lab, self.time, Entity("prompt_version", name))

    def agent(self, name: str) -> AgentSwitch:
        self._known("agent", name, self.lab.sim.estate.agent_index)
        return AgentSwitch(self.lab, self.time, Entity("agent", name))

    def app(self, name: str) -> AppSwitch:
        self._known("app", name, self.lab.sim.estate.app_index)
        return AppSwitch(self.lab, self.time, Entity("app", name))

    def gpu(self, name: str) -> GpuSwitch:
        self.lab.sim.estate.node_of(name)
        return GpuSwitch(self.lab, self.time, Entity("gpu", name))

    def deployment(self, name: str) -> DeploymentSwitch:
        self._known("deployment", name, [n.deployment for n in self.lab.sim.estate.nodes])
        return DeploymentSwitch(self.lab, self.time, Entity("deployment", name))

    def _known(self, kind: str, name: str, known: Sequence[str] | dict[str, int]) -> None:
        if name not in known:
            raise ConfigError(f"no {kind} {name!r} in the estate{did_you_mean(name, known)}", where="lab")


@dataclass(frozen=True)
class Switch:
    """Something that can go wrong at a moment. `lasts` (a duration) takes the fault back by itself."""

    lab: Lab
    time: float
    target: Entity

    def recovers(self) -> Lab:
        """Takes back every fault of the target that is scheduled up to this moment.

        Raises: ConfigError when there is none.
        """
        found = [
            i
            for i, f in enumerate(self.lab.sim.faults)
            if f.target == self.target and f.start <= self.time < f.end
        ]
        if not found:
            raise ConfigError(f"{self.target} has no fault to recover from then", where="lab")
        for i in found:
            self.lab.sim.end_fault(i, self.time)
        return self.lab

    def _on(self, fault: AnyFault) -> Lab:
        self.lab.sim.add_fault(fault)
        return self.lab

    def _end(self, lasts: str | float | None) -> float:
        return FOREVER if lasts is None else self.time + seconds(lasts)


class ProviderSwitch(Switch):
    def fails(
        self, share: float, *, lasts: str | float | None = None, fails_with: Mix = OUTAGE_MIX, model: str = "",
        on: str | float = 0.0, off: str | float = 0.0,
    ) -> Lab:  # fmt: skip
        """`share` of its calls fails; `on` and `off` make it come and go."""
        return self._on(
            ProviderOutage(
                self.target.name,
                share,
                self.time,
                self._end(lasts),
                dict(fails_with),
                seconds(on),
                seconds(off),
                model,
            )
        )

    def quota_exhausted(self, *, lasts: str | float | None = None) -> Lab:
        return self._on(QuotaExhausted(self.target.name, self.time, self._end(lasts)))

    def slow(self, factor: float, *, lasts: str | float | None = None) -> Lab:
        return self._on(SlowProvider(self.target.name, factor, self.time, self._end(lasts)))


class AllProvidersSwitch(Switch):
    def fail(self, share: float = 0.95, *, lasts: str | float | None = None) -> Lab:
        return self._on(AllProvidersDown(self.time, self._end(lasts), share))


class TenantSwitch(Switch):
    def burns(self, times: float = 8.0, *, lasts: str | float | None = None) -> Lab:
        """It sends `times` its calls."""
        return self._on(BudgetBurn(self.target.name, times, self.time, self._end(lasts)))

    def bad_key(self, *, lasts: str | float | None = None) -> Lab:
        return self._on(BadKey(self.target.name, self.time, self._end(lasts)))


class PromptSwitch(Switch):
    def doubles_tokens(
        self, factor: float = 2.0, *, output_factor: float = 1.0, lasts: str | float | None = None
    ) -> Lab:
        """This version goes live for its app, and every call of it takes `factor` times the input tokens."""
        return self._on(PromptInflation(self.target.name, factor, self.time, self._end(lasts), output_factor))


class AgentSwitch(Switch):
    def loops(self, pattern: str = "repeat", *, lasts: str | float | None = None) -> Lab:
        """One run of the agent goes round without end: `repeat`, or `cycle` for A-B-A-B."""
        if pattern not in ("repeat", "cycle"):
            raise ConfigError(f"no loop pattern {pattern!r}; known: cycle, repeat", where="lab")
        return self._on(AgentLoop(self.target.name, self.time, self._end(lasts), pattern))

    def goes_on_rightly(self, pattern: str, *, lasts: str | float | None = None) -> Lab:
        """One run of the agent `pages`, `polls` or `retests`: what only looks like a loop."""
        if pattern not in ("pages", "polls", "retests"):
            raise ConfigError(f"no look-alike {pattern!r}; known: pages, polls, retests", where="lab")
        return self._on(LookAlike(self.target.name, self.time, self._end(lasts), pattern))


class AppSwitch(Switch):
    def retry_storm(self, share: float = 0.75, *, retries: int = 8, lasts: str | float | None = None) -> Lab:
        return self._on(RetryStorm(self.target.name, self.time, self._end(lasts), share, retries))


class GpuSwitch(Switch):
    def xid(self, number: int, *, serving_fails: float = 0.4, lasts: str | float | None = None) -> Lab:
        return self._on(GpuXid(self.target.name, number, self.time, self._end(lasts), serving_fails))

    def overheats(self, *, slower: float = 1.6, lasts: str | float | None = None) -> Lab:
        return self._on(GpuThrottle(self.target.name, self.time, self._end(lasts), slower))


class DeploymentSwitch(Switch):
    def saturates(self, *, slower: float = 5.0, lasts: str | float | None = None) -> Lab:
        return self._on(ServingSaturated(self.target.name, self.time, self._end(lasts), slower))
