"""Remediation hooks on the runtime's database: the durable queue, the kill switch before each start, and the hooks' own word."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any

import structlog

from flyball.app.embedded import Embedded
from flyball.app.settings import Settings
from flyball.app.store import operations
from flyball.core.directives import Operation, OperationReport
from flyball.remediation.hooks import Dispatcher, HookClient, OperationRow, hooks_client, is_terminal
from flyball.remediation.hooks.dispatcher import State

_log = structlog.get_logger(__name__)


class StoredOperations:
    """The dispatcher's queue. A report and what it means for its row are one transaction: the executor hears each once."""

    def __init__(self, runtime: Embedded) -> None:
        self._runtime = runtime

    async def due(self, now: float, limit: int) -> Sequence[OperationRow]:
        with self._runtime.reader.connect() as c:
            return operations.due_operations(c, now, limit)

    async def mark_sending(self, operation: Operation, at: float) -> bool:
        marked: list[bool] = []
        await self._write(lambda c: marked.append(operations.mark_sending(c, operation, at)))
        return marked == [True]

    async def put_off(self, operation: Operation, state: State | None, at: float) -> None:
        await self._write(partial(operations.put_off, operation=operation, state=state, at=at))

    async def reported(self, report: OperationReport, state: State | None, at: float = 0.0) -> None:
        note = partial(operations.note_report, report=report, state=state, at=at)
        await asyncio.wrap_future(self._runtime.order(report, also=note))

    async def _write(self, work: Callable[[Any], object]) -> None:
        await asyncio.wrap_future(self._runtime.write(work))


def wanted(runtime: Embedded, operation: Operation) -> bool:
    """Whether a start may be sent now: not stopped, by the switch that is ahead of the stages, nor taken back by them."""
    stop = runtime.switchboard.stop_of(operation)
    if stop is not None:
        _log.warning("hook.stopped", operation=operation.id, scope=stop.scope, by=stop.by)
    return stop is None and operation.id in runtime.figures.wanted


async def called_back(runtime: Embedded, report: OperationReport) -> None:
    """A hook's own word about an operation. Where it is the last one, nobody asks it any more."""
    now = runtime.clock.now()
    state: State | None = None if is_terminal(report.status) else "asking"
    note = partial(operations.note_report, report=report, state=state, at=now)
    await asyncio.wrap_future(runtime.order(report, also=note))


def dispatching(runtime: Embedded, settings: Settings) -> Iterator[Coroutine[None, None, None]]:
    """The dispatcher. Also without a hook in the settings: what runbooks ask of one is then refused, not left lying."""
    yield _dispatch(runtime, settings)


async def _dispatch(runtime: Embedded, settings: Settings) -> None:
    async with hooks_client(settings.hooks) as client:
        dispatcher = Dispatcher(
            StoredOperations(runtime),
            HookClient(settings.hooks, client, runtime.clock),
            partial(wanted, runtime),
            clock=runtime.clock,
            rng=random.Random(),
        )
        await dispatcher.run(asyncio.Event())
