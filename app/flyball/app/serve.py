"""`flyball run`: the server, the ticks, the scrapes and the notifications, from start to a drained stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import structlog
import uvicorn

from flyball.app.clock import SystemClock, monotonic
from flyball.app.embedded import Embedded, Limits, Publish, Retention, Stopped
from flyball.app.hooks import dispatching
from flyball.app.http.server import create_app
from flyball.app.intake import Intake
from flyball.app.logs import configure_logging
from flyball.app.notify import AlertRouter, notifications
from flyball.app.reload import RunbookWatch
from flyball.app.scrape import scrapes
from flyball.app.settings import Settings, unknown_variables
from flyball.app.store.database import Database
from flyball.app.wiring import database_of, hash_key, make_formats, make_pipeline
from flyball.core.errors import ConfigError, FlyballError

_TICK_S: Final = 1.0
_TRIM_S: Final = 60.0
GRACE_S: Final = 10
"""Seconds that requests may take to end once the process is told to stop."""
SWITCH_INTERVAL_S: Final = 0.002
"""Python's is 5 ms. Shorter, and the threads spend their time handing over; longer, and answers wait while windows close."""
_log = structlog.get_logger(__name__)


def make_runtime(
    settings: Settings, database: Database | None = None, publish: Publish | None = None
) -> Embedded:
    """Args:
        database: where this process owns it already.
        publish: as of `Embedded`.

    Raises: ConfigError when a runbook, the data folder or the database is not as it should be; DatabaseLost when it does not answer.
    """
    limits, kept = settings.limits, settings.retention
    return Embedded(
        lambda: make_pipeline(settings, monotonic),
        database or database_of(settings),
        SystemClock(),
        alerts=AlertRouter(settings.notify),
        publish=publish,
        limits=Limits(limits.pending_bytes, limits.backlog_bytes, limits.memory_events),
        retention=Retention(kept.log_s, kept.log_bytes, kept.dead_letters_s, kept.dead_letters_bytes),
        snapshot_every_s=settings.snapshot_every_s,
        synchronous=settings.synchronous,
    )


def serve(settings: Settings) -> int:
    """Runs until SIGTERM or Ctrl-C; with Kafka, writes to its topics. Returns the exit code: 0 when everything taken was also processed.

    Raises: ConfigError when the port is taken, the data folder cannot be used, or a runbook is refused.
    """
    if settings.kafka.bootstrap:
        from flyball.streams.kafka import require_clients

        require_clients()
        from flyball.app.serve_ingest import serve_ingest

        return serve_ingest(settings)
    configure_logging()
    calm_interpreter()
    for told in unknown_variables(os.environ):
        _log.warning("variable.unknown", what=told)
    listener = listen(settings.host, settings.port)
    try:
        runtime = make_runtime(settings)
    except FlyballError:
        listener.close()
        raise
    formats = make_formats(settings, hash_key(settings))
    runtime.start()
    watch = RunbookWatch(runtime, settings)
    background = Background(runtime, settings, watch)
    app = create_app(runtime, formats, settings, background.run, watch)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=GRACE_S
    )
    server = Server(config, runtime.board.close)
    runtime.on_failure = background.on_failure = partial(setattr, server, "should_exit", True)
    port = listener.getsockname()[1]
    _log.info(
        "started", url=f"http://{settings.host}:{port}", data=str(settings.data), database=runtime.database.name, mode=settings.mode,
        position=runtime.position,
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    drained = runtime.stop()
    _log.info("stopped", drained=drained, position=runtime.position)
    failure = runtime.failure or background.failure
    if failure is not None:
        print(f"flyball: stopped by {type(failure).__name__}: {failure}", file=sys.stderr)
        return 1
    return 0 if drained and server.started else 1


def calm_interpreter() -> None:
    """Sets up this process for answers that wait for busy threads: they take turns more often, and Python looks for cycles less often.
    Records and the labels of a million series are objects by the million, none in a cycle; walking over them stops every thread, and took a
    quarter of the time in which a window with new series is judged."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def listen(host: str, port: int) -> socket.socket:
    """The socket, before anything else is touched. Raises: ConfigError when the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except OSError as e:
        raise ConfigError(f"{host!r} is no address of this machine ({e.strerror})", where="host") from e
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as e:
        listener.close()
        if e.errno == errno.EADDRINUSE:
            what = f"{port} is taken on {host}; stop what listens there, or set another port"
            raise ConfigError(what, where="port") from e
        raise ConfigError(f"cannot listen on {host}:{port} ({e.strerror})", where="host") from e
    return listener


class Server(uvicorn.Server):
    """Stops on SIGTERM and Ctrl-C and then *returns*, so that the runtime is drained; uvicorn's own would raise the signal again.

    Args:
        stopping: called as soon as it is told to stop: lets go of long polls, and of what else requests wait for.
    """

    def __init__(self, config: uvicorn.Config, stopping: Callable[[], None] | None = None) -> None:
        super().__init__(config)
        self._stopping = stopping or _nothing

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            # A second Ctrl-C ends the draining; what is in the log then waits for the next start.
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping()
        await super().shutdown(sockets)


class Background:
    """Ticks, retention, scrapes, runbooks, hooks and notifications beside the server.

    `on_failure` is called when one of them ends by an error: `failure`. The process should then end too.

    Args:
        now: the time of the next tick, None for none; default is what the clock says.
        intake: where scrapes go to; default is the runtime.
    """

    def __init__(
        self, runtime: Embedded, settings: Settings, watch: RunbookWatch | None = None,
        now: Callable[[], float | None] | None = None, intake: Intake[Any] | None = None,
    ) -> None:  # fmt: skip
        self._runtime, self._settings = runtime, settings
        self._now, self._intake = now or runtime.clock.now, intake or runtime
        self._watch = watch or RunbookWatch(runtime, settings)
        self.on_failure: Callable[[], None] = _nothing
        self.failure: BaseException | None = None

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        await self._watch.look()  # the runbooks that count stand in the log before the first event
        works = [
            self._ticks(),
            self._watch.run(),
            *notifications(self._runtime, self._settings),
            *dispatching(self._runtime, self._settings),
            *scrapes(self._intake, self._settings),
        ]
        tasks = [asyncio.create_task(work) for work in works]
        for task in tasks:
            task.add_done_callback(self._ended)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            return
        why = task.exception()
        self.failure = self.failure or why
        if not isinstance(why, Stopped):  # what ended the runtime is told by it
            _log.error("background.stopped", why=repr(why), exc_info=why)
        self.on_failure()

    async def _ticks(self) -> None:
        rounds = 0
        while True:
            await asyncio.sleep(_TICK_S)
            now = self._now()
            if now is not None:
                # An unanswered tick means that the writer is behind; more of them would only make it later.
                await asyncio.wrap_future(self._runtime.tick(now))
            rounds += 1
            if rounds % int(_TRIM_S / _TICK_S) == 0:
                self._runtime.trim()


def _nothing() -> None:
    """Until somebody wants to hear of a failure."""
