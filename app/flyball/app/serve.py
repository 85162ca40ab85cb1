"""`flyball run`: the server, the ticks, the scrapes and the notifications, from start to a drained stop."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import structlog
import uvicorn

from flyball.app.clock import SystemClock, monotonic
from flyball.app.embedded import Embedded, Limits, Overloaded, Retention
from flyball.app.http.server import create_app
from flyball.app.logs import configure_logging
from flyball.app.notify import AlertRouter, notifications
from flyball.app.scrape import scrapes
from flyball.app.settings import Settings
from flyball.app.wiring import database_path, hash_key, make_formats, make_pipeline

_TICK_S: Final = 1.0
_TRIM_S: Final = 60.0
_log = structlog.get_logger(__name__)


def make_runtime(settings: Settings) -> Embedded:
    """Raises: ConfigError when a runbook, the data folder or the database is not as it should be."""
    limits, kept = settings.limits, settings.retention
    return Embedded(
        lambda: make_pipeline(settings, monotonic),
        database_path(settings.data),
        SystemClock(),
        alerts=AlertRouter(settings.notify),
        limits=Limits(limits.pending_bytes, limits.backlog_bytes, limits.memory_events),
        retention=Retention(kept.log_s, kept.log_bytes, kept.dead_letters_s),
        snapshot_every_s=settings.snapshot_every_s,
        synchronous=settings.synchronous,
    )


def serve(settings: Settings) -> int:
    """Runs until SIGTERM or Ctrl-C. Returns the exit code: 0 when everything taken was also processed."""
    configure_logging()
    # Ingest shares the interpreter with the stages: a shorter turn keeps answers quick while windows close.
    sys.setswitchinterval(0.001)
    runtime = make_runtime(settings)
    formats = make_formats(settings, hash_key(settings))
    runtime.start()
    background = Background(runtime, settings)
    app = create_app(runtime, formats, settings, background.run)
    server = uvicorn.Server(
        uvicorn.Config(
            app, host=settings.host, port=settings.port, log_level="warning", access_log=False, lifespan="on"
        )
    )
    background.on_failure = partial(setattr, server, "should_exit", True)
    _log.info(
        "started", url=f"http://{settings.host}:{settings.port}", data=str(settings.data), mode=settings.mode,
        position=runtime.position,
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    drained = runtime.stop()
    _log.info("stopped", drained=drained, position=runtime.position)
    if runtime.failure is not None:
        print(f"flyball: stopped by {runtime.failure!r}", file=sys.stderr)
        return 1
    return 0 if drained and server.started else 1


class Background:
    """Ticks, retention, scrapes and notifications beside the server."""

    def __init__(self, runtime: Embedded, settings: Settings) -> None:
        self._runtime, self._settings = runtime, settings
        self.on_failure: Callable[[], None] = _nothing

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:

        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._ticks()),
                *(group.create_task(c) for c in notifications(self._runtime, self._settings)),
                *(group.create_task(c) for c in scrapes(self._runtime, self._settings)),
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()

    async def _ticks(self) -> None:
        rounds = 0
        while True:
            await asyncio.sleep(_TICK_S)
            if self._runtime.failure is not None:
                self.on_failure()
                return
            # An unanswered tick means that the writer is behind; more of them would only make it later.
            with contextlib.suppress(Overloaded):
                await asyncio.wrap_future(self._runtime.tick())
            rounds += 1
            if rounds % int(_TRIM_S / _TICK_S) == 0:
                self._runtime.trim()


def _nothing() -> None:
    """Until somebody wants to hear of a failure."""
