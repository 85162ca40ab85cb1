"""`flyball worker`: roles on Kafka, from start to a stop that leaves the groups.

`windows` shares the partitions of the source topics with all its like. `control` (with `detect`, see docs/adr/0005) is one at a time: it owns the
database, reads `flyball.windows` from where the database says, and is otherwise `flyball run`: the same log, stages and HTTP interfaces.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Collection, Mapping
from functools import partial
from typing import Final

import structlog
import uvicorn

from flyball.app.embedded import Embedded
from flyball.app.http.server import create_app
from flyball.app.logs import configure_logging
from flyball.app.reload import RunbookWatch
from flyball.app.serve import GRACE_S, SWITCH_INTERVAL_S, Background, Server, listen, make_runtime
from flyball.app.settings import Settings, unknown_variables
from flyball.app.wiring import hash_key, make_formats, pipeline_config
from flyball.core.errors import ConfigError, did_you_mean
from flyball.core.ports import Decoded, Format
from flyball.streams.kafka.admin import require_cluster, wanted
from flyball.streams.kafka.client import TopicReader
from flyball.streams.kafka.windows_role import Decode, WindowsRole
from flyball.streams.kafka.worker import Role, Worker
from flyball.streams.portion import PortionError, decode_portion

ROLES: Final = ("windows", "detect", "control")
_TOPICS: Final = ("llm-calls", "agent-steps", "gpu-samples", "changes", "windows", "state", "dead-letters")
_MOST: Final = 500
_COMMIT_S: Final = 5.0
_log = structlog.get_logger(__name__)


def roles_of(text: str) -> frozenset[str]:
    """Raises: ConfigError for a word that is no role.

    >>> sorted(roles_of("control, detect"))
    ['control', 'detect']
    """
    found = frozenset(filter(None, (part.strip() for part in text.split(","))))
    for name in sorted(found - set(ROLES)):
        raise ConfigError(f"no role is {name!r}{did_you_mean(name, ROLES)}", where="roles")
    if "detect" in found and "control" not in found:
        raise ConfigError("detect and control go together for now; write detect,control", where="roles")
    return found or frozenset(ROLES)


def work(settings: Settings, roles: Collection[str]) -> int:
    """Runs until SIGTERM or Ctrl-C. Returns the exit code.

    Raises: ConfigError when the cluster, the database, the port or a runbook is not as it must be; Stuck.
    """
    configure_logging()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    for told in unknown_variables(os.environ):
        _log.warning("variable.unknown", what=told)
    for differs in require_cluster(settings.kafka.config(), wanted(settings.kafka.partitions, _TOPICS)):
        _log.warning("kafka.differs", what=str(differs))
    if "control" not in roles:
        return asyncio.run(_work(settings, roles, None, None))
    with listen(settings.host, settings.port) as listener:
        runtime = make_runtime(settings)
        runtime.start()
        code = 1
        try:
            code = asyncio.run(_work(settings, roles, runtime, listener))
        finally:
            drained = runtime.stop()
        if runtime.failure is not None:
            print(f"flyball: stopped by {type(runtime.failure).__name__}: {runtime.failure}", file=sys.stderr)
            return 1
        return code if drained else 1


async def _work(
    settings: Settings, roles: Collection[str], runtime: Embedded | None, listener: socket.socket | None
) -> int:
    config = settings.kafka.config()
    formats = make_formats(settings, hash_key(settings))
    hosted: dict[str, Role] = {}
    if "windows" in roles:
        windows = pipeline_config(settings).windows
        hosted["windows"] = WindowsRole(config, decoder(settings, formats), windows).run
    if runtime is not None and listener is not None:
        control = Control(runtime, TopicReader(config, "windows", "control"))
        hosted["http"] = partial(_serve, settings, runtime, formats, listener, control)
        hosted["control"] = control.run
    worker = Worker(config, hosted)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.stop)
    if runtime is not None:
        runtime.on_failure = worker.stop
    _log.info("started", roles=sorted(roles), kafka=config.bootstrap)
    await worker.run()
    _log.info("stopped")
    return 0


async def _serve(
    settings: Settings, runtime: Embedded, formats: Mapping[str, Format], listener: socket.socket, control: Control,
    stop: asyncio.Event,
) -> None:  # fmt: skip
    watch = RunbookWatch(runtime, settings)
    background = Background(runtime, settings, watch, control.now)
    app = create_app(runtime, formats, settings, background.run, watch)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=GRACE_S
    )
    server = _Quiet(config, runtime.board.close)
    background.on_failure = partial(setattr, server, "should_exit", True)

    async def end() -> None:
        await stop.wait()
        server.should_exit = True

    ending = asyncio.create_task(end())
    try:
        await server.serve(sockets=[listener])
    finally:
        ending.cancel()
    if background.failure is not None:
        raise background.failure


class _Quiet(Server):
    """Leaves signals to the worker: the roles stop together."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


class Control:
    """Takes portions into the runtime's log, each with the offset that comes next, in one transaction."""

    def __init__(self, runtime: Embedded, reader: TopicReader) -> None:
        self._runtime, self._reader = runtime, reader
        self.unreadable = 0
        self._behind: float | None = None
        """Newest arrival among what was read, while there is more to read."""

    def now(self) -> float | None:
        """What time it is for the stages: that of the portions as long as there is a backlog of them, so that going through it again
        finds what it found; None (the clock's) once all is read."""
        return self._behind

    async def run(self, stop: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        await self._reader.start(self._runtime.consumed(self._reader.topic))
        commit_at = loop.time()
        try:
            while not stop.is_set():
                found = await self._reader.read(_MOST, 0.2)
                if not found:
                    self._behind = None
                for place, records in found.items():
                    done = None
                    for record in records:
                        try:
                            portion = decode_portion(record.value or b"")
                        except PortionError as e:
                            self.unreadable += 1
                            _log.error(
                                "portion.unreadable", place=str(place), offset=record.offset, why=str(e)
                            )
                            continue
                        if portion.received_at is not None:
                            self._behind = max(self._behind or 0.0, portion.received_at)
                        done = self._runtime.take_portion(
                            record.value or b"", portion, {(place.topic, place.partition): record.offset + 1}
                        )
                    if done is not None:
                        # Not read further before this is durable: what waits in memory stays small.
                        await asyncio.wrap_future(done)
                    if loop.time() - commit_at > _COMMIT_S:
                        commit_at = loop.time()
                        await self._reader.commit({place: records[-1].offset + 1})
        finally:
            await self._reader.stop()


def decoder(settings: Settings, formats: Mapping[str, Format]) -> Decode:
    """How values of the topics are read: as a record's headers say, else as the settings do."""

    def decode(topic: str, value: bytes, headers: Mapping[str, bytes]) -> Decoded:
        content_type = headers.get("content-type", b"").decode("ascii", "replace")
        kind = headers.get("flyball-format", b"").decode("ascii", "replace")
        if not kind and "protobuf" in content_type:
            kind = "otlp"
        if not kind and content_type.startswith("application/x-ndjson"):
            kind = "native"
        kind = kind or settings.kafka.formats.get(topic, "native")
        return formats[kind if kind in formats else "native"].decode(value, content_type)

    return decode


__all__ = ["ROLES", "decoder", "roles_of", "work"]
