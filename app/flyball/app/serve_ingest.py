"""`flyball run --kafka`: the ingest alone, from start to a stop after the last acknowledgement."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
import uvicorn

from flyball.app.clock import SystemClock
from flyball.app.http.kafka import create_ingest_app
from flyball.app.kafka_ingest import KafkaIngest
from flyball.app.logs import configure_logging
from flyball.app.scrape import scrapes
from flyball.app.serve import GRACE_S, Server, listen
from flyball.app.settings import Settings, unknown_variables
from flyball.app.store.database import reading
from flyball.app.wiring import hash_key, make_formats
from flyball.app.writer import Limits
from flyball.streams.kafka.admin import require_cluster, wanted
from flyball.streams.kafka.producer import WRITTEN

_log = structlog.get_logger(__name__)


def serve_ingest(settings: Settings) -> int:
    """Runs until SIGTERM or Ctrl-C. Returns the exit code: 0 when everything taken was also acknowledged.

    Raises: ConfigError when the port is taken, or cluster or database cannot be used as they are; DatabaseLost.
    """
    configure_logging()
    # The client tells every failed connection, ten times a second while a broker is away; what it means is told by us, once.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    for told in unknown_variables(os.environ):
        _log.warning("variable.unknown", what=told)
    with listen(settings.host, settings.port) as listener:
        for differs in require_cluster(settings.kafka.config(), wanted(settings.kafka.partitions, WRITTEN)):
            _log.warning("kafka.differs", what=str(differs))
        if database := settings.database.get_secret_value():
            with reading(database):
                pass  # what is wrong with it is told now
        return asyncio.run(_serve(settings, listener))


async def _serve(settings: Settings, listener: socket.socket) -> int:
    intake = KafkaIngest(settings.kafka.config(), SystemClock(), Limits(settings.limits.pending_bytes))
    formats = make_formats(settings, hash_key(settings))
    await intake.start()
    app = create_ingest_app(intake, formats, settings, lambda: _scraping(intake, settings))
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=GRACE_S
    )
    server = Server(config)
    intake.on_failure(lambda: setattr(server, "should_exit", True))
    port = listener.getsockname()[1]
    _log.info("started", url=f"http://{settings.host}:{port}", kafka=settings.kafka.bootstrap)
    with contextlib.suppress(KeyboardInterrupt):
        await server.serve(sockets=[listener])
    drained = await intake.stop(GRACE_S)
    _log.info("stopped", drained=drained, events=sum(intake.events.values()))
    if intake.failure is not None:
        print(f"flyball: stopped by {type(intake.failure).__name__}: {intake.failure}", file=sys.stderr)
        return 1
    return 0 if drained and server.started else 1


@asynccontextmanager
async def _scraping(intake: KafkaIngest, settings: Settings) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(work) for work in scrapes(intake, settings)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
