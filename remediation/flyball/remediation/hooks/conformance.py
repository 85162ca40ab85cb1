"""Tries a hook: does it keep the contract when requests come twice, late, in the wrong order, forged, or when it is killed?

Each check says what was sent, what was expected and what came. Orders are really carried out, several times, on the target that
is given, and undone again.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import httpx
import msgspec
from pydantic import SecretStr

from flyball.core.directives import Operation
from flyball.core.errors import ConfigError, DecodeError, FlyballError, did_you_mean
from flyball.remediation.hooks.wire import (
    TERMINAL,
    Answer,
    decode_answer,
    message_id,
    printable,
    request_body,
)
from flyball.remediation.signing import signed_headers

NOT_RUN: Final = "not_run"
_REFUSED: Final = frozenset({"rejected", "unsupported"})
_OLD_S: Final = 600.0
_BURST: Final = 30
_MANY_BYTES, _TOO_MANY_BYTES = 48 * 1024, 2 << 20
_CRASHES: Final = 5


class HookNotReached(FlyballError):
    """Nothing answers at the hook's address."""


class Exchange(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a check, in words."""

    sent: str
    expected: str
    came: str
    ok: bool


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one check. `not_run` says in `why` what it would need."""

    name: str
    asks: str
    result: Literal["passed", "failed", "not_run"]
    why: str = ""
    exchanges: tuple[Exchange, ...] = ()


@dataclass(frozen=True, slots=True)
class Trial:
    """What is tried, and how.

    action, targets, params: what is ordered; it is carried out for real.
    restart: kills the receiver the hard way and starts it again, returning when it answers; None where the kit cannot.
    wait_s: longest wait for an operation to end.
    """

    url: str
    secret: SecretStr
    action: str
    targets: tuple[str, ...]
    params: dict[str, Any] = field(default_factory=dict)
    restart: Callable[[], None] | None = None
    wait_s: float = 30.0
    timeout_s: float = 10.0
    now: Callable[[], float] = time.time
    pause: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True)
class Came:
    """What came back: an HTTP status, and the answer where it is one; `lost` when there was no whole answer."""

    http: int = 0
    answer: Answer | None = None
    lost: str = ""

    @property
    def status(self) -> str:
        """The word; empty when there is none."""
        return self.answer.status if self.answer and 200 <= self.http < 300 else ""

    @property
    def refused(self) -> bool:
        """Said no: by a word, or by an HTTP status that says it."""
        return self.status in _REFUSED or 400 <= self.http < 500

    def __str__(self) -> str:
        if not self.http:
            return self.lost
        if self.answer is None:
            return f"HTTP {self.http}" + (f", {self.lost}" if self.lost else "")
        told = [printable(self.answer.status, 40), printable(self.answer.code, 40)]
        if self.answer.runs is not None:
            told.append(f"runs {self.answer.runs}")
        return f"HTTP {self.http}, " + " ".join(t for t in told if t)


class _Found(Exception):
    """A check ends here: what came is not what has to come."""


class Kit:
    """Sends, and keeps what was sent, expected and came."""

    def __init__(self, trial: Trial, http: httpx.Client) -> None:
        self.trial, self._http = trial, http
        self.exchanges: list[Exchange] = []
        self._made: list[Operation] = []
        self._asked = 0

    # --- requests -------------------------------------------------------------------------------------------------

    def operation(self, **changes: Any) -> Operation:
        """A new one, never seen before."""
        t = self.trial
        made = Operation(
            id=f"OP-TRY-{secrets.token_hex(6).upper()}", verb="start", hook="conform", action=t.action, plan="PLAN-TRY",
            incident="INC-TRY", runbook="conform", step="try", targets=t.targets, params=t.params, at=t.now(),
            deadline=t.now() + 600.0,
        )  # fmt: skip
        made = msgspec.structs.replace(made, **changes)
        self._made.append(made)
        return made

    def post(
        self,
        operation: Operation,
        what: str,
        expected: str,
        ok: Callable[[Came], bool],
        *,
        headers: dict[str, str] | None = None,
        text: str | None = None,
        read_s: float | None = None,
    ) -> Came:
        """Raises: _Found when what comes is not ok."""
        text = request_body(operation) if text is None else text
        if headers is None:
            headers = signed_headers([self.trial.secret], message_id(operation), text, self.trial.now())
        came = self._exchange("POST", self.trial.url, headers, text.encode(), read_s)
        return self.judge(what, expected, came, ok(came))

    def ask(
        self,
        operation: Operation,
        expected: str,
        ok: Callable[[Came], bool],
        *,
        verb: str = "start",
        signed: bool = True,
    ) -> Came:
        """The status, once. Raises: _Found when what comes is not ok."""
        came = self.status(operation, verb, signed)
        return self.judge(f"status of {verb}{'' if signed else ', not signed'}", expected, came, ok(came))

    def ended(self, operation: Operation, verb: str = "start", among: frozenset[str] = TERMINAL) -> Came:
        """The status once it is terminal. Raises: _Found when it does not become one of `among` in time."""
        begun, wait = self.trial.now(), 0.02
        came = self.status(operation, verb)
        while came.status not in TERMINAL | _REFUSED:
            # One that is not known after some seconds will not become known.
            if self.trial.now() >= begun + (
                min(3.0, self.trial.wait_s) if came.http == 404 else self.trial.wait_s
            ):
                break
            self.trial.pause(wait)
            wait = min(wait * 1.5, 0.5)
            came = self.status(operation, verb)
        words = "a terminal status" if among == TERMINAL else " or ".join(sorted(among))
        expected = f"{words} within {self.trial.wait_s:g} s"
        return self.judge(f"status of {verb}, until it is terminal", expected, came, came.status in among)

    def done_once(self, operation: Operation, first: Came) -> None:
        """That nothing was done again since the operation was seen to have ended."""
        # What is done a second time in the background would only now be under way.
        self.trial.pause(0.2)
        came = self.status(operation, "start")
        a, b = first.answer, came.answer
        same = bool(a and b) and (a.status, a.before, a.undo_ref) == (b.status, b.before, b.undo_ref)  # type: ignore[union-attr]
        once = b is not None and b.runs in (None, a.runs if a else None) and (b.runs or 0) <= 1
        self.judge("status of start, a moment later", f"unchanged ({first})", came, same and once)

    def start(self, what: str = "start", **changes: Any) -> tuple[Operation, Came]:
        """An order that has to be taken, and what it came to."""
        operation = self.operation(**changes)
        self.post(operation, what, "accepted, or a terminal status", _taken)
        return operation, self.ended(operation, among=frozenset({"succeeded"}))

    def clean_up(self) -> None:
        """Undoes what this check may have done, and waits for it; how that goes is judged by other checks."""
        for made in reversed(self._made):
            if made.verb != "start" or made.dry_run or self.status(made, "start").http == 404:
                continue
            undo = again(made, "undo", 1_000_000, undo_ref=made.id)
            text = request_body(undo)
            headers = signed_headers([self.trial.secret], message_id(undo), text, self.trial.now())
            self._exchange("POST", self.trial.url, headers, text.encode(), None)
            end = self.trial.now() + 3.0
            while self.status(made, "undo").status == "accepted" and self.trial.now() < end:
                self.trial.pause(0.05)

    # --- inside ---------------------------------------------------------------------------------------------------

    def status(self, operation: Operation, verb: str, signed: bool = True) -> Came:
        self._asked += 1
        url = f"{self.trial.url.rstrip('/')}/operations/{operation.id}?verb={verb}"
        name = f"{operation.id}.status.{self._asked}"
        headers = signed_headers([self.trial.secret], name, "", self.trial.now()) if signed else {}
        return self._exchange("GET", url, headers, None, None)

    def _exchange(
        self, method: str, url: str, headers: dict[str, str], body: bytes | None, read_s: float | None
    ) -> Came:
        fixed = {"content-type": "application/json"} if body is not None else {}
        limit = httpx.Timeout(self.trial.timeout_s, read=read_s or self.trial.timeout_s)
        try:
            came = self._http.request(method, url, content=body, headers={**fixed, **headers}, timeout=limit)
        except httpx.TransportError as e:
            return Came(lost=f"no answer ({type(e).__name__})")
        try:
            return Came(came.status_code, decode_answer(came.content))
        except DecodeError as e:
            # A refusal may do without words; its HTTP status says it.
            return Came(came.status_code, lost="" if came.is_client_error else e.detail)

    def judge(self, sent: str, expected: str, came: Came, ok: bool) -> Came:
        self.exchanges.append(Exchange(sent=sent, expected=expected, came=str(came), ok=ok))
        if not ok:
            raise _Found
        return came


def _taken(came: Came) -> bool:
    return came.status == "accepted" or came.status in TERMINAL


def _not_done(came: Came) -> bool:
    """Not heard of, refused, or cancelled: in no case done."""
    runs = came.answer.runs if came.answer else None
    unknown = came.http == 404 or came.status in _REFUSED | {"cancelled", "failed_not_applied"}
    return unknown and not runs


def again(
    operation: Operation, verb: Literal["start", "cancel", "undo"], epoch: int, **changes: Any
) -> Operation:
    """Another request about the same operation."""
    return msgspec.structs.replace(operation, verb=verb, epoch=epoch, **changes)


# --- signatures ----------------------------------------------------------------------------------------------------


def _forged(kit: Kit, how: str, headers: Callable[[Operation, str], dict[str, str]]) -> None:
    operation = kit.operation()
    text = request_body(operation)
    kit.post(
        operation, f"start, {how}", "HTTP 401 or 403", lambda c: c.http in (400, 401, 403),
        headers=headers(operation, text), text=text,
    )  # fmt: skip
    kit.ask(operation, "not heard of (HTTP 404), or not done", _not_done)


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
    kit.post(operation, "the same start again", "the same status, not done again", _taken)
    retry = msgspec.structs.replace(operation, attempt=2, epoch=2)
    kit.post(retry, "the same start as attempt 2", "the same status, not done again", _taken)
    kit.done_once(operation, first)


def duplicate_at_once(kit: Kit) -> None:
    """A copy that arrives while the first is being carried out is not done as well."""
    operation = kit.operation()
    kit.post(operation, "start", "accepted, or a terminal status", _taken)
    kit.post(operation, "the same start at once", "the same status, not done again", _taken)
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
    kit.post(undo, "undo, before its start", "succeeded (there is nothing to undo)", _taken)
    kit.ended(operation, "undo", frozenset({"succeeded"}))
    _start_too_late(kit, operation)


def _start_too_late(kit: Kit, operation: Operation) -> None:
    # With the same token too: it is the order of arrival that has to count here.
    for epoch, which in ((1, "with its older token"), (2, "with the same token")):
        late = msgspec.structs.replace(operation, epoch=epoch)
        kit.post(late, f"its start, {which}", "cancelled or rejected", _no)
    kit.trial.pause(0.2)
    kit.ask(operation, "cancelled or not heard of; not done", _not_done)


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
    kit.post(operation, "the same start again", "the same status, not done again", _taken)
    kit.done_once(operation, first)


def crash(kit: Kit) -> None:
    """What was accepted before a `kill -9` is known after it, comes to an end, and is not done twice."""
    restart = kit.trial.restart
    if restart is None:
        raise _NotRun("needs --command: the kit has to kill and start the receiver itself")
    for round in range(_CRASHES):
        operation = kit.operation()
        came = kit.post(operation, f"start, round {round + 1}", "accepted, or a terminal status", _taken)
        kit.trial.pause(secrets.randbelow(50 * (round + 1)) / 1000)
        restart()
        known = kit.ended(operation)
        if came.status in TERMINAL and known.status != came.status:
            kit.judge("status after the restart", f"{came.status}, as it was answered", known, False)
        kit.post(operation, "the same start after the restart", "the same status, not done again", _taken)
        kit.done_once(operation, known)
    kit.post(
        again(operation, "undo", 2, undo_ref=operation.id), "undo of the last one", "accepted or succeeded",
        lambda c: c.status in ("accepted", "succeeded"),
    )  # fmt: skip
    kit.ended(operation, "undo", frozenset({"succeeded"}))


# --- recovery ------------------------------------------------------------------------------------------------------


def cancel(kit: Kit) -> None:
    """A cancel says what the operation came to, and it stays at that."""
    operation = kit.operation()
    kit.post(operation, "start", "accepted, or a terminal status", _taken)
    stop = again(operation, "cancel", 2)
    kit.post(stop, "cancel at once", "cancelled, accepted, or what became of it", _taken)
    came = kit.ended(operation, "cancel")
    if came.status == "cancelled":
        # What goes on in spite of its cancel needs a moment to show.
        kit.trial.pause(1.0)
        kit.ask(operation, "cancelled; not done", lambda c: c.status == "cancelled" and _not_done(c))
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
        kit.post(request, f"{verb} {number + 1} of {_BURST}, one after the other", "accepted or done", _taken)
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
    kit.ask(trial, "not heard of (HTTP 404), or not done", lambda c: _not_done(c) or c.status == "accepted")
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
    kit.ask(operation, "not heard of (HTTP 404), or not done", _not_done)


def large_body(kit: Kit) -> None:
    """A request of 48 kB is answered, one of 2 MB is refused, and the hook still stands after it."""
    large = kit.operation(dry_run=True, params={**kit.trial.params, "filler": "x" * _MANY_BYTES})
    kit.post(
        large,
        "a dry run of 48 kB",
        "any word",
        lambda c: c.status in TERMINAL | _REFUSED | {"accepted"} or c.http == 400,
    )
    huge = kit.operation(params={**kit.trial.params, "filler": "x" * _TOO_MANY_BYTES})
    refused = "HTTP 4xx, or the connection closed"
    kit.post(
        huge, "a start of 2 MB", refused, lambda c: c.refused or (not c.http and "Timeout" not in c.lost)
    )
    kit.ask(huge, "not heard of (HTTP 404), or not done", _not_done)
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
    cancel, undo_twice, recovery_not_limited, timeout_after_acceptance, crash,
)  # fmt: skip


class _NotRun(Exception):
    """The check needs something that is not there; the text says what."""


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
    except _Found:
        last = kit.exchanges[-1]
        result, why = "failed", f"{last.sent}: expected {last.expected}; came {last.came}"
    except _NotRun as e:
        result, why = "not_run", str(e)
    kit.clean_up()
    return Check(name=check.__name__, asks=asks, result=result, why=why, exchanges=tuple(kit.exchanges))
