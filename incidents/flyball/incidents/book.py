"""The book of incidents: which are open, how bad and how far they are, and every change of them, said once.

Correlation (`correlator`) decides what belongs where; here is what follows from it with time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from flyball.core.codec import pack_state, unpack_state
from flyball.core.entities import Entity
from flyball.core.events import Change
from flyball.core.incident import Incident, IncidentChange
from flyball.incidents import enrich, severity
from flyball.incidents.case import Case, Tally
from flyball.incidents.cells import LABEL_POSITION, Cells
from flyball.incidents.graph import Graph
from flyball.incidents.joining import Joiner
from flyball.incidents.lifecycle import Step, advance, allowed
from flyball.incidents.ranking import Ranker
from flyball.incidents.settings import IncidentSettings
from flyball.incidents.signals import (
    EGRESS,
    FAMILY_OF_INDEX,
    spec_of,
)
from flyball.incidents.silences import Silence, Silences
from flyball.incidents.text import clock

_KIND: Final = "incidents"
_VERSION: Final = 1
_SHOWN_ANOMALIES: Final = 100
_MAX_CHANGES: Final = 2_000
_NO_DATA_WINDOWS: Final = 6


class Book:
    """Open and resolved incidents with their papers. The base of `Correlator`; of no use alone.

    Raises: SnapshotError from `restore`.
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

    # ---- asking

    def open_incidents(self) -> list[Incident]:
        return sorted((c.incident for c in self._open.values()), key=lambda i: (i.at, i.id))

    def find(self, incident_id: str) -> Incident | None:
        """One that is open or not yet forgotten."""
        case = self._case(incident_id)
        return case.incident if case is not None else None

    def incidents(self, limit: int = 100) -> list[Incident]:
        """Open ones first, then resolved ones, newest first."""
        closed = sorted(
            (c.incident for c in self._closed.values()), key=lambda i: (-(i.resolved_at or 0.0), i.id)
        )
        return [*reversed(self.open_incidents()), *closed][:limit]

    def get(self, incident_id: str) -> Incident | None:
        case = self._open.get(incident_id) or self._closed.get(incident_id)
        return case.incident if case else None

    def _case(self, incident_id: str) -> Case | None:
        return self._open.get(incident_id) or self._closed.get(incident_id)

    # ---- how it is now

    def _scopes(self, case: Case) -> list[dict[str, str]]:
        return (
            [{}]
            if is_egress(case)
            else self._joiner.scopes(case.incident.scope)
            if case.incident.scope
            else []
        )

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
        if case.incident.root.kind == "stream" and not is_egress(case):
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

    def _take(self) -> list[IncidentChange]:
        out, self._out = self._out, []
        return out

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


def is_egress(case: Case) -> bool:
    return case.incident.root == Entity("stream", EGRESS)


def _figures(i: Incident) -> tuple[Any, ...]:
    return (i.impact, i.severity, i.root, i.page, i.n_anomalies, i.title, i.summary, i.changes)
