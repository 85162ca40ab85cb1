"""`flyball worker`: roles on Kafka, from start to a stop that leaves the groups.

`windows` shares the partitions of the source topics with all its like. `control` (with `detect`, see docs/adr/0005) is one at a time, the others of
its like stand by; see `control`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Final

import structlog
import uvicorn
from prometheus_client.registry import Collector

from flyball.app.clock import SystemClock
from flyball.app.control import Control, look_before
from flyball.app.http.worker import WINDOWS_FIGURES, Site, create_worker_app
from flyball.app.kafka_ingest import KafkaIngest
from flyball.app.kafka_windows import make_windows_role
from flyball.app.logs import configure_logging
from flyball.app.metrics import FigureCollector
from flyball.app.outputs import WRITTEN as PUBLISHED
from flyball.app.serve import GRACE_S, Server, calm_interpreter, listen
from flyball.app.settings import Settings, unknown_variables
from flyball.app.store.database import Database
from flyball.app.wiring import hash_key, make_formats
from flyball.app.writer import Limits
from flyball.core.errors import ConfigError, FlyballError, did_you_mean
from flyball.streams.kafka.admin import require_cluster, wanted
from flyball.streams.kafka.client import KafkaError
from flyball.streams.kafka.producer import WRITTEN as INGESTED
from flyball.streams.kafka.topics import TAKEN_IN
from flyball.streams.kafka.windows_role import WindowsRole
from flyball.streams.kafka.worker import Role, Worker

ROLES: Final = ("windows", "detect", "control")
_WINDOWS: Final = (*TAKEN_IN, "windows", "state", "late", "dead-letters")
_CONTROL: Final = (*INGESTED, "windows", *PUBLISHED)
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
        raise ConfigError("detect and control go together; write detect,control", where="roles")
    return found or frozenset(ROLES)


def work(settings: Settings, roles: Collection[str]) -> int:
    """Runs until SIGTERM or Ctrl-C. Returns the exit code.

    Raises: ConfigError when the cluster, the database, the port or a runbook is not as it must be; DatabaseLost.
    """
    configure_logging()
    # The client tells every failed connection, ten times a second while a broker is away; what it means is told by us, once.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    calm_interpreter()
    for told in unknown_variables(os.environ):
        _log.warning("variable.unknown", what=told)
    topics = {
        *(_WINDOWS if "windows" in roles else ()),
        *(_CONTROL if "control" in roles else ()),
    }
    with listen(settings.host, settings.port) as listener:
        for differs in require_cluster(
            settings.kafka.config(), wanted(settings.kafka.partitions, sorted(topics))
        ):
            _log.warning("kafka.differs", what=str(differs))
        database = look_before(settings) if "control" in roles else None
        return asyncio.run(_work(settings, roles, listener, database))


async def _work(
    settings: Settings, roles: Collection[str], listener: socket.socket, database: Database | None
) -> int:
    config = settings.kafka.config()
    formats = make_formats(settings, hash_key(settings))
    hosted: dict[str, Role] = {}
    windows: WindowsRole | None = None
    if "windows" in roles:
        windows = make_windows_role(config, settings, formats)
        hosted["windows"] = windows.run

    def metrics() -> Iterable[Collector]:
        return [] if windows is None else [FigureCollector(windows.figures(), WINDOWS_FIGURES)]

    def joined() -> bool:
        return windows is not None and windows.figures().rebalances > 0

    control: Control | None = None
    intake: KafkaIngest | None = None
    site = Site(create_worker_app(settings, joined, metrics))
    if "control" in roles:
        intake = KafkaIngest(config, SystemClock(), Limits(settings.limits.pending_bytes))
        control = Control(settings, intake, formats, site, database, metrics)
        hosted["control"] = control.run
    serving = _Serving(site, listener, intake)
    hosted["http"] = serving.run
    worker = Worker(config, hosted)
    if intake is not None:
        intake.on_failure(worker.stop)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.stop)
    url = f"http://{settings.host}:{listener.getsockname()[1]}"
    _log.info("started", url=url, roles=sorted(roles), kafka=config.bootstrap)
    failure: BaseException | None = None
    try:
        await worker.run()
    except (FlyballError, KafkaError) as e:
        failure = e
    for number in (signal.SIGTERM, signal.SIGINT):
        # A second one ends the draining; what is in the log then waits for the next start.
        loop.remove_signal_handler(number)
    drained = await asyncio.to_thread(control.close) if control is not None else True
    _log.info("stopped", drained=drained and serving.drained)
    failure = (intake.failure if intake is not None else None) or failure
    if failure is not None:
        print(f"flyball: stopped by {type(failure).__name__}: {failure}", file=sys.stderr)
        return 1
    return 0 if drained and serving.drained else 1


class _Serving:
    """The server, and the way into Kafka that its ingest uses, for as long as it serves."""

    def __init__(self, site: Site, listener: socket.socket, intake: KafkaIngest | None) -> None:
        self._site, self._listener, self._intake = site, listener, intake
        self.drained = True

    async def run(self, stop: asyncio.Event) -> None:
        """Raises: ConfigError when the brokers have gone since they were looked at."""
        config = uvicorn.Config(
            self._site, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=GRACE_S
        )  # fmt: skip
        server = _Quiet(config, lambda: self._site.closing())
        if self._intake is not None:
            await self._intake.start()
        ending = asyncio.create_task(_end(stop, server))
        try:
            await server.serve(sockets=[self._listener])
        finally:
            ending.cancel()
            if self._intake is not None:
                self.drained = await self._intake.stop(GRACE_S)


async def _end(stop: asyncio.Event, server: Server) -> None:
    await stop.wait()
    server.should_exit = True


class _Quiet(Server):
    """Leaves signals to the worker: the roles stop together."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


__all__ = ["ROLES", "roles_of", "work"]
