"""Carries operations to the hooks: each start at most once, and every one with an end.

The durable queue is the caller's (a table written in the same transaction as the ledger's reservation); it is reached by the
small port `OperationStore`. What is marked as sending and has no answer, because of a time-out or because this process was
killed, may have been taken: its status is asked, and a start is never sent again. A cancel or an undo is done once by the hook
however often it comes, so one without a clear answer is repeated. What was certainly not taken is told, and tried again only when
the executor orders another attempt.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, Literal, Protocol

import msgspec
import structlog

from flyball.core.directives import Operation, OperationReport
from flyball.core.ports import Clock
from flyball.remediation.hooks.client import HookClient
from flyball.remediation.hooks.wire import told, unknown

_log = structlog.get_logger(__name__)

ASK_S: Final[tuple[float, ...]] = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
"""Waits between questions for the status; the last one repeats."""
REPEAT_S: Final[tuple[float, ...]] = (1.0, 2.0, 5.0, 15.0, 30.0, 60.0, 300.0)
"""Waits before a cancel or an undo is repeated; the last one repeats."""
QUIET_TRIES: Final = 2
JITTER: Final = 0.25

State = Literal["reserved", "sending", "asking"]


class OperationRow(msgspec.Struct, frozen=True, kw_only=True):
    """One request that is not finished: of one operation, one verb and one attempt.

    state: `reserved`, not sent yet (or, of a cancel or undo, to be repeated); `sending`, marked before it went out; `asking`,
        taken or unknown, its status is asked.
    since: when it was first marked as sending; 0 before.
    tries: how often it was put off, by `put_off` or by `reported` with a state.
    told: status of the last report about it; empty when there was none.
    started: of a cancel, whether any start of the operation was ever marked as sending; else True.
    """

    operation: Operation
    state: State = "reserved"
    since: float = 0.0
    tries: int = 0
    told: str = ""
    started: bool = True


class OperationStore(Protocol):
    """The durable queue. Each call is one transaction, and committed when it returns."""

    async def due(self, now: float, limit: int) -> Sequence[OperationRow]:
        """Rows that are not finished and whose time has come: undo and cancel first, then by age. A new row is due at once."""
        ...

    async def mark_sending(self, operation: Operation, at: float) -> bool:
        """`reserved` becomes `sending`, with `since` set where it is 0. False, and no change, when the row is in any other state."""
        ...

    async def put_off(self, operation: Operation, state: State | None, at: float) -> None:
        """The row is due again at `at` in this state, or finished (None). `tries` counts one more."""
        ...

    async def reported(self, report: OperationReport, state: State | None, at: float = 0.0) -> None:
        """The report goes into the log, for the executor, and the row's `told` becomes its status.

        state: None when the row is finished; else it is due again at `at` in this state, as by `put_off`.
        """
        ...


class HookDispatchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How hard it tries.

    concurrency: starts and questions at once; cancels and undos are never limited.
    settle_s: how long the status of an unanswered start is asked before people are told that nobody knows.
    ask_for_s: how long after its deadline the status is asked. repeat_for_s: how long a cancel or undo is repeated.
    """

    concurrency: int = 16
    per_hook: int = 4
    settle_s: float = 10.0
    ask_for_s: float = 3600.0
    repeat_for_s: float = 3600.0
    poll_s: float = 0.5
    batch: int = 64


class Dispatcher:
    """Takes due rows from the store, sends them, and asks how they went.

    Requests of one operation go one after another. Counts what it did in `counts`: `sent`, `asked`, `dropped`, and the statuses.

    Args:
        wanted: asked immediately before a start is sent, after everything that takes time; thread-safe (the kill switch).
            Never asked for a cancel or an undo.
        clock: wall time. rng: seeded by the caller, for jitter.
    """

    def __init__(
        self,
        store: OperationStore,
        client: HookClient,
        wanted: Callable[[Operation], bool],
        *,
        clock: Clock,
        rng: random.Random,
        settings: HookDispatchSettings | None = None,
    ) -> None:
        self._store, self._client, self._wanted = store, client, wanted
        self._clock, self._rng = clock, rng
        self._settings = settings = settings or HookDispatchSettings()
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._all = asyncio.Semaphore(settings.concurrency)
        self._of_hook: dict[str, asyncio.Semaphore] = {}
        self._wake = asyncio.Event()
        self.counts: Counter[str] = Counter()

    def wake(self) -> None:
        """There is something new in the store. To be called in the dispatcher's event loop."""
        self._wake.set()

    async def drain(self) -> None:
        """Does everything that is due now, and returns when the last of it is done or put off."""
        while await self._start_due() or self._busy:
            await asyncio.wait(self._busy.values(), return_when=asyncio.FIRST_COMPLETED)
            self._reap()

    async def run(self, stop: asyncio.Event) -> None:
        """Goes on until `stop`; then lets what is being sent finish, within its time-out."""
        stopped = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                self._wake.clear()
                await self._start_due()
                woken = asyncio.create_task(self._wake.wait())
                await asyncio.wait(
                    {stopped, woken, *self._busy.values()},
                    timeout=self._settings.poll_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                woken.cancel()
                self._reap()
            if self._busy:
                await asyncio.wait(self._busy.values())
                self._reap()
        finally:
            stopped.cancel()
            for task in self._busy.values():
                task.cancel()

    async def _start_due(self) -> bool:
        started = False
        for row in await self._store.due(self._clock.now(), self._settings.batch + len(self._busy)):
            id = row.operation.id
            if id not in self._busy:
                started = True
                self._busy[id] = asyncio.create_task(self._take(row), name=f"hook {id}")
        return started

    def _reap(self) -> None:
        for id, task in list(self._busy.items()):
            if task.done():
                del self._busy[id]
                # A store that fails is not ours to mend: it comes out here.
                task.result()

    async def _take(self, row: OperationRow) -> None:
        operation = row.operation
        if operation.verb != "start":
            # Recovery waits for nobody's turn.
            await (self._ask_recovery(row) if row.state == "asking" else self._recover(row))
            return
        of_hook = self._of_hook.setdefault(operation.hook, asyncio.Semaphore(self._settings.per_hook))
        # The hook's own turn first: a slow hook's queue must not sit on the places that all share.
        async with of_hook, self._all:
            if row.state == "reserved":
                await self._start(row)
            else:
                await self._ask(row)

    # --- start ----------------------------------------------------------------------------------------------------

    async def _start(self, row: OperationRow) -> None:
        operation = row.operation
        if await self._dropped(operation):
            return
        if not await self._store.mark_sending(operation, self._clock.now()):
            return
        # Once more: the commit took its time, and nothing has been sent yet.
        if await self._dropped(operation):
            return
        self.counts["sent"] += 1
        report = await self._client.send(operation)
        if report.status == "ambiguous" and not operation.dry_run:
            _log.warning("hook.no_answer", operation=operation.id, code=report.code, why=report.detail)
            await self._settle(msgspec.structs.replace(row, since=report.at), report)
        elif report.status == "accepted" and not operation.dry_run:
            await self._tell(report, "asking", self._in(ASK_S, 0))
        else:
            await self._tell(report, None)

    async def _dropped(self, operation: Operation) -> bool:
        """Whether it is not to be sent any more; then that is told. Certain: nothing was sent."""
        now = self._clock.now()
        if now >= operation.deadline:
            code, detail = "deadline", "its deadline passed before it was sent"
        elif not self._wanted(operation):
            code, detail = "not_wanted", "cancelled or stopped before it was sent"
        else:
            return False
        self.counts["dropped"] += 1
        await self._tell(told(operation, now, "cancelled", code, detail), None)
        return True

    # --- status ---------------------------------------------------------------------------------------------------

    async def _ask(self, row: OperationRow) -> None:
        """What became of a request that was taken, or may have been."""
        if row.operation.dry_run:
            # Killed while a dry run was out: it changed nothing, and nobody heard its answer.
            await self._tell(told(row.operation, self._clock.now(), "not_reached", "dry_run_lost"), None)
            return
        await self._settle(row)

    async def _settle(self, row: OperationRow, lost: OperationReport | None = None) -> None:
        """Asks once, and tells what is news. `lost`: how the answer to the request itself got lost, just now."""
        operation = row.operation
        self.counts["asked"] += 1
        report = await self._client.ask(operation)
        now = report.at
        if report.status not in ("accepted", "ambiguous", "not_reached"):
            await self._tell(report, None)
        elif now >= max(operation.deadline, row.since) + self._settings.ask_for_s:
            await self._stop_asking(row, now)
        elif report.status == row.told or (report.status == "not_reached" and row.told):
            await self._put_off(row, "asking")
        elif report.status == "accepted" or _said_so(report) or row.told == "accepted":
            await self._tell(report, "asking", self._in(ASK_S, row.tries))
        elif now < row.since + self._settings.settle_s:
            await self._put_off(row, "asking")
        else:
            last = lost or report
            await self._tell(
                unknown(operation, now, last.code, last.detail), "asking", self._in(ASK_S, row.tries)
            )

    async def _stop_asking(self, row: OperationRow, now: float) -> None:
        if row.told == "ambiguous":
            await self._store.put_off(row.operation, None, now)
        else:
            detail = "no terminal status, also long after its deadline"
            await self._tell(unknown(row.operation, now, "no_status", detail), None)

    # --- cancel, undo ---------------------------------------------------------------------------------------------

    async def _recover(self, row: OperationRow) -> None:
        """Sends a cancel or an undo, as often as it takes to know: the hook does it once."""
        operation = row.operation
        now = self._clock.now()
        if operation.verb == "cancel" and not row.started:
            await self._tell(told(operation, now, "cancelled", "not_sent", "its start was never sent"), None)
            return
        if row.state == "reserved" and not await self._store.mark_sending(operation, now):
            return
        self.counts["sent"] += 1
        await self._recovered(row, await self._client.send(operation))

    async def _ask_recovery(self, row: OperationRow) -> None:
        self.counts["asked"] += 1
        report = await self._client.ask(row.operation)
        waits = report.status == "not_reached" or report.status == row.told == "accepted"
        if waits and not self._over(row, report.at):
            await self._put_off(row, "asking")
        elif waits:
            await self._tell(
                unknown(row.operation, report.at, "no_status", "accepted, and never ended"), None
            )
        else:
            await self._recovered(row, report)

    async def _recovered(self, row: OperationRow, report: OperationReport) -> None:
        if report.status == "accepted":
            await self._tell(report, "asking", self._in(ASK_S, 0))
        elif report.status != "ambiguous":
            await self._tell(report, None)
        elif self._over(row, report.at):
            await self._tell(unknown(row.operation, report.at, report.code, report.detail), None)
        elif row.tries < QUIET_TRIES or row.told == "ambiguous":
            await self._put_off(row, "reserved")
        else:
            # A hiccup is nobody's news; one that lasts is.
            await self._tell(report, "reserved", self._in(REPEAT_S, row.tries))

    def _over(self, row: OperationRow, now: float) -> bool:
        return row.since > 0 and now >= row.since + self._settings.repeat_for_s

    # --- store ----------------------------------------------------------------------------------------------------

    async def _put_off(self, row: OperationRow, state: State) -> None:
        waits = ASK_S if state == "asking" else REPEAT_S
        await self._store.put_off(row.operation, state, self._in(waits, row.tries))

    async def _tell(self, report: OperationReport, state: State | None, at: float = 0.0) -> None:
        self.counts[report.status] += 1
        _log.info(
            "hook.report",
            operation=report.id,
            verb=report.verb,
            attempt=report.attempt,
            status=report.status,
            code=report.code,
        )
        await self._store.reported(report, state, at)

    def _in(self, waits: Sequence[float], tries: int) -> float:
        return self._clock.now() + waits[min(tries, len(waits) - 1)] * (1 + JITTER * self._rng.random())


def _said_so(report: OperationReport) -> bool:
    """Whether `ambiguous` is the hook's own answer, and not that it has never heard of the operation."""
    return report.status == "ambiguous" and report.code != "not_known"
