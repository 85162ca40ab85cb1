"""The HTTP interface of a process that only takes telemetry in: ingest, health, metrics, totals. The rest is the control role's.

With a database given, incidents and the ledger can be read here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from prometheus_client.registry import Collector
from sqlalchemy import Connection

from flyball.app.http import history, ingest
from flyball.app.http.answers import json_response
from flyball.app.http.auth import Auth
from flyball.app.http.read import assemble_status
from flyball.app.http.server import Background, assemble
from flyball.app.kafka_ingest import KafkaIngest
from flyball.app.metrics import Figure, FigureCollector, page
from flyball.app.settings import Settings
from flyball.app.store.database import reading
from flyball.app.store.owner import DatabaseLost
from flyball.core.errors import ConfigError
from flyball.core.ports import Format

CONTROLS: Final = (
    "incidents", "directives", "enforced", "dead-letters", "approvals", "stops", "runbooks", "ledger", "operations", "slack",
)  # fmt: skip
"""First parts of the paths under /v1 that the control role serves."""
ELSEWHERE: Final = (
    "served where the database is: ask a process with the control role (`flyball worker --roles control`)"
)


def create_ingest_app(
    intake: KafkaIngest,
    formats: Mapping[str, Format],
    settings: Settings,
    background: Background | None = None,
) -> FastAPI:
    auth = Auth(settings.tokens)
    shown = health(
        auth,
        lambda: intake.failure,
        lambda: {"ready": intake.ready},
        lambda: [FigureCollector(intake, INGEST_FIGURES)],
        lambda: status(intake),
    )
    return assemble([*taking(intake, formats, settings, auth), shown, elsewhere()], background)


def taking(
    intake: KafkaIngest, formats: Mapping[str, Format], settings: Settings, auth: Auth
) -> list[APIRouter]:
    """The ways in, and what can be read without owning the database."""
    ways_in = ingest.router(ingest.Ingest(intake, intake.encode, formats, settings, auth))
    database = settings.database.get_secret_value()
    return [ways_in, history.router(partial(_beside, database), auth)] if database else [ways_in]


def health(
    auth: Auth,
    failure: Callable[[], BaseException | None],
    ready: Callable[[], dict[str, Any]],
    metrics: Callable[[], Iterable[Collector]],
    status: Callable[[], dict[str, Any]],
) -> APIRouter:
    """What every process shows of itself.

    Args:
        ready: what `/readyz` says; 503 unless its `ready` is true.
    """
    r = APIRouter()

    @r.get("/healthz", summary="200 while the process works; 500 when a part of it has died")
    async def healthz() -> Response:
        why = failure()
        if why is not None:
            return json_response({"status": "failed", "why": str(why)}, 500)
        return json_response({"status": "ok"})

    @r.get("/readyz", summary="200 while this process does what it is there for")
    async def readyz() -> Response:
        found = ready()
        return json_response(found, 200 if found["ready"] else 503)

    @r.get("/metrics", summary="Prometheus metrics")
    async def get_metrics(request: Request) -> Response:
        auth.check(request, "read")
        return Response(page(metrics()), media_type="text/plain; version=0.0.4; charset=utf-8")

    @r.get("/v1/status", summary="Totals since the start of this process")
    async def get_status(request: Request) -> Response:
        auth.check(request, "read")
        return json_response(status())

    return r


@contextmanager
def _beside(database: str) -> Iterator[Connection]:
    """A connection to a database that somebody else owns; 503 while it cannot be had."""
    try:
        with reading(database) as c:
            yield c
    except (DatabaseLost, ConfigError) as e:
        raise HTTPException(503, str(e)) from e


def elsewhere() -> APIRouter:
    """503 for what is served by the control role, so that a client that was given the wrong address is told."""
    r = APIRouter(include_in_schema=False)
    methods = ["GET", "POST"]

    async def not_here(request: Request) -> Response:
        return json_response({"error": f"{request.url.path} is {ELSEWHERE}"}, 503)

    for name in CONTROLS:
        r.add_api_route(f"/v1/{name}", not_here, methods=methods)
        r.add_api_route(f"/v1/{name}/{{rest:path}}", not_here, methods=methods)
    return r


def status(intake: KafkaIngest) -> dict[str, Any]:
    """In the shape of the whole; what only the control role knows is zero. `events` counts what was acknowledged, copies included."""
    totals = assemble_status(
        {"events": dict(intake.events)}, dict(intake.rejected), {}, 0, 0.0, intake.pending_bytes, 0, 0, []
    )
    return totals | {"role": "ingest", "ready": intake.ready, "kafka": written(intake)}


def written(intake: KafkaIngest) -> dict[str, Any]:
    """What was written to Kafka since the start of this process."""
    p = intake.producer
    return {
        "address": intake.config.bootstrap,
        "reachable": p.reachable,
        "records": p.acknowledged_records,
        "bytes": p.acknowledged_bytes,
        "pending_bytes": intake.pending_bytes,
        "unacknowledged_bodies": intake.unacknowledged,
    }


KAFKA_FIGURES: Final[tuple[Figure[KafkaIngest], ...]] = (
    Figure("flyball_kafka_written_records", "Records that Kafka has acknowledged.", lambda i: i.producer.acknowledged_records),
    Figure("flyball_kafka_written_bytes", "Their bytes before compression.", lambda i: i.producer.acknowledged_bytes),
    Figure("flyball_kafka_refused_records", "Records that Kafka has refused.", lambda i: i.producer.refused_records),
    Figure("flyball_kafka_unacknowledged_bodies", "Bodies whose senders were told that they were not acknowledged.", lambda i: i.unacknowledged),
    Figure("flyball_kafka_reachable", "1 while a broker answers.", lambda i: i.producer.reachable, "gauge"),
    Figure("flyball_kafka_pending_bytes", "Bytes of bodies that are being read or are not acknowledged.", lambda i: i.pending_bytes, "gauge"),
)  # fmt: skip
"""What ingest that writes to Kafka adds, wherever it is hosted."""

INGEST_FIGURES: Final[tuple[Figure[KafkaIngest], ...]] = (
    Figure("flyball_received_events", "Events that Kafka has acknowledged, copies included.", lambda i: i.received, label="format"),
    Figure("flyball_rejected_events", "Events that could not be taken; they are in the dead letters.", lambda i: i.rejected, label="reason"),
    *KAFKA_FIGURES,
)  # fmt: skip
"""Everything that `/metrics` of a process that only ingests shows."""
