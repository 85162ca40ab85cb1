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
    exempt: scopes within `scope` that it does not apply to, because somebody stopped Flyball for them.

    Params by kind, all in force at once where several are given:
    `redirect`: `{"to": {"provider": "a"}, "share": 0.25}`;
    `limit`: `requests_per_min`, `tokens_per_min`, `usd_per_hour` (numbers, of the whole scope together);
    `cap`: `output_tokens` (int, per call), `model` (the model that is used instead);
    `block`: `reason` (text for the caller).
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
    exempt: tuple[dict[str, str], ...] = ()


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
    """A stable word: `when_matched`, `approved`; `mode_observe`, `mode_suggest`, `mode_approve`, `must_ask`; `hold`, `precondition`,
    `lock`, `cooldown`, `hysteresis`, `runs`, `stopped`, `no_telemetry`, `condition_cleared`; `stale`, `attempts`, `breaker`, `denied`,
    `blast_radius`, or why a step found no target (`no_target`, `no_candidate`, …); of an answer `approval_expired`, `approval_used`,
    `approval_unknown`, `approval_unsigned`, `approval_withdrawn`, `own_change`, `plan_changed`."""
    detail: str = ""
    until: float | None = None
    plan_hash: str = ""
    by: str = "flyball"
    """Who decided: Flyball, or the person who approved or denied."""
    values: dict[str, Any] = {}


class Outcome(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="outcome"):
    """What an action really did. `unverified` counts as failed for every limit; `cancelled` is never success.

    `waiting`: the step asks a person first. `ambiguous`: sent, and nobody knows whether it was done; never repeated by itself.
    """

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
        "cancelled",
        "waiting",
    ]
    reason: str = ""
    directive: str = ""
    values: dict[str, Any] = {}


class Enforced(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="enforced"):
    """What an enforcement point says it holds in force; "granted" and "in force" are two things."""

    point: str
    at: float
    directives: dict[str, int]
    """directive id → calls it was applied to since the last report."""


class Approval(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="approval"):
    """A person's answer to something that waits. Bound to its hash, so that what is carried out is what was read; used once."""

    waiting: str
    """Hash of the plan, or of the step of a running plan, that it answers: `Waiting.hash`."""
    approve: bool
    by: str
    at: float


class Release(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="release"):
    """A person lets go: of one lease or operation by its id, of a plan by its hash, or of all (empty). Never blocked by anything."""

    subject: str
    by: str
    at: float


class StopChange(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="stop_change"):
    """The kill switch. `scope`: `all`, `tenant:NAME`, `runbook:NAME` or `action:KIND`.

    `stop` prevents new effects, wider ones and renewals, never a release, an undo or an expiry; `resume` takes it back;
    `reset` closes the breaker of `runbook:NAME` by a person's hand.
    """

    change: Literal["stop", "resume", "reset"]
    scope: str
    by: str
    at: float
    reason: str = ""


OperationStatus = Literal[
    "accepted",
    "rejected",
    "not_reached",
    "unsupported",
    "succeeded",
    "failed_not_applied",
    "failed_applied",
    "ambiguous",
    "superseded",
    "cancelled",
]


class Operation(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="operation"):
    """What a remediation hook is asked to do. Reserved in the ledger before it is sent.

    id: the same over all attempts and verbs; the hook does each (id, verb) once.
    targets: resolved once, frozen; never empty. epoch: fencing token; a hook ignores lower ones for the same id.
    deadline: seconds since the epoch; after it the request is dropped, not sent.
    undo_ref: what the hook gave with its success, for `undo`.
    """

    id: str
    verb: Literal["start", "cancel", "undo"]
    hook: str
    action: str
    plan: str
    incident: str
    runbook: str
    step: str
    targets: tuple[str, ...]
    params: dict[str, Any]
    at: float
    deadline: float
    attempt: int = 1
    epoch: int = 1
    dry_run: bool = False
    undo_ref: str = ""


class OperationReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="operation_report"):
    """What became of a request to a hook: its immediate answer, its terminal status, or how it failed to get there.

    `not_reached`: certainly not received, may be sent again. A status that is not known is `ambiguous`.
    transient: of `rejected`, whether it may be tried again.
    """

    id: str
    verb: Literal["start", "cancel", "undo"]
    at: float
    status: OperationStatus
    attempt: int = 1
    transient: bool = False
    code: str = ""
    detail: str = ""
    undo_ref: str = ""
    superseded_by: str = ""
    targets: tuple[str, ...] = ()
    before: dict[str, Any] = {}
    dry_run: bool = False
    """The answer to a dry run: `accepted` then says that it would be done, to `targets`, with the `predicted` blast."""
    predicted: dict[str, Any] = {}
    retry_after_s: float | None = None
    """With `rejected` and `transient`: how long the hook asks to wait."""


class Intervention(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="person"):
    """What a person did, and whether it was taken: approve, deny, stop, resume, reset, release, ack, resolve, silence, reopen."""

    at: float
    by: str
    kind: str
    subject: str
    accepted: bool = True
    incident: str = ""
    runbook: str = ""
    reason: str = ""
    values: dict[str, Any] = {}


class LedgerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the durable record of what was decided and done. `key` is unique: an entry is written once."""

    key: str
    at: float
    kind: Literal["decision", "directive", "outcome", "operation", "person"]
    incident: str
    runbook: str
    body: dict[str, Any]
