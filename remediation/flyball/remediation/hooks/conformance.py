"""Tries a hook: does it keep the contract when requests come twice, late, in the wrong order, forged, or when it is killed?

Each check says what was sent, what was expected and what came. Orders are really carried out, several times, on the target that
is given, and undone again.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Final, Literal

import httpx
import msgspec
from pydantic import SecretStr

from flyball.core.directives import Operation
from flyball.core.errors import ConfigError, DecodeError, did_you_mean
from flyball.remediation.hooks.kit import (
    REFUSED,
    Came,
    Check,
    Found,
    HookNotReached,
    Kit,
    NotRun,
    Trial,
    again,
    not_done,
    taken,
)
from flyball.remediation.hooks.wire import TERMINAL, message_id, request_body, verify_callback
from flyball.remediation.signing import SignatureRefused, signed_headers

_OLD_S: Final = 600.0
_BURST: Final = 30
_MANY_BYTES, _TOO_MANY_BYTES = 48 * 1024, 2 << 20
_CRASHES: Final = 5

# --- signatures ----------------------------------------------------------------------------------------------------


def _forged(kit: Kit, how: str, headers: Callable[[Operation, str], dict[str, str]]) -> None:
    operation = kit.operation()
    text = request_body(operation)
    kit.post(
        operation, f"start, {how}", "HTTP 401 or 403", lambda c: c.http in (400, 401, 403),
        headers=headers(operation, text), text=text,
    )  # fmt: skip
    kit.ask(operation, "not heard of (HTTP 404), or not done", not_done)


def signature_missing(kit: Kit) -> None:
    """A request without signature is refused, and nothing is done."""
    _forged(kit, "not signed", lambda _, __: {})


def signature_wrong(kit: Kit) -> None:
    """A request signed with another secret is refused."""
    other = SecretStr("whsec_" + "A" * 40)
    _forged(
        kit,
        "signed with another secret",
        lambda o, t: signed_headers([other], message_id(o), t, kit.trial.now()),
    )


def signature_old(kit: Kit) -> None:
    """A request signed ten minutes ago is refused: somebody has kept it."""
    signed = [kit.trial.secret]
    _forged(
        kit, "signed ten minutes ago",
        lambda o, t: signed_headers(signed, message_id(o), t, kit.trial.now() - _OLD_S),
    )  # fmt: skip


def signature_of_another_body(kit: Kit) -> None:
    """A request whose body was changed after it was signed is refused."""
    signed = [kit.trial.secret]
    _forged(
        kit, "its body changed after signing",
        lambda o, t: signed_headers(signed, message_id(o), t.replace("conform", "changed"), kit.trial.now()),
    )  # fmt: skip


def signature_of_status(kit: Kit) -> None:
    """The status of an operation is told to nobody who cannot sign."""
    operation, _ = kit.start()
    kit.ask(operation, "HTTP 401 or 403", lambda c: c.http in (401, 403), signed=False)


# --- each once -----------------------------------------------------------------------------------------------------


def duplicate(kit: Kit) -> None:
    """The same operation sent again, as a copy or as another attempt, is answered and not done again."""
    operation, first = kit.start()
    kit.post(operation, "the same start again", "the same status, not done again", taken)
    retry = msgspec.structs.replace(operation, attempt=2, epoch=2)
    kit.post(retry, "the same start as attempt 2", "the same status, not done again", taken)
    kit.done_once(operation, first)


def duplicate_at_once(kit: Kit) -> None:
    """A copy that arrives while the first is being carried out is not done as well."""
    operation = kit.operation()
    kit.post(operation, "start", "accepted, or a terminal status", taken)
    kit.post(operation, "the same start at once", "the same status, not done again", taken)
    kit.done_once(operation, kit.ended(operation))


def other_order(kit: Kit) -> None:
    """The id of a known operation with another order is refused: what was approved is what is done."""
    operation, first = kit.start()
    other = msgspec.structs.replace(
        operation, targets=(*operation.targets, "somewhere-else"), epoch=2, attempt=2
    )
    kit.post(other, "start of the same id with one target more", "rejected", lambda c: c.refused)
    kit.done_once(operation, first)


# --- order ---------------------------------------------------------------------------------------------------------


def cancel_before_start(kit: Kit) -> None:
    """A start that arrives after its cancel is not done."""
    operation = kit.operation()
    kit.post(
        again(operation, "cancel", 2),
        "cancel, before its start",
        "cancelled",
        lambda c: c.status == "cancelled",
    )
    _start_too_late(kit, operation)


def undo_before_start(kit: Kit) -> None:
    """An undo of what was never started succeeds, and a start that arrives after it is not done."""
    operation = kit.operation()
    undo = again(operation, "undo", 2, undo_ref=operation.id)
    kit.post(undo, "undo, before its start", "succeeded (there is nothing to undo)", taken)
    kit.ended(operation, "undo", frozenset({"succeeded"}))
    _start_too_late(kit, operation)


def _start_too_late(kit: Kit, operation: Operation) -> None:
    # With the same token too: it is the order of arrival that has to count here.
    for epoch, which in ((1, "with its older token"), (2, "with the same token")):
        late = msgspec.structs.replace(operation, epoch=epoch)
        kit.post(late, f"its start, {which}", "cancelled or rejected", _no)
    kit.trial.pause(0.2)
    kit.ask(operation, "cancelled or not heard of; not done", not_done)


def _no(came: Came) -> bool:
    return came.refused or came.status == "cancelled"


def old_token(kit: Kit) -> None:
    """A start with a lower fencing token than one that was seen for the same operation is refused."""
    operation, first = kit.start("start with token 5", epoch=5)
    kit.post(again(operation, "start", 4), "the same start with token 4", "rejected", lambda c: c.refused)
    kit.done_once(operation, first)


# --- lost answers --------------------------------------------------------------------------------------------------


def timeout_after_acceptance(kit: Kit) -> None:
    """A caller that hangs up before the answer finds the operation known, and done once."""
    operation = kit.operation()
    kit.post(operation, "start, and hung up before the answer", "anything", lambda c: True, read_s=0.001)
    first = kit.ended(operation)
    kit.post(operation, "the same start again", "the same status, not done again", taken)
    kit.done_once(operation, first)


def crash(kit: Kit) -> None:
    """What was accepted before a `kill -9` is known after it, comes to an end, and is not done twice."""
    restart = kit.trial.restart
    if restart is None:
        raise NotRun("needs --command: the kit has to kill and start the receiver itself")
    for round in range(_CRASHES):
        operation = kit.operation()
        came = kit.post(operation, f"start, round {round + 1}", "accepted, or a terminal status", taken)
        kit.trial.pause(secrets.randbelow(50 * (round + 1)) / 1000)
        restart()
        known = kit.ended(operation)
        if came.status in TERMINAL and known.status != came.status:
            kit.judge("status after the restart", f"{came.status}, as it was answered", known, False)
        kit.post(operation, "the same start after the restart", "the same status, not done again", taken)
        kit.done_once(operation, known)
    kit.post(
        again(operation, "undo", 2, undo_ref=operation.id), "undo of the last one", "accepted or succeeded",
        lambda c: c.status in ("accepted", "succeeded"),
    )  # fmt: skip
    kit.ended(operation, "undo", frozenset({"succeeded"}))


def callback(kit: Kit) -> None:
    """The end of an operation is told as well, signed, and as it is told when it is asked."""
    heard = kit.trial.heard
    if heard is None:
        raise NotRun("needs --listen: the receiver has to tell the kit as it would tell Flyball")
    operation, asked = kit.start()
    path = f"/v1/operations/{operation.id}"
    end = kit.trial.now() + min(kit.trial.wait_s, 10.0)
    while not (told := [(h, b) for p, h, b in heard() if p == path]) and kit.trial.now() < end:
        kit.trial.pause(0.05)
    expected = f"POST {path}, signed: {asked.status}"
    if not told:
        kit.judge("nothing; waited", expected, Came(lost="nothing"), False)
    headers, body = told[-1]
    try:
        report = verify_callback(headers, body, [kit.trial.secret], at=kit.trial.now())
    except (SignatureRefused, DecodeError) as e:
        kit.judge("nothing; waited", expected, Came(lost=f"POST {path}, {e}"), False)
    else:
        came = Came(lost=f"POST {path}: {report.id} {report.verb} {report.status}")
        good = (report.id, report.verb, report.status) == (operation.id, "start", asked.status)
        kit.judge("nothing; waited", expected, came, good)


# --- recovery ------------------------------------------------------------------------------------------------------


def cancel(kit: Kit) -> None:
    """A cancel says what the operation came to, and it stays at that."""
    operation = kit.operation()
    kit.post(operation, "start", "accepted, or a terminal status", taken)
    stop = again(operation, "cancel", 2)
    kit.post(stop, "cancel at once", "cancelled, accepted, or what became of it", taken)
    came = kit.ended(operation, "cancel")
    if came.status == "cancelled":
        # What goes on in spite of its cancel needs a moment to show.
        kit.trial.pause(1.0)
        kit.ask(operation, "cancelled; not done", lambda c: c.status == "cancelled" and not_done(c))
    else:
        kit.ask(operation, f"{came.status}, as the cancel was told", lambda c: c.status == came.status)
    kit.post(stop, "cancel again", f"{came.status} again", lambda c: c.status == came.status)


def undo_twice(kit: Kit) -> None:
    """An undo succeeds, a second one is answered the same and done no more, and the start is not done again after it."""
    operation, first = kit.start()
    ref = first.answer.undo_ref if first.answer else ""
    undo = again(operation, "undo", 2, undo_ref=ref)
    kit.post(undo, "undo", "accepted or succeeded", lambda c: c.status in ("accepted", "succeeded"))
    undone = kit.ended(operation, "undo", frozenset({"succeeded"}))
    kit.post(undo, "undo again", "succeeded", lambda c: c.status == "succeeded")
    later = again(operation, "undo", 3, undo_ref=ref, attempt=2)
    kit.post(later, "undo as attempt 2", "succeeded", lambda c: c.status == "succeeded")
    kit.trial.pause(0.2)
    runs = undone.answer.runs if undone.answer else None
    kit.ask(
        operation,
        f"unchanged ({undone})",
        lambda c: c.answer is not None and c.answer.runs == runs,
        verb="undo",
    )
    kit.post(operation, "the start again", "any answer; not done again", lambda c: bool(c.http))
    kit.done_once(operation, first)


def recovery_not_limited(kit: Kit) -> None:
    """Cancels and undos are taken however many come."""
    for number in range(_BURST):
        verb: Literal["cancel", "undo"] = "undo" if number % 2 else "cancel"
        operation = kit.operation()
        request = again(operation, verb, 2, undo_ref=operation.id if verb == "undo" else "")
        kit.post(request, f"{verb} {number + 1} of {_BURST}, one after the other", "accepted or done", taken)
        # Said once, not thirty times.
        if number:
            kit.exchanges.pop()


# --- what is asked -------------------------------------------------------------------------------------------------


def dry_run(kit: Kit) -> None:
    """A dry run says what would be done, and changes nothing."""
    trial = kit.operation(dry_run=True)
    expected = "accepted, with targets, predicted and undo_ref"
    came = kit.post(trial, "start as a dry run", expected, _tells_all)
    kit.trial.pause(0.2)
    kit.ask(trial, "not heard of (HTTP 404), or not done", lambda c: not_done(c) or c.status == "accepted")
    second = kit.operation(dry_run=True)
    first = came.answer

    def the_same(c: Came) -> bool:
        a = c.answer
        return bool(a and first) and (a.targets, a.predicted, a.before) == (  # type: ignore[union-attr]
            first.targets, first.predicted, first.before,  # type: ignore[union-attr]
        )  # fmt: skip

    kit.post(second, "another dry run of the same", "the same targets, predicted and before", the_same)


def _tells_all(came: Came) -> bool:
    a = came.answer
    return a is not None and came.status == "accepted" and bool(a.targets and a.predicted and a.undo_ref)


def unknown_action(kit: Kit) -> None:
    """What the hook does not know is answered as such."""
    operation = kit.operation(action="conform-no-such-action")
    kit.post(
        operation, "start of an action that there is not", "unsupported", lambda c: c.status == "unsupported"
    )
    strange = request_body(kit.operation()).replace('"verb":"start"', '"verb":"explode"')
    kit.post(
        kit.operation(), "a verb that there is not", "rejected or HTTP 4xx", lambda c: c.refused, text=strange
    )


def deadline_passed(kit: Kit) -> None:
    """An order that comes after its deadline is refused."""
    operation = kit.operation(deadline=kit.trial.now() - 5.0)
    kit.post(operation, "start, five seconds after its deadline", "rejected", lambda c: c.refused)
    kit.trial.pause(0.2)
    kit.ask(operation, "not heard of (HTTP 404), or not done", not_done)


def large_body(kit: Kit) -> None:
    """A request of 48 kB is answered, one of 2 MB is refused, and the hook still stands after it."""
    large = kit.operation(dry_run=True, params={**kit.trial.params, "filler": "x" * _MANY_BYTES})
    kit.post(
        large,
        "a dry run of 48 kB",
        "any word",
        lambda c: c.status in TERMINAL | REFUSED | {"accepted"} or c.http == 400,
    )
    huge = kit.operation(params={**kit.trial.params, "filler": "x" * _TOO_MANY_BYTES})
    refused = "HTTP 4xx, or the connection closed"
    kit.post(
        huge, "a start of 2 MB", refused, lambda c: c.refused or (not c.http and "Timeout" not in c.lost)
    )
    kit.ask(huge, "not heard of (HTTP 404), or not done", not_done)
    kit.post(
        kit.operation(dry_run=True),
        "a dry run of the usual size",
        "accepted",
        lambda c: c.status == "accepted",
    )


def unreadable(kit: Kit) -> None:
    """What is signed and still no request is refused, and the hook still stands after it."""
    for text in ("", "[]", "{", '{"verb": "start"}', "null"):
        kit.post(kit.operation(), f"{text!r}, signed", "rejected or HTTP 4xx", lambda c: c.refused, text=text)
    kit.post(kit.operation(dry_run=True), "a dry run", "accepted", lambda c: c.status == "accepted")


CHECKS: Final[tuple[Callable[[Kit], None], ...]] = (
    signature_missing, signature_wrong, signature_old, signature_of_another_body, signature_of_status,
    dry_run, unknown_action, deadline_passed, unreadable, large_body,
    duplicate, duplicate_at_once, other_order, cancel_before_start, undo_before_start, old_token,
    cancel, undo_twice, recovery_not_limited, timeout_after_acceptance, crash, callback,
)  # fmt: skip


def names() -> list[str]:
    """Of all checks, in their order."""
    return [check.__name__ for check in CHECKS]


def run(
    trial: Trial, only: Sequence[str] = (), progress: Callable[[Check], None] = lambda check: None
) -> list[Check]:
    """Every check, or those named in `only`, one after another.

    Raises: HookNotReached when nothing answers at all; ConfigError for a name that is no check.
    """
    for name in only:
        if name not in names():
            raise ConfigError(f"{name!r} is no check{did_you_mean(name, names())}")
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(trust_env=False, follow_redirects=False, limits=limits) as http:
        first = Kit(trial, http)
        reached = first.status(first.operation(), "start")
        if not reached.http:
            raise HookNotReached(f"{trial.url}: {reached.lost}; start the receiver, or name its address")
        done = []
        for check in CHECKS:
            if not only or check.__name__ in only:
                found = _run(check, trial, http)
                progress(found)
                done.append(found)
        return done


def _run(check: Callable[[Kit], None], trial: Trial, http: httpx.Client) -> Check:
    kit = Kit(trial, http)
    asks = (check.__doc__ or "").strip()
    result: Literal["passed", "failed", "not_run"] = "passed"
    why = ""
    try:
        check(kit)
    except Found:
        last = kit.exchanges[-1]
        result, why = "failed", f"{last.sent}: expected {last.expected}; came {last.came}"
    except NotRun as e:
        result, why = "not_run", str(e)
    kit.clean_up()
    return Check(name=check.__name__, asks=asks, result=result, why=why, exchanges=tuple(kit.exchanges))
