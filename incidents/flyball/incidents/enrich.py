"""What a person needs in the first ten seconds: impact, title, summary, related changes, what was done and refused."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from flyball.core.anomaly import Anomaly
from flyball.core.directives import Decision, Directive, DirectiveChange, Outcome, Verdict
from flyball.core.entities import Entity, entities_of
from flyball.core.events import Change
from flyball.core.incident import ActionNote, Impact, Incident, RelatedChange
from flyball.incidents.case import Case
from flyball.incidents.cells import COLUMN, LABEL_POSITION, Cells, Slice
from flyball.incidents.graph import Graph
from flyball.incidents.signals import EGRESS, FAMILY_OF_INDEX
from flyball.incidents.text import clock, count, factor, name, percent, seconds, usd

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints32 = NDArray[np.int32]
    Floats = NDArray[np.float64]

_SHOWN_NAMES: Final = 20
_SHOWN_CHANGES: Final = 10
_SHOWN_ACTIONS: Final = 50
_FAMILY: Final = np.array(FAMILY_OF_INDEX)
_ENOUGH_CALLS: Final = 10
_BARE: Final = frozenset({"provider", "model", "app", "prompt_version"})
"""Kinds whose names speak for themselves in a title."""


# ---- impact


def add_slice(
    case: Case,
    cells: Cells,
    piece: Slice,
    scopes: Sequence[Mapping[str, str]],
    max_names: int,
    *,
    quiet: bool = False,
) -> bool:
    """Adds one window to what the incident has done so far; True when the window held calls of its scope.

    Args:
        quiet: all its anomalies are off: the window shows how it is now, but is no part of the damage.
    """
    t = case.tally
    window_s = max(piece.end - piece.start, 1e-9)
    wanted = np.isin(_FAMILY, case.families)[piece.fail_classes]
    all_attempts = float(piece.data[COLUMN["attempts"]].sum(dtype=np.float64))
    t.estate_ratio_now = float(piece.fail_counts[wanted].sum()) / all_attempts if all_attempts else 0.0
    hit = wanted & cells.any_mask(scopes, piece.fail_cells)
    rows = np.nonzero(cells.any_mask(scopes, piece.cells))[0]

    def total(name: str) -> float:
        return float(piece.data[COLUMN[name], rows].sum(dtype=np.float64))

    t.calls_now, t.failed_now = int(total("attempts")), int(piece.fail_counts[hit].sum())
    cost = total("cost_usd")
    t.usd_per_min_now = cost * 60.0 / window_s
    t.tokens_per_min_now = (total("input_tokens") + total("output_tokens")) * 60.0 / window_s
    had_calls = bool(total("calls"))
    if quiet:
        return had_calls
    t.minutes += window_s / 60.0
    t.calls += t.calls_now
    t.failed += t.failed_now
    t.usd += cost
    if t.calls_now >= _ENOUGH_CALLS:
        t.worst_ratio = max(t.worst_ratio, t.failed_now / t.calls_now)
    if not had_calls:
        return False
    if case.group == "errors":
        affected, weight = piece.fail_cells[hit], piece.fail_counts[hit].astype(np.float64)
    else:
        affected, weight = piece.cells[rows], piece.data[COLUMN["calls"], rows].astype(np.float64)
    for label, into in (("app", t.apps), ("tenant", t.tenants)):
        of_calls = cells.totals(piece, label)
        for value, code, n in _by_value(cells, label, affected, weight):
            pair = into.get(value)
            if pair is None and len(into) < max_names:
                pair = into[value] = [0, 0]
            if pair is not None:
                pair[0] += n
                pair[1] += int(of_calls[code])
    for label, names in (("model", t.models), ("region", t.regions)):
        for value, _, n in _by_value(cells, label, affected, weight):
            if value in names or len(names) < max_names:
                names[value] = names.get(value, 0) + n
    return True


def _by_value(cells: Cells, label: str, affected: Ints32, weight: Floats) -> list[tuple[str, int, int]]:
    """(value, code, affected calls) of one label; calls that do not tell it are left out."""
    position = LABEL_POSITION[label]
    by_code = np.bincount(cells.codes[position, affected], weight)
    values = cells.values[position]
    return [(values[code], code, int(by_code[code])) for code in np.nonzero(by_code)[0].tolist() if code]


def impact_of(case: Case, graph: Graph) -> Impact:
    """Figures since the start. Money above the expected counts as wasted; cost of single failed calls is not told."""
    t = case.tally
    if not t.calls and (runs := _runs(case, graph)):
        return _impact_of_runs(runs, graph)
    expected = case.base_usd_per_min * t.minutes
    wasted = (
        t.usd * (1.0 - 1.0 / case.factor)
        if case.group in ("tokens", "cost") and case.factor > 1
        else t.usd - expected
    )
    return Impact(
        calls=t.calls,
        failed_calls=t.failed,
        failed_ratio_now=round(t.failed_now / t.calls_now, 6) if t.calls_now else 0.0,
        failed_ratio_baseline=round(case.base_ratio, 6),
        usd_per_min_now=round(t.usd_per_min_now, 6),
        usd_per_min_baseline=round(case.base_usd_per_min, 6),
        usd_since_start=round(t.usd, 6),
        usd_wasted=round(max(wasted, 0.0), 6),
        tokens_per_min_now=round(t.tokens_per_min_now, 3),
        apps=_worst(t.apps),
        tenants=_worst(t.tenants),
        n_apps=len(t.apps),
        n_tenants=len(t.tenants),
        models=tuple(sorted(t.models, key=lambda k: (-t.models[k], k))[:_SHOWN_NAMES]),
        regions=tuple(sorted(t.regions, key=lambda k: (-t.regions[k], k))[:_SHOWN_NAMES]),
    )


def _worst(names: Mapping[str, Sequence[int]]) -> tuple[tuple[str, int, float], ...]:
    """Most affected calls first; share of its calls in the windows in which it was affected."""
    order = sorted(names, key=lambda k: (-names[k][0], k))[:_SHOWN_NAMES]
    return tuple((k, names[k][0], round(min(names[k][0] / max(names[k][1], 1), 1.0), 4)) for k in order)


def _runs(case: Case, graph: Graph) -> list[str]:
    found = {a.labels.get("run", "") for a in case.primary()} - {""}
    return sorted(r for r in found if r in graph.runs)


def _impact_of_runs(names: Sequence[str], graph: Graph) -> Impact:
    runs = [graph.runs[n] for n in names]
    calls, cost = sum(r.calls for r in runs), sum(r.usd for r in runs)
    minutes = max((max(r.last_at for r in runs) - min(r.first_at for r in runs)) / 60.0, 1.0)
    apps = sorted({r.app for r in runs} - {""})
    tenants = sorted({r.tenant for r in runs} - {""})
    return Impact(
        calls=calls,
        usd_per_min_now=round(cost / minutes, 6),
        usd_since_start=round(cost, 6),
        usd_wasted=round(cost, 6),
        tokens_per_min_now=round(sum(r.tokens for r in runs) / minutes, 3),
        apps=tuple((a, sum(r.calls for r in runs if r.app == a), 1.0) for a in apps[:_SHOWN_NAMES]),
        tenants=tuple((t, sum(r.calls for r in runs if r.tenant == t), 1.0) for t in tenants[:_SHOWN_NAMES]),
        n_apps=len(apps),
        n_tenants=len(tenants),
    )


def run_velocity(case: Case, graph: Graph) -> float:
    """Dollars a minute of the runs that the incident is about; 0.0 where it is about none that was seen."""
    return sum(graph.runs[n].usd_per_min for n in _runs(case, graph))


# ---- words


def title_of(case: Case) -> str:
    """What broke, for whom, since when: `anthropic: 61 % of calls fail (overloaded) since 02:14`."""
    root, lead = case.incident.root, case.lead
    since, over = clock(case.incident.since), case.incident.resolved_at
    span = f"since {since}" if over is None else f"from {since} to {clock(case.quiet_since or over)}"
    if root == Entity("stream", EGRESS):
        what = (
            f"all providers {'fail' if over is None else 'failed'} together ({name(lead.klass) or 'errors'})"
        )
        return f"{what} {span}: suspect our own egress, DNS or release"
    return f"{_who(case)}: {_what(case, lead)} {span}"


def _who(case: Case) -> str:
    root, scope = case.incident.root, case.incident.scope
    if root.kind in _BARE:
        return name(root.name)
    if root.kind == "region" and scope.get("provider"):
        return f"{name(scope['provider'])} in {name(root.name)}"
    if root.kind == "gpu" and scope.get("node"):
        return f"gpu {name(root.name)} on {name(scope['node'])}"
    return f"{root.kind.replace('_', ' ')} {name(root.name)}"


def _what(case: Case, lead: Anomaly) -> str:
    group = case.group
    times = max(case.factor, lead.observed / lead.expected if lead.expected > 0 else 0.0)
    if group == "errors":
        t = case.tally
        mean = t.failed / t.calls if t.calls else min(max(lead.observed, 0.0), 1.0)
        klass = name(lead.klass) or "errors"
        if case.quiet_since is not None:
            return f"up to {percent(max(t.worst_ratio, mean))} of calls failed ({klass})"
        ratio = t.failed_now / t.calls_now if t.calls_now >= _ENOUGH_CALLS else mean
        return f"{percent(ratio)} of calls fail ({klass})"
    if group == "slow":
        of = "time to first token" if lead.signal == "llm.ttft" else "calls"
        verb = "is" if lead.signal == "llm.ttft" else "take"
        return f"{of} {verb} {factor(times)} as long{_instead(lead, seconds(lead.observed), seconds(lead.expected))}"
    if group == "tokens":
        which = (
            "output tokens"
            if lead.signal == "llm.output_tokens"
            else "input tokens"
            if lead.signal == "llm.input_tokens"
            else "tokens"
        )
        return f"{which} per call {factor(times)}{_instead(lead, f'{lead.observed:,.0f}', f'{lead.expected:,.0f}')}"
    if group == "retries":
        return f"{factor(times)} as many calls, retries among them"
    if group == "cost":
        return f"spends {factor(times)} as much{_instead(lead, usd(lead.observed) + '/min', usd(lead.expected) + '/min')}"
    if group == "cache":
        return "cached share of the prompt falls" + _instead(
            lead, percent(lead.observed), percent(lead.expected)
        )
    if group == "agent":
        return _agent_words(lead)
    if group == "gpu":
        xid = lead.evidence.get("xid")
        what = f"XID {xid}" if xid is not None else name(lead.klass) or "fault"
        return f"{'throttled' if lead.signal == 'gpu.throttle' else 'GPU fault'} ({what})"
    if group == "serving":
        return f"inference server saturated ({lead.signal.removeprefix('serving.')})"
    return (
        f"{lead.signal.partition('.')[2] or lead.signal}{' (' + name(lead.klass) + ')' if lead.klass else ''}"
    )


def _instead(lead: Anomaly, observed: str, expected: str) -> str:
    return f" ({observed} instead of {expected})" if lead.expected > 0 else ""


def _agent_words(lead: Anomaly) -> str:
    agent = lead.labels.get("agent") or lead.labels.get("app", "")
    of = f" in {name(agent)}" if agent else ""
    if lead.signal == "agent.loop":
        return f"runs in a loop ({name(lead.klass) or 'repeat'}){of}"
    return {
        "agent.spend": f"spends {usd(lead.observed)} instead of {usd(lead.expected)}",
        "agent.context": f"context grows {factor(lead.observed / lead.expected) if lead.expected > 0 else ''}".rstrip(),
        "agent.fan_out": f"fans out to {lead.observed:,.0f}",
    }.get(lead.signal, name(lead.signal)) + of


def summary_of(case: Case, impact: Impact, no_data_since: float | None = None) -> str:
    """Who suffers and what it costs: `4 apps, 37 tenants, 1,912 failed calls, $6.80/min …; checkout-bot worst (92 %)`."""
    parts = []
    if impact.n_apps:
        parts.append(count(impact.n_apps, "app"))
    if impact.n_tenants:
        parts.append(count(impact.n_tenants, "tenant"))
    if case.group == "errors":
        parts.append(count(impact.failed_calls, "failed call"))
    elif impact.calls:
        parts.append(count(impact.calls, "call"))
    if impact.usd_per_min_now or impact.usd_per_min_baseline:
        before = f" ({usd(impact.usd_per_min_baseline)} before)" if impact.usd_per_min_baseline else ""
        parts.append(f"{usd(impact.usd_per_min_now)}/min{before}")
    text = ", ".join(parts) or f"{count(case.n_anomalies, 'anomaly', 'anomalies')} of {case.incident.signal}"
    if case.group == "errors" and len(impact.apps) > 1:
        worst = max(impact.apps, key=lambda a: (a[2], a[1], a[0]))
        text += f"; {name(worst[0])} worst ({percent(worst[2])})"
    if no_data_since is not None:
        text += f"; no data since {clock(no_data_since)}"
    return text


# ---- what changed, what was done


def related_changes(
    changes: Sequence[Change],
    scope: Mapping[str, str],
    known: Mapping[str, Container[str]],
    since: float,
    span_s: float,
) -> tuple[RelatedChange, ...]:
    """Changes around the start that no label sets apart: same scope first, then nearest in time. At most ten.

    Args:
        scope: labels of the root.
        known: label → values seen among the affected; a change about another app than these is left out.
    """
    found = []
    for c in changes:
        if abs(c.at - since) > span_s:
            continue
        labels = {k: v for k, v in c.labels.items() if v}
        hits = sum(1 for k, v in labels.items() if scope.get(k) == v)
        if any(k in scope and scope[k] != v for k, v in labels.items()):
            continue
        around = sum(1 for k, v in labels.items() if k not in scope and v in known.get(k, ()))
        if labels and not hits and not around:
            continue
        found.append((-hits, -around, abs(c.at - since), c.at, c.kind, c.summary, c))
    found.sort(key=lambda f: f[:6])
    return tuple(
        RelatedChange(c.at, c.kind, c.summary, dict(c.labels), c.url, c.actor)
        for *_, c in found[:_SHOWN_CHANGES]
    )


def note_decision(incident: Incident, d: Decision) -> tuple[ActionNote, ...]:
    """A repeated hold or refusal for the same reason is one line, with its newest time. What a person may answer has its hash."""
    waits = d.decision is Verdict.SUGGEST
    by = d.by if d.by != "flyball" else ""
    note = ActionNote(
        d.at, d.runbook, str(d.decision), d.reason, detail=d.detail, plan=d.plan_hash if waits else "", until=d.until,
        by=by,
    )  # fmt: skip
    # An answer that did not count leaves what it was about waiting.
    notes = incident.actions if d.reason in _STILL_WAITS else _answered(incident.actions, d.runbook)
    for i, old in enumerate(notes):
        if (old.runbook, old.decision, old.reason, old.directive) == (
            note.runbook,
            note.decision,
            note.reason,
            "",
        ) and not old.outcome:
            return (*notes[:i], note, *notes[i + 1 :])
    return _bounded((*notes, note))


_STILL_WAITS: Final = ("own_change", "approval_unknown", "approval_unsigned", "approval_used")


def _answered(notes: tuple[ActionNote, ...], runbook: str) -> tuple[ActionNote, ...]:
    """Nothing of this runbook waits for a person any more."""
    return tuple(
        msgspec.structs.replace(n, plan="", until=None) if n.plan and n.runbook == runbook else n
        for n in notes
    )


def note_directive(incident: Incident, change: DirectiveChange) -> tuple[ActionNote, ...]:
    d = change.directive
    outcome = {"granted": "granted", "renewed": "granted"}.get(change.change, change.change)
    notes = _answered(incident.actions, d.runbook)
    by = next((n.by for n in reversed(notes) if n.runbook == d.runbook and n.by), "")
    note = ActionNote(
        change.at,
        d.runbook,
        str(Verdict.RUN),
        change.reason,
        outcome,
        describe(d),
        d.id,
        until=d.expires_at,
        by=by,
    )
    for i, old in enumerate(notes):
        if old.directive == d.id:
            return (*notes[:i], note, *notes[i + 1 :])
    return _bounded((*notes, note))


def note_outcome(incident: Incident, o: Outcome) -> tuple[ActionNote, ...]:
    notes = incident.actions if o.result == "waiting" else _answered(incident.actions, o.runbook)
    for i in range(len(notes) - 1, -1, -1):
        old = notes[i]
        if o.directive and old.directive == o.directive:
            # What the directive does stands; what became of it is new.
            note = ActionNote(
                o.at, old.runbook, old.decision, o.reason or old.reason, o.result, old.detail, old.directive,
                until=old.until, by=old.by,
            )  # fmt: skip
            return (*notes[:i], note, *notes[i + 1 :])
    waits = o.result == "waiting"
    until = o.values.get("until") if waits else None
    note = ActionNote(
        o.at, o.runbook, str(Verdict.RUN), o.reason, o.result, f"{o.action} ({o.step})", o.directive,
        plan=str(o.values.get("waiting", "")) if waits else "", by=str(o.values.get("by", "")),
        until=float(until) if isinstance(until, int | float) else None,
    )  # fmt: skip
    return _bounded((*notes, note))


def _bounded(notes: tuple[ActionNote, ...]) -> tuple[ActionNote, ...]:
    return notes[-_SHOWN_ACTIONS:]


def describe(d: Directive) -> str:
    """`redirect 25 % of provider=b to provider=a until 03:14`."""
    scope = ", ".join(f"{k}={name(str(v))}" for k, v in sorted(d.scope.items()))
    to = d.params.get("to")
    share = d.params.get("share")
    part = f"{percent(float(share))} of " if isinstance(share, int | float) else ""
    target = (
        " to " + ", ".join(f"{k}={name(str(v))}" for k, v in sorted(to.items()))
        if isinstance(to, dict)
        else ""
    )
    return f"{d.kind} {part}{scope}{target} until {clock(d.expires_at)}"


def members_of(by_entity: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(by_entity.items(), key=lambda kv: (-kv[1], kv[0]))[:_SHOWN_NAMES])


def subject_of(labels: Mapping[str, str]) -> str:
    """The entity an anomaly is about: the finest that its labels name."""
    found = entities_of(labels)
    for kind in (
        "run",
        "gpu",
        "node",
        "tenant",
        "prompt_version",
        "agent",
        "app",
        "team",
        "deployment",
        "region",
        "model",
        "provider",
    ):
        for e in found:
            if e.kind == kind:
                return str(e)
    return str(found[0]) if found else "unknown"
