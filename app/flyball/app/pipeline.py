"""The way of the data as one object: the same for the embedded runtime, for replay and for the lab.

    batch → dedup → (event detectors) → windows → (window detectors) → correlate → plan → execute
      portions of partitions → merger ↗                                   ↑___________________|

Everything here is deterministic: what comes in is events and ticks, what goes out is `Emissions`. A snapshot taken between two
records, restored, gives the same emissions for every record after it.
"""

from __future__ import annotations

import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import structlog

from flyball.app.orders import Command, Order, RunbookTexts
from flyball.app.own_faults import own_fault, standing
from flyball.core.anomaly import Anomaly
from flyball.core.codec import pack_state, unpack_state
from flyball.core.columns import Window
from flyball.core.directives import (
    Approval,
    Decision,
    Directive,
    DirectiveChange,
    Enforced,
    Intervention,
    Operation,
    OperationReport,
    Release,
    StopChange,
)
from flyball.core.errors import ConfigError
from flyball.core.estate import Emissions
from flyball.core.events import TYPE_NAMES, Batch, Change, LlmCall
from flyball.core.incident import IncidentChange
from flyball.core.plans import Mode, Plan, Waiting
from flyball.core.stops import Stops, check_scope
from flyball.detectors import default_detectors
from flyball.detectors._budget import PageBudget
from flyball.detectors._episodes import CoolDown
from flyball.incidents.correlator import Correlator
from flyball.incidents.settings import IncidentSettings
from flyball.remediation import actions
from flyball.remediation.executor import Executor, ExecutorSettings
from flyball.remediation.scripted import ScriptedExecutor
from flyball.remediation.verify import VerifySettings
from flyball.runbooks.estate import LiveEstate
from flyball.runbooks.explain import Explained
from flyball.runbooks.loader import RunbookSet
from flyball.runbooks.planner import Planner
from flyball.streams.dedup import Deduplicator
from flyball.streams.merging import STALL_S, Merged, Merger
from flyball.streams.portion import Portion
from flyball.streams.windows import Windows, WindowSettings, WindowStats

_log = structlog.get_logger(__name__)
_STATE_VERSION = 1
_AGAIN_S = 20.0
"""How often it is said again that a source still stands: what is not said again is taken to be over."""


@dataclass(frozen=True, slots=True)
class PipelineConfig:
    """What the pipeline depends on; two pipelines of equal config and input say the same."""

    windows: WindowSettings = field(default_factory=WindowSettings)
    incidents: IncidentSettings = field(default_factory=IncidentSettings)
    false_pages_per_week: float = 2.0
    cooldown_s: float = 300.0
    mode: Mode = "suggest"
    runbooks: RunbookSet | None = None
    dry_run: bool = False
    """Everything is decided and recorded, nothing takes effect."""
    scripted: bool = False
    """Nothing is done to the world: directives are judged as if they had worked (replay)."""
    stall_s: float = STALL_S
    """A source of portions whose time stands still for so long is not waited for."""


@dataclass(slots=True)
class Counters:
    """Totals since the beginning of time; part of the snapshot, so they survive a restart."""

    events: Counter[str] = field(default_factory=Counter)
    windows: int = 0
    anomalies: int = 0
    pages: int = 0
    directives: int = 0
    incidents: int = 0
    decisions: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        return {
            "events": dict(self.events), "windows": self.windows, "anomalies": self.anomalies, "pages": self.pages,
            "directives": self.directives, "incidents": self.incidents, "decisions": dict(self.decisions),
            "outcomes": dict(self.outcomes),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Counters:
        return cls(
            Counter(raw["events"]), raw["windows"], raw["anomalies"], raw["pages"], raw["directives"], raw["incidents"],
            Counter(raw["decisions"]), Counter(raw["outcomes"]),
        )  # fmt: skip


class Pipeline:
    """All stages wired. One thread feeds it; it is not thread-safe.

    Args:
        config: see PipelineConfig.
        timer: seconds of a monotonic clock, for time-per-stage metrics only; it never reaches a stage. None = not timed.
    """

    def __init__(self, config: PipelineConfig, *, timer: Callable[[], float] | None = None) -> None:
        self.config = config
        self.counters = Counters()
        self.stage_seconds: defaultdict[str, float] = defaultdict(float)
        self.disabled: dict[str, str] = {}
        self._now = 0.0
        self._halts_told_at = 0.0
        self._texts: RunbookTexts | None = None
        self._timer = timer
        self._dedup = Deduplicator()
        self.windows = Windows(config.windows)
        self._merger: Merger | None = None
        budget = PageBudget(config.false_pages_per_week)
        detectors = default_detectors(budget)
        self._on_events = [d for d in detectors if d.reads == "events"]
        self._on_windows = [d for d in detectors if d.reads == "windows"]
        self._cooldown = CoolDown(config.cooldown_s)
        self._correlator = Correlator(config.incidents)
        self._estate = LiveEstate()
        self._runbooks = config.runbooks or RunbookSet()
        self._planner = Planner(self._runbooks, config.mode, dry_run=config.dry_run)
        executor = ExecutorSettings(verify=VerifySettings(window_s=config.windows.window_s))
        self._executor = ScriptedExecutor(executor) if config.scripted else Executor(executor)

    # --- in -------------------------------------------------------------------------------------------------------

    def feed(self, batch: Batch) -> Emissions:
        out = Emissions()
        if batch.received_at is not None:
            self._now = max(self._now, batch.received_at)
        elif batch.events:
            self._now = max(self._now, batch.events[-1].at)
        batch = self._timed("dedup", self._dedup.feed, batch)
        by_type: Counter[type] = Counter(map(type, batch.events))
        if self._merger is not None and LlmCall in by_type:
            # Its windows would be of other series than those of the merger, slot by slot.
            raise ValueError("calls come in portions here; send them to the topics")
        for kind, n in by_type.items():
            self.counters.events[TYPE_NAMES[kind]] += n
        if len(by_type) > 1 or not self._windows_only(by_type):
            self._judge_events(batch, by_type, out)
        for window in self._timed("windows", self.windows.feed, batch):
            self._close(window, out)
        return self._counted(out)

    def feed_portion(self, portion: Portion, at: float) -> Emissions:
        """As `feed`, for what a front has made of the records of its partition. From the first on, calls come in portions only.

        Args:
            at: when it came here; stalled sources are told by it.

        Raises: PortionError when its windows are cut otherwise than here.
        """
        out = Emissions()
        if self._merger is None:
            for window in self.windows.flush():
                self._close(window, out)
        merger = self._merger = self._merger or self._new_merger()
        # Never later than `at`: clocks of producers set the times of records.
        told = portion.newest if portion.received_at is None else portion.received_at
        self._now = max(self._now, min(told, at))
        before, stood = merger.totals.copy(), merger.halts.get(portion.source)
        self._take_merged(self._timed("merge", merger.feed, portion, at), out)
        stands = merger.halts.get(portion.source)
        if stood is None and stands is not None:
            self._correlate([standing(portion.source, stands, self._now, "on")], out)
        elif stood is not None and stands is None:
            self._correlate([standing(portion.source, stood, self._now, "off")], out)
        for kind in TYPE_NAMES.values():
            if n := merger.totals[kind] - before[kind]:
                self.counters.events[kind] += n
        return self._counted(out)

    def _take_merged(self, items: Sequence[Merged], out: Emissions) -> None:
        for item in items:
            if isinstance(item, Window):
                self._close(item, out)
            else:
                self._judge_events(item, Counter(map(type, item.events)), out)

    def _still_halted(self, now: float) -> list[Anomaly]:
        if self._merger is None or not self._merger.halts or now - self._halts_told_at < _AGAIN_S:
            return []
        self._halts_told_at = now
        return [standing(source, halt, now, "still") for source, halt in sorted(self._merger.halts.items())]

    def _new_merger(self) -> Merger:
        return Merger(self.config.windows, stall_s=self.config.stall_s)

    def tick(self, now: float) -> Emissions:
        """Lets time pass: windows that wait for silent senders close, leases expire, holds end."""
        self._now = max(self._now, now)
        out = Emissions()
        if self._merger is not None:
            self._take_merged(self._timed("merge", self._merger.tick, now), out)
        for window in self._timed("windows", self.windows.tick, now):
            self._close(window, out)
        anomalies: list[Anomaly] = []
        for event_detector in self._on_events:
            anomalies += self._guarded(event_detector.kind, event_detector.tick, now)
        for window_detector in self._on_windows:
            anomalies += self._guarded(window_detector.kind, window_detector.tick, now)
        self._correlate([*self._cooldown.feed(anomalies), *self._still_halted(now)], out)
        changes = list(self._timed("correlate", self._correlator.tick, now))
        out.changes += changes
        self._act(changes, out, ticking=True)
        return self._counted(out)

    def flush(self) -> Emissions:
        """Closes every open window: the end of a replay."""
        out = Emissions()
        for window in self.windows.flush():
            self._close(window, out)
        if self._merger is not None:
            self._take_merged(self._merger.flush(), out)
        return self._counted(out)

    def take(self, order: Order) -> Emissions:
        """A person's word, a report, another set of runbooks. What a person asked for is answered in `people`, also a no."""
        out = Emissions()
        self._now = max(self._now, order.at)
        if isinstance(order, Enforced | OperationReport):
            self._sort_out(self._executor.feed([order], self._estate, self._now), out)
        elif isinstance(order, Command):
            self._command(order, out)
        elif isinstance(order, Approval):
            self._answer(order, out)
        elif isinstance(order, StopChange):
            self._switch(order, out)
        elif isinstance(order, Release):
            self._let_go(order, out)
        elif isinstance(order, RunbookTexts):
            self._exchange(order, out)
        else:
            self._correlate([own_fault(order)], out)
        return self._counted(out)

    def enforced(self, report: Enforced) -> Emissions:
        """An enforcement point says what it holds: "granted" and "in force" are two things."""
        return self.take(report)

    # --- out ------------------------------------------------------------------------------------------------------

    def directives(self) -> Sequence[Directive]:
        return self._executor.directives(self._now)

    def waiting(self) -> list[Waiting]:
        """What only a person can start: plans, and steps of running plans that ask first."""
        return [*self._planner.waiting(self._now), *self._executor.waiting(self._now)]

    @property
    def stops(self) -> Stops:
        """The kill switch as the stages know it."""
        return self._planner.stops

    @property
    def runbooks(self) -> RunbookSet:
        """Those that count now."""
        return self._runbooks

    def explain(self, incident: str) -> list[Explained]:
        """Every runbook's guards for an incident now, each with its value."""
        return list(self._planner.explain(incident, self._estate, self._now))

    @property
    def mode(self) -> Mode:
        """Ceiling on the runbooks' own modes."""
        return self._texts.ceiling if self._texts is not None else self.config.mode

    @property
    def recorded(self) -> bool:
        """Whether the runbooks that count came as a record."""
        return self._texts is not None

    def wanted(self, operation: str) -> bool:
        """Whether an operation is still to be sent: not cancelled, not stopped, not past its deadline."""
        return self._executor.wanted(operation)

    @property
    def duplicates(self) -> int:
        return self._dedup.duplicates + (self._merger.duplicates if self._merger is not None else 0)

    @property
    def watermark(self) -> float:
        """Event time before which windows are closed; 0.0 before the first event."""
        merged = self._merger.watermark if self._merger is not None else 0.0
        return max(0.0, self.windows.watermark, merged)

    @property
    def sources(self) -> dict[str, tuple[int, float, bool]]:
        """Of each source of portions: newest record applied, newest event time, whether it is idle."""
        return self._merger.sources if self._merger is not None else {}

    @property
    def window_stats(self) -> WindowStats:
        """What windows count, wherever they are made."""
        return self.windows.stats if self._merger is None else self._merger.stats

    def snapshot(self) -> bytes:
        state = {
            "counters": self.counters.as_dict(),
            "disabled": self.disabled,
            "now": self._now,
            "halts_told_at": self._halts_told_at,
            "runbooks": self._texts,
            "stages": {name: stage.snapshot() for name, stage in self._stages()},
        }
        return pack_state("pipeline", _STATE_VERSION, state)

    def restore(self, data: bytes) -> None:
        """Raises: SnapshotError when the snapshot is of another version; the state must then be rebuilt from the log."""
        state = unpack_state(data, "pipeline", _STATE_VERSION)
        self.counters = Counters.from_dict(state["counters"])
        self.disabled = dict(state["disabled"])
        self._now = state["now"]
        self._halts_told_at = state.get("halts_told_at", 0.0)
        if state["runbooks"] is not None:
            self._reload(msgspec.convert(state["runbooks"], RunbookTexts))
        saved = state["stages"]
        self._merger = self._new_merger() if "merger" in saved else None
        for name, stage in self._stages():
            if name in saved:  # a detector that was added since starts empty
                stage.restore(saved[name])

    # --- inside ---------------------------------------------------------------------------------------------------

    def _stages(self) -> Iterable[tuple[str, Any]]:
        yield "dedup", self._dedup
        yield "windows", self.windows
        if self._merger is not None:
            yield "merger", self._merger
        for on_events in self._on_events:
            yield f"detector:{on_events.kind}", on_events
        for on_windows in self._on_windows:
            yield f"detector:{on_windows.kind}", on_windows
        yield "cooldown", self._cooldown
        yield "correlator", self._correlator
        yield "estate", self._estate
        yield "planner", self._planner
        yield "executor", self._executor

    def _windows_only(self, by_type: Counter[type]) -> bool:
        """LLM calls of a batch without runs interest no event detector; told by one look at types that detectors ask for."""
        return Change not in by_type and not any(t in d.types for d in self._on_events for t in by_type)

    def _judge_events(self, batch: Batch, by_type: Counter[type], out: Emissions) -> None:
        events = batch.events
        self._timed("correlate", self._correlator.observe_events, events)
        self._timed("estate", self._estate.observe, events, batch.received_at)
        anomalies: list[Anomaly] = []
        for detector in self._on_events:
            wanted = [t for t in by_type if t in detector.types]
            if not wanted:
                continue
            mine = events if len(wanted) == len(by_type) else [e for e in events if type(e) in detector.types]
            anomalies += self._guarded(detector.kind, detector.feed, mine)
        items: list[Any] = [e for e in events if type(e) is Change] if by_type.get(Change) else []
        self._correlate([*items, *self._cooldown.feed(anomalies)], out)

    def _close(self, window: Window, out: Emissions) -> None:
        out.windows.append(window)
        self._timed("estate", self._estate.feed, [window])
        anomalies: list[Anomaly] = []
        for detector in self._on_windows:
            anomalies += self._guarded(detector.kind, detector.feed, [window])
        self._correlate([window, *self._cooldown.feed(anomalies)], out)

    def _correlate(self, items: list[Any], out: Emissions) -> None:
        if not items:
            return
        out.anomalies += [i for i in items if isinstance(i, Anomaly)]
        changes = list(self._timed("correlate", self._correlator.feed, items))
        out.changes += changes
        self._act(changes, out, ticking=False)

    def _act(self, changes: list[IncidentChange], out: Emissions, *, ticking: bool) -> None:
        now = self._now
        planned = list(self._timed("plan", self._planner.feed, changes, self._estate, now)) if changes else []
        if ticking:
            planned += self._timed("plan", self._planner.tick, now, self._estate)
        moved = self._carry_out(planned, changes, out)
        if ticking:
            moved += self._timed("execute", self._executor.tick, now, self._estate)
        self._sort_out(moved, out)

    def _carry_out(
        self,
        planned: Sequence[tuple[Decision, Plan | None]],
        changes: Sequence[IncidentChange],
        out: Emissions,
    ) -> list[Any]:
        """Decisions go to their incidents, plans to the executor; what it did about them."""
        decisions = [d for d, _ in planned]
        out.decisions += decisions
        orders: list[Any] = [*(p for _, p in planned if p is not None), *changes]
        moved = (
            list(self._timed("execute", self._executor.feed, orders, self._estate, self._now))
            if orders
            else []
        )
        if decisions:
            out.changes += self._correlator.feed(decisions)
        return moved

    def _sort_out(self, moved: Sequence[Any], out: Emissions) -> None:
        """What the executor did goes back to the incident it was done for, and to the planner's limits."""
        if not moved:
            return
        told: list[Any] = []
        for item in moved:
            if isinstance(item, Operation):
                out.operations.append(item)
                continue
            told.append(item)
            if isinstance(item, DirectiveChange):
                out.directives.append(item)
            else:
                out.outcomes.append(item)
        out.changes += self._correlator.feed(told)
        followed = list(self._planner.feed(told, self._estate, self._now))
        if followed:
            self._sort_out(self._carry_out(followed, (), out), out)

    # --- what people say ------------------------------------------------------------------------------------------

    def _command(self, order: Command, out: Emissions) -> None:
        person = Intervention(
            at=order.at, by=order.by, kind=order.kind, subject=order.incident, incident=order.incident,
            values={} if order.until is None else {"until": order.until},
        )  # fmt: skip
        try:
            changes = list(
                self._correlator.command(order.kind, order.incident, order.by, order.at, order.until)
            )
        except ConfigError as e:
            # Whoever took the word has looked before; between that look and now the incident moved on.
            out.people.append(msgspec.structs.replace(person, accepted=False, reason=str(e)))
            return
        out.people.append(person)
        out.changes += changes
        self._act(changes, out, ticking=False)

    def _answer(self, order: Approval, out: Emissions) -> None:
        """To a step of a running plan if it is that, else to a plan; the planner says no to what it does not know."""
        step = next((w for w in self._executor.waiting(self._now) if w.hash == order.waiting), None)
        plan = next((w for w in self._planner.waiting(self._now) if w.hash == order.waiting), None)
        known = step or plan
        reason, values = "", dict[str, Any]()
        if step is not None:
            moved = list(self._executor.feed([order], self._estate, self._now))
            self._sort_out(moved, out)
            # What speaks of the answer itself is its refusal; what it began does not.
            no = next((o for o in out.outcomes if o.values.get("waiting") == order.waiting), None)
            accepted = no is None or (not order.approve and no.reason == "denied")
            reason = "" if accepted or no is None else no.reason
        else:
            planned = list(self._planner.feed([order], self._estate, self._now))
            accepted = any((p is not None) if order.approve else d.reason == "denied" for d, p in planned)
            if planned and not accepted:
                reason = planned[0][0].reason
                values = {"detail": planned[0][0].detail}
            self._sort_out(self._carry_out(planned, (), out), out)
            no = next((o for o in out.outcomes if o.result == "not_accepted"), None)
            if accepted and no is not None:
                values = {"outcome": "not_accepted", "why": no.reason}
        out.people.append(
            Intervention(
                at=order.at, by=order.by, kind="approve" if order.approve else "deny", subject=order.waiting,
                accepted=accepted, reason=reason or ("" if accepted else "approval_unknown"), values=values,
                incident=known.plan.incident if known else "", runbook=known.plan.runbook if known else "",
            )
        )  # fmt: skip

    def _switch(self, order: StopChange, out: Emissions) -> None:
        reason = ""
        try:
            check_scope(order.scope)
        except ConfigError as e:
            reason = str(e)
        if order.change == "resume" and not reason and order.scope not in self.stops.live:
            reason = "not_stopped"
        if not reason:
            planned = list(self._planner.feed([order], self._estate, self._now))
            moved = list(self._executor.feed([order], self._estate, self._now))
            self._sort_out([*self._carry_out(planned, (), out), *moved], out)
        runbook = order.scope.partition(":")[2] if order.scope.startswith("runbook:") else ""
        out.people.append(
            Intervention(
                at=order.at, by=order.by, kind=order.change, subject=order.scope, accepted=not reason, runbook=runbook,
                reason=reason or order.reason,
            )
        )  # fmt: skip

    def _let_go(self, order: Release, out: Emissions) -> None:
        moved = list(self._executor.feed([order], self._estate, self._now))
        self._sort_out(moved, out)
        out.people.append(
            Intervention(
                at=order.at, by=order.by, kind="release", subject=order.subject or "all", accepted=bool(moved),
                reason="" if moved else "nothing_in_force",
            )
        )  # fmt: skip

    def _exchange(self, order: RunbookTexts, out: Emissions) -> None:
        reason = self._reload(order)
        out.people.append(
            Intervention(
                at=order.at, by=order.by, kind="runbooks", subject=f"{len(order.runbooks)} runbooks", accepted=not reason,
                reason=reason, values={"ceiling": order.ceiling, "modes": {r.path: r.mode for r in order.runbooks}},
            )
        )  # fmt: skip

    def _reload(self, texts: RunbookTexts) -> str:
        """Why the set was refused; empty when it counts now. A refused one leaves what runs in place."""
        try:
            loaded = texts.load(actions.registry())
        except ConfigError as e:  # read again by a version that is stricter than the one that took it
            _log.warning("runbooks.refused", why=str(e))
            return str(e)
        self._texts, self._runbooks = texts, loaded
        self._planner.reload(loaded, texts.ceiling)
        return ""

    def _counted(self, out: Emissions) -> Emissions:
        c = self.counters
        c.windows += len(out.windows)
        c.anomalies += sum(a.phase == "on" for a in out.anomalies)
        c.incidents += sum(not change.old for change in out.changes)
        c.pages += sum(1 for change in out.changes if is_page(change))
        c.directives += sum(d.change == "granted" for d in out.directives)
        c.decisions.update(d.decision.value for d in out.decisions)
        c.outcomes.update(o.result for o in out.outcomes)
        return out

    def _timed(self, stage: str, work: Callable[..., Any], *args: Any) -> Any:
        if self._timer is None:
            return work(*args)
        start = self._timer()
        try:
            return work(*args)
        finally:
            self.stage_seconds[stage] += self._timer() - start

    def _guarded(self, kind: str, work: Callable[..., Any], argument: Any) -> Sequence[Anomaly]:
        """A detector that raises is switched off and reported; it never stops the stream."""
        if kind in self.disabled:
            return ()
        try:
            return cast(Sequence[Anomaly], self._timed("detect", work, argument))
        except Exception as e:  # noqa: BLE001 - whatever a detector (also a third party's) raises must not stop the rest
            self.disabled[kind] = f"{type(e).__name__}: {e}"
            where = traceback.extract_tb(e.__traceback__)[-1]
            _log.error(
                "detector.disabled",
                detector=kind,
                error=self.disabled[kind],
                at=f"{where.filename}:{where.lineno}",
            )
            return ()


def is_page(change: IncidentChange) -> bool:
    """Whether this change is one that wakes a person: the opening of a paging incident, or its becoming one."""
    rose = any(note.startswith("pages: SEV") for note in change.reason.split("; "))
    return change.incident.page and change.notify and (not change.old or rose)
