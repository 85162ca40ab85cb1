"""The stage that turns anomalies into incidents and keeps them until they are over.

Feed it what the pipeline says, in order: windows, the anomalies of each window together after it, changes, and what planner
and executor report back. All time is event time; `tick` brings the watermark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Final, TypeAlias

import msgspec

from flyball.core.anomaly import Anomaly
from flyball.core.columns import Window
from flyball.core.directives import Decision, DirectiveChange, Outcome
from flyball.core.entities import Entity
from flyball.core.events import Batch, Change, Event
from flyball.core.ids import short_id
from flyball.core.incident import Incident, IncidentChange, State
from flyball.incidents import enrich
from flyball.incidents.case import Case, Member
from flyball.incidents.desk import Desk
from flyball.incidents.lifecycle import Step
from flyball.incidents.ranking import Root, root_by_labels, root_of_many
from flyball.incidents.signals import (
    AFTERMATH,
    EGRESS,
    GATEWAY_LOCAL,
    NAMED_ONLY,
    error_family,
    group_of,
    leading_order,
    rank_of,
    related,
    spec_of,
)

Item: TypeAlias = Window | Anomaly | Change | Decision | DirectiveChange | Outcome | Batch

_SETTLING_S: Final = 120.0
"""For so long after opening, every window may still correct the root."""
_TOGETHER_S: Final = 30.0
"""What begins so soon after an incident may be its cause, seen late: windows and scrapes end when they end."""
_MAX_SAMPLES: Final = 20_000


class Correlator(Desk):
    """Anomalies in, incident changes out. One open incident per root; one page per incident.

    Misleads when two faults of one kind hit exactly the same entity: they are one incident, by intent.

    Raises: SnapshotError from `restore`; ConfigError from `command` and `add_silence`.
    """

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
        # Open ones first: what they turn out to explain does not open beside them.
        for key in sorted(touched, key=lambda k: (k in self._open and self._open[k].opening, k)):
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
        fits = [(self._joiner.fit(c, a), c) for c in self._near(a) if not _overtakes(a, c)]
        fits = [(f, c) for f, c in fits if f > 0.0]
        if not fits:
            return False
        best = min(
            fits,
            key=lambda fc: (-round(fc[0], 6), fc[1].group in AFTERMATH, fc[1].incident.at, fc[1].incident.id),
        )[1]
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
            if case.merged_into or case.leader not in case.members or _overtakes(a, case):
                continue
            if self._joiner.fit(case, a) <= 0.0:
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
        rivals = [
            c
            for c in self._open.values()
            if related(c.lead, leader.signal, leader.klass) and not _overtakes(leader, c)
        ]
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
        return self._ranked(leader, since, without) or root_by_labels(
            leader, self._graph.expand(leader.labels)
        )

    def _ranked(self, leader: Anomaly, since: float, without: Sequence[Mapping[str, str]]) -> Root | None:
        if spec_of(leader.signal, leader.klass) is None:
            return None
        near = [c for c in self._changes if abs(c.at - since) <= self.settings.changes_s]
        return self._ranker.rank(leader, since, near, without)

    def _same_or_wider(self, root: Root, rivals: Sequence[Case]) -> Case | None:
        """An open incident with this root, or with one that lies within it and so widens: by its labels or, while it is young and
        nothing was done about it, by where its failures lie (an app that hammers is refused by one provider first)."""
        ours = not root.scope and root.entity == Entity("stream", EGRESS)
        same, within = [], []
        for c in rivals:
            i = c.incident
            if i.root == root.entity and i.scope == root.scope:
                same.append(c)
                continue
            named = len(i.scope) > len(root.scope) and root.scope.items() <= i.scope.items()
            unsettled = self._now - i.at <= _SETTLING_S and not c.effects
            if (named and (root.scope or ours)) or (unsettled and self._joiner.covers(root.scope, c)):
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
        for old in [c for c in self._open.values() if _overtakes(leader, c) and _same_root(c, case)]:
            self._unite(case, old)
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
        """Looks again who explains most, now that more is known. The root changes only for a clearly better one.

        What explains the beginning stays the root: anomalies that began later are consequences (clients that try again, caches
        that are cold after a failover) and lead nowhere. Once the incident is minutes old, or something was done about
        it, the root only widens, because what is seen then is no longer the fault alone.
        """
        many = self._many(case)
        early = self._early(case)
        lead = min(early, key=leading_order, default=case.lead)
        upgraded = rank_of(lead) < rank_of(case.lead)
        if upgraded or not case.members[case.leader].on:
            on = [
                a for a in early
                if case.members[a.id].on and (upgraded or (a.signal == case.lead.signal and _same_family(a, case.lead)))
            ]  # fmt: skip
            if on:
                lead = min(on, key=leading_order)
            elif not upgraded:
                if many is None:
                    return  # what is over explains nothing new
                lead = case.lead
            case.leader = lead.id
            if upgraded:
                self._note(case, f"{lead.signal} is nearer to the cause than {case.incident.signal}")
                self._change(case, signal=lead.signal, klass=lead.klass)
        root = many or self._ranked(case.lead, case.incident.since, self._others(case))
        if root is None:
            if not (upgraded or case.opening):
                return  # the cells show nothing: no reason to leave what they showed
            root = root_by_labels(case.lead, self._graph.expand(case.lead.labels))
        current = case.incident.root
        better = root.confidence - root.confidence_of(current) >= self.settings.root_margin
        settled = bool(case.effects) or self._now - case.incident.at > _SETTLING_S
        if settled and many is None:
            better = better and root.scope.items() <= case.incident.scope.items()
        if root.entity == current:
            self._set_root(
                case, root if root.scope == case.incident.scope else _with_scope(root, case.incident.scope)
            )
        elif better or upgraded or case.opening:
            self._set_root(case, root)
            self._merge_same_root(case)

    def _early(self, case: Case) -> list[Anomaly]:
        """Anomalies that may lead: those that began with the incident, and before anything was done about it.

        An incident led by what is a consequence elsewhere (cold caches, retries, cost) may be overtaken at any time: otherwise it
        would hide the outage that comes after it at the same root.
        """
        if case.group in AFTERMATH:
            return case.primary()
        until = case.incident.since + _TOGETHER_S
        acted = min((e.granted_at for e in case.effects.values()), default=until)
        return [a for a in case.primary() if a.since <= min(until, acted) or group_of(a.signal) == "gpu"]

    def _others(self, case: Case) -> list[dict[str, str]]:
        return [
            s
            for other in self._open.values()
            if other is not case
            and related(other.lead, case.lead.signal, case.lead.klass)
            and not _overtakes(case.lead, other)
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
            if (
                other is case
                or not _same_root(other, case)
                or not related(other.lead, case.lead.signal, case.lead.klass)
            ):
                continue
            older, newer = sorted((other, case), key=lambda c: (c.opening, c.incident.at, c.incident.id))
            if _overtakes(newer.lead, older):
                older, newer = newer, older
            self._unite(older, newer)
            self._after_round(older, joined=False, was_active=True)
            return

    def _unite(self, kept: Case, merged: Case) -> None:
        """Makes one incident part of another with the same root; what was overtaken is no beginning and only ends."""
        for m in () if _overtakes(kept.lead, merged) else merged.members.values():
            if m.anomaly.id not in kept.members:
                self._add(kept, m.anomaly, consequence=m.consequence)
                if m.anomaly.id in kept.members:
                    kept.members[m.anomaly.id].on = m.on
        for effect in merged.effects.values():
            kept.effects.setdefault(effect.directive, effect)
        if merged.incident.page and not kept.incident.page:
            # Somebody was woken for this trouble already: not twice.
            self._change(kept, page=True)
        merged.merged_into = kept.incident.id
        self._note(kept, f"{merged.incident.id} has the same root and joins it")
        if merged.opening:
            del self._open[merged.incident.id]
        else:
            self._resolve(merged, f"part of {kept.incident.id}: same root {kept.incident.root}", loud=False)

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


def _last_word(old: Anomaly, a: Anomaly) -> Anomaly:
    """The newest statement; but an end keeps the figures of the trouble, which is what people ask about."""
    since = min(a.since, old.since)
    if a.phase != "off":
        return msgspec.structs.replace(a, since=since)
    why = {k: a.evidence[k] for k in ("why", "over") if k in a.evidence}
    return msgspec.structs.replace(old, at=a.at, since=since, phase="off", evidence={**old.evidence, **why})


def _overtakes(a: Anomaly, case: Case) -> bool:
    """Whether an anomaly is worse than what an incident is about, and came later: it opens its own incident. Cold caches or a dear
    client, which woke nobody, are not the beginning of the outage that comes minutes after them."""
    i = case.incident
    return (
        case.group in AFTERMATH
        and group_of(a.signal) not in AFTERMATH
        and not (i.page or case.effects)
        and a.since > i.since + _TOGETHER_S
    )


def _same_root(a: Case, b: Case) -> bool:
    return a.incident.root == b.incident.root and a.incident.scope == b.incident.scope


def _same_family(a: Anomaly, b: Anomaly) -> bool:
    return group_of(a.signal) != "errors" or error_family(a.klass) == error_family(b.klass)


def _with_scope(root: Root, scope: dict[str, str]) -> Root:
    return Root(root.entity, scope, root.confidence, root.candidates)


def _ago(span_s: float) -> str:
    return f"{span_s:.0f} s" if span_s < 120 else f"{span_s / 60:.0f} min"


__all__ = ["Correlator", "Item"]
