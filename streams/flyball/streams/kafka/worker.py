"""The Faust application that hosts the roles of a worker.

Faust gives the life of the process: services that start, stop and fail together. Records do not pass through its streams, but through the roles' own
loops; nor does anything use its tables, windows, `concurrency`, `take` or `exactly_once`: docs/adr/0007 lists why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import faust
import faust.app.base
import structlog

from flyball.core.errors import FlyballError
from flyball.streams.kafka.config import KafkaConfig

Role = Callable[[asyncio.Event], Awaitable[None]]
"""Runs until the event is set; raises what ends the process."""

_STOP_S = 30.0
_log = structlog.get_logger(__name__)


class _OwnClients(faust.app.base.BootStrategy):
    """The roles bring their clients; Faust's own consumer would join a group and start tables that nobody uses."""

    enable_kafka = False


class _App(faust.App):
    """Starts the roles with the application. `App.service` would wait for tables to be recovered, of which there are none."""

    BootStrategy = _OwnClients
    roles: Sequence[faust.Service] = ()

    def on_init_dependencies(self) -> Iterable[faust.Service]:
        own: Iterable[Any] = super().on_init_dependencies()
        return [*own, *self.roles]

    async def on_first_start(self) -> None:
        """Without tables no folder for them: a worker's file system may be read-only."""


class _Hosted(faust.Service):
    """One role's loop."""

    def __init__(self, name: str, role: Role, ended: Callable[[str, asyncio.Task[None]], None]) -> None:
        self._name, self._role, self._told = name, role, ended
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        super().__init__(loop=asyncio.get_running_loop())

    async def on_start(self) -> None:
        self._task = asyncio.ensure_future(self._role(self._stop))
        self._task.add_done_callback(lambda task: self._told(self._name, task))

    async def on_stop(self) -> None:
        self._stop.set()
        if self._task is not None:
            _, late = await asyncio.wait([self._task], timeout=_STOP_S)
            if late:
                _log.warning("role.cancelled", role=self._name, after_s=_STOP_S)
                self._task.cancel()
                await asyncio.wait([self._task], timeout=_STOP_S)


class Worker:
    """Runs roles until one ends or `stop` is called."""

    def __init__(self, config: KafkaConfig, roles: Mapping[str, Role]) -> None:
        self.failure: BaseException | None = None
        self._over = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.app = _App(
            config.group("worker"), **config.for_faust(), autodiscover=False, web_enabled=False, topic_allow_declare=False,
            topic_disable_leader=True, store="memory://", loop=self._loop,
        )  # fmt: skip
        self.app.roles = [_Hosted(name, role, self._ended) for name, role in roles.items()]

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        why = None if task.cancelled() else task.exception()
        if why is not None:
            self.failure = self.failure or why
            if not isinstance(why, FlyballError):  # which whoever runs this tells people
                _log.error("role.ended", role=name, why=repr(why))
        self._over.set()

    def stop(self) -> None:
        """From any thread: the roles finish what they are at, and leave their groups."""
        self._loop.call_soon_threadsafe(self._over.set)

    async def run(self) -> None:
        """Raises: what a role raised."""
        await self.app.start()
        try:
            await self._over.wait()
        finally:
            await self.app.stop()
        if self.failure is not None:
            raise self.failure


__all__ = ["Role", "Worker"]
