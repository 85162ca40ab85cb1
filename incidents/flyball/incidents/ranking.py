"""Which entity explains most with least: the root of a set of anomalies, with the facts for and against it.

The counts decide, and the prior only where they cannot. For every provider, model, region, deployment, app, prompt
version, team, tenant and agent (over all cells, not only those with anomalies) a spatial scan statistic asks how much
better "this one departs, the rest does not" explains the window than "everything departs a little". An entity that leaves
failures outside loses, and so does one that takes healthy calls in.

Source: Kulldorff (1997), "A spatial scan statistic", Poisson model; the mapping to a share of belief is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from flyball.core.anomaly import Anomaly
from flyball.core.entities import Entity, entities_of
from flyball.core.events import Change
from flyball.core.incident import RootCandidate
from flyball.incidents.cells import LABEL_POSITION, Cells, Measure
from flyball.incidents.signals import EGRESS, error_family, group_of, may_be_ours, priors_of, spec_of
from flyball.incidents.text import count, factor, name, percent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

KINDS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("provider", ("provider",)),
    ("model", ("provider", "model")),
    ("deployment", ("deployment",)),
    ("region", ("provider", "region")),
    ("app", ("app",)),
    ("prompt_version", ("prompt",)),
    ("team", ("team",)),
    ("tenant", ("tenant",)),
    ("agent", ("agent",)),
)
"""Root kinds that cells can show, and the labels that make one: the last must be told, the others may be empty."""

_CHILDREN: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "provider": (("model", "model"), ("region", "region"), ("tenant", "tenant"), ("app", "app")),
    "model": (("region", "region"), ("deployment", "deployment"), ("tenant", "tenant"), ("app", "app")),
    "deployment": (("tenant", "tenant"), ("app", "app")),
    "region": (("model", "model"), ("tenant", "tenant"), ("app", "app")),
    "app": (("prompt", "prompt version"), ("provider", "provider"), ("model", "model"), ("tenant", "tenant")),
    "prompt_version": (("model", "model"), ("tenant", "tenant"), ("app", "app")),
    "team": (("app", "app"), ("tenant", "tenant"), ("provider", "provider")),
    "tenant": (("app", "app"), ("provider", "provider"), ("model", "model")),
    "agent": (("model", "model"), ("tenant", "tenant"), ("app", "app")),
    "stream": (("provider", "provider"), ("app", "app"), ("tenant", "tenant")),
}
_SIBLINGS: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "provider": ((), "other providers"),
    "model": (("provider",), "other models of it"),
    "region": (("provider",), "other regions of it"),
    "deployment": (("model",), "other deployments of the model"),
    "prompt_version": (("app",), "other prompt versions of the app"),
    "app": ((), "other apps"),
    "tenant": ((), "other tenants"),
    "team": ((), "other teams"),
    "agent": ((), "other agents"),
}
_SHARPNESS: Final = 30.0
"""Nats by which an explanation loses that explains nothing: keeps a large count from claiming certainty."""
_HEAP: Final = 3.0
"""Variance over mean of one call's tokens or seconds, in units of their mean: 1 + cv² of a lognormal with sigma 1 is 2.7."""
_PER_KIND: Final = 4
_SHOWN: Final = 5
_MIN_CALLS: Final = 5
_CHANGED_FACTOR: Final = 3.0
"""What a change about an entity, in the hour before, adds to the belief in it."""
_JUST_CHANGED_FACTOR: Final = 10.0
_JUST_S: Final = 300.0
"""The same when it came just before: that a change meets the beginning of trouble to the minute is seldom chance."""
_SOLE_TENANT_FACTOR: Final = 0.15
_CALLED_MORE: Final = {"rate_limited": 20.0, "health": 5.0}
"""What having multiplied its calls adds to the belief in an app, by family of errors."""
_EGRESS_RATIO: Final = 0.1
_BESIDES: Final = 0.5
"""Excess rate of what else is in a scope, of that of what the leader names, for the scope to be a cause of spend."""


@dataclass(frozen=True, slots=True)
class Root:
    """The best explanation: what it is, the labels that select its calls, and all that was considered."""

    entity: Entity
    scope: dict[str, str]
    confidence: float
    candidates: tuple[RootCandidate, ...]

    def confidence_of(self, entity: Entity) -> float:
        return next((c.confidence for c in self.candidates if c.entity == entity), 0.0)


@dataclass(slots=True)
class _Candidate:
    entity: Entity
    scope: dict[str, str]
    log_weight: float
    nats: float
    extra_for: tuple[str, ...] = ()
    extra_against: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Words:
    """How facts of one signal are put: `fail` of one child, `noun` of the mass, `rate` of a share."""

    fails: str
    well: str
    mass: str
    rate: Callable[[float, float, float], str]


def _failed(now: float, expected: float, n: float) -> str:
    return f"{percent(now / n) if n else '0 %'} fail"


def _multiple(now: float, expected: float, n: float) -> str:
    return factor(now / expected) if expected else "no past"


_WORDS: Final[dict[str, _Words]] = {
    "errors": _Words("fail", "well", "failed calls", _failed),
    "slow": _Words("are slow", "as always", "lost time", _multiple),
    "tokens": _Words("use more tokens", "as always", "additional tokens", _multiple),
    "retries": _Words("call more", "as always", "additional calls", _multiple),
    "cost": _Words("cost more", "as always", "additional cost", _multiple),
}


def scan(now: Floats, expected: Floats, total_now: float, total_expected: float) -> Floats:
    """Log likelihood ratio, in the unit of `now`, of "inside departs from outside"; 0 where inside is not the higher.

    >>> round(float(scan(np.array([90.0]), np.array([10.0]), 100.0, 100.0)[0]), 1)
    175.8
    """
    out_now, out_expected = np.maximum(total_now - now, 0.0), np.maximum(total_expected - expected, 0.0)
    if total_now <= 0 or total_expected <= 0:
        return np.zeros(len(now))
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.where(now > 0, now * np.log(now / expected), 0.0)
        outside = np.where(out_now > 0, out_now * np.log(out_now / np.maximum(out_expected, 1e-12)), 0.0)
        value = inside + outside - total_now * np.log(total_now / total_expected)
        higher = now * out_expected >= out_now * expected
    return np.where(higher & np.isfinite(value), np.maximum(value, 0.0), 0.0)


class Ranker:
    """Finds roots. Holds no state of its own: everything is asked of the cells."""

    def __init__(self, cells: Cells, explained_ratio: float) -> None:
        self._cells, self._explained_ratio = cells, explained_ratio

    def rank(
        self,
        leader: Anomaly,
        since: float,
        changes: Sequence[Change] = (),
        without: Sequence[Mapping[str, str]] = (),
    ) -> Root | None:
        """The root of a departure that cells show; None where they do not, and labels must do.

        Args:
            leader: the anomaly nearest to a cause; the root must explain it.
            changes: of the time around it; one about an entity speaks for that entity.
            without: scopes of other open incidents, whose cells are left out.
        """
        spec = spec_of(leader.signal, leader.klass)
        measure = None if spec is None else self._cells.measure(spec, since)
        if measure is None:
            return None
        measure = measure.without(without)
        total_now, total_expected = float(measure.now.sum()), float(measure.expected.sum())
        # Of what the leader names: elsewhere the mass may fall by more than it rises here.
        named = {k: v for k, v in leader.labels.items() if k in LABEL_POSITION and v}
        if total_now <= 0 or total_expected <= 0 or float(measure.excess[measure.mask(named)].sum()) <= 0:
            return None
        egress = self._egress(leader, measure)
        if egress is not None:
            return egress
        found = self._candidates(leader, measure, total_now, total_expected)
        if not found:
            return None
        self._weigh(found, leader, measure, since, changes)
        return self._root(found, leader, measure)

    def _candidates(
        self, leader: Anomaly, measure: Measure, total_now: float, total_expected: float
    ) -> list[_Candidate]:
        calls = float(measure.count.sum())
        spec = spec_of(leader.signal, leader.klass)
        # Tokens and seconds come in heaps: they are scaled to "so many calls' worth", or their sheer size would be evidence, and a
        # few long calls would.
        counts = spec is not None and (spec.kind == "errors" or spec.column == "calls")
        unit = 1.0 if counts else calls / total_expected / _HEAP
        found: list[_Candidate] = []
        of_leader = {k: v for k, v in leader.labels.items() if k in LABEL_POSITION and v}
        for kind, by in KINDS:
            inverse, groups = self._cells.group(by)
            group = inverse[measure.idx]
            now: Floats = np.bincount(group, measure.now, groups).astype(np.float64)
            expected: Floats = np.bincount(group, measure.expected, groups).astype(np.float64)
            nats = scan(now, expected, total_now, total_expected) * unit
            for g in np.argsort(-nats, kind="stable")[: _PER_KIND + 1].tolist():
                if nats[g] <= 0:
                    break
                scope = self._scope(by, int(measure.idx[np.nonzero(group == g)[0][0]]))
                if by[-1] not in scope:
                    continue
                if of_leader and measure.share(of_leader, [scope]) < self._explained_ratio:
                    continue
                if leader.signal == "llm.cost" and not _departs_besides(measure, scope, of_leader):
                    continue
                found.append(_Candidate(Entity(kind, scope[by[-1]]), scope, 0.0, float(nats[g])))
        return found

    def _scope(self, by: tuple[str, ...], cell: int) -> dict[str, str]:
        labels = self._cells.labels_of(cell)
        return {name: labels[LABEL_POSITION[name]] for name in by if labels[LABEL_POSITION[name]]}

    def _weigh(
        self,
        found: list[_Candidate],
        leader: Anomaly,
        measure: Measure,
        since: float,
        changes: Sequence[Change],
    ) -> None:
        prior = priors_of(leader.signal, leader.klass)
        best = max(c.nats for c in found)
        for c in found:
            c.log_weight = -min(best - c.nats, _SHARPNESS * (1.0 - c.nats / best)) + float(
                np.log(prior.get(c.entity.kind, 0.05))
            )
            change = next(
                (x for x in reversed(changes) if x.at <= since + 60.0 and _is_about(x, c.entity)), None
            )
            if change is not None:
                just = since - change.at <= _JUST_S
                c.log_weight += float(np.log(_JUST_CHANGED_FACTOR if just else _CHANGED_FACTOR))
                before = max((since - change.at) / 60.0, 0.0)
                c.extra_for += (f"{change.kind} about it {before:.0f} min before",)
            if leader.signal == "llm.errors":
                self._judge_tenants(c, measure)
                self._judge_volume(c, since, _CALLED_MORE.get(error_family(leader.klass), 1.0))

    def _judge_tenants(self, c: _Candidate, measure: Measure) -> None:
        """At least two tenants before a provider is blamed, where it serves more than one or the one fails elsewhere too."""
        if c.entity.kind not in ("provider", "model", "region", "deployment"):
            return
        inside = measure.mask(c.scope)
        tenant = measure.codes("tenant")
        # A failure or two of others are always there: what counts is where the excess lies.
        by_tenant = np.bincount(tenant[inside], np.maximum(measure.excess[inside], 0.0))
        by_tenant[0] = 0.0
        if by_tenant.sum() <= 0:
            return
        top = int(by_tenant.argmax())
        share = float(by_tenant[top] / by_tenant.sum())
        tenants = len(np.unique(tenant[inside & (tenant > 0)]))
        if share >= 0.95 and tenants > 1:
            c.log_weight += float(np.log(_SOLE_TENANT_FACTOR))
            who = self._cells.values[LABEL_POSITION["tenant"]][top]
            c.extra_against += (f"tenant {name(who)} alone has {percent(share)} of the failed calls",)

    def _judge_volume(self, c: _Candidate, since: float, times: float) -> None:
        """Refusals follow from calling more: who multiplied its calls is nearer to the cause than who limits."""
        spec = spec_of("llm.retries", "")
        volume = None if spec is None else self._cells.measure(spec, since)
        if volume is None or c.entity.kind not in ("app", "agent", "tenant", "team", "prompt_version"):
            return
        inside = volume.mask(c.scope)
        now, expected = float(volume.now[inside].sum()), float(volume.expected[inside].sum())
        total = float(volume.excess.sum())
        if expected > 0 and now >= 2.0 * expected and total > 0 and (now - expected) >= 0.6 * total:
            c.log_weight += float(np.log(times))
            c.extra_for += (f"its calls rose {factor(now / expected)}",)

    # ---- everything at once

    def _egress(self, leader: Anomaly, measure: Measure) -> Root | None:
        """Our own way out, when every provider that was called fails, and not because of one app, tenant or prompt."""
        if not may_be_ours(leader.signal, leader.klass):
            return None
        position = LABEL_POSITION["provider"]
        provider = measure.codes("provider")
        now, n = np.bincount(provider, measure.now), np.bincount(provider, measure.count)
        called = [i for i in range(1, len(n)) if n[i] >= 2 * _MIN_CALLS]
        if len(called) < 2:
            return None
        rates = [now[i] / n[i] for i in called]
        if min(rates) < _EGRESS_RATIO or min(rates) < 0.3 * max(rates):
            return None
        positive = np.maximum(measure.excess, 0.0)
        for kind in ("app", "tenant", "prompt", "agent", "team"):
            code = measure.codes(kind)
            of_excess, of_calls = np.bincount(code, positive), np.bincount(code, measure.count)
            of_excess[0] = 0.0
            top = int(of_excess.argmax())
            if of_excess[top] >= 0.8 * positive.sum() and of_calls[top] < 0.6 * measure.count.sum():
                return None
        names = [name(self._cells.values[position][i]) for i in called]
        rate = ", ".join(f"{who} {percent(r)}" for who, r in zip(names[:4], rates, strict=False))
        facts = (
            f"{len(called)} of {len(called)} providers fail together",
            rate,
            *self._child_facts("stream", {}, measure, _WORDS["errors"])[0][1:],
        )
        others = tuple(
            RootCandidate(
                Entity("provider", who), round(0.1 / len(names), 3), (), ("the other providers fail as well",)
            )
            for who in names[: _SHOWN - 1]
        )
        entity = Entity("stream", EGRESS)
        return Root(entity, {}, 0.9, (RootCandidate(entity, 0.9, tuple(facts), ()), *others))

    # ---- belief and facts

    def _root(self, found: list[_Candidate], leader: Anomaly, measure: Measure) -> Root:
        order = {kind: i for i, (kind, _) in enumerate(KINDS)}
        found.sort(key=lambda c: (-c.log_weight, order[c.entity.kind], c.entity, sorted(c.scope.items())))
        top = found[0].log_weight
        weights = [float(np.exp(c.log_weight - top)) for c in found]
        total = sum(weights)
        candidates: list[RootCandidate] = []
        seen: set[Entity] = set()
        for c, weight in zip(found, weights, strict=True):
            if c.entity in seen or len(candidates) == _SHOWN:
                continue
            seen.add(c.entity)
            facts_for, facts_against = self._facts(c, leader, measure)
            candidates.append(RootCandidate(c.entity, round(weight / total, 3), facts_for, facts_against))
        # Even the only explanation left may be wrong: never certain.
        best = candidates[0] = RootCandidate(
            candidates[0].entity,
            min(candidates[0].confidence, 0.99),
            candidates[0].facts_for,
            candidates[0].facts_against,
        )
        return Root(best.entity, found[0].scope, best.confidence, tuple(candidates))

    def _facts(
        self, c: _Candidate, leader: Anomaly, measure: Measure
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        words = _WORDS.get(group_of(leader.signal), _WORDS["errors"])
        facts_for, facts_against = self._child_facts(c.entity.kind, c.scope, measure, words)
        share = measure.share({}, [c.scope])
        if share >= 0.9:
            facts_for.append(f"{percent(share)} of the {words.mass} lie in it")
        else:
            facts_against.append(f"{percent(1.0 - share)} of the {words.mass} lie outside it")
        siblings = self._sibling_fact(c, measure, words)
        if siblings is not None:
            (facts_for if siblings[0] else facts_against).append(siblings[1])
        return (*c.extra_for, *facts_for[:5]), (*c.extra_against, *facts_against[:4])

    def _child_facts(
        self, kind: str, scope: Mapping[str, str], measure: Measure, words: _Words
    ) -> tuple[list[str], list[str]]:
        """How many of its parts depart: "3 of 3 models of it fail" speaks for it, a large part that is well against."""
        inside = measure.mask(scope)
        rate = _rate(float(measure.now[inside].sum()), float(measure.expected[inside].sum()))
        facts_for: list[str] = []
        facts_against: list[str] = []
        for label, noun in _CHILDREN.get(kind, ()):
            code = measure.codes(label)[inside]
            now = np.bincount(code, measure.now[inside])
            expected = np.bincount(code, measure.expected[inside])
            n = np.bincount(code, measure.count[inside])
            told = [i for i in range(1, len(n)) if n[i] >= _MIN_CALLS]
            if not told:
                continue
            bad = [i for i in told if _rate(now[i], expected[i]) >= max(0.3 * rate, 0.2)]
            noun = noun if len(told) == 1 else noun + "s"
            if len(bad) > 0.6 * len(told):
                facts_for.append(f"{len(bad):,} of {len(told):,} {noun} {words.fails}")
            elif label != "tenant" or len(told) < 50:
                facts_against.append(f"only {len(bad):,} of {len(told):,} {noun} {words.fails}")
            well = [i for i in told if i not in bad and n[i] >= 0.15 * n.sum()] if len(told) < 50 else []
            if well and len(bad) > 0.6 * len(told):
                i = max(well, key=lambda i: n[i])
                what = name(self._cells.values[LABEL_POSITION[label]][i])
                facts_against.append(
                    f"{noun.removesuffix('s')} {what} is {words.well} ({words.rate(now[i], expected[i], n[i])})"
                )
        return facts_for, facts_against

    def _sibling_fact(self, c: _Candidate, measure: Measure, words: _Words) -> tuple[bool, str] | None:
        known = _SIBLINGS.get(c.entity.kind)
        if known is None:
            return None
        shared, noun = known
        around = dict(c.scope)
        if shared and any(s not in around for s in shared):
            cell = int(measure.idx[np.nonzero(measure.mask(c.scope))[0][0]])
            labels = self._cells.labels_of(cell)
            around |= {s: labels[LABEL_POSITION[s]] for s in shared if labels[LABEL_POSITION[s]]}
        around = {k: v for k, v in around.items() if k in shared}
        rest = measure.mask(around) & ~measure.mask(c.scope)
        n = float(measure.count[rest].sum())
        if n < _MIN_CALLS:
            return None
        now, expected = float(measure.now[rest].sum()), float(measure.expected[rest].sum())
        inside = measure.mask(c.scope)
        own = _rate(float(measure.now[inside].sum()), float(measure.expected[inside].sum()))
        return _rate(now, expected) < 0.3 * own, f"{noun}: {words.rate(now, expected, n)}"


def _departs_besides(measure: Measure, scope: Mapping[str, str], named: Mapping[str, str]) -> bool:
    """Whether a scope departs about as much in what the leader does not name: the spend of all who share a model wanders with
    the hour, and one who burns money does not make the model the cause."""
    ours = measure.mask(named)
    rest = measure.mask(scope) & ~ours
    return not rest.any() or measure.rate(rest) >= _BESIDES * measure.rate(ours)


def _is_about(change: Change, entity: Entity) -> bool:
    """A deploy of a prompt version names its app as well, and is about the version."""
    narrower = change.labels.get("prompt") and entity.kind in ("app", "team")
    return entity.matches(change.labels) and not narrower


def _rate(now: float, expected: float) -> float:
    """Excess over what is expected; 1.0 is twice as much."""
    return (now - expected) / expected if expected > 0 else 0.0


def root_by_labels(leader: Anomaly, labels: Mapping[str, str]) -> Root:
    """The root where cells show nothing: the named entity that the signal blames most often."""
    group = group_of(leader.signal)
    prefer = {
        "agent": ("run", "agent", "app"),
        "gpu": ("gpu", "node", "deployment"),
        "serving": ("deployment", "gpu", "node", "model"),
        "stream": ("stream",),
    }.get(group)
    found = entities_of(labels)
    if prefer is not None:
        found = [e for kind in prefer for e in found if e.kind == kind] or found
    else:
        prior = priors_of(leader.signal, leader.klass)
        told = set(entities_of(leader.labels))
        # What the anomaly itself names comes before what the graph adds.
        found.sort(key=lambda e: (e not in told, -prior.get(e.kind, 0.01)))
    entity = found[0] if found else Entity("stream", "unknown")
    scope = {entity.label: entity.name}
    if entity.kind in ("model", "region") and labels.get("provider"):
        scope["provider"] = labels["provider"]
    if entity.kind == "gpu" and labels.get("node"):
        scope["node"] = labels["node"]
    facts = (f"named by {leader.detector}",) if found else ("no label names anything",)
    confidence = 0.9 if prefer is not None and found else 0.5 if found else 0.1
    return Root(entity, dict(sorted(scope.items())), confidence, (RootCandidate(entity, confidence, facts),))


def root_of_many(entity: Entity, scope: dict[str, str], fact: str) -> Root:
    """A root that several smaller ones add up to: a node with several failing GPUs, an agent with several looping runs."""
    return Root(entity, scope, 0.9, (RootCandidate(entity, 0.9, (fact,)),))


__all__ = ["KINDS", "Ranker", "Root", "count", "root_by_labels", "root_of_many", "scan"]
