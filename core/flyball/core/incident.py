"""Incidents: anomalies with one likely root, and how they change."""

from __future__ import annotations

from enum import IntEnum, StrEnum

import msgspec

from flyball.core.entities import Entity


class Severity(IntEnum):
    """How bad. `HIGH` and above page (wake a person) by default; lower ones notify."""

    LOW = 1
    MEDIUM = 2
    HIGH = 3
    CRITICAL = 4

    @property
    def sev(self) -> str:
        """`SEV1` is the worst: the way on-call engineers count."""
        return f"SEV{5 - self.value}"


class State(StrEnum):
    OPEN = "open"
    ACKNOWLEDGED = "acknowledged"
    MITIGATING = "mitigating"
    VERIFYING = "verifying"
    RESOLVED = "resolved"


class RootCandidate(msgspec.Struct, frozen=True):
    """One explanation, with the facts that speak for and against it. `confidence` is in [0, 1] over all candidates."""

    entity: Entity
    confidence: float
    facts_for: tuple[str, ...] = ()
    facts_against: tuple[str, ...] = ()


class Impact(msgspec.Struct, frozen=True):
    """For whom and how much, since the start of the incident; `*_now` are over the last closed window."""

    calls: int = 0
    failed_calls: int = 0
    failed_ratio_now: float = 0.0
    failed_ratio_baseline: float = 0.0
    usd_per_min_now: float = 0.0
    usd_per_min_baseline: float = 0.0
    usd_since_start: float = 0.0
    usd_wasted: float = 0.0
    tokens_per_min_now: float = 0.0
    apps: tuple[tuple[str, int, float], ...] = ()
    """(app, failed or affected calls, share of its calls), worst first; at most 20."""
    tenants: tuple[tuple[str, int, float], ...] = ()
    n_apps: int = 0
    n_tenants: int = 0
    models: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()


class RelatedChange(msgspec.Struct, frozen=True):
    at: float
    kind: str
    summary: str
    labels: dict[str, str] = {}
    url: str = ""
    actor: str = ""


class ActionNote(msgspec.Struct, frozen=True):
    """What was done, or refused, and why: one line of the alert."""

    at: float
    runbook: str
    decision: str
    reason: str
    outcome: str = ""
    """Empty, `granted`, `in_force`, `verified`, `released`, `expired`, `undone`, `failed`."""
    detail: str = ""
    directive: str = ""
    plan: str = ""
    """Hash of what waits for a person's answer; empty when nothing does."""
    until: float | None = None
    """Until when it holds: a wait for an answer, a cooldown."""
    by: str = ""
    """Who decided, where it was a person."""


class Incident(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="incident"):
    """One thing that broke. Immutable: every change is a new value, and `revision` counts them."""

    id: str
    at: float
    """When it was opened (event time)."""
    since: float
    """When the trouble began: the earliest `since` of its anomalies."""
    updated_at: float
    root: Entity
    signal: str
    klass: str = ""
    severity: Severity = Severity.MEDIUM
    severity_reason: str = ""
    state: State = State.OPEN
    scope: dict[str, str] = {}
    """Labels that all members share; the root is always among them."""
    page: bool = False
    """True when it may wake a person: decided once, at opening or when severity rises."""
    title: str = ""
    """What broke, for whom, since when."""
    summary: str = ""
    confidence: float = 0.0
    candidates: tuple[RootCandidate, ...] = ()
    anomalies: tuple[str, ...] = ()
    n_anomalies: int = 0
    members: tuple[tuple[str, int], ...] = ()
    """(entity, anomalies about it), most first; at most 20."""
    impact: Impact = Impact()
    evidence: dict[str, float | int | str | list[str]] = {}
    """The evidence of the leading anomaly: observed, expected, n, score, threshold, and its own facts."""
    samples: tuple[str, ...] = ()
    changes: tuple[RelatedChange, ...] = ()
    actions: tuple[ActionNote, ...] = ()
    seen_before: tuple[str, ...] = ()
    """Ids of earlier incidents with the same root and signal, newest first; at most 5."""
    reopened: int = 0
    resolved_at: float | None = None
    silenced_until: float | None = None
    acknowledged_by: str = ""
    revision: int = 1


class IncidentChange(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="incident_change"):
    """One step of an incident's life, with its reason. `old` is empty when it opens; equal to `new` for an update in place."""

    incident: Incident
    at: float
    old: str
    new: str
    reason: str
    notify: bool = False
    """Whether people should hear of it: opened, worse, acted on, resolved, reopened; not every new figure."""
