"""The shapes that others build on: what `flyball replay --json`, the HTTP interface and `flyball status --json` print."""

from __future__ import annotations

from typing import Any

import msgspec

from flyball.core.directives import Decision, Directive, DirectiveChange, Operation, Outcome, StopChange
from flyball.core.incident import Incident, IncidentChange
from flyball.core.plans import Mode, Waiting, lower_mode
from flyball.runbooks.explain import Explained
from flyball.runbooks.loader import Runbook


def incident(i: Incident) -> dict[str, Any]:
    """An incident: the fixed fields first, then all the rest."""
    rest = msgspec.to_builtins(i)
    fixed = {
        "type": "incident", "id": i.id, "at": i.at, "root": {"kind": i.root.kind, "name": i.root.name}, "signal": i.signal,
        "class": i.klass, "severity": i.severity.name.lower(), "scope": dict(i.scope), "page": i.page, "summary": i.summary,
    }  # fmt: skip
    for name in ("klass", *fixed):
        rest.pop(name, None)
    rest["candidates"] = [
        {"root": {"kind": c.entity.kind, "name": c.entity.name}, "confidence": c.confidence, "for": list(c.facts_for), "against": list(c.facts_against)}
        for c in i.candidates
    ]  # fmt: skip
    return {**fixed, **rest}


def incident_change(c: IncidentChange) -> dict[str, Any]:
    return {
        "type": "incident_change",
        "id": c.incident.id,
        "at": c.at,
        "from": c.old,
        "to": c.new,
        "reason": c.reason,
    }


def decision(d: Decision) -> dict[str, Any]:
    return {
        "type": "decision", "at": d.at, "incident": d.incident, "runbook": d.runbook, "decision": d.decision.value,
        "reason": d.reason, "detail": d.detail, "until": d.until, "plan_hash": d.plan_hash, "by": d.by,
        "values": msgspec.to_builtins(d.values),
    }  # fmt: skip


def directive(d: Directive) -> dict[str, Any]:
    return {
        "id": d.id, "kind": d.kind, "scope": d.scope, "params": d.params, "granted_at": d.granted_at,
        "expires_at": d.expires_at, "incident": d.incident, "runbook": d.runbook, "step": d.step, "epoch": d.epoch,
        "exempt": list(d.exempt),
    }  # fmt: skip


def directive_change(c: DirectiveChange) -> dict[str, Any]:
    return {"type": "directive", "at": c.at, "change": c.change, "reason": c.reason} | directive(c.directive)


def outcome(o: Outcome) -> dict[str, Any]:
    return {"type": "outcome", **msgspec.to_builtins(o)}


def operation(o: Operation) -> dict[str, Any]:
    return {"type": "operation", **msgspec.to_builtins(o)}


def waiting(w: Waiting) -> dict[str, Any]:
    """What a person may approve: the plan as it would be carried out, and until when an answer counts."""
    return {
        "hash": w.hash, "incident": w.plan.incident, "runbook": w.plan.runbook, "step": w.step, "since": w.since,
        "until": w.until, "values": msgspec.to_builtins(w.values), "plan": msgspec.to_builtins(w.plan),
    }  # fmt: skip


def stop(s: StopChange) -> dict[str, Any]:
    return {"scope": s.scope, "by": s.by, "at": s.at, "reason": s.reason}


def explained(e: Explained) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(e)
    return found


def runbook(r: Runbook, ceiling: Mode) -> dict[str, Any]:
    return {
        "name": r.name, "path": r.path, "source": r.source, "mode": r.mode, "in_force": lower_mode(r.mode, ceiling),
        "owner": r.model.owner, "description": r.model.description,
    }  # fmt: skip
