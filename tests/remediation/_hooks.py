"""What the tests of hooks share: operations, a clock, the queue's contract in a dict, and a hook behind a fake wire."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
from msgspec.structs import replace
from pydantic import SecretStr

from flyball.core.directives import Operation, OperationReport
from flyball.remediation.hooks import HookSettings, OperationRow

AT = 1_790_000_000.0
SECRET = SecretStr("whsec_" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWY=")
OTHER_SECRET = SecretStr("whsec_" + "MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI=")


def hook(url: str = "http://127.0.0.1:9/", name: str = "nodes", **changes: Any) -> HookSettings:
    given = {"name": name, "url": url, "secrets": [SECRET], "allow_private": True, "timeout_s": 5.0}
    return HookSettings.model_validate(given | changes)


def operation(
    id: str = "OP-1", verb: Literal["start", "cancel", "undo"] = "start", **changes: Any
) -> Operation:
    made = Operation(
        id=id, verb=verb, hook="nodes", action="drain", plan="PLAN-1", incident="INC-1", runbook="gpu-fault", step="drain",
        targets=("node-1",), params={"grace_s": 30}, at=AT, deadline=AT + 600.0,
    )  # fmt: skip
    return replace(made, **changes)


@dataclass
class Time:
    at: float = AT

    def now(self) -> float:
        return self.at


class Killed(BaseException):
    """The process is gone: nothing after it runs. No `Exception`, so that nothing catches it."""


@dataclass
class Entry:
    row: OperationRow
    due_at: float = 0.0
    finished: bool = False


@dataclass
class MemoryStore:
    """The queue's contract, in a dict. `die_at`: the number of the call that never returns, before or after it took effect."""

    entries: dict[tuple[str, str, int], Entry] = field(default_factory=dict)
    reports: list[OperationReport] = field(default_factory=list)
    die_at: int = -1
    die_after: bool = False
    calls: int = 0

    def put(self, operation: Operation) -> None:
        key = (operation.id, operation.verb, operation.attempt)
        self.entries.setdefault(key, Entry(OperationRow(operation=operation)))

    def entry(self, operation: Operation) -> Entry:
        return self.entries[operation.id, operation.verb, operation.attempt]

    @property
    def open(self) -> list[Entry]:
        return [e for e in self.entries.values() if not e.finished]

    def statuses(self, verb: str = "start") -> list[str]:
        return [r.status for r in self.reports if r.verb == verb]

    async def due(self, now: float, limit: int) -> Sequence[OperationRow]:
        found = [e for e in self.open if e.due_at <= now]
        found.sort(key=lambda e: (e.row.operation.verb == "start", e.row.operation.at))
        return [self._with_started(e.row) for e in found[:limit]]

    def _with_started(self, row: OperationRow) -> OperationRow:
        if row.operation.verb != "cancel":
            return row
        starts = [e for (id, verb, _), e in self.entries.items() if (id, verb) == (row.operation.id, "start")]
        return replace(row, started=any(e.row.since > 0 for e in starts))

    async def mark_sending(self, operation: Operation, at: float) -> bool:
        self._dies(before=True)
        entry = self.entry(operation)
        if entry.finished or entry.row.state != "reserved":
            return False
        entry.row = replace(entry.row, state="sending", since=entry.row.since or at)
        self._dies(before=False)
        return True

    async def put_off(
        self, operation: Operation, state: Literal["reserved", "sending", "asking"] | None, at: float
    ) -> None:
        self._dies(before=True)
        self._move(operation, state, at)
        self._dies(before=False)

    async def reported(
        self,
        report: OperationReport,
        state: Literal["reserved", "sending", "asking"] | None,
        at: float = 0.0,
    ) -> None:
        self._dies(before=True)
        self.reports.append(report)
        entry = self.entries[report.id, report.verb, report.attempt]
        entry.row = replace(entry.row, told=report.status)
        self._move(entry.row.operation, state, at)
        self._dies(before=False)

    def _move(
        self, operation: Operation, state: Literal["reserved", "sending", "asking"] | None, at: float
    ) -> None:
        entry = self.entry(operation)
        entry.finished = state is None
        if state is not None:
            entry.row = replace(entry.row, state=state, tries=entry.row.tries + 1)
            entry.due_at = at

    def _dies(self, before: bool) -> None:
        if before:
            self.calls += 1
        if self.calls == self.die_at and before is not self.die_after:
            raise Killed


def respond(status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> httpx.Response:
    """An answer that is still to be read, as one from the network is."""
    return httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))


Fault = Literal[
    "", "no_connection", "no_answer", "not_taken", "http_500", "http_503", "http_429", "gibberish"
]


@dataclass
class Platform(httpx.AsyncBaseTransport):
    """A hook that keeps the contract, behind a wire that does not. Keeps what was really done.

    faults: what happens to the next requests, one after the other; then all goes well.
        `no_answer`: taken, and the answer is lost; `not_taken`: lost on the way there, after sending.
    ends: what an operation is when it is first asked about; "" for never.
    """

    faults: list[Fault] = field(default_factory=list)
    answers: str = "accepted"
    ends: str = "succeeded"
    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    posts: list[dict[str, Any]] = field(default_factory=list)
    status: dict[tuple[str, str], str] = field(default_factory=dict)
    die_at: int = -1
    die_after: bool = False
    requests: int = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests += 1
        if self.requests == self.die_at and not self.die_after:
            raise Killed
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "no_connection":
            raise httpx.ConnectError("refused", request=request)
        if fault == "not_taken":
            raise httpx.ReadError("reset", request=request)
        if fault in ("http_429", "http_503"):
            return respond(int(fault[5:]), headers={"retry-after": "7"})
        body = await request.aread()
        answer = self._take(json.loads(body)) if request.method == "POST" else self._told(request.url)
        if self.requests == self.die_at:
            raise Killed
        if fault == "no_answer":
            raise httpx.ReadTimeout("no answer", request=request)
        if fault == "http_500":
            return respond(500)
        if fault == "gibberish":
            return respond(200, b"<html>")
        return respond(200, json.dumps(answer).encode()) if answer else respond(404)

    def _take(self, order: dict[str, Any]) -> dict[str, Any]:
        self.posts.append(order)
        id, verb = order["operation_id"], order["verb"]
        if order["dry_run"]:
            return {
                "status": "accepted",
                "targets": order["targets"],
                "predicted": {"nodes": 1},
                "undo_ref": id,
            }
        if verb == "cancel":
            if self.status.get((id, "start"), "accepted") == "accepted":
                self.status[id, "start"] = "cancelled"
            return {"status": self.status[id, "start"]}
        if (id, verb) not in self.status:
            self.status[id, verb] = self.answers
            if self.answers not in ("rejected", "unsupported"):
                self.done[id, verb] += 1
        return {"status": self.status[id, verb], "undo_ref": id}

    def _told(self, url: httpx.URL) -> dict[str, Any]:
        id, verb = url.path.rpartition("/")[2], url.params["verb"]
        verb = "start" if verb == "cancel" else verb
        if self.status.get((id, verb)) == "accepted" and self.ends:
            self.status[id, verb] = self.ends
        if (id, verb) not in self.status:
            return {}
        return {
            "operation_id": id,
            "verb": url.params["verb"],
            "status": self.status[id, verb],
            "undo_ref": id,
        }
