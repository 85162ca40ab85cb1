"""Directives: leases that change how traffic is handled until they expire; and the decisions that lead to them."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

import msgspec

DirectiveKind = Literal["redirect", "limit", "cap", "block"]


class Directive(msgspec.Struct, frozen=True, kw_only=True):
    """A lease. An enforcement point obeys it until `expires_at` and then lets go by itself, also when Flyball is dead.

    scope: labels that select the calls it applies to, e.g. `{"provider": "b"}`; never empty.
    params: by kind; redirect: `{"to": {"provider": "a"}, "share": 0.25}` (share of calls, by stable hash).
    epoch: fencing; an enforcement point ignores a directive of a lower epoch for the same id.
    """

    id: str
    kind: DirectiveKind
    scope: dict[str, str]
    params: dict[str, Any]
    granted_at: float
    expires_at: float
    incident: str
    runbook: str
    step: str
    epoch: int = 1


class DirectiveChange(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="directive_change"):
    """`granted`, `renewed` (other params or expiry, same id), `released` (by us) or `expired` (by time)."""

    directive: Directive
    at: float
    change: Literal["granted", "renewed", "released", "expired"]
    reason: str


class Verdict(StrEnum):
    RUN = "run"
    SUGGEST = "suggest"
    HOLD = "hold"
    REFUSE = "refuse"


class Decision(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="decision"):
    """What the planner decided about one runbook for one incident, why, and on which values."""

    at: float
    incident: str
    runbook: str
    decision: Verdict
    reason: str
    """A stable word first: `when_matched`, `mode_suggest`, `cooldown`, `no_candidate`, `blast_radius`, `stale`, `lock`, …"""
    detail: str = ""
    until: float | None = None
    plan_hash: str = ""
    values: dict[str, Any] = {}


class Outcome(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="outcome"):
    """What an action really did. `unverified` counts as failed for every limit."""

    at: float
    incident: str
    runbook: str
    step: str
    action: str
    result: Literal[
        "not_accepted",
        "applied",
        "failed",
        "ambiguous",
        "verified",
        "unverified",
        "undone",
        "released",
        "expired",
    ]
    reason: str = ""
    directive: str = ""
    values: dict[str, Any] = {}


class Enforced(msgspec.Struct, frozen=True, kw_only=True):
    """What an enforcement point says it holds in force; "granted" and "in force" are two things."""

    point: str
    at: float
    directives: dict[str, int]
    """directive id → calls it was applied to since the last report."""


class LedgerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the durable record of what was decided and done. `key` is unique: an entry is written once."""

    key: str
    at: float
    kind: Literal["decision", "directive", "outcome", "person"]
    incident: str
    runbook: str
    body: dict[str, Any]
