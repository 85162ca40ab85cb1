"""What people and enforcement points read: status, incidents, directives, dead letters, metrics."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from flyball.app import views
from flyball.app.embedded import Embedded
from flyball.app.http.answers import json_response
from flyball.app.http.auth import Auth
from flyball.app.intake import Edge
from flyball.app.metrics import exposition
from flyball.app.reload import RunbookWatch
from flyball.app.store import acts, store
from flyball.core.directives import Enforced


class EnforcedBody(BaseModel):
    """What an enforcement point holds in force."""

    point: str = Field(min_length=1, max_length=200)
    directives: dict[str, int] = Field(
        max_length=10_000, description="Directive id → calls it was applied to since the last report."
    )


def status(
    runtime: Embedded, watch: RunbookWatch | None = None, edge: Edge[Any] | None = None
) -> dict[str, Any]:
    """The totals that `flyball status --json` and `GET /v1/status` show.

    Args:
        watch: of the runbooks' files, for what is wrong with them.
        edge: the way in, where that is not the runtime itself.
    """
    with runtime.reader.connect() as c:
        incidents = store.incident_counts(c)
    rejected = runtime.rejected if edge is None else runtime.rejected + edge.rejected
    return (
        assemble_status(
            runtime.figures.totals,
            dict(rejected),
            incidents,
            runtime.position,
            *runtime.lag(),
            len(runtime.board.read()[1]),
            runtime.faults,
            [s.scope for s in runtime.switchboard.stops.live.values()],
        )
        | {
            "clock_skew": runtime.figures.clock_skew_s,
            "ready": runtime.ready,
            "waiting": len(runtime.figures.waiting),
            "left_out_why": _newest_left_out(runtime),
            "runbooks_refused": watch.refused if watch is not None else [],
        }
        | (edge.status() if edge is not None else {})
    )


def _newest_left_out(runtime: Embedded) -> str:
    with runtime.reader.connect() as c:
        return acts.newest_skipped(c)


def assemble_status(
    counters: dict[str, Any],
    rejected: dict[str, int],
    incidents: dict[str, int],
    position: int,
    lag_s: float,
    lag_bytes: int,
    live_directives: int,
    left_out: int,
    stopped: list[str],
) -> dict[str, Any]:
    return {
        "events": counters.get("events", {}),
        "rejected": rejected,
        "duplicates": counters.get("duplicates", 0),
        "late": counters.get("late", 0),
        "incidents": incidents,
        "pages": counters.get("pages", 0),
        "directives": counters.get("directives", 0),
        "live_directives": live_directives,
        "stopped": stopped,
        "left_out": left_out,
        "lag_s": lag_s,
        "lag_bytes": lag_bytes,
        "position": position,
        "windows": counters.get("windows", 0),
        "anomalies": counters.get("anomalies", 0),
        "decisions": counters.get("decisions", {}),
        "outcomes": counters.get("outcomes", {}),
        "watermark": counters.get("watermark", 0.0),
        "disabled_detectors": counters.get("disabled", {}),
    }


def router(
    runtime: Embedded, auth: Auth, watch: RunbookWatch | None = None, edge: Edge[Any] | None = None
) -> APIRouter:
    r = APIRouter()

    @r.get("/healthz", summary="200 while the process works; 500 when a thread of it has died")
    async def healthz() -> Response:
        if runtime.failure is not None:
            return json_response({"status": "failed", "why": str(runtime.failure)}, 500)
        return json_response({"status": "ok"})

    @r.get("/readyz", summary="200 while events are taken")
    async def readyz() -> Response:
        ready = runtime.ready and (edge is None or edge.ready())
        return json_response({"ready": ready}, 200 if ready else 503)

    @r.get("/metrics", summary="Prometheus metrics")
    async def metrics(request: Request) -> Response:  # from memory, and of roles that live on this loop
        auth.check(request, "read")
        return Response(exposition(runtime, edge), media_type="text/plain; version=0.0.4; charset=utf-8")

    @r.get("/v1/status", summary="Totals since the beginning")
    def get_status(request: Request) -> Response:
        auth.check(request, "read")
        return json_response(status(runtime, watch, edge))

    @r.get("/v1/directives", summary="Leases in force; ETag, If-None-Match, ?wait=SECONDS")
    async def directives(request: Request, wait: Annotated[float, Query(ge=0, le=60)] = 0.0) -> Response:
        auth.check(request, "enforce")
        # A proxy may have made our strong tag a weak one.
        known = request.headers.get("if-none-match", "").strip().removeprefix("W/")
        etag, live = await runtime.board.wait(known, wait) if known else runtime.board.read()
        if etag == known:
            return Response(status_code=304, headers={"ETag": etag})
        return json_response(
            [views.directive(d) for d in live], headers={"ETag": etag, "Cache-Control": "no-cache"}
        )

    @r.post("/v1/enforced", summary="What an enforcement point holds in force")
    async def enforced(request: Request, body: EnforcedBody) -> Response:
        auth.check(request, "enforce")
        report = Enforced(point=body.point, at=runtime.clock.now(), directives=body.directives)
        await asyncio.wrap_future(runtime.order(report))
        return json_response({"accepted": True}, 202)

    @r.get("/v1/dead-letters", summary="What could not be taken, newest first")
    def dead_letters(request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Response:
        auth.check(request, "admin")
        with runtime.reader.connect() as c:
            found = store.list_dead_letters(c, limit)
        for letter in found:
            if letter["body"] is not None:
                letter["body"] = base64.b64encode(letter["body"]).decode()
        return json_response(found)

    return r
