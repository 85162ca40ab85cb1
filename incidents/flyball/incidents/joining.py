"""Whether an anomaly belongs to an incident that is already there: by labels, along the graph, or by where its excess lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from flyball.core.anomaly import Anomaly
from flyball.core.entities import Entity
from flyball.incidents.case import Case, Effect
from flyball.incidents.cells import LABEL_POSITION, Cells
from flyball.incidents.graph import Graph
from flyball.incidents.settings import IncidentSettings
from flyball.incidents.signals import EGRESS, GATEWAY_LOCAL, group_of, related, spec_of

_AGENT_COULD_CAUSE: Final = frozenset({"tokens", "cost", "retries", "cache"})
_SIDE_EFFECTS: Final = frozenset({"errors", "slow", "cost", "cache", "tokens", "retries", "serving"})
"""What shifting, limiting or giving back traffic can make other parts of the estate show."""
_OWN_SCOPE_EFFECTS: Final = frozenset({"cost", "cache", "retries"})
"""What our directive can make its own scope show, beyond the trouble that was there before."""
_USED_RATIO: Final = 0.3
"""Share of its calls that an app has in the incident's scope, for what else it shows to belong there."""
_NO_EXCESS: Final = 0.1
"""Excess over the expected below which cells do not show what the anomaly states (other weights, other statistics)."""
_TRIFLE: Final = 0.1
"""Share of an anomaly's excess that says nothing: calls that were under way when a new version came, a few long answers."""
_COVERS: Final = 0.8
"""Share of an incident's excess that a root found later must explain, to be the root of it as well."""
_BEFORE_S: Final = 600.0
"""What began so long before an incident is not its consequence."""


class Joiner:
    """Answers for the correlator; holds nothing of its own."""

    def __init__(self, cells: Cells, graph: Graph, settings: IncidentSettings) -> None:
        self._cells, self._graph, self._settings = cells, graph, settings

    def scopes(self, scope: Mapping[str, str]) -> list[dict[str, str]]:
        """Label sets that select an incident's calls in the cells; none where its calls are not told apart there."""
        if all(k in LABEL_POSITION for k in scope) and (not scope or self._cells.knows(scope)):
            return [dict(scope)]
        reached = [s for s in self._graph.reaches(scope) if self._cells.knows(s)]
        if reached:
            return reached
        models = {
            m
            for s in self._graph.reaches(scope)
            for m in self._graph.parents(Entity("deployment", s["deployment"]), "model")
        }
        return [{"model": m} for m in sorted(models) if self._cells.knows({"model": m})]

    def fit(self, case: Case, a: Anomaly) -> float:
        """How well an incident explains an anomaly, in [0, 1]; below `explained_ratio` means not at all (0.0)."""
        if a.since < case.incident.since - _BEFORE_S or not related(case.lead, a.signal, a.klass):
            return 0.0
        ours, theirs = case.group, group_of(a.signal)
        if ours == "stream" or theirs == "stream":
            return 1.0 if case.incident.root.name != EGRESS and case.incident.root.matches(a.labels) else 0.0
        if "agent" in (ours, theirs):
            return self._fit_agent(case, a, ours, theirs)
        if theirs in ("gpu", "serving"):
            return self._fit_machine(case, a)
        return self._fit_cells(case, a)

    def _fit_agent(self, case: Case, a: Anomaly, ours: str, theirs: str) -> float:
        labels = self._graph.expand(a.labels)
        lead = self._graph.expand(case.lead.labels)
        if ours == theirs == "agent":
            if a.labels.get("run") and a.labels.get("run") in {m.labels.get("run") for m in case.primary()}:
                return 1.0
            same = "agent" if lead.get("agent") else "app"
            return (
                0.9
                if a.signal == case.incident.signal and lead.get(same) and labels.get(same) == lead[same]
                else 0.0
            )
        if ours == "agent":
            told = [k for k in ("agent", "app", "prompt", "tenant", "team") if a.labels.get(k)]
            if theirs not in _AGENT_COULD_CAUSE or not {"agent", "app"} & set(told):
                return 0.0
            return 0.6 if all(lead.get(k) == a.labels[k] for k in told) else 0.0
        if (
            case.incident.root.kind not in ("app", "agent", "tenant", "team")
            or ours not in _AGENT_COULD_CAUSE
        ):
            return 0.0
        return 1.0 if case.incident.root.matches(labels) else 0.0

    def _fit_machine(self, case: Case, a: Anomaly) -> float:
        labels, scope = self._graph.expand(a.labels), self._graph.expand(case.incident.scope)
        if case.group in ("gpu", "serving"):
            if case.group == "gpu" or group_of(a.signal) == "gpu":
                return (
                    1.0
                    if scope.get("node") and labels.get("node") == scope["node"]
                    else float(_within(scope, labels))
                )
            return 1.0 if scope.get("deployment") and labels.get("deployment") == scope["deployment"] else 0.0
        if not case.incident.scope:
            return 0.0
        # A server says its model, not who provides it: what it does not say cannot speak against it.
        told = {k: v for k, v in case.incident.scope.items() if labels.get(k)}
        if (
            told
            and all(labels[k] == v for k, v in told.items())
            and (set(told) - {"provider"} or len(told) == len(case.incident.scope))
        ):
            return 1.0
        return 0.0

    def _fit_cells(self, case: Case, a: Anomaly) -> float:
        scope = case.incident.scope
        if case.incident.root == Entity("stream", EGRESS):
            return 1.0
        if _within(scope, self._graph.expand(a.labels)):
            return 1.0
        if any(k in a.labels and a.labels[k] != v for k, v in scope.items()):
            return 0.0
        if group_of(a.signal) == "retries":
            followed = self._failures_of(case, a)
            if followed >= self._settings.explained_ratio:
                return followed
        # Where a level began to move is known only to a minute or so: what it did before the incident does not count.
        since = max(a.since, case.incident.since) if group_of(a.signal) == case.group else a.since
        share = self.explained(a, self.scopes(scope), since)
        if share is None:
            return 0.5 if _within(a.labels, scope) or self._used(case, a) else 0.0
        return share if share >= self._settings.explained_ratio else 0.0

    def _failures_of(self, case: Case, a: Anomaly) -> float:
        """Share of what fails for those who try again that fails where the incident is: a storm follows its failures, also
        where the calls that it adds are too few, or elsewhere, to tell by themselves."""
        failing = next((m for m in (case.lead, *case.primary()) if group_of(m.signal) == "errors"), None)
        spec = None if failing is None else spec_of(failing.signal, failing.klass)
        measure = None if spec is None else self._cells.measure(spec, case.incident.since)
        labels = {k: v for k, v in a.labels.items() if k in LABEL_POSITION}
        return (
            0.0 if measure is None or not labels else measure.share(labels, self.scopes(case.incident.scope))
        )

    def _used(self, case: Case, a: Anomaly) -> bool:
        """Whether an anomaly without an excess of its own to place is about calls that the incident hits: what an app
        shows beside its errors while a provider that it uses fails."""
        spec = spec_of(case.incident.signal, case.incident.klass)
        measure = None if spec is None else self._cells.measure(spec, case.incident.since)
        labels = {k: v for k, v in a.labels.items() if k in LABEL_POSITION}
        if measure is None or not labels or group_of(a.signal) == case.group:
            return False
        of = measure.mask(labels)
        hit = of & measure.any_mask(self.scopes(case.incident.scope))
        return float(measure.count[hit].sum()) >= _USED_RATIO * float(measure.count[of].sum()) > 0.0

    def explained(
        self, a: Anomaly, scopes: Sequence[Mapping[str, str]], since: float | None = None
    ) -> float | None:
        """Share of an anomaly's excess that lies in some scopes; 0.0 where the rest of it departs as much, because then the
        scopes are not the reason; None where cells cannot say."""
        spec = spec_of(a.signal, a.klass)
        measure = None if spec is None else self._cells.measure(spec, a.since if since is None else since)
        labels = {k: v for k, v in a.labels.items() if k in LABEL_POSITION}
        if measure is None or not scopes or not labels:
            return None
        of = np.nonzero(measure.mask(labels))[0]
        within = measure.any_mask(scopes)[of]
        hit, rest = of[within], of[~within]
        if measure.rate(of) < _NO_EXCESS:
            return None
        outside = float(measure.excess[rest].sum()) / float(measure.excess[of].sum())
        if measure.rate(rest) > 0.5 * measure.rate(hit) and outside > _TRIFLE:
            return 0.0
        return measure.share(labels, scopes)

    def covers(self, scope: Mapping[str, str], case: Case) -> bool:
        """Whether nearly all that departs in an incident departs in `scope`."""
        spec = spec_of(case.incident.signal, case.incident.klass)
        measure = None if spec is None else self._cells.measure(spec, case.incident.since)
        own = self.scopes(case.incident.scope)
        if measure is None or len(own) != 1 or not scope:
            return False
        return measure.share(own[0], [scope]) >= _COVERS

    # ---- our own doing

    def caused_by(self, effect: Effect, a: Anomaly) -> bool:
        """Whether one of our directives explains an anomaly: cost and cold caches after a redirect, errors of the target
        that the shift overran, refusals of a limit. Only near a change of the directive, and only what began after it."""
        group = group_of(a.signal)
        if a.at - effect.changed_at > self._settings.consequence_s or a.at < effect.granted_at:
            return False
        if group not in _SIDE_EFFECTS or a.since < effect.granted_at - self._window_s():
            return False
        if effect.to and self._touches(a, effect.to):
            return True
        own = group in _OWN_SCOPE_EFFECTS or a.klass in (GATEWAY_LOCAL, "rate_limited")
        return own and self._touches(a, effect.scope)

    def _touches(self, a: Anomaly, scope: Mapping[str, str]) -> bool:
        labels = self._graph.expand(a.labels)
        shared = [k for k in scope if labels.get(k)]
        if any(labels[k] != scope[k] for k in shared):
            return False
        if shared:
            return True
        share = self.explained(a, [scope])
        if share is None:
            return self._sends_to(a, scope)
        return share >= self._settings.explained_ratio

    def _sends_to(self, a: Anomaly, scope: Mapping[str, str]) -> bool:
        """Whether a fair part of the calls that an anomaly is about lately went to a scope: for what cells do not measure."""
        spec = spec_of("llm.retries", "")
        measure = None if spec is None else self._cells.measure(spec, a.since)
        labels = {k: v for k, v in a.labels.items() if k in LABEL_POSITION}
        if measure is None or not labels:
            return False
        of = measure.mask(labels)
        return (
            float(measure.now[of & measure.mask(scope)].sum())
            >= _USED_RATIO * float(measure.now[of].sum())
            > 0.0
        )

    def _window_s(self) -> float:
        newest = self._cells.ring[-1] if self._cells.ring else None
        return newest.end - newest.start if newest else 10.0


def _within(part: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether all labels of `part` are among `labels`; nothing is within everything only by name, so empty is False."""
    return bool(part) and all(labels.get(k) == v for k, v in part.items())
