"""Figures that are no numbers: JSON has neither NaN nor infinity, so they are left out before anything is stored or sent."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from flyball.core.incident import Impact, IncidentChange


def finite(change: IncidentChange) -> IncidentChange:
    """The change without facts that are no numbers; where a figure must stand, it is 0. Mostly the same object."""
    incident = change.incident
    evidence = {k: v for k, v in incident.evidence.items() if not isinstance(v, float) or math.isfinite(v)}
    replaced: dict[str, Any] = {} if len(evidence) == len(incident.evidence) else {"evidence": evidence}
    if not _is_finite(incident.impact):
        replaced["impact"] = msgspec.convert(_without(msgspec.to_builtins(incident.impact)), Impact)
    if not math.isfinite(incident.confidence):
        replaced["confidence"] = 0.0
    if any(not math.isfinite(c.confidence) for c in incident.candidates):
        replaced["candidates"] = tuple(
            c if math.isfinite(c.confidence) else msgspec.structs.replace(c, confidence=0.0)
            for c in incident.candidates
        )
    if not replaced:
        return change
    return msgspec.structs.replace(change, incident=msgspec.structs.replace(incident, **replaced))


def _is_finite(impact: Impact) -> bool:
    figures = (v for v in msgspec.structs.astuple(impact) if isinstance(v, float))
    shares = (share for group in (impact.apps, impact.tenants) for _, _, share in group)
    return all(map(math.isfinite, figures)) and all(map(math.isfinite, shares))


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without(v) for v in value]
    return 0.0 if isinstance(value, float) and not math.isfinite(value) else value
