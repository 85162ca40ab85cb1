"""The shapes that others build on: what `flyball replay --json`, the HTTP interface and `flyball status --json` print."""

from __future__ import annotations

from typing import Any

import msgspec

from flyball.core.directives import Decision, Directive, DirectiveChange, Outcome
from flyball.core.incident import Incident, IncidentChange


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
        "reason": d.reason, "detail": d.detail, "until": d.until, "values": msgspec.to_builtins(d.values),
    }  # fmt: skip


def directive(d: Directive) -> dict[str, Any]:
    return {
        "id": d.id, "kind": d.kind, "scope": d.scope, "params": d.params, "granted_at": d.granted_at,
        "expires_at": d.expires_at, "incident": d.incident, "runbook": d.runbook, "step": d.step, "epoch": d.epoch,
    }  # fmt: skip


def directive_change(c: DirectiveChange) -> dict[str, Any]:
    return {"type": "directive", "at": c.at, "change": c.change, "reason": c.reason} | directive(c.directive)


def outcome(o: Outcome) -> dict[str, Any]:
    return {"type": "outcome", **msgspec.to_builtins(o)}
