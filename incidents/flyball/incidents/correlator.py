"""The stage that turns anomalies into incidents and keeps them until they are over.

Feed it what the pipeline says, in order: windows, the anomalies of each window together after it, changes, and what planner
and executor report back. All time is event time; `tick` brings the watermark.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Final, TypeAlias

import msgspec

from flyball.core.anomaly import Anomaly
from flyball.core.codec import pack_state, unpack_state
from flyball.core.columns import Window
from flyball.core.directives import Decision, DirectiveChange, Outcome, Verdict
from flyball.core.entities import Entity
from flyball.core.errors import ConfigError
from flyball.core.events import Batch, Change, Event
from flyball.core.ids import short_id
from flyball.core.incident import Incident, IncidentChange, Severity, State
from flyball.incidents import enrich, severity
from flyball.incidents.case import Case, Effect, Member, Tally
from flyball.incidents.cells import LABEL_POSITION, Cells
from flyball.incidents.graph import Graph
from flyball.incidents.joining import Joiner
from flyball.incidents.lifecycle import Step, advance, allowed, command_step
from flyball.incidents.ranking import Ranker, Root, root_by_labels, root_of_many
from flyball.incidents.settings import IncidentSettings
from flyball.incidents.signals import (
    AFTERMATH,
    EGRESS,
    FAMILY_OF_INDEX,
    GATEWAY_LOCAL,
    NAMED_ONLY,
    group_of,
    leading_order,
    rank_of,
    related,
    spec_of,
)
from flyball.incidents.silences import Matcher, Silence, Silences
from flyball.incidents.text import clock

Item: TypeAlias = Window | Anomaly | Change | Decision | DirectiveChange | Outcome | Batch

_KIND: Final = "incidents"
_VERSION: Final = 1
_SETTLING_S: Final = 120.0
"""For so long after opening, every window may still correct the root."""
_SHOWN_ANOMALIES: Final = 100
_MAX_CHANGES: Final = 2_000
_MAX_SAMPLES: Final = 20_000
_NO_DATA_WINDOWS: Final = 6


class Correlator:
    """Anomalies in, incident changes out. One open incident per root; one page per incident.

    Misleads when two faults of one kind hit exactly the same entity: they are one incident, by intent.

    Raises: SnapshotError from `restore`; ConfigError from `command` and `add_silence`.
    """

    def __init__(self, settings: IncidentSettings | None = None) -> None:
        s = self.settings = settings or IncidentSettings()
        self._cells = Cells(
            ring_windows=s.ring_windows,
            ring_rows=s.ring_rows,
            max_cells=s.max_cells,
            half_life_s=s.baseline_half_life_s,
        )
        self._graph = Graph(max_edges=s.max_edges, max_runs=s.max_runs)
        self._ranker = Ranker(self._cells, s.explained_ratio)
        self._joiner = Joiner(self._cells, self._graph, s)
        self._silences = Silences()
        self._open: dict[str, Case] = {}
        self._closed: dict[str, Case] = {}
        self._case_of: dict[str, str] = {}
        self._changes: deque[Change] = deque(maxlen=_MAX_CHANGES)
        self._now = 0.0
        self._data_at = 0.0
        self._live = True
        self._samples: list[tuple[tuple[str, ...], int, tuple[str, ...]]] = []
        self.dropped: dict[str, int] = {}
        """Anomalies that became part of nothing, by reason: `gateway_local`, `max_open`."""
        self._out: list[IncidentChange] = []
        self._by_label: dict[tuple[str, str], dict[str, None]] = {}
        self._expanded: dict[str, list[tuple[str, str]]] = {}

    # ---- the stage

    def feed(self, items: Sequence[Item]) -> list[IncidentChange]:
        """What changed. Anomalies next to each other are judged together, so that the first is not taken for the root."""
        waiting: list[Anomaly] = []
        for item in items:
            if isinstance(item, Anomaly):
                waiting.append(item)
                continue
            self._correlate(waiting)
            waiting = []
            if isinstance(item, Window):
                self._absorb(item)
            elif isinstance(item, Change):
                self._note_change(item)
            elif isinstance(item, Decision):
                self._decided(item)
            elif isinstance(item, DirectiveChange):
                self._directed(item)
            elif isinstance(item, Outcome):
                self._came_out(item)
            else:
                if item.sender and item.events:
                    self._graph.hear(Entity("stream", item.sender), max(e.at for e in item.events))
                self.observe_events(item.events)
        self._correlate(waiting)
        return self._take()

    def observe_events(self, events: Sequence[Event]) -> None:
        """Learns who belongs to whom from single events (runs, GPUs, servers), and takes the changes among them."""
        watched = frozenset(
            a.labels["run"] for c in self._open.values() for a in c.primary() if a.labels.get("run")
        )
        self._graph.observe(events, watched)
        for e in events:
            if type(e) is Change:
                self._note_change(e)

    def tick(self, now: float) -> list[IncidentChange]:
        """Lets time pass: what has been quiet long enough resolves, what vanished is told. `now` is event time."""
        self._now = max(self._now, now)
        self._settle()
        return self._take()

    def _take(self) -> list[IncidentChange]:
        out, self._out = self._out, []
        return out

    # ---- asking

    def open_incidents(self) -> list[Incident]:
        return sorted((c.incident for c in self._open.values()), key=lambda i: (i.at, i.id))

    def incidents(self, limit: int = 100) -> list[Incident]:
        """Open ones first, then resolved ones, newest first."""
        closed = sorted(
            (c.incident for c in self._closed.values()), key=lambda i: (-(i.resolved_at or 0.0), i.id)
        )
        return [*reversed(self.open_incidents()), *closed][:limit]

    def get(self, incident_id: str) -> Incident | None:
        case = self._open.get(incident_id) or self._closed.get(incident_id)
        return case.incident if case else None

    # ---- people

    def command(
        self, kind: str, incident_id: str, by: str, at: float, until: float | None = None, reason: str = ""
    ) -> list[IncidentChange]:
        """What a person asks for: `ack`, `resolve`, `reopen`, or `silence` until a moment.

        Raises: ConfigError for an unknown command or incident, or a step that the lifecycle refuses.
        """
        step = command_step(kind)
        case = self._open.get(incident_id) or self._closed.get(incident_id)
        if case is None:
            raise ConfigError(
                f"unknown incident {incident_id!r}; it never was, or is forgotten", code="IN102"
            )
        self._now = max(self._now, at)
        why = f" ({reason})" if reason else ""
        if step is None:
            if case.incident.state is State.RESOLVED:
                raise ConfigError(f"cannot silence {incident_id}: it is resolved", code="IN101")
            if until is None or until <= at:
                raise ConfigError(
                    f"cannot silence {incident_id} without an end in the future; give until", code="IN103"
                )
            self._change(case, silenced_until=until)
            self._tell(case, f"silenced by {by} until {clock(until)}{why}", loud=False)
        else:
            advance(case.incident.state, step, incident_id)
            if step is Step.ACK:
                if case.incident.acknowledged_by:
                    raise ConfigError(
                        f"cannot ack {incident_id}: {case.incident.acknowledged_by} has it", code="IN101"
                    )
                self._change(case, acknowledged_by=by)
                self._step(case, step, f"acknowledged by {by}{why}", loud=True)
            elif step is Step.RESOLVE:
                case.ignored = {a.id: None for a in case.active()}
                self._resolve(case, f"resolved by {by}{why}")
            else:
                self._reopen(case, f"reopened by {by}{why}")
        return self._take()

    def add_silence(
        self, matchers: Iterable[Matcher | str], *, at: float, until: float, by: str, comment: str = ""
    ) -> Silence:
        """Nobody is woken by incidents whose labels match, until then. Matches on the scope and on `root`, `root_kind`,
        `signal`, `class` and `severity`. Raises: ConfigError (see `Silences.add`)."""
        return self._silences.add(matchers, at=at, until=until, by=by, comment=comment)

    def remove_silence(self, silence_id: str) -> bool:
        return self._silences.remove(silence_id)

    def silences(self) -> list[Silence]:
        return self._silences.all()

    # ---- windows

    def _absorb(self, window: Window) -> None:
        # What the last window's anomalies left quiet is settled before this window is known: its anomalies come after it.
        self._settle()
        frozen = [(c.incident.since, self._scopes(c)) for c in self._open.values()]
        piece = self._cells.absorb(window, frozen)
        self._samples = [
            (window.cells.labels[slot], index, ids)
            for (slot, index), ids in islice(window.samples.items(), _MAX_SAMPLES)
        ]
        self._live = window.live
        self._now = max(self._now, window.end)
        if len(piece.cells):
            self._data_at = max(self._data_at, window.end)
        for case in self._open.values():
            quiet = case.quiet_since is not None
            if enrich.add_slice(
                case, self._cells, piece, self._scopes(case), self.settings.max_names, quiet=quiet
            ):
                case.data_at = window.end
                case.no_data_told = False

    def _scopes(self, case: Case) -> list[dict[str, str]]:
        return (
            [{}]
            if _is_egress(case)
            else self._joiner.scopes(case.incident.scope)
            if case.incident.scope
            else []
        )

    def _note_change(self, change: Change) -> None:
        if change in self._changes:
            return
        self._changes.append(change)
        for case in list(self._open.values()):
            before = case.incident.changes
            self._enrich_changes(case)
            if case.incident.changes != before:
                self._tell(case, f"a change belongs to it: {change.kind} at {clock(change.at)}", loud=False)

    # ---- anomalies

    def _correlate(self, anomalies: Sequence[Anomaly]) -> None:
        if not anomalies:
            return
        self._now = max(self._now, max(a.at for a in anomalies))
        self._by_label, self._expanded = {}, {}
        for case in self._open.values():
            self._index(case)
        touched: dict[str, bool] = {}
        was_active = {c.incident.id: bool(c.holding()) for c in self._open.values()}
        fresh = [a for a in sorted(anomalies, key=leading_order) if not self._known(a, touched)]
        fresh = [a for a in fresh if not self._consequence(a)]
        fresh = [a for a in fresh if not self._join_open(a, touched)]
        fresh = [a for a in fresh if not self._join_resolved(a, touched)]
        while fresh:
            found = self._found(fresh, touched)
            if found is None:
                break
            taken = {fresh[0].id}
            taken |= {a.id for a in self._neighbours(found, fresh[1:]) if self._join(found, a, touched)}
            fresh = [a for a in fresh if a.id not in taken]
        for key in sorted(touched):
            if key in self._open:
                case = self._open[key]
                self._after_round(case, joined=touched[key], was_active=was_active.get(key, False))

    def _known(self, a: Anomaly, touched: dict[str, bool]) -> bool:
        """Takes a further statement about a known anomaly; False for one that is new here."""
        key = self._case_of.get(a.id)
        case = self._open.get(key or "") or self._closed.get(key or "")
        if case is None:
            # An end without a beginning ends nothing.
            return a.phase == "off"
        member = case.members.get(a.id)
        if a.phase == "off":
            case.ignored.pop(a.id, None)
        if member is not None:
            member.anomaly = _last_word(member.anomaly, a)
            member.on = a.phase != "off"
        if case.incident.state is not State.RESOLVED:
            touched.setdefault(case.incident.id, False)
            return True
        if (
            a.phase == "off"
            or a.id in case.ignored
            or case.merged_into
            or (member is not None and member.consequence)
        ):
            return True
        if a.at - (case.incident.resolved_at or 0.0) > self.settings.reopen_s or member is None:
            del self._case_of[a.id]
            return False
        self._reopen(
            case, f"{a.signal} is back {_ago(a.at - (case.incident.resolved_at or 0.0))} after it was over"
        )
        touched[case.incident.id] = True
        return True

    def _consequence(self, a: Anomaly) -> bool:
        """Attaches what our own action explains to the incident it was taken for; drops refusals that explain nothing."""
        for case in [*self._open.values(), *self._closed.values()]:
            effect = next((e for e in case.effects.values() if self._joiner.caused_by(e, a)), None)
            if effect is None:
                continue
            self._add(case, a, consequence=True)
            where = ", ".join(f"{k} {v}" for k, v in sorted(a.labels.items()))
            loud = (
                group_of(a.signal) == "errors"
                and a.klass != GATEWAY_LOCAL
                and case.incident.state is not State.RESOLVED
            )
            self._tell(case, f"consequence of our {effect.kind}: {a.signal} of {where}", loud=loud)
            return True
        if a.klass == GATEWAY_LOCAL:
            self.dropped[GATEWAY_LOCAL] = self.dropped.get(GATEWAY_LOCAL, 0) + 1
            return True
        return False

    def _join_open(self, a: Anomaly, touched: dict[str, bool]) -> bool:
        fits = [(self._joiner.fit(c, a), c) for c in self._near(a)]
        fits = [(f, c) for f, c in fits if f > 0.0]
        if not fits:
            return False
        best = min(fits, key=lambda fc: (-round(fc[0], 6), fc[1].incident.at, fc[1].incident.id))[1]
        self._add(best, a)
        touched[best.incident.id] = True
        return True

    def _near(self, a: Anomaly) -> list[Case]:
        """Open incidents that an anomaly could belong to: with a label in common where only labels can tell."""
        if group_of(a.signal) not in NAMED_ONLY:
            return [c for c in self._open.values() if related(c.lead, a.signal, a.klass)]
        keys: dict[str, None] = {}
        for pair in self._implied(a):
            keys.update(self._by_label.get(pair, {}))
        return [self._open[k] for k in keys if k in self._open]

    def _index(self, case: Case) -> None:
        for pair in self._pairs(case):
            self._by_label.setdefault(pair, {})[case.incident.id] = None

    def _pairs(self, case: Case) -> set[tuple[str, str]]:
        scope = case.incident.scope
        pairs = {*scope.items(), *self._graph.expand(scope).items(), *self._implied(case.lead)}
        for a in case.primary()[:100]:
            pairs.update(self._implied(a))
        return pairs

    def _implied(self, a: Anomaly) -> list[tuple[str, str]]:
        """The labels of an anomaly and those that they imply; remembered for the round."""
        found = self._expanded.get(a.id)
        if found is None:
            found = self._expanded[a.id] = list(self._graph.expand(a.labels).items())
        return found

    def _neighbours(self, case: Case, fresh: Sequence[Anomaly]) -> list[Anomaly]:
        """Those that the incident could explain, by the cheap tests."""
        own = self._pairs(case)
        return [
            a
            for a in fresh
            if related(case.lead, a.signal, a.klass)
            and (group_of(a.signal) not in NAMED_ONLY or not own.isdisjoint(self._implied(a)))
        ]

    def _join_resolved(self, a: Anomaly, touched: dict[str, bool]) -> bool:
        for case in sorted(
            self._closed.values(), key=lambda c: (-(c.incident.resolved_at or 0.0), c.incident.id)
        ):
            gone_s = a.at - (case.incident.resolved_at or 0.0)
            if gone_s > self.settings.reopen_s:
                break
            if case.merged_into or case.leader not in case.members or self._joiner.fit(case, a) <= 0.0:
                continue
            self._add(case, a)
            if group_of(a.signal) in AFTERMATH and case.group not in AFTERMATH:
                case.ignored[a.id] = None
                return True
            self._reopen(case, f"{a.signal} again {_ago(gone_s)} after it was over")
            touched[case.incident.id] = True
            return True
        return False

    def _join(self, case: Case, a: Anomaly, touched: dict[str, bool]) -> bool:
        if self._joiner.fit(case, a) <= 0.0:
            return False
        self._add(case, a)
        touched[case.incident.id] = True
        return True

    def _add(self, case: Case, a: Anomaly, *, consequence: bool = False) -> None:
        self._case_of[a.id] = case.incident.id
        case.n_anomalies += 1
        subject = enrich.subject_of(a.labels)
        if subject in case.by_entity or len(case.by_entity) < self.settings.max_members:
            case.by_entity[subject] = case.by_entity.get(subject, 0) + 1
        if len(case.members) < self.settings.max_members:
            case.members[a.id] = Member(a, a.phase != "off", consequence)

    # ---- roots

    def _found(self, fresh: Sequence[Anomaly], touched: dict[str, bool]) -> Case | None:
        """The incident that the leading anomaly opens, widens, or turns out to belong to; None when there is no room."""
        leader = fresh[0]
        rivals = [c for c in self._open.values() if related(c.lead, leader.signal, leader.klass)]
        root = self._root(leader, leader.since)
        case = self._same_or_wider(root, rivals)
        if case is None and rivals:
            named = group_of(leader.signal) in NAMED_ONLY
            scopes = [] if named else [s for c in rivals for s in self._scopes(c) if s]
            if scopes:
                root = self._root(leader, leader.since, scopes)
                case = self._same_or_wider(root, rivals)
        if case is not None:
            if case.incident.root != root.entity:
                self._set_root(case, root)
            self._add(case, leader)
            touched[case.incident.id] = True
            return case
        if len(self._open) >= self.settings.max_open:
            self.dropped["max_open"] = self.dropped.get("max_open", 0) + len(fresh)
            return None
        return self._begin(leader, root, touched)

    def _root(self, leader: Anomaly, since: float, without: Sequence[Mapping[str, str]] = ()) -> Root:
        if spec_of(leader.signal, leader.klass) is not None:
            near = [c for c in self._changes if abs(c.at - since) <= self.settings.changes_s]
            root = self._ranker.rank(leader, since, near, without)
            if root is not None:
                return root
        return root_by_labels(leader, self._graph.expand(leader.labels))

    def _same_or_wider(self, root: Root, rivals: Sequence[Case]) -> Case | None:
        """An open incident with this root, or with one that lies within it and so widens."""
        ours = not root.scope and root.entity == Entity("stream", EGRESS)
        same, within = [], []
        for c in rivals:
            i = c.incident
            if i.root == root.entity and i.scope == root.scope:
                same.append(c)
            elif (
                len(i.scope) > len(root.scope)
                and (root.scope or ours)
                and root.scope.items() <= i.scope.items()
            ):
                within.append(c)
        return min(same or within, key=lambda c: (c.incident.at, c.incident.id), default=None)

    def _begin(self, leader: Anomaly, root: Root, touched: dict[str, bool]) -> Case:
        key = short_id("INC", leader.signal, str(root.entity), leader.id)
        known = self._closed.get(key)
        if known is not None:
            self._reopen(known, f"{leader.signal} again")
            self._add(known, leader)
            touched[key] = True
            return known
        incident = Incident(
            id=key, at=self._now, since=leader.since, updated_at=self._now, root=root.entity, signal=leader.signal,
            klass=leader.klass, scope=root.scope, confidence=root.confidence, candidates=root.candidates,
        )  # fmt: skip
        case = self._open[key] = Case(incident=incident, leader=leader.id, opening=True, data_at=self._now)
        case.effects, case.members = {}, {}
        self._add(case, leader)
        touched[key] = True
        return case

    def _set_root(self, case: Case, root: Root) -> None:
        if root.entity != case.incident.root and not case.opening:
            facts = "; ".join(root.candidates[0].facts_for[:2])
            self._note(
                case, f"root is now {root.entity}, was {case.incident.root}" + (f": {facts}" if facts else "")
            )
        moved = (root.entity, root.scope) != (case.incident.root, case.incident.scope)
        self._change(
            case, root=root.entity, scope=root.scope, confidence=root.confidence, candidates=root.candidates
        )
        if moved:
            self._recount(case)

    def _reroot(self, case: Case) -> None:
        """Looks again who explains most, now that more is known. The root changes only for a clearly better one."""
        lead = min(case.primary(), key=leading_order)
        upgraded = rank_of(lead) < rank_of(case.lead)
        if upgraded or not case.members[case.leader].on:
            on = [a for a in case.active() if upgraded or a.signal == case.lead.signal]
            lead = min(on, key=leading_order) if on else lead
            case.leader = lead.id
            if upgraded:
                self._note(case, f"{lead.signal} is nearer to the cause than {case.incident.signal}")
                self._change(case, signal=lead.signal, klass=lead.klass)
        lead = case.lead
        root = self._many(case) or self._root(lead, case.incident.since, self._others(case))
        current = case.incident.root
        better = root.confidence - root.confidence_of(current) >= self.settings.root_margin
        if root.entity == current:
            self._set_root(
                case, root if root.scope == case.incident.scope else _with_scope(root, case.incident.scope)
            )
        elif better or upgraded or case.opening:
            self._set_root(case, root)
            self._merge_same_root(case)

    def _others(self, case: Case) -> list[dict[str, str]]:
        return [
            s
            for other in self._open.values()
            if other is not case and related(other.lead, case.lead.signal, case.lead.klass)
            for s in self._scopes(other)
            if s
        ]

    def _many(self, case: Case) -> Root | None:
        """Several runs of one agent, or GPUs of one node, have what they share as their root."""
        s = self.settings
        labels = [self._graph.expand(a.labels) for a in case.primary() if group_of(a.signal) == case.group]
        if case.group == "agent":
            runs = {x["run"] for x in labels if x.get("run")}
            for kind in ("prompt", "agent", "app"):
                shared = {x.get(kind, "") for x in labels}
                if (
                    len(runs) >= s.runs_to_agent
                    and len(shared) == 1
                    and "" not in shared
                    and kind != "prompt"
                ):
                    value = min(shared)
                    return root_of_many(Entity(kind, value), {kind: value}, f"{len(runs):,} runs of it loop")
        if case.group == "gpu":
            gpus, nodes = {x["gpu"] for x in labels if x.get("gpu")}, {x.get("node", "") for x in labels}
            if len(gpus) >= s.gpus_to_node and len(nodes) == 1 and "" not in nodes:
                node = min(nodes)
                return root_of_many(Entity("node", node), {"node": node}, f"{len(gpus):,} GPUs of it fail")
        return None

    def _merge_same_root(self, case: Case) -> None:
        for other in sorted(self._open.values(), key=lambda c: (c.incident.at, c.incident.id)):
            same = other.incident.root == case.incident.root and other.incident.scope == case.incident.scope
            if other is case or not same or not related(other.lead, case.lead.signal, case.lead.klass):
                continue
            older, newer = sorted((other, case), key=lambda c: (c.opening, c.incident.at, c.incident.id))
            for m in newer.members.values():
                if m.anomaly.id not in older.members:
                    self._add(older, m.anomaly, consequence=m.consequence)
                    if m.anomaly.id in older.members:
                        older.members[m.anomaly.id].on = m.on
            for kept in newer.effects.values():
                older.effects.setdefault(kept.directive, kept)
            if newer.incident.page and not older.incident.page:
                # Somebody was woken for this trouble already: not twice.
                self._change(older, page=True)
            newer.merged_into = older.incident.id
            self._note(older, f"{newer.incident.id} has the same root and joins it")
            if newer.opening:
                del self._open[newer.incident.id]
            else:
                self._resolve(
                    newer, f"part of {older.incident.id}: same root {older.incident.root}", loud=False
                )
            self._after_round(older, joined=False, was_active=True)
            return

    # ---- after a round

    def _after_round(self, case: Case, *, joined: bool, was_active: bool) -> None:
        young = self._now - case.incident.at <= _SETTLING_S
        if case.opening:
            self._recount(case)
        # An incident that opens has just been ranked; only what joined it can say more.
        if case.active() and (len(case.members) > 1 if case.opening else joined or young):
            self._reroot(case)
        if case.merged_into:
            return
        if not case.holding():
            self._quiet(case)
        else:
            back = case.quiet_since is not None and not was_active
            case.quiet_since = None
            if back and case.incident.state is State.VERIFYING:
                step = Step.DOUBT if case.live_effects() else Step.EASE
                self._step(case, step, "the trouble is back", loud=False)
        self._refresh(case)
        if case.opening:
            self._open_now(case)
        elif case.notes or case.loud:
            self._flush(case)

    def _quiet(self, case: Case) -> None:
        if case.quiet_since is not None:
            return
        case.quiet_since = self._now
        if case.live_effects() and allowed(case.incident.state, Step.VERIFY):
            self._step(case, Step.VERIFY, "all its anomalies are off; watching that it stays so", loud=False)

    def _recount(self, case: Case) -> None:
        """Counts from the windows since the start, for a root that is new."""
        since = min((a.since for a in case.primary()), default=case.incident.since)
        self._change(case, since=min(since, case.incident.since))
        case.tally = Tally(apps={}, tenants={}, models={}, regions={})
        scopes = self._scopes(case)
        now, _ = self._cells.spans(case.incident.since)
        for piece in now:
            if scopes and enrich.add_slice(case, self._cells, piece, scopes, self.settings.max_names):
                case.data_at = max(case.data_at, piece.end)
        rates = self._cells.past_rates(scopes, case.incident.since, case.families)
        case.base_ratio, case.base_usd_per_min, _ = rates

    def _refresh(self, case: Case) -> None:
        """Severity, page, figures and words as they are now. Severity only rises while an incident is open."""
        before = _figures(case.incident)
        self._measure_factor(case)
        found, why = severity.judge(case, self.settings.severity, enrich.run_velocity(case, self._graph))
        if found > case.incident.severity or case.opening:
            if not case.opening:
                self._note(case, f"{found.sev} now, was {case.incident.severity.sev}: {why}")
                case.loud = True
            self._change(case, severity=found, severity_reason=why)
        self._decide_page(case)
        self._enrich(case)
        case.dirty = case.dirty or _figures(case.incident) != before

    def _measure_factor(self, case: Case) -> None:
        spec = spec_of(case.incident.signal, case.incident.klass)
        if spec is None or spec.kind == "errors":
            return
        measure = self._cells.measure(spec, case.incident.since)
        if measure is None:
            return
        inside = measure.any_mask(self._scopes(case))
        expected = float(measure.expected[inside].sum())
        if expected > 0:
            case.factor = round(max(float(measure.now[inside].sum()) / expected, case.factor), 4)

    def _decide_page(self, case: Case) -> None:
        i = case.incident
        if i.page or i.severity < self.settings.page_at or not self._live or not case.active():
            return
        if (i.silenced_until or 0.0) > self._now:
            return
        labels = {
            **i.scope,
            "root": str(i.root),
            "root_kind": i.root.kind,
            "signal": i.signal,
            "class": i.klass,
        }
        silence = self._silences.covering({**labels, "severity": i.severity.name.lower()}, self._now)
        if silence is not None:
            if i.silenced_until != silence.until:
                self._change(case, silenced_until=silence.until)
                self._note(
                    case,
                    f"nobody is woken: silence {silence.id} by {silence.by} until {clock(silence.until)}",
                )
            return
        self._change(case, page=True)
        if not case.opening:
            self._note(case, f"pages: {i.severity.sev} on {i.root}")
            case.loud = True

    def _enrich(self, case: Case) -> None:
        impact = enrich.impact_of(case, self._graph)
        lead = case.lead
        evidence: dict[str, float | int | str | list[str]] = {
            **lead.evidence, "observed": lead.observed, "expected": lead.expected, "unit": lead.unit, "n": lead.n,
            "score": lead.score, "threshold": lead.threshold, "detector": lead.detector,
        }  # fmt: skip
        if case.factor > 1.0:
            evidence["factor"] = case.factor
        no_data = case.data_at if case.no_data_told else None
        i = case.incident
        seen = sorted(
            (
                c.incident
                for c in self._closed.values()
                if c.incident.root == i.root and c.incident.signal == i.signal
            ),
            key=lambda x: (-(x.resolved_at or 0.0), x.id),
        )
        self._change(
            case, impact=impact, evidence=evidence, samples=self._samples_of(case), n_anomalies=case.n_anomalies,
            anomalies=tuple(list(case.members)[:_SHOWN_ANOMALIES]), members=enrich.members_of(case.by_entity),
            klass=lead.klass if lead.signal == i.signal else i.klass,
            seen_before=tuple(x.id for x in seen if x.id != i.id)[:5],
            title=enrich.title_of(case), summary=enrich.summary_of(case, impact, no_data),
        )  # fmt: skip
        self._enrich_changes(case)

    def _enrich_changes(self, case: Case) -> None:
        t, i = case.tally, case.incident
        known: dict[str, Any] = {"app": t.apps, "tenant": t.tenants, "model": t.models, "region": t.regions}
        if i.signal.startswith("llm.") or not i.scope:
            known["prompt"] = {a.labels["prompt"] for a in case.primary() if a.labels.get("prompt")}
        changes = enrich.related_changes(
            self._changes, i.scope, known, i.since,
            self.settings.changes_s,
        )  # fmt: skip
        if changes != i.changes:
            self._change(case, changes=changes)

    def _samples_of(self, case: Case, limit: int = 5) -> tuple[str, ...]:
        found = dict.fromkeys(case.incident.samples)
        for a in (case.lead, *(a for a in case.primary()[:20])):
            found.update(dict.fromkeys(a.samples))
        if len(found) < limit and case.group == "errors":
            families, scopes = case.families, self._scopes(case)
            for labels, index, ids in self._samples:
                if FAMILY_OF_INDEX[index] in families and any(_carries(labels, s) for s in scopes):
                    found.update(dict.fromkeys(ids))
                if len(found) >= limit:
                    break
        return tuple(found)[:limit]

    # ---- time

    def _settle(self) -> None:
        """What is over, gone or without data, as of now."""
        self._silences.expire(self._now)
        for case in list(self._open.values()):
            heard = self._heard(case)
            if not case.holding():
                self._quiet(case)
            if self._over(case, heard) or self._gone(case, heard):
                continue
            window_s = self._cells.ring[-1].end - self._cells.ring[-1].start if self._cells.ring else 10.0
            if (
                heard is not None
                and self._now - heard > _NO_DATA_WINDOWS * window_s
                and not case.no_data_told
            ):
                case.no_data_told = True
                case.data_at = heard
                self._note(case, f"no data since {clock(heard)}: the state stays as it is")
            if self._now - case.told_at >= self.settings.update_s or case.notes:
                self._refresh(case)
                if case.notes or case.dirty:
                    self._flush(case)
        self._forget()

    def _heard(self, case: Case) -> float | None:
        """When something of the root was last heard; None where that cannot be known."""
        times = [case.data_at] if self._scopes(case) else []
        for kind in ("gpu", "node", "deployment"):
            if value := case.incident.scope.get(kind):
                times += [self._graph.seen[k] for k in (f"{kind}:{value}",) if k in self._graph.seen]
        if case.incident.root.kind == "stream" and not _is_egress(case):
            times += [self._graph.seen[k] for k in (str(case.incident.root),) if k in self._graph.seen]
        if case.group == "agent":
            last = max((m.anomaly.at for m in case.members.values()), default=case.incident.at)
            runs = {a.labels.get("run", "") for a in case.primary()}
            times += [max([last, *(self._graph.runs[r].last_at for r in runs if r in self._graph.runs)])]
        return max(times) if times else None

    def _over(self, case: Case, heard: float | None) -> bool:
        quiet = case.quiet_since
        if quiet is None or case.holding() or self._now - quiet < self.settings.quiet_s:
            return False
        # `off` came with data; the quiet itself has to be seen as well, except of a run, which may simply have ended.
        if heard is not None and heard < quiet + self.settings.quiet_s and case.group != "agent":
            return False
        told = {
            str(m.anomaly.evidence.get("why") or m.anomaly.evidence.get("over") or "")
            for m in case.members.values()
        } - {""}
        why = f" ({'; '.join(sorted(told))})" if len(told) == 1 and case.group in ("agent", "gpu") else ""
        case.ignored = {a.id: None for a in case.active()}
        self._resolve(case, f"quiet for {self.settings.quiet_s:.0f} s, with data{why}")
        return True

    def _gone(self, case: Case, heard: float | None) -> bool:
        """A run that ended or a prompt version that was rolled back suffers no more; a silent provider may well."""
        after_s = self.settings.vanish_s.get(case.incident.root.kind)
        if after_s is None or heard is None or self._now - heard < after_s:
            return False
        alive = max(self._data_at, self._graph.newest)
        if self._now - alive > after_s / 2.0:
            return False
        self._resolve(
            case,
            f"nothing of {case.incident.root} since {clock(heard)}, while other traffic goes on: it is gone",
        )
        return True

    def _forget(self) -> None:
        """Papers of what can no longer reopen are thrown away; the incidents themselves stay, up to a bound."""
        stale = False
        for case in self._closed.values():
            if case.members and self._now - (case.incident.resolved_at or 0.0) > self.settings.reopen_s:
                case.members, case.by_entity, case.ignored = {}, {}, {}
                case.tally = Tally(apps={}, tenants={}, models={}, regions={})
                case.effects = {
                    k: e
                    for k, e in case.effects.items()
                    if self._now - e.changed_at <= self.settings.consequence_s
                }
                stale = True
        while len(self._closed) > self.settings.history:
            oldest = min(self._closed.values(), key=lambda c: (c.incident.resolved_at or 0.0, c.incident.id))
            del self._closed[oldest.incident.id]
            stale = True
        if stale:
            keep = {key: c for d in (self._open, self._closed) for key, c in d.items() if c.members}
            self._case_of = {a: key for a, key in self._case_of.items() if key in keep}

    # ---- what planner and executor say

    def _decided(self, d: Decision) -> None:
        case = self._case(d.incident)
        if case is None:
            return
        before = len(case.incident.actions)
        self._change(case, actions=enrich.note_decision(case.incident, d))
        new = len(case.incident.actions) > before
        what = d.detail or d.reason
        if new:
            self._tell(
                case,
                f"{d.runbook}: {d.decision} ({what})",
                loud=d.decision in (Verdict.SUGGEST, Verdict.REFUSE),
            )

    def _directed(self, change: DirectiveChange) -> None:
        d = change.directive
        case = self._case(d.incident)
        if case is None:
            return
        self._now = max(self._now, change.at)
        self._change(case, actions=enrich.note_directive(case.incident, change))
        to = d.params.get("to")
        effect = case.effects.get(d.id)
        if effect is None:
            target = {k: str(v) for k, v in to.items()} if isinstance(to, Mapping) else {}
            effect = case.effects[d.id] = Effect(
                d.id, d.kind, dict(d.scope), target, d.granted_at, change.at, runbook=d.runbook
            )
        effect.changed_at = change.at
        effect.live = change.change in ("granted", "renewed")
        text = f"{change.change}: {enrich.describe(d)} ({change.reason})"
        state = case.incident.state
        if state is State.RESOLVED:
            self._tell(case, text, loud=False)
        elif effect.live:
            if allowed(state, Step.MITIGATE):
                self._step(case, Step.MITIGATE, text, loud=True)
            else:
                self._tell(case, text, loud=True)
        else:
            self._let_go(case, text)

    def _let_go(self, case: Case, text: str) -> None:
        """The last directive ended. While the trouble goes on the incident is open again, and people should know."""
        if not case.live_effects() and case.active() and allowed(case.incident.state, Step.EASE):
            self._step(case, Step.EASE, f"{text}; the trouble goes on", loud=True)
        else:
            self._tell(case, text, loud=True)

    def _came_out(self, o: Outcome) -> None:
        case = self._case(o.incident)
        if case is None:
            return
        self._now = max(self._now, o.at)
        self._change(case, actions=enrich.note_outcome(case.incident, o))
        text = f"{o.runbook} {o.step}: {o.result}" + (f" ({o.reason})" if o.reason else "")
        state = case.incident.state
        if state is State.RESOLVED:
            self._tell(case, text, loud=False)
        elif o.result == "applied" and allowed(state, Step.MITIGATE):
            self._step(case, Step.MITIGATE, text, loud=True)
        elif o.result == "verified" and allowed(state, Step.VERIFY):
            self._step(case, Step.VERIFY, text, loud=True)
        elif o.result in ("unverified", "failed", "undone") and state is State.VERIFYING:
            self._step(case, Step.DOUBT if case.live_effects() else Step.EASE, text, loud=True)
        elif (
            o.result in ("failed", "undone", "unverified")
            and state is State.MITIGATING
            and not case.live_effects()
        ):
            self._step(case, Step.EASE, text, loud=True)
        else:
            self._tell(case, text, loud=o.result not in ("applied", "ambiguous"))

    def _case(self, incident_id: str) -> Case | None:
        return self._open.get(incident_id) or self._closed.get(incident_id)

    # ---- changes

    def _change(self, case: Case, **fields: Any) -> None:
        case.incident = msgspec.structs.replace(case.incident, **fields)

    def _note(self, case: Case, text: str) -> None:
        case.notes = [*case.notes, text]

    def _tell(self, case: Case, reason: str, *, loud: bool) -> None:
        self._note(case, reason)
        case.loud = case.loud or loud
        self._flush(case)

    def _open_now(self, case: Case) -> None:
        case.opening = False
        case.notes = []
        i = case.incident
        facts = "; ".join(i.candidates[0].facts_for[:3]) if i.candidates else ""
        reason = f"{i.severity.sev}: {i.severity_reason}; root {i.root}" + (f": {facts}" if facts else "")
        self._say(case, "", str(i.state), reason, loud=True)

    def _flush(self, case: Case) -> None:
        state = str(case.incident.state)
        reason = "; ".join(case.notes) or "new figures"
        loud, case.loud, case.notes = case.loud, False, []
        if case.opening:
            return
        self._say(case, state, state, reason, loud=loud)

    def _step(self, case: Case, step: Step, reason: str, *, loud: bool) -> None:
        old = case.incident.state
        new = advance(old, step, case.incident.id)
        self._change(case, state=new)
        text = "; ".join([*case.notes, reason])
        case.notes = []
        self._say(case, str(old), str(new), text, loud=loud or case.loud)
        case.loud = False

    def _resolve(self, case: Case, reason: str, *, loud: bool = True) -> None:
        key = case.incident.id
        self._change(case, resolved_at=self._now)
        self._refresh_figures(case)
        del self._open[key]
        self._closed[key] = case
        self._step(case, Step.RESOLVE, reason, loud=loud)

    def _refresh_figures(self, case: Case) -> None:
        if case.members:
            impact = enrich.impact_of(case, self._graph)
            self._change(
                case, impact=impact, summary=enrich.summary_of(case, impact), title=enrich.title_of(case)
            )

    def _reopen(self, case: Case, reason: str) -> None:
        key = case.incident.id
        case.quiet_since = None
        case.no_data_told = False
        case.ignored = {}
        case.data_at = self._now
        self._closed.pop(key, None)
        self._open[key] = case
        self._change(case, resolved_at=None, reopened=case.incident.reopened + 1)
        self._step(case, Step.REOPEN, reason, loud=True)

    def _say(self, case: Case, old: str, new: str, reason: str, *, loud: bool) -> None:
        revision = case.incident.revision if not old else case.incident.revision + 1
        self._change(case, updated_at=self._now, revision=revision)
        case.told_at = self._now
        case.dirty = False
        self._out.append(
            IncidentChange(
                incident=case.incident,
                at=self._now,
                old=old,
                new=new,
                reason=reason,
                notify=loud and self._live,
            )
        )

    # ---- snapshot

    def snapshot(self) -> bytes:
        """Everything, in one value; its size follows the kept rows (about 60 bytes each) and the cells (about 150)."""
        return pack_state(
            _KIND,
            _VERSION,
            {
                "cells": self._cells.state(),
                "graph": self._graph.state(),
                "silences": self._silences.state(),
                "open": list(self._open.values()),
                "closed": list(self._closed.values()),
                "case_of": self._case_of,
                "changes": list(self._changes),
                "now": self._now,
                "data_at": self._data_at,
                "live": self._live,
                "dropped": self.dropped,
                "samples": self._samples,
            },
        )

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError when the bytes are of another stage or version, or damaged."""
        s = unpack_state(state, _KIND, _VERSION, _State)
        self._cells.load(s.cells)
        self._graph.load(s.graph)
        self._silences.load(s.silences)
        self._open = {c.incident.id: c for c in s.open}
        self._closed = {c.incident.id: c for c in s.closed}
        self._case_of = s.case_of
        self._changes = deque(s.changes, maxlen=_MAX_CHANGES)
        self._now, self._data_at, self._live, self.dropped = s.now, s.data_at, s.live, s.dropped
        self._samples = s.samples
        self._out = []


class _State(msgspec.Struct):
    cells: dict[str, Any]
    graph: dict[str, Any]
    silences: list[Silence]
    open: list[Case]
    closed: list[Case]
    case_of: dict[str, str]
    changes: list[Change]
    now: float
    data_at: float
    live: bool
    dropped: dict[str, int]
    samples: list[tuple[tuple[str, ...], int, tuple[str, ...]]]


def _carries(labels: tuple[str, ...], scope: Mapping[str, str]) -> bool:
    return all(labels[LABEL_POSITION[k]] == v for k, v in scope.items())


def _last_word(old: Anomaly, a: Anomaly) -> Anomaly:
    """The newest statement; but an end keeps the figures of the trouble, which is what people ask about."""
    since = min(a.since, old.since)
    if a.phase != "off":
        return msgspec.structs.replace(a, since=since)
    why = {k: a.evidence[k] for k in ("why", "over") if k in a.evidence}
    return msgspec.structs.replace(old, at=a.at, since=since, phase="off", evidence={**old.evidence, **why})


def _is_egress(case: Case) -> bool:
    return case.incident.root == Entity("stream", EGRESS)


def _with_scope(root: Root, scope: dict[str, str]) -> Root:
    return Root(root.entity, scope, root.confidence, root.candidates)


def _figures(i: Incident) -> tuple[Any, ...]:
    return (i.impact, i.severity, i.root, i.page, i.n_anomalies, i.title, i.summary, i.changes)


def _ago(span_s: float) -> str:
    return f"{span_s:.0f} s" if span_s < 120 else f"{span_s / 60:.0f} min"


__all__ = ["Correlator", "Item", "Severity"]
