"""What goes over the wire between Flyball and a hook: the request, the answer, the callback. One place for both directions.

A request: `{verb, operation_id, attempt, plan_hash, incident, runbook, step, action, targets, params, dry_run, deadline,
fencing_token, undo_ref}`. An answer, a status and a callback: `{operation_id, verb, attempt, status, code, transient, detail,
undo_ref, by, targets, before, predicted}`, of which only `status` must be there (in a callback also `operation_id`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, get_args

import msgspec
from pydantic import SecretStr

from flyball.core.directives import Operation, OperationReport, OperationStatus
from flyball.core.errors import DecodeError
from flyball.remediation.signing import check_signature

Verb = Literal["start", "cancel", "undo"]

REQUEST_BYTES: Final = 64 * 1024
"""Most that is sent: a hook may refuse what is longer."""
ANSWER_BYTES: Final = 64 * 1024
"""Most of an answer or a callback that is read."""
_CODE, _DETAIL, _REF = 80, 500, 1000

TERMINAL: Final[frozenset[str]] = frozenset(
    {"succeeded", "failed_not_applied", "failed_applied", "ambiguous", "superseded", "cancelled"}
)
"""After these nothing more happens. `ambiguous` is the hook's own word here: it does not know either."""
_OF_VERB: Final[dict[str, frozenset[str]]] = {
    "start": TERMINAL | {"accepted", "rejected", "unsupported"},
    # What the operation came to: cancelled, or what it is when that came too late.
    "cancel": TERMINAL | {"accepted", "rejected", "unsupported"},
    "undo": TERMINAL - {"cancelled"} | {"accepted", "rejected", "unsupported"},
}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a hook says. Fields that are not known are passed over; wrong types make the whole unreadable."""

    status: str
    operation_id: str = ""
    verb: str = ""
    attempt: int | None = None
    code: str = ""
    transient: bool = False
    detail: str = ""
    undo_ref: str = ""
    by: str = ""
    targets: tuple[str, ...] = ()
    before: dict[str, Any] = {}
    predicted: dict[str, Any] = {}
    runs: int | None = None
    """How often the action was carried out for this operation; only the conformance kit looks at it."""


_decoder = msgspec.json.Decoder(Answer)


def is_terminal(status: str) -> bool:
    """Whether a report with this status is the last one of its verb, unless a hook that said `ambiguous` learns more."""
    return status != "accepted"


def request_body(operation: Operation) -> str:
    """The JSON text of a request; the same for every try of the same attempt."""
    body = {
        "verb": operation.verb,
        "operation_id": operation.id,
        "attempt": operation.attempt,
        "plan_hash": operation.plan,
        "incident": operation.incident,
        "runbook": operation.runbook,
        "step": operation.step,
        "action": operation.action,
        "targets": list(operation.targets),
        "params": operation.params,
        "dry_run": operation.dry_run,
        "deadline": operation.deadline,
        "fencing_token": operation.epoch,
        "undo_ref": operation.undo_ref,
    }
    return msgspec.json.encode(body).decode()


def message_id(operation: Operation) -> str:
    """`webhook-id`: the same for every try of one attempt, another one for another attempt or verb."""
    dry = ".dry" if operation.dry_run else ""
    return f"{operation.id}.{operation.verb}.{operation.attempt}{dry}"


def decode_answer(body: bytes) -> Answer:
    """Raises: DecodeError when it is no answer at all."""
    if len(body) > ANSWER_BYTES:
        raise DecodeError("too_large", f"the answer is longer than {ANSWER_BYTES} bytes")
    try:
        answer = _decoder.decode(body)
    except msgspec.DecodeError as e:
        raise DecodeError("json", f"the answer is not what a hook answers: {e}") from e
    if len(answer.undo_ref) > _REF or len(answer.by) > _REF:
        raise DecodeError("too_large", f"`undo_ref` or `by` is longer than {_REF} characters")
    return answer


def report_of(answer: Answer, operation: Operation, at: float) -> OperationReport:
    """What an answer says about the operation it was asked of. What cannot be told for sure is `ambiguous`."""
    if answer.operation_id and answer.operation_id != operation.id:
        return unknown(
            operation, at, "other_operation", f"answered about {printable(answer.operation_id, 80)}"
        )
    if answer.verb and answer.verb != operation.verb:
        return unknown(operation, at, "other_verb", f"answered about {printable(answer.verb, 20)}")
    return _report(answer, operation.id, operation.verb, operation.attempt, operation.dry_run, at)


def _report(answer: Answer, id: str, verb: Verb, attempt: int, dry_run: bool, at: float) -> OperationReport:
    code, detail = printable(answer.code, _CODE), printable(answer.detail, _DETAIL)
    status: OperationStatus = "ambiguous"
    for known in get_args(OperationStatus):
        if known == answer.status and known in _OF_VERB[verb]:
            status = known
    if status == "ambiguous" and answer.status != "ambiguous":
        code, detail = "unknown_status", f"{printable(answer.status, 40)!r} is no status of {verb}"
    if status == "superseded" and not answer.by:
        detail = detail or "by whom is not told"
    return OperationReport(
        id=id,
        verb=verb,
        at=at,
        status=status,
        attempt=attempt,
        transient=answer.transient and status == "rejected",
        code=code,
        detail=detail,
        undo_ref=answer.undo_ref,
        superseded_by=answer.by if status == "superseded" else "",
        targets=answer.targets,
        before=answer.before,
        dry_run=dry_run,
        predicted=answer.predicted if dry_run else {},
    )


def unknown(operation: Operation, at: float, code: str, detail: str) -> OperationReport:
    """That nobody knows what became of it."""
    return told(operation, at, "ambiguous", code, detail)


def told(
    operation: Operation,
    at: float,
    status: OperationStatus,
    code: str,
    detail: str = "",
    *,
    transient: bool = False,
    retry_after_s: float | None = None,
) -> OperationReport:
    """A report in our own words, about what the hook did not say itself."""
    return OperationReport(
        id=operation.id,
        verb=operation.verb,
        at=at,
        status=status,
        attempt=operation.attempt,
        transient=transient,
        code=code,
        detail=detail,
        dry_run=operation.dry_run,
        retry_after_s=retry_after_s,
    )


def verify_callback(
    headers: Mapping[str, str], body: bytes, secrets: Sequence[SecretStr], *, at: float
) -> OperationReport:
    """The report in a hook's signed callback (`POST /v1/operations/{id}`). Check its `id` against the address.

    Args:
        secrets: those of the hook that the operation went to, not of any hook.
        at: when it arrived.

    Raises: SignatureRefused when it is not signed with one of them; DecodeError when it is no status of an operation.
    """
    check_signature(secrets, headers, body)
    answer = decode_answer(body)
    if not answer.operation_id:
        raise DecodeError("missing_field", "a callback names its operation; write operation_id")
    verb = answer.verb or "start"
    if verb not in ("start", "cancel", "undo"):
        raise DecodeError("verb", f"{printable(verb, 20)!r} is no verb; write start, cancel or undo")
    return _report(answer, answer.operation_id, verb, answer.attempt or 1, False, at)  # type: ignore[arg-type]


def printable(text: str, length: int) -> str:
    """Somebody else's text on one line, cut to `length`."""
    return "".join(c if c.isprintable() else " " for c in text[:length]).strip()
