"""What a hook is tried with: sends requests, judges what comes, and keeps both in words."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import httpx
import msgspec
from pydantic import SecretStr

from flyball.core.directives import Operation
from flyball.core.errors import DecodeError, FlyballError
from flyball.remediation.hooks.wire import (
    TERMINAL,
    Answer,
    decode_answer,
    message_id,
    printable,
    request_body,
)
from flyball.remediation.signing import signed_headers

REFUSED: Final = frozenset({"rejected", "unsupported"})


class HookNotReached(FlyballError):
    """Nothing answers at the hook's address."""


class Found(Exception):
    """A check ends here: what came is not what has to come."""


class NotRun(Exception):
    """The check needs something that is not there; the text says what."""


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
    heard: what the receiver has posted to Flyball's address so far, as (path, headers, body); None where nobody listens there.
    wait_s: longest wait for an operation to end.
    """

    url: str
    secret: SecretStr
    action: str
    targets: tuple[str, ...]
    params: dict[str, Any] = field(default_factory=dict)
    restart: Callable[[], None] | None = None
    heard: Callable[[], Sequence[tuple[str, Mapping[str, str], bytes]]] | None = None
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
        return self.status in REFUSED or 400 <= self.http < 500

    def __str__(self) -> str:
        if not self.http:
            return self.lost
        if self.answer is None:
            return f"HTTP {self.http}" + (f", {self.lost}" if self.lost else "")
        told = [printable(self.answer.status, 40), printable(self.answer.code, 40)]
        if self.answer.runs is not None:
            told.append(f"runs {self.answer.runs}")
        return f"HTTP {self.http}, " + " ".join(t for t in told if t)


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
        """Raises: Found when what comes is not ok."""
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
        """The status, once. Raises: Found when what comes is not ok."""
        came = self.status(operation, verb, signed)
        return self.judge(f"status of {verb}{'' if signed else ', not signed'}", expected, came, ok(came))

    def ended(self, operation: Operation, verb: str = "start", among: frozenset[str] = TERMINAL) -> Came:
        """The status once it is terminal. Raises: Found when it does not become one of `among` in time."""
        begun, wait = self.trial.now(), 0.02
        came = self.status(operation, verb)
        while came.status not in TERMINAL | REFUSED:
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
        self.post(operation, what, "accepted, or a terminal status", taken)
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
            raise Found
        return came


def taken(came: Came) -> bool:
    return came.status == "accepted" or came.status in TERMINAL


def not_done(came: Came) -> bool:
    """Not heard of, refused, or cancelled: in no case done."""
    runs = came.answer.runs if came.answer else None
    unknown = came.http == 404 or came.status in REFUSED | {"cancelled", "failed_not_applied"}
    return unknown and not runs


def again(
    operation: Operation, verb: Literal["start", "cancel", "undo"], epoch: int, **changes: Any
) -> Operation:
    """Another request about the same operation."""
    return msgspec.structs.replace(operation, verb=verb, epoch=epoch, **changes)
