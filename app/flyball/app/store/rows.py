"""What one transaction stores, as values."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from flyball.core.directives import (
    Decision,
    DirectiveChange,
    Intervention,
    LedgerEntry,
    Operation,
    Outcome,
)
from flyball.core.ids import short_id
from flyball.core.incident import IncidentChange


@dataclass(frozen=True, slots=True)
class LogRow:
    """One record of the log as stored. `id` is its position."""

    id: int
    kind: str
    received_at: float
    sender: str
    n: int
    body: bytes


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """What could not be taken, with its bytes unless a setting says otherwise. `n` events share it when a body was mostly bad."""

    at: float
    sender: str
    format: str
    reason: str
    detail: str
    size: int
    body: bytes | None
    n: int = 1

    def without_bytes(self) -> DeadLetter:
        return replace(self, body=None)


@dataclass(frozen=True, slots=True)
class EdgeTotals:
    """What the edge has counted since the beginning, and what it holds on disk now."""

    received: dict[str, int]
    """Events by format."""
    rejected: dict[str, int]
    """Events by reason."""
    log_bytes: int
    dead: int
    dead_bytes: int


@dataclass(frozen=True, slots=True)
class Removed:
    rows: int
    size: int


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """One message for one channel. `id` depends on incident, channel and revision: the same one is never stored twice."""

    id: str
    incident: str
    revision: int
    channel: str
    created_at: float
    due_at: float
    why: str
    body: bytes
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Publication:
    """One record of an output topic. `id` is the same in every replay: who reads the topic knows a repetition by it."""

    topic: str
    """Without prefix."""
    key: str
    id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record of the log that made a stage raise. It is left out, now and whenever the log is read again."""

    position: int
    at: float
    kind: str
    sender: str
    n: int
    reason: str
    body: bytes


@dataclass(slots=True)
class Commit:
    """All that one stretch of the log led to; stored together with the position behind it, or not at all."""

    position: int
    changes: list[IncidentChange] = field(default_factory=list)
    entries: list[LedgerEntry] = field(default_factory=list)
    directives: list[DirectiveChange] = field(default_factory=list)
    outbox: list[OutboxRow] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    publications: list[Publication] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    snapshot: bytes | None = None
    counters: dict[str, Any] | None = None
    at: float = 0.0
    answers: list[tuple[Future[Intervention], Intervention]] = field(default_factory=list)
    """For people who wait: told once it is stored."""


def entry_of(item: Decision | DirectiveChange | Outcome | Operation | Intervention) -> LedgerEntry:
    """The ledger's line for what was decided or done; its key is the same in every replay."""
    body = msgspec.to_builtins(item)
    if isinstance(item, Decision):
        key = short_id(
            "DEC", item.incident, item.runbook, item.decision, item.reason, item.at, item.plan_hash, length=14
        )
        return LedgerEntry(
            key=key, at=item.at, kind="decision", incident=item.incident, runbook=item.runbook, body=body
        )
    if isinstance(item, DirectiveChange):
        d = item.directive
        key = short_id("DIR", d.id, d.epoch, item.change, item.at, length=14)
        return LedgerEntry(
            key=key, at=item.at, kind="directive", incident=d.incident, runbook=d.runbook, body=body
        )
    if isinstance(item, Operation):
        key = short_id("OPN", item.id, item.verb, item.attempt, item.at, length=14)
        return LedgerEntry(
            key=key, at=item.at, kind="operation", incident=item.incident, runbook=item.runbook, body=body
        )
    if isinstance(item, Intervention):
        key = short_id("PER", item.by, item.kind, item.subject, item.at, item.accepted, length=14)
        return LedgerEntry(
            key=key, at=item.at, kind="person", incident=item.incident, runbook=item.runbook, body=body
        )
    key = short_id(
        "OUT", item.incident, item.runbook, item.step, item.result, item.at, item.directive,
        item.values.get("plan", ""), length=14,
    )  # fmt: skip
    return LedgerEntry(
        key=key, at=item.at, kind="outcome", incident=item.incident, runbook=item.runbook, body=body
    )
